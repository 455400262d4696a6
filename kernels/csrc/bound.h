// Bounds on log-scales, on vectors.
#pragma once

#include <cmath>

#include "kernels.h"
#include "simd.h"

namespace fastmaf {

template <class T>
inline Vec<T> bound_log_scale(Vec<T> u, const Bound& b) {
  if (std::isinf(b.bound)) return u;
  const T limit = static_cast<T>(b.bound);
  if (b.soft) return limit * hyperbolic_tangent(u / limit);
  u = (u > limit) ? broadcast(limit) : u;  // NaN stays NaN
  return (u < -limit) ? broadcast(-limit) : u;
}

// d log_scale / du as a function of the bounded value.
template <class T>
inline Vec<T> bound_slope(Vec<T> a, const Bound& b) {
  const Vec<T> one = broadcast(T(1)), zero = broadcast(T(0));
  if (std::isinf(b.bound)) return one;
  const T limit = static_cast<T>(b.bound);
  if (b.soft) return one - (a / limit) * (a / limit);
  return (a < limit) ? ((a > -limit) ? one : zero) : zero;
}

}  // namespace fastmaf
