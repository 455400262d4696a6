// One vector register of T, as compiler vectors: AVX-512, AVX, or whatever 16 bytes the target has (SSE, NEON).
// -DFASTMAF_SCALAR, or a compiler without vector types, makes a vector one number: the same kernels, no SIMD.
//
// Files that are compiled for several instruction sets give each a namespace of its own, FASTMAF_ISA.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if !defined(FASTMAF_ISA)
#define FASTMAF_ISA baseline
#endif

namespace fastmaf {
namespace FASTMAF_ISA {

// A weight stored in 16 bits: the upper half of a float32.
struct bfloat16 {
  uint16_t bits;
};

#if defined(FASTMAF_SCALAR) || !defined(__GNUC__)
#define FASTMAF_LANES_ARE_ONE 1
template <class T>
using Vec = T;
template <class T>
using IntVec = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
template <class T>
inline constexpr int kLanes = 1;
#else
#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif
template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> integer;
  typedef integer int_type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
using IntVec = typename VecOf<T>::int_type;
template <class T>
inline constexpr int kLanes = kVectorBytes / sizeof(T);
#endif

// AVX-512 and NEON have 32 vector registers, the others 16.
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kRegisters = 32;
#else
inline constexpr int kRegisters = 16;
#endif

#if defined(__GNUC__)
#define FASTMAF_INLINE inline __attribute__((always_inline))
#define FASTMAF_INLINE_LAMBDA __attribute__((always_inline))
#else
#define FASTMAF_INLINE inline
#define FASTMAF_INLINE_LAMBDA
#endif

template <class T>
constexpr int64_t round_up(int64_t n, T multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// A macro: GCC takes a function that does nothing else for one without effects, and may drop its calls.
#if defined(__GNUC__)
#define FASTMAF_PREFETCH(address) __builtin_prefetch(address, 0, 3)
#else
#define FASTMAF_PREFETCH(address) ((void)(address))
#endif
inline float widen(bfloat16 w) {
  const uint32_t bits = static_cast<uint32_t>(w.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}
inline float widen(float w) { return w; }
inline double widen(double w) { return w; }

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vec<float> load(const bfloat16* p) {
#if defined(FASTMAF_LANES_ARE_ONE)
  return widen(*p);
#else
  typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
  Halves half;
  std::memcpy(&half, p, sizeof half);
  const Words bits = __builtin_convertvector(half, Words) << 16;
  Vec<float> v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
#endif
}

template <class T>
inline void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

// The first `count` numbers, zeros behind them; reads nothing else.
template <class T, class W>
inline Vec<T> load_part(const W* p, int64_t count) {
  T buffer[kLanes<T>] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = widen(p[i]);
  return load(buffer);
}

template <class T>
inline void store_part(T* p, Vec<T> v, int64_t count) {
  T buffer[kLanes<T>];
  store(buffer, v);
  for (int64_t i = 0; i < count; ++i) p[i] = buffer[i];
}

// The same in one instruction: narrow stores before a wide load, and the other way round, make the processor wait.
#if defined(__AVX512F__) && !defined(FASTMAF_LANES_ARE_ONE)
template <>
inline Vec<float> load_part<float>(const float* p, int64_t count) {
  return (Vec<float>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, 16)) - 1), p);
}
template <>
inline void store_part(float* p, Vec<float> v, int64_t count) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, 16)) - 1), (__m512)v);
}
#elif defined(__AVX2__) && !defined(FASTMAF_LANES_ARE_ONE)
inline __m256i mask_of_first(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(std::clamp<int64_t>(count, 0, 8))),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
template <>
inline Vec<float> load_part<float>(const float* p, int64_t count) {
  return (Vec<float>)_mm256_maskload_ps(p, mask_of_first(count));
}
template <>
inline void store_part(float* p, Vec<float> v, int64_t count) {
  _mm256_maskstore_ps(p, mask_of_first(count), (__m256)v);
}
#endif

template <class T>
inline Vec<T> broadcast(T s) {
  return s - Vec<T>{};  // not 0 + s: for s = -0 that is another number, so it would be computed
}

