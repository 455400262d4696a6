// Rows of a packed weight times a batch of activations: the inner loops of forward passes and of the level inverse.
//
//     C[row][n] += sum_{k0 <= k < min(k1, what the row sees)} W[row][k] X[n][k]
//
// Up to eight samples: vectors run along k, so that each weight is loaded once for all samples ("dot"). More samples:
// vectors run along the samples, so that nothing need be summed across a vector ("outer").
#pragma once

#include "activations.h"

namespace fastmaf {

namespace detail {

template <class T, class W, int R, int N>
inline void dot(const W* w, long w_stride, long ahead, const T* x, long count, const Product<T>& c) {
  constexpr int L = kLanes<T>;
  constexpr int kUnroll = std::max<int>(1, kLineBytes / (L * sizeof(W)));
  constexpr int kSums = R * N, kEights = (kSums + 7) / 8 * 8;
  Vec<T> acc[kEights] = {};
  const auto step = [&](const Vec<T>(&wv)[R], const T* xk) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const Vec<T> xv = load(xk + n * kDotStride);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r * N + n] += wv[r] * xv;
    }
  };
  Vec<T> wv[R];
  long k = 0;
  for (; k + kUnroll * L <= count; k += kUnroll * L) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) prefetch(w + r * w_stride + k + ahead);
#pragma GCC unroll 16
    for (int u = 0; u < kUnroll; ++u) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) wv[r] = load(w + r * w_stride + k + u * L);
      step(wv, x + k + u * L);
    }
  }
  for (; k + L <= count; k += L) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) wv[r] = load(w + r * w_stride + k);
    step(wv, x + k);
  }
  if (k < count) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) wv[r] = load_part<T>(w + r * w_stride + k, count - k);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const Vec<T> xv = load_part<T>(x + n * kDotStride + k, count - k);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r * N + n] += wv[r] * xv;
    }
  }
  T sums[kEights];
#pragma GCC unroll 2
  for (int i = 0; i < kEights; i += 8) eight_sums<T>(acc + i, sums + i);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) c.data[r * c.row + n * c.sample] += sums[r * N + n];
}

// Narrow rows follow one another in memory without a gap. Read one after the other they are a single stream, which the processor
// fetches by itself; several at once (below) would be as many streams that break off every row.
template <class T, class W, int N>
void dot_stream(long rows, const W* w, long w_stride, const T* x, long count, Product<T> c) {
  constexpr int R = 8 / N;  // rows whose sums across vectors are taken together
  constexpr long kAhead = 1024 / sizeof(W);
  constexpr int L = kLanes<T>, kUnroll = std::max<int>(1, kLineBytes / (L * sizeof(W))), kChains = std::min(2, kUnroll);
  while (rows > 0) {
    const int here = static_cast<int>(std::min<long>(R, rows));
    Vec<T> acc[8] = {};
    for (int r = 0; r < here; ++r, w += w_stride) {
      Vec<T> sum[kChains][N] = {};  // two, or each addition would wait for the one before
      const auto add = [&](int chain, const Vec<T>& wv, const T* xk) {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) sum[chain][n] += wv * load(xk + n * kDotStride);
      };
      long k = 0;
      for (; k + kUnroll * L <= count; k += kUnroll * L) {
        prefetch(w + k + kAhead);
#pragma GCC unroll 16
        for (int u = 0; u < kUnroll; ++u) add(u % kChains, load(w + k + u * L), x + k + u * L);
      }
      for (; k + L <= count; k += L) add(0, load(w + k), x + k);
      if (k < count) {
        const Vec<T> wv = load_part<T>(w + k, count - k);
        for (int n = 0; n < N; ++n) sum[0][n] += wv * load_part<T>(x + n * kDotStride + k, count - k);
      }
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[r * N + n] = kChains == 2 ? sum[0][n] + sum[kChains - 1][n] : sum[0][n];
    }
    T sums[8];
    eight_sums<T>(acc, sums);
    for (int r = 0; r < here; ++r)
      for (int n = 0; n < N; ++n) c.data[r * c.row + n * c.sample] += sums[r * N + n];
    rows -= here;
    c = c.from(here);
  }
}

