// Uniform random numbers that depend on a seed and on their index alone, so that threads, chunks and CPUs do not change them.
//
// SplitMix64 (Steele, Lea and Flood 2014, Fast splittable pseudorandom number generators), whose state is the seed plus the index
// times a constant: number i is computed without those before it.
#include <cstdint>

namespace {

uint64_t at(uint64_t seed, uint64_t first, int64_t i) {
  uint64_t z = seed + (first + static_cast<uint64_t>(i) + 1) * 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

}  // namespace

extern "C" {
#pragma GCC visibility push(default)

// Writes `count` numbers of [-bound, bound) in steps of bound / 2^23; the first has the index `first`. The product is the only
// operation that rounds.
void fastmaf_uniform_float(float* numbers, int64_t count, uint64_t seed, uint64_t first, double bound) {
  const float scale = static_cast<float>(bound) / (1 << 23);
  for (int64_t i = 0; i < count; ++i)
    numbers[i] = static_cast<float>(static_cast<int32_t>(at(seed, first, i) >> 40) - (1 << 23)) * scale;
}

// The same in steps of bound / 2^52.
void fastmaf_uniform_double(double* numbers, int64_t count, uint64_t seed, uint64_t first, double bound) {
  const double scale = bound / (int64_t{1} << 52);
  for (int64_t i = 0; i < count; ++i)
    numbers[i] = static_cast<double>(static_cast<int64_t>(at(seed, first, i) >> 11) - (int64_t{1} << 52)) * scale;
}

#pragma GCC visibility pop
}  // extern "C"
