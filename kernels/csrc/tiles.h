// Samples in tiles: what passes from layer to layer lies as [tile][unit][samples of the tile], so that a layer reads it as it is, and an
// element-wise map has whole vectors.
//
// Few samples make nearly equal tiles of as many as the registers hold the sums of, a vector of rows for each. Many make tiles of 16, of
// which the last may have samples that count for nothing: then a vector holds numbers of samples.
#pragma once

#include "panels.h"

namespace fastmaf {
namespace FASTMAF_ISA {

inline constexpr long kWide = 16;  // samples of a wide tile
inline constexpr long kMostNarrow = kMostOuter<2>;

// 0..n in parts of nearly equal size, none larger than `most`.
struct Split {
  long n, count;
  Split(long n, long most) : n(n), count(std::max(1L, (n + most - 1) / most)) {}
  long begin(long i) const { return n / count * i + std::min(i, n % count); }
  long size(long i) const { return n / count + (i < n % count); }
};

class Tiles {
 public:
  // Wide where at most a fifth of the vectors' lanes is lost to the last tile.
  explicit Tiles(long n) : Tiles(n, n > 8 && round_up(n, kWide) * 5 <= n * 6) {}
  Tiles(long n, bool wide) : n(n), wide(wide), count(wide ? (n + kWide - 1) / kWide : Split(n, kMostNarrow).count) {}

  const long n;
  const bool wide;
  const long count;

  long begin(long t) const { return wide ? t * kWide : Split(n, kMostNarrow).begin(t); }
  // Samples of a tile, and how many it has room for.
  long used(long t) const { return wide ? std::min(kWide, n - t * kWide) : Split(n, kMostNarrow).size(t); }
  long size(long t) const { return wide ? kWide : used(t); }
  // Numbers of all tiles, and before a tile, of so many units.
  long numel(long units) const { return (wide ? count * kWide : n) * units; }
  long offset(long t, long units) const { return begin(t) * units; }
};

// Units k0..k1 of a tile [unit][size] from rows of samples, x [used][stride]. Unit k goes to place order[k] (null: k).
template <class T, class Order>
void fill_tile(const T* x, long stride, long used, long size, long k0, long k1, const Order& order, T* tile) {
  constexpr long L = kLanes<T>;
  if (size == 1) {
    if (order)
      for (long k = k0; k < k1; ++k) tile[order[k]] = x[k];
    else
      std::copy(x + k0, x + k1, tile + k0);
    return;
  }
  for (long k = k0; k < k1; k += L)
    for (long s = 0; s < size; s += L) {
      const long units = std::min(L, k1 - k);
      Vec<T> block[L];
      for (long i = 0; i < L; ++i) {
        const T* from = x + (s + i) * stride + k;
        block[i] = s + i >= used ? Vec<T>{} : units == L ? load(from) : load_part<T>(from, units);
      }
      transpose<T>(block);
      const long count = std::min(L, size - s);
      for (long j = 0; j < units; ++j) {
        T* to = tile + (order ? order[k + j] : k + j) * size + s;
        count == L ? store(to, block[j]) : store_part(to, block[j], count);
      }
    }
}

// The way back: x [used][stride], units k0..k1, of which unit k lies at place order[k] (null: k) of the tile.
template <class T, class Order>
void give_tile(const T* tile, long used, long size, long k0, long k1, const Order& order, T* x, long stride) {
  constexpr long L = kLanes<T>;
  if (size == 1) {
    if (order)
      for (long k = k0; k < k1; ++k) x[k] = tile[order[k]];
    else
      std::copy(tile + k0, tile + k1, x + k0);
    return;
  }
  for (long k = k0; k < k1; k += L)
    for (long s = 0; s < used; s += L) {
      const long units = std::min(L, k1 - k), count = std::min(L, size - s);
      Vec<T> block[L];
      for (long j = 0; j < L; ++j) {
        const T* from = tile + (order ? order[k + std::min(j, units - 1)] : k + std::min(j, units - 1)) * size + s;
        block[j] = count == L ? load(from) : load_part<T>(from, count);
      }
      transpose<T>(block);
      for (long i = 0; i < std::min(L, used - s); ++i) {
        T* to = x + (s + i) * stride + k;
        units == L ? store(to, block[i]) : store_part(to, block[i], units);
      }
    }
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
