// The element-wise map of an output layer, and its inverse, on the products of some of its rows.
#pragma once

#include "affine_map.h"
#include "tiles.h"

namespace fastmaf {
namespace FASTMAF_ISA {

// Panels whose products are finished before anything is made of them.
inline constexpr int64_t kGroupPanels = 8;
inline constexpr int64_t kGroupRows = kGroupPanels * kPanel;

// Calls body(row of the block, numbers of its samples) for rows of a narrow tile of several samples, products c [sample][c_rows].
template <class T, class Body>
FASTMAF_INLINE void each_row(const T* c, int64_t c_rows, int64_t samples, int64_t rows, const Body& body) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t r = 0; r < rows; r += L)
    for (int64_t s = 0; s < samples; s += L) {
      Vec<T> block[L];
      for (int64_t i = 0; i < L; ++i) block[i] = s + i < samples ? load(c + (s + i) * c_rows + r) : Vec<T>{};
      transpose<T>(block);
      for (int64_t j = 0; j < std::min(L, rows - r); ++j) body(r + j, s, block[j]);
    }
}

// z of the map for x; `a` is its log-scale.
template <class T>
FASTMAF_INLINE Vec<T> mapped(const AffineMap& map, Vec<T> shift, Vec<T> a, Vec<T> x) {
  return map.form == kShiftFirst ? (x - shift) * exponential(-a) : x * exponential(a) + shift;
}

// Adds numbers [rows][size], vectors get(place), up over the rows, in runs of 8 and then in double: narrower sums would be long chains of
// roundings. Gets up to a vector behind them.
template <class T, class Get>
void add_rows(const Get& get, int64_t rows, int64_t size, double* sums) {
  constexpr int64_t L = kLanes<T>, kRun = 8;
  if (size == 1) {
    for (int64_t r = 0; r < rows; r += kRun * L) {
      Vec<T> sum = {};
      double rest = 0;
      for (int64_t i = r; i < std::min(rows, r + kRun * L); i += L)
        if (i + L <= rows && L >= 8)
          sum += get(i);
        else
          rest += lane_sum<T>(get(i), rows - i);
      *sums += lane_sum<T>(sum, L) + rest;
    }
    return;
  }
  for (int64_t s = 0; s < size; s += L)
    for (int64_t r = 0; r < rows; r += kRun) {
      Vec<T> sum = {};
      for (int64_t i = r; i < std::min(rows, r + kRun); ++i) sum += get(i * size + s);
      T lanes[L];
      store(lanes, sum);
      for (int64_t j = 0; j < std::min(L, size - s); ++j) sums[s + j] += lanes[j];
    }
}

// The rows of one sample's products as shifts and raw log-scales, in whole vectors.
template <class T>
FASTMAF_INLINE void deal(const T* c, int64_t dims, T* shifts, T* raws) {
  for (int64_t d = 0; d < dims; d += kLanes<T>) {
    Vec<T> shift, raw;
    unzip<T>(load(c + 2 * d), load(c + 2 * d + kLanes<T>), shift, raw);
    store(shifts + d, shift), store(raws + d, raw);
  }
}

// Where the element-wise map of an output layer reads and writes, in tiles. z of dimension d goes to place places[d] (null: d) of z; and
// own, if not null, has all in order. log_scale may be null.
template <class T>
struct AffineTiles {
  const T* x;
  T* z;
  const int32_t* places;
  T *own, *log_scale;
};

