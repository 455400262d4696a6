// The element-wise map of an affine layer, on vectors; see kernels/affine_output/affine_map.py for the equations.
#pragma once

#include "api.h"
#include "functions.h"

namespace fastmaf {
namespace FASTMAF_ISA {

// The softplus of torch, which is its argument above this.
constexpr int kThreshold = 20;

template <class T>
FASTMAF_INLINE Vec<T> softplus_of_torch(Vec<T> u) {
  return (u > broadcast(T(kThreshold))) ? u : softplus<T>(u);
}

// The log-scale of a raw output.
template <class T>
FASTMAF_INLINE Vec<T> log_scale_of(Vec<T> u, const AffineMap& map) {
  const T limit = static_cast<T>(map.limit), epsilon = static_cast<T>(map.epsilon);
  if (map.scale == kSoftplus) {
    if (epsilon > 0) return logarithm(softplus_of_torch<T>(u) + epsilon);
    // The softplus is e^u below, of which there is no logarithm where it is denormal.
    const Vec<T> least = broadcast(T(-40));
    return (u < least) ? u : logarithm(softplus_of_torch<T>((u < least) ? least : u));
  }
  if (map.scale == kSigmoid) return epsilon > 0 ? logarithm(logistic<T>(u + limit) + epsilon) : -softplus<T>(-(u + limit));
  if (std::isinf(map.limit)) return u;
  if (map.scale == kTanh) {
    // tanh 20 is 1 to the last bit. `over` makes NaN of a quotient beyond the largest number.
    const Vec<T> most = broadcast(T(20) * limit);
    u = (u > most) ? most : u;  // NaN stays NaN
    u = (u < -most) ? -most : u;
    return limit * hyperbolic_tangent(over<T>(u, limit));
  }
  if (map.scale == kSoftClip) {
    const Vec<T> a = u / (absolute<T>(u) / limit + T(1));
    const Vec<T> bound = broadcast(limit);
    return (absolute<T>(u) > std::numeric_limits<T>::max()) ? ((u > Vec<T>{}) ? bound : -bound) : a;
  }
  u = (u > limit) ? broadcast(limit) : u;  // NaN stays NaN
  return (u < -limit) ? broadcast(-limit) : u;
}

// d log_scale / d raw, as a function of the log-scale.
template <class T>
FASTMAF_INLINE Vec<T> slope_of(Vec<T> a, const AffineMap& map) {
  const Vec<T> one = broadcast(T(1)), zero = broadcast(T(0));
  const T limit = static_cast<T>(map.limit), epsilon = static_cast<T>(map.epsilon);
  if (map.scale == kSoftplus || map.scale == kSigmoid) {
    const Vec<T> s = exponential(a), p = s - epsilon;
    if (map.scale == kSoftplus) {
      const Vec<T> of_softplus = (p > broadcast(T(kThreshold))) ? one : minus_expm1<T>(p);
      return (s > zero) ? of_softplus / s : one;
    }
    return epsilon > 0 ? p * (one - p) / s : minus_expm1<T>(-a);
  }
  if (std::isinf(map.limit)) return one;
  if (map.scale == kTanh) return one - over<T>(a, limit) * over<T>(a, limit);
  if (map.scale == kSoftClip) {
    const Vec<T> rest = one - absolute<T>(a) / limit;
    return rest * rest;
  }
  return (a < limit) ? ((a > -limit) ? one : zero) : zero;
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
