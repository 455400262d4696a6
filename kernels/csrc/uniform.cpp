// Uniform random numbers for packed weights. Each depends on a seed and on its place among the visible weights alone, so that threads,
// parts, panels and CPUs do not change it.
//
// SplitMix64 (Steele, Lea and Flood 2014, Fast splittable pseudorandom number generators), whose state is the seed plus the index
// times a constant: number i is computed without those before it. The 16 rows of a panel are 16 sequences side by side.
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <new>

#include "api.h"
#include "rows.h"

extern "C" const char* fastmaf_used_isa();

namespace fastmaf {
namespace {

#define FASTMAF_INLINE inline __attribute__((always_inline))

constexpr uint64_t kStep = 0x9E3779B97F4A7C15u;
constexpr int64_t kLanes = 8;  // 64-bit numbers of a register of AVX-512; elsewhere the compiler takes vectors apart
typedef uint64_t States __attribute__((vector_size(64)));
typedef int64_t Integers __attribute__((vector_size(64)));
template <class T>
struct Numbers {
  typedef T type __attribute__((vector_size(kLanes * sizeof(T))));
};

// Writes numbers of [-bound, bound): the upper 24 or 53 bits of what the generator returns for these states, less half of their range,
// in steps of `step`. The product is the only operation that rounds.
template <class T>
FASTMAF_INLINE void write(const States& state, T step, T* to) {
  States z = state;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  if constexpr (sizeof(T) == 8) z ^= z >> 31;  // does not reach the upper 24 bits
  constexpr int kBits = sizeof(T) == 8 ? 53 : 24;
  const Integers integers = (Integers)(z >> (64 - kBits)) - (int64_t{1} << (kBits - 1));
  const auto numbers = __builtin_convertvector(integers, typename Numbers<T>::type) * step;
  std::memcpy(to, &numbers, sizeof numbers);
}

template <class T>
FASTMAF_INLINE void fill(T* weight, const int64_t* prefix, const int64_t* panels, int64_t out_features, const Part& part, uint64_t seed,
                         T step) {
  uint64_t index = static_cast<uint64_t>(part.number);
  for (int64_t p = part.first; p < part.last; ++p) {
    const Rows r(prefix, out_features, p);
    States state[kPanel / kLanes];
    for (int64_t j = 0; j < kPanel; ++j) state[j / kLanes][j % kLanes] = seed + (index + static_cast<uint64_t>(r.begin[j]) + 1) * kStep;
    T* column = weight + kPanel * panels[p];
    for (int64_t k = 0; k < panels[p + 1] - panels[p]; ++k, column += kPanel) {
      for (int64_t g = 0; g < kPanel / kLanes; ++g) {
        write(state[g], step, column + g * kLanes);
        state[g] += kStep;
      }
      if (k >= r.common)
        for (int64_t j = 0; j < kPanel; ++j)
          if (k >= r.sees[j]) column[j] = 0;
    }
    index += static_cast<uint64_t>(r.numbers);
  }
}

#if defined(__x86_64__)
template <class T>
__attribute__((target("avx512f,avx512dq"))) void fill_avx512(T* weight, const int64_t* prefix, const int64_t* panels,
                                                             int64_t out_features, const Part& part, uint64_t seed, T step) {
  fill(weight, prefix, panels, out_features, part, seed, step);
}
#endif

template <class T>
int uniform(T* weight, const int64_t* prefix, const int64_t* panels, int64_t out_features, int64_t panel_count, uint64_t seed, T step,
            int64_t threads) {
  [[maybe_unused]] const bool has_avx512 = std::strncmp(fastmaf_used_isa(), "avx512", 6) == 0;
  try {
    each_part(prefix, panels, out_features, panel_count, sizeof(T), threads, [&](const Part& part) {
#if defined(__x86_64__)
      if (has_avx512) return fill_avx512(weight, prefix, panels, out_features, part, seed, step);
#endif
      fill(weight, prefix, panels, out_features, part, seed, step);
    });
  } catch (const std::bad_alloc&) {
    return -ENOMEM;
  }
  return 0;
}

}  // namespace

// Fills a packed weight with numbers of [-bound, bound) in steps of bound / 2^23, and its padding with zeros. Returns 0, or the negative
// of an errno.
FASTMAF_EXPORT int fastmaf_uniform_float(float* weight, const int64_t* prefix, const int64_t* panels, int64_t out_features,
                                         int64_t panel_count, uint64_t seed, double bound, int64_t threads) {
  return uniform(weight, prefix, panels, out_features, panel_count, seed, static_cast<float>(bound) / (1 << 23), threads);
}

// The same in steps of bound / 2^52.
FASTMAF_EXPORT int fastmaf_uniform_double(double* weight, const int64_t* prefix, const int64_t* panels, int64_t out_features,
                                          int64_t panel_count, uint64_t seed, double bound, int64_t threads) {
  return uniform(weight, prefix, panels, out_features, panel_count, seed, bound / (int64_t{1} << 52), threads);
}

}  // namespace fastmaf
