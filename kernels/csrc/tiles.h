// Samples in tiles: what passes from layer to layer lies as [tile][unit][samples of the tile], so that a layer reads it as it is, and an
// element-wise map has whole vectors.
//
// Few samples make nearly equal tiles of as many as the registers hold the sums of, a vector of rows for each. Many make tiles of 16, of
// which the last may have samples that count for nothing: then a vector holds numbers of samples.
#pragma once

#include "panels.h"

namespace fastmaf {
namespace FASTMAF_ISA {

inline constexpr int64_t kWide = 16;  // samples of a wide tile
inline constexpr int64_t kMostNarrow = kMostOuter<2>;

// 0..n in parts of nearly equal size, none larger than `most`.
struct Split {
  int64_t n, count;
  Split(int64_t n, int64_t most) : n(n), count(std::max<int64_t>(1, (n + most - 1) / most)) {}
  int64_t begin(int64_t i) const { return n / count * i + std::min(i, n % count); }
  int64_t size(int64_t i) const { return n / count + (i < n % count); }
};

class Tiles {
 public:
  // Wide where at most a fifth of the vectors' lanes is lost to the last tile.
  explicit Tiles(int64_t n) : Tiles(n, n > 8 && round_up(n, kWide) * 5 <= n * 6) {}
  Tiles(int64_t n, bool wide) : n(n), wide(wide), count(wide ? (n + kWide - 1) / kWide : Split(n, kMostNarrow).count) {}

  const int64_t n;
  const bool wide;
  const int64_t count;

  int64_t begin(int64_t t) const { return wide ? t * kWide : Split(n, kMostNarrow).begin(t); }
  // Samples of a tile, and how many it has room for.
  int64_t used(int64_t t) const { return wide ? std::min(kWide, n - t * kWide) : Split(n, kMostNarrow).size(t); }
  int64_t size(int64_t t) const { return wide ? kWide : used(t); }
  // Numbers of all tiles, and before a tile, of so many units.
  int64_t numel(int64_t units) const { return (wide ? count * kWide : n) * units; }
  int64_t offset(int64_t t, int64_t units) const { return begin(t) * units; }
};

// Number i of a unit in wide tiles: of sample i, in lane i % 16 of tile i / 16.
template <class T>
T* in_tile(T* tiles, int64_t i, int64_t unit, int64_t units) {
  return tiles + (i / kWide * units + unit) * kWide + i % kWide;
}

// Units k0..k1 of a tile [unit][size] from rows of samples, x [used][stride]. Unit k goes to place order[k] (null: k).
template <class T, class Order>
void fill_tile(const T* x, int64_t stride, int64_t used, int64_t size, int64_t k0, int64_t k1, const Order& order, T* tile) {
  constexpr int64_t L = kLanes<T>;
  if (size == 1) {
    if (order)
      for (int64_t k = k0; k < k1; ++k) tile[order[k]] = x[k];
    else
      std::copy(x + k0, x + k1, tile + k0);
    return;
  }
  for (int64_t k = k0; k < k1; k += L)
    for (int64_t s = 0; s < size; s += L) {
      const int64_t units = std::min(L, k1 - k);
      Vec<T> block[L];
      for (int64_t i = 0; i < L; ++i) {
        const T* from = x + (s + i) * stride + k;
        block[i] = s + i >= used ? Vec<T>{} : units == L ? load(from) : load_part<T>(from, units);
      }
      transpose<T>(block);
      const int64_t count = std::min(L, size - s);
      for (int64_t j = 0; j < units; ++j) {
        T* to = tile + (order ? order[k + j] : k + j) * size + s;
        count == L ? store(to, block[j]) : store_part(to, block[j], count);
      }
    }
}

// The way back: x [used][stride], units k0..k1, of which unit k lies at place order[k] (null: k) of the tile.
template <class T, class Order>
void give_tile(const T* tile, int64_t used, int64_t size, int64_t k0, int64_t k1, const Order& order, T* x, int64_t stride) {
  constexpr int64_t L = kLanes<T>;
  if (size == 1) {
    if (order)
      for (int64_t k = k0; k < k1; ++k) x[k] = tile[order[k]];
    else
      std::copy(tile + k0, tile + k1, x + k0);
    return;
  }
  for (int64_t k = k0; k < k1; k += L)
    for (int64_t s = 0; s < used; s += L) {
      const int64_t units = std::min(L, k1 - k), count = std::min(L, size - s);
      Vec<T> block[L];
      for (int64_t j = 0; j < L; ++j) {
        const T* from = tile + (order ? order[k + std::min(j, units - 1)] : k + std::min(j, units - 1)) * size + s;
        block[j] = count == L ? load(from) : load_part<T>(from, count);
      }
      transpose<T>(block);
      for (int64_t i = 0; i < std::min(L, used - s); ++i) {
        T* to = x + (s + i) * stride + k;
        units == L ? store(to, block[i]) : store_part(to, block[i], units);
      }
    }
}

// Adds what each sample has of its own, terms [n][units] of all tiles, to sums of rows row..row+rows of tile t: c as `products` lays it out.
// Null: nothing.
template <class T>
void add_terms(const Tiles& tiles, int64_t t, const T* terms, int64_t units, int64_t row, int64_t rows, T* c, int64_t c_rows) {
  constexpr int64_t L = kLanes<T>, kRun = 64;
  if (terms == nullptr) return;
  const T* from = terms + tiles.begin(t) * units + row;
  rows = std::min(rows, units - row);
  if (tiles.wide) {
    T tile[kRun * kWide];
    for (int64_t r = 0; r < rows; r += kRun) {
      const int64_t count = std::min(kRun, rows - r);
      fill_tile(from + r, units, tiles.used(t), kWide, 0, count, static_cast<const int64_t*>(nullptr), tile);
      T* to = c + r * kWide;
      for (int64_t i = 0; i < count * kWide; i += L) store(to + i, load(to + i) + load(tile + i));
    }
    return;
  }
  for (int64_t s = 0; s < tiles.size(t); ++s)
    for (int64_t r = 0; r < rows; ++r) c[s * c_rows + r] += from[s * units + r];
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