inline constexpr long kAheadBytes = 4096;

template <class T, class W, int N>
void dot_rows(long rows, const W* w, long w_stride, const T* x, long count, Product<T> c) {
  if constexpr (N <= 4)
    if (w_stride <= kDotColumns) return dot_stream<T, W, N>(rows, w, w_stride, x, count, c);
  // As many rows at once as leave registers for one vector of each row and one of x.
  constexpr int R = N == 1 ? 4 : std::max(1, std::min(4, (kRegisters - 4) / (N + 1)));
  // What is fetched ahead: the next rows, but so far away that memory has the time to answer.
  const long ahead = std::max<long>(std::max(2, R), kAheadBytes / static_cast<long>(sizeof(W)) / w_stride) * w_stride;
  for (; rows >= R; rows -= R, w += R * w_stride, c = c.from(R)) dot<T, W, R, N>(w, w_stride, ahead, x, count, c);
  for (; rows > 0; --rows, w += w_stride, c = c.from(1)) dot<T, W, 1, N>(w, w_stride, ahead, x, count, c);
}

// KU independent sums over k hide the latency of a multiply-add where R * C accumulators are too few for that.
template <class T, int R, int C, int KU>
inline void outer(const T* w, long w_stride, const T* x, long k0, long k1, T* c, long c_stride, long ahead) {
  constexpr int L = kLanes<T>;
  constexpr long kLine = kLineBytes / sizeof(T);
  static_assert(kLine % KU == 0);
  Vec<T> acc[KU][R][C] = {};
  auto step = [&](long k, auto u) {
    Vec<T> xv[C];
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) xv[j] = load(x + k * kPanel<T> + j * L);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const Vec<T> wv = broadcast(w[r * w_stride + k]);
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) acc[u][r][j] += wv * xv[j];
    }
  };
  long k = k0;
  for (; k + kLine <= k1; k += kLine) {
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) prefetch(w + r * w_stride + k + ahead);
    for (long i = k; i < k + kLine; i += KU) {
      step(i, std::integral_constant<int, 0>{});
      if constexpr (KU > 1) step(i + 1, std::integral_constant<int, 1>{});
      if constexpr (KU > 2) step(i + 2, std::integral_constant<int, 2>{}), step(i + 3, std::integral_constant<int, 3>{});
    }
  }
  for (; k < k1; ++k) step(k, std::integral_constant<int, 0>{});
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) {
      Vec<T> total = acc[0][r][j];
#pragma GCC unroll 4
      for (int u = 1; u < KU; ++u) total += acc[u][r][j];
      T* p = c + r * c_stride + j * L;
      store(p, load(p) + total);
    }
}

template <class T, int R, int KU1, int KU2>
void outer_columns(const T* w, long w_stride, const T* x, long panel_stride, long vectors, long k0, long k1, T* c, long c_stride,
                   long ahead) {
  constexpr int L = kLanes<T>;
  for (; vectors >= 2; vectors -= 2, x += panel_stride, c += 2 * L) {
    outer<T, R, 2, KU2>(w, w_stride, x, k0, k1, c, c_stride, ahead);
    ahead = 0;  // the next rows need be fetched once
  }
  if (vectors > 0) outer<T, R, 1, KU1>(w, w_stride, x, k0, k1, c, c_stride, ahead);
}

}  // namespace detail

inline constexpr long kGroupRows = 12;     // rows that are handled together; even, so that pairs stay together