// Two numbers by turns.
inline Vec<float> broadcast_pair(const float* p) {
#if defined(FASTMAF_LANES_ARE_ONE)
  return *p;
#else
  typedef int64_t Longs __attribute__((vector_size(kVectorBytes)));
  int64_t both;
  std::memcpy(&both, p, sizeof both);
  return (Vec<float>)(Longs{} + both);
#endif
}

// Zero in the lanes behind the first `count`.
template <class T>
FASTMAF_INLINE Vec<T> first_lanes(Vec<T> v, int64_t count) {
#if defined(FASTMAF_LANES_ARE_ONE)
  return count > 0 ? v : T(0);
#else
  IntVec<T> lane;
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
  return (lane < IntVec<T>{} + static_cast<typename VecOf<T>::integer>(count)) ? v : Vec<T>{};
#endif
}

// The sum of the first `count` lanes, in pairs.
template <class T>
FASTMAF_INLINE T lane_sum(Vec<T> v, int64_t count) {
#if defined(FASTMAF_LANES_ARE_ONE)
  return count > 0 ? v : T(0);
#else
  if (count < kLanes<T>) v = first_lanes<T>(v, count);
#if defined(__clang__)
  T buffer[kLanes<T>];
  store(buffer, v);
  for (int width = kLanes<T> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) buffer[i] += buffer[i + width];
  return buffer[0];
#else
  IntVec<T> lane;
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
#pragma GCC unroll 4
  for (int width = kLanes<T> / 2; width > 0; width /= 2) v += __builtin_shuffle(v, lane ^ width);
  return v[0];
#endif
#endif
}

// Two vectors of pairs: their first and their second numbers.
template <class T>
inline void unzip(Vec<T> low, Vec<T> high, Vec<T>& first, Vec<T>& second) {
#if defined(FASTMAF_LANES_ARE_ONE)
  first = low, second = high;
#elif defined(__clang__) || !defined(__GNUC__)
  T pairs[2 * kLanes<T>], firsts[kLanes<T>], seconds[kLanes<T>];
  store(pairs, low), store(pairs + kLanes<T>, high);
  for (int i = 0; i < kLanes<T>; ++i) firsts[i] = pairs[2 * i], seconds[i] = pairs[2 * i + 1];
  first = load(firsts), second = load(seconds);
#else
  IntVec<T> even;
  for (int i = 0; i < kLanes<T>; ++i) even[i] = 2 * i;
  first = __builtin_shuffle(low, high, even);
  second = __builtin_shuffle(low, high, even + 1);
#endif
}

// The way back.
template <class T>
FASTMAF_INLINE void zip(Vec<T> first, Vec<T> second, Vec<T>& low, Vec<T>& high) {
#if defined(FASTMAF_LANES_ARE_ONE)
  low = first, high = second;
#elif defined(__clang__) || !defined(__GNUC__)
  T firsts[kLanes<T>], seconds[kLanes<T>], pairs[2 * kLanes<T>];
  store(firsts, first), store(seconds, second);
  for (int i = 0; i < kLanes<T>; ++i) pairs[2 * i] = firsts[i], pairs[2 * i + 1] = seconds[i];
  low = load(pairs), high = load(pairs + kLanes<T>);
#else
  IntVec<T> lane;
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i / 2 + i % 2 * kLanes<T>;
  low = __builtin_shuffle(first, second, lane);
  high = __builtin_shuffle(first, second, lane + kLanes<T> / 2);
#endif
}

template <class T>
inline void zip(Vec<T> first, Vec<T> second, T* to) {
  Vec<T> low, high;
  zip<T>(first, second, low, high);
  store(to, low), store(to + kLanes<T>, high);
}

// The transpose of L vectors, L = kLanes, in place. As many times as L has bits, the vectors of the upper half are dealt between those of
// the lower one.
template <class T>
FASTMAF_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  constexpr int L = kLanes<T>;
#pragma GCC unroll 4
  for (int bits = L; bits > 1; bits /= 2) {
    Vec<T> dealt[L];
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; ++i) zip<T>(rows[i], rows[i + L / 2], dealt[2 * i], dealt[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) rows[i] = dealt[i];
  }
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