// The map of `dims` dimensions from d0 on, of one tile; c as `multiply` gives it. Adds the log-scales to sums.
template <class T>
void affine_rows(const AffineMap& map, const Tiles& tiles, int64_t t, const T* c, int64_t c_rows, int64_t d0, int64_t dims,
                 int64_t features, const AffineTiles<T>& at, double* sums) {
  constexpr int64_t L = kLanes<T>, kDims = kGroupRows / 2, kMost = kDims * std::max(kWide, kMostNarrow) + L;
  const int64_t size = tiles.size(t), first = tiles.offset(t, features), count = dims * size;
  const T* x = at.x + first + d0 * size;
  T* z = at.z + first;
  T scales[kMost];
  T* const a_of = at.log_scale && tiles.wide ? at.log_scale + first + d0 * size : scales;
  if (tiles.wide) {
    for (int64_t d = 0; d < dims; ++d)
      for (int64_t v = 0; v < kWide; v += L) {
        const Vec<T> a = log_scale_of<T>(load(c + (2 * d + 1) * kWide + v), map);
        const Vec<T> zv = mapped<T>(map, load(c + 2 * d * kWide + v), a, load(x + d * kWide + v));
        store(a_of + d * kWide + v, a);
        store(z + (at.places ? at.places[d0 + d] : d0 + d) * kWide + v, zv);
        if (at.own) store(at.own + first + (d0 + d) * kWide + v, zv);
      }
  } else {
    T shifts[kMost], raws[kMost], zs[kMost];
    if (size == 1)
      deal(c, dims, shifts, raws);
    else
      each_row(c, c_rows, size, 2 * dims, [&](int64_t r, int64_t s, Vec<T> v) {
        T* to = (r % 2 ? raws : shifts) + r / 2 * size + s;
        // What spills over lies in the next row, whose turn comes after.
        size <= L || size - s >= L ? store(to, v) : store_part(to, v, size - s);
      });
    for (int64_t i = 0; i < count; i += L) {
      const Vec<T> a = log_scale_of<T>(load(raws + i), map);
      store(scales + i, a);
      store(zs + i, mapped<T>(map, load(shifts + i), a, i + L <= count ? load(x + i) : load_part<T>(x + i, count - i)));
    }
    if (at.log_scale) std::copy(scales, scales + count, at.log_scale + first + d0 * size);
    if (at.places)
      for (int64_t d = 0; d < dims; ++d) std::copy(zs + d * size, zs + (d + 1) * size, z + at.places[d0 + d] * size);
    else
      std::copy(zs, zs + count, z + d0 * size);
  }
  double of_lanes[std::max(kWide, kMostNarrow)] = {};
  add_rows<T>([&](int64_t i) { return load(a_of + i); }, dims, size, of_lanes);
  for (int64_t s = 0; s < tiles.used(t); ++s) sums[s] += of_lanes[s];
}

// Where the inverse of a map reads and writes, in tiles: z of dimension d lies at place order[d] (null: d).
template <class T>
struct InverseTiles {
  const T* z;
  T* x;
  const int64_t* order;
};

// x of `dims` dimensions from d0 on, of one tile, from its products, which start at c. Adds the log-scales to sums.
template <class T>
void inverse_rows(const AffineMap& map, const Tiles& tiles, int64_t t, const T* c, int64_t c_rows, int64_t d0, int64_t dims,
                  int64_t features, const InverseTiles<T>& at, double* sums) {
  constexpr int64_t L = kLanes<T>, kDims = kGroupRows / 2, kMost = kDims * std::max(kWide, kMostNarrow) + L;
  const int64_t size = tiles.size(t), first = tiles.offset(t, features), count = dims * size;
  const T* z = at.z + first;
  T *x = at.x + first + d0 * size, scales[kMost];
  const auto inverted = [&](Vec<T> shift, Vec<T> a, Vec<T> zv) {
    return map.form == kShiftFirst ? zv * exponential(a) + shift : (zv - shift) * exponential(-a);
  };
  const auto place = [&](int64_t d) { return (at.order ? at.order[d0 + d] : d0 + d) * size; };
  if (tiles.wide) {
    for (int64_t d = 0; d < dims; ++d)
      for (int64_t v = 0; v < kWide; v += L) {
        const Vec<T> a = log_scale_of<T>(load(c + (2 * d + 1) * kWide + v), map);
        store(scales + d * kWide + v, a);
        store(x + d * kWide + v, inverted(load(c + 2 * d * kWide + v), a, load(z + place(d) + v)));
      }
  } else {
    T shifts[kMost], raws[kMost], zs[kMost];
    for (int64_t d = 0; d < dims; ++d) std::copy(z + place(d), z + place(d) + size, zs + d * size);
    if (size == 1)
      deal(c, dims, shifts, raws);
    else
      for (int64_t d = 0; d < dims; ++d)
        for (int64_t s = 0; s < size; ++s) shifts[d * size + s] = c[s * c_rows + 2 * d], raws[d * size + s] = c[s * c_rows + 2 * d + 1];
    for (int64_t i = 0; i < count; i += L) {
      const Vec<T> a = log_scale_of<T>(load(raws + i), map), xv = inverted(load(shifts + i), a, load(zs + i));
      store(scales + i, a);
      i + L <= count ? store(x + i, xv) : store_part(x + i, xv, count - i);
    }
  }
  double of_lanes[std::max(kWide, kMostNarrow)] = {};
  add_rows<T>([&](int64_t i) { return load(scales + i); }, dims, size, of_lanes);
  for (int64_t s = 0; s < tiles.used(t); ++s) sums[s] += of_lanes[s];
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
