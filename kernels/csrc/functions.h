// Elementary functions of vectors, to a unit or two in the last place.
#pragma once

#include <cmath>
#include <limits>

#include "vector.h"

namespace fastmaf {
namespace FASTMAF_ISA {

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
  return (v > 0.0f) ? ((v > std::numeric_limits<float>::max()) ? v : result) : v + std::numeric_limits<float>::quiet_NaN() * 0.0f;
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

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
