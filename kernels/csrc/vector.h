// One vector register of T, as compiler vectors: AVX-512, AVX, or whatever 16 bytes the target has (SSE, NEON).
// -DFASTMAF_SCALAR, or a compiler without vector types, makes a vector one number: the same kernels, no SIMD.
//
// Files that are compiled for several instruction sets give each a namespace of its own, FASTMAF_ISA.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
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
constexpr long round_up(long n, T multiple) {
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
inline Vec<T> load_part(const W* p, long count) {
  T buffer[kLanes<T>] = {};
  for (long i = 0; i < count; ++i) buffer[i] = widen(p[i]);
  return load(buffer);
}

template <class T>
inline void store_part(T* p, Vec<T> v, long count) {
  T buffer[kLanes<T>];
  store(buffer, v);
  for (long i = 0; i < count; ++i) p[i] = buffer[i];
}

// The same in one instruction: narrow stores before a wide load, and the other way round, make the processor wait.
#if defined(__AVX512F__) && !defined(FASTMAF_LANES_ARE_ONE)
template <>
inline Vec<float> load_part<float>(const float* p, long count) {
  return (Vec<float>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << std::clamp(count, 0L, 16L)) - 1), p);
}
template <>
inline void store_part(float* p, Vec<float> v, long count) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << std::clamp(count, 0L, 16L)) - 1), (__m512)v);
}
#elif defined(__AVX2__) && !defined(FASTMAF_LANES_ARE_ONE)
inline __m256i mask_of_first(long count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(std::clamp(count, 0L, 8L))), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
template <>
inline Vec<float> load_part<float>(const float* p, long count) {
  return (Vec<float>)_mm256_maskload_ps(p, mask_of_first(count));
}
template <>
inline void store_part(float* p, Vec<float> v, long count) {
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

template <class T>
inline Vec<T> square_root(Vec<T> v) {
  T buffer[kLanes<T>];
  store(buffer, v);
  for (int i = 0; i < kLanes<T>; ++i) buffer[i] = std::sqrt(buffer[i]);
  return load(buffer);
}

// m / (sqrt(v) * scale + eps). A square root and a division of a whole 64-byte vector take longer than all else in a step of Adam;
// approximations, each refined once, are right to a unit or two in the last place.
template <class T>
FASTMAF_INLINE Vec<T> over_root(Vec<T> m, Vec<T> v, T scale, T eps) {
#if defined(__AVX512F__) && !defined(FASTMAF_LANES_ARE_ONE)
  if constexpr (sizeof(T) == 4) {
    // What is smaller counts as the least normal number, and infinity as the largest; NaN stays NaN.
    const __m512 least = _mm512_set1_ps(std::numeric_limits<T>::min()), most = _mm512_set1_ps(std::numeric_limits<T>::max());
    const __m512 positive = _mm512_min_ps(most, _mm512_max_ps(least, (__m512)v));
    const Vec<T> r = (Vec<T>)_mm512_rsqrt14_ps(positive), s = (Vec<T>)positive * r;
    const Vec<T> d = (s + T(0.5) * s * (T(1) - s * r)) * scale + eps;
    const Vec<T> q = (Vec<T>)_mm512_rcp14_ps((__m512)d);
    return m * (q * (T(2) - d * q));
  }
#endif
  return m / (square_root<T>(v) * scale + eps);
}

// v = n ln 2 + r with |r| <= ln 2 / 2; ln 2 in two parts, of which the first times n is exact.
inline void reduce(Vec<float> v, Vec<float>& n, Vec<float>& r) {
  const Vec<float> to_integer = broadcast(12582912.0f);  // 1.5 * 2^23: what is added to it is rounded to an integer
  n = (v * 1.44269504f + to_integer) - to_integer;
  r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
}

inline Vec<float> power_of_two(Vec<float> n) {
#if defined(FASTMAF_LANES_ARE_ONE)
  const uint32_t bits = n == n ? (static_cast<uint32_t>(static_cast<int32_t>(n)) + 127) << 23 : 0;  // NaN is no integer
#else
  const IntVec<float> bits = (__builtin_convertvector(n, IntVec<float>) + 127) << 23;
#endif
  Vec<float> result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// e^r - 1 for |r| <= ln 2 / 2 by its Taylor series, whose first dropped term is below 1e-8 of the result.
inline Vec<float> small_expm1(Vec<float> r) {
  Vec<float> p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  return p * r * r + r;
}

// p 2^n
FASTMAF_INLINE Vec<float> scaled(Vec<float> p, Vec<float> n) {
#if defined(__AVX512F__) && !defined(FASTMAF_LANES_ARE_ONE)
  return (Vec<float>)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  // In two factors, as 2^128 and what is denormal are no float32 of that form.
  const Vec<float> to_integer = broadcast(12582912.0f);
  const Vec<float> half = (n * 0.5f + to_integer) - to_integer;
  return p * power_of_two(half) * power_of_two(n - half);
#endif
}

// a / b for b in 1 .. 2^30: an approximation, refined twice by its remainder, takes a third of the time of a division of 64 bytes.
FASTMAF_INLINE Vec<float> quotient(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__) && !defined(FASTMAF_LANES_ARE_ONE)
  Vec<float> q = (Vec<float>)_mm512_rcp14_ps((__m512)b);
  q += q * (1.0f - b * q);
  const Vec<float> result = a * q;
  return result + q * (a - result * b);
#else
  return a / b;
#endif
}

// v / s. Not by a rounded 1 / s alone: all results would err to the same side, and sums of them by as much.
template <class T>
FASTMAF_INLINE Vec<T> over(Vec<T> v, T s) {
#if defined(__AVX512F__) && !defined(FASTMAF_LANES_ARE_ONE)
  const T inverse = 1 / s;
  const Vec<T> q = v * inverse;
  return q + (v - q * s) * inverse;
#else
  return v / s;
#endif
}

FASTMAF_INLINE Vec<float> exponential(Vec<float> v) {
  v = (v > 89.0f) ? broadcast(89.0f) : v;  // the result is infinite or zero beyond; NaN stays NaN
  v = (v < -104.0f) ? broadcast(-104.0f) : v;
  Vec<float> n, r;
  reduce(v, n, r);
  return scaled(small_expm1(r) + 1.0f, n);
}

// tanh v = e / (e + 2) with e = e^2v - 1, formed without cancellation near zero.
FASTMAF_INLINE Vec<float> hyperbolic_tangent(Vec<float> v) {
  v = (v > 10.0f) ? broadcast(10.0f) : v;  // 1 beyond, to the last bit; NaN stays NaN
  v = (v < -10.0f) ? broadcast(-10.0f) : v;
  Vec<float> n, r;
  reduce(v + v, n, r);
  const Vec<float> scale = scaled(broadcast(1.0f), n), e = scale * small_expm1(r) + (scale - 1.0f);
  return quotient(e, e + 2.0f);
}

inline Vec<double> exponential(Vec<double> v) {
  double buffer[kLanes<double>];
  store(buffer, v);
  for (int i = 0; i < kLanes<double>; ++i) buffer[i] = std::exp(buffer[i]);
  return load(buffer);
}

inline Vec<double> hyperbolic_tangent(Vec<double> v) {
  double buffer[kLanes<double>];
  store(buffer, v);
  for (int i = 0; i < kLanes<double>; ++i) buffer[i] = std::tanh(buffer[i]);
  return load(buffer);
}

inline Vec<double> logarithm(Vec<double> v) {
  double buffer[kLanes<double>];
  store(buffer, v);
  for (int i = 0; i < kLanes<double>; ++i) buffer[i] = std::log(buffer[i]);
  return load(buffer);
}

// Of a normal positive number 2^n m with m in [sqrt(1/2), sqrt(2)): n log 2 + 2 artanh((m - 1) / (m + 1)), by artanh's series, whose
// first dropped term is below 1e-9 of the result.
inline Vec<float> logarithm(Vec<float> v) {
  IntVec<float> bits;
  std::memcpy(&bits, &v, sizeof bits);
  const IntVec<float> n = (bits - 0x3f3504f3) >> 23;
  bits -= n * (1 << 23);  // n may be negative
  Vec<float> m;
  std::memcpy(&m, &bits, sizeof m);
  const Vec<float> s = (m - 1.0f) / (m + 1.0f), z = s * s;
  Vec<float> p = z * (1.0f / 9) + 1.0f / 7;
  p = p * z + 1.0f / 5;
  p = p * z + 1.0f / 3;
#if defined(FASTMAF_LANES_ARE_ONE)
  const float exponent = static_cast<float>(n);
#else
  const Vec<float> exponent = __builtin_convertvector(n, Vec<float>);
#endif
  const Vec<float> small = p * z * s * 2.0f + exponent * -2.12194440e-4f;
  const Vec<float> result = exponent * 0.693359375f + (s * 2.0f + small);
  return (v > 0.0f) ? ((v > 3e38f) ? v : result) : v + std::numeric_limits<float>::quiet_NaN() * 0.0f;
}

// 1 - e^-v
template <class T>
inline Vec<T> minus_expm1(Vec<T> v) {
  T buffer[kLanes<T>];
  store(buffer, v);
  for (int i = 0; i < kLanes<T>; ++i) buffer[i] = -std::expm1(-buffer[i]);
  return load(buffer);
}

template <class T>
inline Vec<T> absolute(Vec<T> v) {
  return (v < Vec<T>{}) ? -v : v;
}

// log(1 + e^v), to the last bits for v far below zero as well.
template <class T>
inline Vec<T> softplus(Vec<T> v) {
  const Vec<T> t = exponential(-absolute<T>(v)), sum = t + T(1);
  // The rounding of 1 + t is made good: log(1 + t) = log(sum) + (t - (sum - 1)) / sum.
  return ((v > Vec<T>{}) ? v : Vec<T>{}) + logarithm(sum) + (t - (sum - T(1))) / sum;
}

// 1 / (1 + e^-v)
template <class T>
inline Vec<T> logistic(Vec<T> v) {
  const Vec<T> t = exponential(-absolute<T>(v));
  return ((v > Vec<T>{}) ? broadcast(T(1)) : t) / (t + T(1));
}

// Zero in the lanes behind the first `count`.
template <class T>
FASTMAF_INLINE Vec<T> first_lanes(Vec<T> v, long count) {
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
FASTMAF_INLINE T lane_sum(Vec<T> v, long count) {
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
