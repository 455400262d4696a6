// How the activations of a tile of samples are laid out for products with a packed weight, and where the products go.
#pragma once

#include "packed.h"

namespace fastmaf {

inline constexpr long kDotSamples = 8;
inline constexpr long kTileSamples = 64;  // more are done in turns: their activations would not stay in cache

// Columns that are taken together, so that their activations stay in the first-level cache.
inline constexpr long kDotColumns = 512;
inline constexpr long kOuterColumns = 256;

// How the activations of up to kTileSamples samples are laid out. Dot: [block of kDotColumns columns][n][kDotStride].
// Outer: [panel of two vectors of samples][k][kPanel]. A block or panel is what passes through the first-level cache at once.
struct Shape {
  long samples, padded;  // padded: to whole vectors
  bool dot;
  template <class T>
  static Shape of(long samples) {
    return {samples, round_up(samples, kLanes<T>), samples <= kDotSamples};
  }
};

template <class T>
inline constexpr long kPanel = 2 * kLanes<T>;

// Known when compiling, so that one register addresses all samples; no power of two, which would put all of them into one
// set of the cache.
inline constexpr long kDotStride = kDotColumns + 16;

// Activations of one tile of samples, units 0..count.
template <class T>
struct Activations {
  T* data;
  long ld;  // from block to block (dot), or from panel to panel (outer)
  Shape shape;

  static long numel(long count, Shape shape) {
    const Activations a = over(nullptr, count, shape);
    return a.ld * (shape.dot ? round_up(count, kDotColumns) / kDotColumns : round_up(shape.samples, kPanel<T>) / kPanel<T>);
  }
  static Activations over(T* memory, long count, Shape shape) {
    return {memory, shape.dot ? shape.samples * kDotStride : count * kPanel<T> + 16, shape};
  }
  T& at(long n, long k) const {
    return shape.dot ? data[k / kDotColumns * ld + n * kDotStride + k % kDotColumns]
                     : data[n / kPanel<T> * ld + k * kPanel<T> + n % kPanel<T>];
  }

  // Takes columns begin..end of x [samples][stride].
  void fill(const T* x, long stride, long begin, long end) const {
    if (shape.dot) {
      for (long k0 = begin, k1; k0 < end; k0 = k1) {
        k1 = std::min(k0 / kDotColumns * kDotColumns + kDotColumns, end);
        for (long n = 0; n < shape.samples; ++n)
          std::memcpy(&at(n, k0), x + n * stride + k0, (k1 - k0) * sizeof(T));
      }
      return;
    }
    constexpr long P = kPanel<T>, kBlock = 16;  // rows that one pass over the samples writes
    for (long n0 = 0; n0 < shape.samples; n0 += P) {
      T* panel = data + n0 / P * ld;
      const long count = std::min(P, shape.samples - n0);
      for (long k0 = begin; k0 < end; k0 += kBlock) {
        const long k1 = std::min(k0 + kBlock, end);
        for (long n = 0; n < count; ++n)
          for (long k = k0; k < k1; ++k) panel[k * P + n] = x[(n0 + n) * stride + k];
        for (long k = k0; k < k1; ++k)
          for (long n = count; n < P; ++n) panel[k * P + n] = 0;
      }
    }
  }
};

// Where a product goes: row r of sample n at data[r * row + n * sample]. The outer form needs sample == 1.
template <class T>
struct Product {
  T* data;
  long row, sample;
  Product from(long r) const { return {data + r * row, row, sample}; }
};

}  // namespace fastmaf