// Rows `row0..row1` of one tile, columns k0..k1; C starts at row0.
template <class T, class W>
void multiply_tile(const Packed<W>& p, const Tile& tile, long row0, long row1, long k0, long k1, const Activations<T>& x,
                   const Product<T>& c) {
  const long rows = row1 - row0, w_stride = tile.width;
  const W* w = p.row(tile, row0);
  if (k1 <= k0) return;
  if (x.shape.dot && k1 - k0 < kLanes<T>) {  // what one level of an inverse adds: no vector to speak of
    for (long r = 0; r < rows; ++r)
      for (long k = k0; k < k1; ++k) {
        const T wk = widen(w[r * w_stride + k]);
        for (long n = 0; n < x.shape.samples; ++n) c.data[r * c.row + n * c.sample] += wk * x.at(n, k);
      }
    return;
  }
  const long ahead = rows * w_stride;
  if (x.shape.dot) {
    const long block_end = k0 / kDotColumns * kDotColumns + kDotColumns;
    if (k1 > block_end) {
      multiply_tile(p, tile, row0, row1, k0, block_end, x, c);
      return multiply_tile(p, tile, row0, row1, block_end, k1, x, c);
    }
    switch (x.shape.samples) {
#define FASTMAF_DOT(N) \
  case N:              \
    return detail::dot_rows<T, W, N>(rows, w + k0, w_stride, &x.at(0, k0), k1 - k0, c);
      FASTMAF_DOT(1) FASTMAF_DOT(2) FASTMAF_DOT(3) FASTMAF_DOT(4)
      FASTMAF_DOT(5) FASTMAF_DOT(6) FASTMAF_DOT(7) FASTMAF_DOT(8)
#undef FASTMAF_DOT
    }
    return;
  }
  const T* a;
  long a_stride, a_ahead = ahead;
  const T* xk = x.data;
  T widened[kGroupRows * kOuterColumns];
  if constexpr (std::is_same_v<T, std::remove_const_t<W>>) {
    a = w;
    a_stride = w_stride;
  } else {
    for (; k1 - k0 > kOuterColumns; k0 += kOuterColumns)
      multiply_tile(p, tile, row0, row1, k0, k0 + kOuterColumns, x, c);
    for (long r = 0; r < rows; ++r) {
      const W* q = w + r * w_stride + k0;
      T* to = widened + r * kOuterColumns;
      long k = 0;
      for (; k + kLanes<T> <= k1 - k0; k += kLanes<T>) {
        store(to + k, load(q + k));
        prefetch(q + k + ahead);
      }
      for (; k < k1 - k0; ++k) to[k] = widen(q[k]);
    }
    a = widened;
    a_stride = kOuterColumns;
    a_ahead = 0;
    xk += k0 * kPanel<T>;
    k1 -= k0;
    k0 = 0;
  }
  const long vectors = x.shape.padded / kLanes<T>;
  long r = 0;
  if (vectors == 1)
    for (; r + 12 <= rows; r += 12)
      detail::outer<T, 12, 1, 1>(a + r * a_stride, a_stride, xk, k0, k1, c.data + r * c.row, c.row, a_ahead);
  for (; r + 6 <= rows; r += 6)
    detail::outer_columns<T, 6, 1, 1>(a + r * a_stride, a_stride, xk, x.ld, vectors, k0, k1, c.data + r * c.row, c.row, a_ahead);
  for (; r + 2 <= rows; r += 2)
    detail::outer_columns<T, 2, 4, 2>(a + r * a_stride, a_stride, xk, x.ld, vectors, k0, k1, c.data + r * c.row, c.row, a_ahead);
  for (; r < rows; ++r)
    detail::outer_columns<T, 1, 4, 4>(a + r * a_stride, a_stride, xk, x.ld, vectors, k0, k1, c.data + r * c.row, c.row, a_ahead);
}

// Rows `row0..row1`, wherever their tiles end; columns k0..k1 as far as each group of rows sees. C starts at row0.
template <class T, class W>
void multiply(const Packed<W>& p, long row0, long row1, long k0, long k1, const Activations<T>& x,
              const Product<T>& c) {
  p.groups(row0, row1, kGroupRows, [&](const Tile& tile, long r0, long r1) {
    const long end = std::min(k1, p.template visible<T>(tile, r1));
    multiply_tile(p, tile, r0, r1, k0, end, x, c.from(r0 - row0));
  });
}

// The same over all columns, a block of columns at a time, so that its activations stay in cache.
template <class T, class W>
void multiply_blocked(const Packed<W>& p, long row0, long row1, const Activations<T>& x, const Product<T>& c) {
  if (row1 <= row0) return;
  const long block = x.shape.dot ? kDotColumns : kOuterColumns;
  const long columns = p.prefix[row1 - 1];
  for (long k0 = 0; k0 < columns; k0 += block) multiply(p, row0, row1, k0, k0 + block, x, c);
}

}  // namespace fastmaf
