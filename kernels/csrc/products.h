// The two products of a backward pass over a few rows of a weight, and what keeps memory busy meanwhile.
//
// Samples of x, grad_x and of the stage lie kStride numbers apart, those of g kGradientStride: known when compiling, so that
// one register addresses several of them, and no powers of two, which would put all into one set of the cache.
#pragma once

#include "packed.h"

namespace fastmaf {

inline constexpr long kMostColumns = 512;  // of a strip
inline constexpr long kStride = kMostColumns + 16;
inline constexpr long kStripRows = 64;  // rows whose g is formed, and whose share of grad_x is summed, at once
inline constexpr long kGradientStride = kStripRows + 16;

// An inner loop sums kWide vectors of kHigh rows or samples: enough sums to keep both multipliers busy, few enough to leave
// registers for what they share.
inline constexpr int kWide = 2;
inline constexpr int kHigh = 4;

// Fetches the next rows of a weight, and of what is laid out like it, a cache line at each step(). Called between pieces of
// arithmetic, it keeps memory busy through all of it, not only where the data are first met.
template <class T>
class Ahead {
 public:
  // Rows of `columns` numbers, `stride` apart, from w on.
  void start(const T* w, long rows, long columns, long stride) {
    if (columns == stride) columns *= rows, rows = 1;
    row_ = w, rows_ = rows, columns_ = columns, stride_ = stride, k_ = 0;
  }
  void step() {
    if (rows_ <= 0) return;
    prefetch_far(row_ + k_);
    for (const long other : others)
      if (other != 0) prefetch_far(row_ + k_ + other);
    k_ += kLineNumbers<T>;
    if (k_ >= columns_) k_ = 0, row_ += stride_, --rows_;
  }
  long others[2] = {};  // distances from a number of the weight to those that go with it

 private:
  const T* row_ = nullptr;
  long rows_ = 0, columns_ = 0, stride_ = 0, k_ = 0;
};

namespace detail {

// grad_x[s][k] += sum over rows j of g[s][j] w[j][k], for S samples and C vectors of columns.
template <class T, int S, int C>
FASTMAF_INLINE void input_product(long rows, const T* w, long w_stride, const T* g, T* grad_x) {
  constexpr int L = kLanes<T>;
  Vec<T> acc[S][C];
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) acc[s][c] = load(grad_x + s * kStride + c * L);
  for (long j = 0; j < rows; ++j, w += w_stride, ++g) {
    Vec<T> wv[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) wv[c] = in_register(load(w + c * L));
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
      const Vec<T> gv = broadcast(g[s * kGradientStride]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[s][c] += gv * wv[c];
    }
  }
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(grad_x + s * kStride + c * L, acc[s][c]);
}

// grad_W[r][k] = (kFirst ? 0 : what is there) + sum over samples of g[s][r] x[s][k], for R rows and C vectors of columns. N:
// how many samples, where that is known when compiling.
template <class T, int R, int C, bool kFirst, int N>
FASTMAF_INLINE void weight_chain(long n, const T* g, const T* x, T* grad_w) {
  constexpr int L = kLanes<T>;
  Vec<T> sum[R][C] = {};
  const auto add = [&](long s) {
    Vec<T> xv[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) xv[c] = in_register(load(x + s * kStride + c * L));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<T> gv = broadcast(g[s * kGradientStride + r]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum[r][c] += gv * xv[c];
    }
  };
  if constexpr (N > 0) {
#pragma GCC unroll 8
    for (int s = 0; s < N; ++s) add(s);
  } else {
    for (long s = 0; s < n; ++s) add(s);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      T* to = grad_w + r * kStride + c * L;
      store(to, kFirst ? sum[r][c] : load(to) + sum[r][c]);
    }
}

// Columns in whole multiples of C vectors; returns how many. Functions of their own, as loops that share a function with others
// lose registers to them.
template <class T, int C>
FASTMAF_NOINLINE long input_columns(long n, long rows, const T* w, long w_stride, const T* g, T* grad_x, long columns,
                                    Ahead<T>& ahead) {
  constexpr long W = C * kLanes<T>;
  long k = 0;
  for (; k + W <= columns; k += W) {
    long s = 0;
    for (; s + kHigh <= n; s += kHigh, ahead.step())
      input_product<T, kHigh, C>(rows, w + k, w_stride, g + s * kGradientStride, grad_x + s * kStride + k);
    for (; s < n; ++s, ahead.step())
      input_product<T, 1, C>(rows, w + k, w_stride, g + s * kGradientStride, grad_x + s * kStride + k);
  }
  return k;
}

// Large batches are summed in parts: one chain of roundings would grow with them.
inline constexpr long kSamplesInChain = 32;
template <class T, int R, int C>
FASTMAF_NOINLINE long weight_columns(long n, const T* g, const T* x, T* grad_w, long columns, Ahead<T>& ahead) {
  constexpr long W = C * kLanes<T>;
  long k = 0;
  if (n == 8) {  // the usual small batch: no loop over samples at all
    for (; k + W <= columns; k += W, ahead.step()) weight_chain<T, R, C, true, 8>(8, g, x + k, grad_w + k);
    return k;
  }
  for (; k + W <= columns; k += W, ahead.step()) {
    weight_chain<T, R, C, true, 0>(std::min(n, kSamplesInChain), g, x + k, grad_w + k);
    for (long s = kSamplesInChain; s < n; s += kSamplesInChain)
      weight_chain<T, R, C, false, 0>(std::min(n - s, kSamplesInChain), g + s * kGradientStride, x + s * kStride + k, grad_w + k);
  }
  return k;
}

}  // namespace detail

// grad_x [n][columns] += gᵀ w. Takes grad_x in whole vectors; what lies beyond the columns is left as it was.
template <class T>
void input_product(long n, long rows, const T* w, long w_stride, const T* g, T* grad_x, long columns, Ahead<T>& ahead) {
  constexpr int L = kLanes<T>;
  long k = detail::input_columns<T, kWide>(n, rows, w, w_stride, g, grad_x, columns, ahead);
  k += detail::input_columns<T, 1>(n, rows, w + k, w_stride, g, grad_x + k, columns - k, ahead);
  if (k == columns) return;
  T padded[kHigh * L];  // the last columns of a weight that is no whole number of vectors wide
  for (long r0 = 0; r0 < rows; r0 += kHigh) {
    const long count = std::min<long>(kHigh, rows - r0);
    for (long r = 0; r < count; ++r) store(padded + r * L, load_part<T>(w + (r0 + r) * w_stride + k, columns - k));
    detail::input_columns<T, 1>(n, count, padded, L, g + r0, grad_x + k, L, ahead);
  }
}

// grad_w [R rows][columns] = g x, in whole vectors.
template <class T, int R>
void weight_product(long n, const T* g, const T* x, T* grad_w, long columns, Ahead<T>& ahead) {
  const long k = detail::weight_columns<T, R, kWide>(n, g, x, grad_w, columns, ahead);
  detail::weight_columns<T, R, 1>(n, g, x + k, grad_w + k, round_up(columns - k, kLanes<T>), ahead);
}

}  // namespace fastmaf
