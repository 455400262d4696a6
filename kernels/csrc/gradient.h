// The gradient of the products of some rows of a layer, from that of its outputs.
#pragma once

#include "affine_map.h"
#include "tiles.h"

namespace fastmaf {
namespace FASTMAF_ISA {

inline constexpr int64_t kGradientPanels = 8;  // whose rows' gradients are formed together
inline constexpr int64_t kGradientRows = kGradientPanels * kPanel;

// The gradient g of the products of a group of panels' rows, as both products want it.
template <class T>
struct Gradient {
  T* by_sample;  // [padded n][kGradientRows]
  T* by_row;     // [tile][kGradientRows / fold][16 samples by fold]
};

// n in whole vectors.
template <class T>
constexpr int64_t padded(int64_t n) {
  return round_up(n, static_cast<int64_t>(kLanes<T>));
}

// Where the samples fill half a vector only, two rows share one, by turns: half the multiply-adds. grad_x then has two terms of each
// sample next to each other.
template <class T>
constexpr int fold_of(int64_t n) {
  return sizeof(T) == 4 && n > 0 && 2 * n <= kLanes<T> ? 2 : 1;
}

// The gradient of `count` rows of a layer's products, of the samples from i on that fill a vector: put(row of these, vector).
template <class T, class Put>
void linear_gradient(const Source& s, int64_t rows, int64_t row, int64_t count, int64_t i, const Put& put) {
  const T *grad = in_tile(static_cast<const T*>(s.grad_y), i, row, rows);
  const T* of = s.relu_of ? in_tile(static_cast<const T*>(s.relu_of), i, row, rows) : nullptr;
  const T scale = static_cast<T>(s.scale);
  const Vec<T> zero = {};
  for (int64_t r = 0; r < count; ++r) {
    const Vec<T> g = load(grad + r * kWide) * scale;
    put(r, of ? ((load(of + r * kWide) > zero) ? g : zero) : g);
  }
}

template <class T, class Put>
void affine_gradient(const Source& s, int64_t rows, int64_t row, int64_t count, int64_t i, int64_t n, const Put& put) {
  constexpr int64_t L = kLanes<T>;
  const int64_t features = rows / 2;
  const T scale = static_cast<T>(s.scale);
  const Vec<T> grad_ladj = load_part<T>(static_cast<const T*>(s.grad_ladj) + i, std::min(L, n - i));
  for (int64_t d = 0; d < count / 2; ++d) {
    const auto get = [&](const void* p) { return load(in_tile(static_cast<const T*>(p), i, row / 2 + d, features)); };
    const Vec<T> a = get(s.log_scale), grad_z = get(s.grad_z);
    Vec<T> grad_x, grad_shift, grad_a;
    if (s.map.form == kShiftFirst) {
      grad_x = grad_z * exponential(-a);
      grad_shift = -grad_x;
      grad_a = -(grad_z * get(s.z)) - grad_ladj;
    } else {
      grad_x = grad_z * exponential(a);
      grad_shift = grad_z;
      grad_a = grad_x * get(s.x) + grad_ladj;
    }
    if (s.grad_log_scale) grad_a += get(s.grad_log_scale);
    put(2 * d, grad_shift * scale);
    put(2 * d + 1, grad_a * slope_of<T>(a, s.map) * scale);
    if (s.grad_x) store(in_tile(static_cast<T*>(s.grad_x), i, row / 2 + d, features), grad_x);
  }
}

// g, and grad_bias (null: not wanted), of the group of rows from `row` on.
template <class T>
void make_gradient(const Source& s, int64_t rows, int64_t n, int64_t row, const Gradient<T>& g, T* grad_bias) {
  constexpr int64_t L = kLanes<T>;
  const int64_t wide = padded<T>(n), count = std::min(kGradientRows, rows - row), whole = round_up(count, kPanel);
  for (int64_t i = 0; i < wide; i += L) {
    T* const to = in_tile(g.by_row, i, 0, kGradientRows);
    // Lanes behind the last sample count for nothing, whatever is in them.
    const auto put = [&](int64_t r, Vec<T> v) {
      if (n - i < L) v = first_lanes<T>(v, n - i);
      store(to + r * kWide, v);
    };
    s.log_scale ? affine_gradient<T>(s, rows, row, count, i, n, put) : linear_gradient<T>(s, rows, row, count, i, put);
    for (int64_t r = count; r < whole; ++r) put(r, Vec<T>{});
    for (int64_t r = 0; r < whole; r += L) {
      Vec<T> block[L];
      for (int64_t j = 0; j < L; ++j) block[j] = load(to + (r + j) * kWide);
      transpose<T>(block);
      for (int64_t j = 0; j < L; ++j) store(g.by_sample + (i + j) * kGradientRows + r, block[j]);
    }
  }
  for (int64_t r = 0; grad_bias && r < count; ++r) {
    double total = 0;
    for (int64_t i = 0; i < wide; i += 4 * L) {  // short sums before they are widened
      Vec<T> sum = {};
      for (int64_t j = i; j < std::min(wide, i + 4 * L); j += L) sum += load(in_tile(g.by_row, j, r, kGradientRows));
      total += lane_sum<T>(sum, L);
    }
    grad_bias[row + r] = static_cast<T>(total);
  }
  if (fold_of<T>(n) == 2)
    for (int64_t r = 0; r < whole; r += 2) {
      Vec<T> low, high;
      zip<T>(load(g.by_row + r * kWide), load(g.by_row + (r + 1) * kWide), low, high);
      store(g.by_row + r / 2 * kWide, low);
    }
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
