// Rows of a packed weight times a batch of activations: the inner loops of forward passes and of the level inverse.
//
//     C[row][n] += sum_{k0 <= k < min(k1, what the row sees)} W[row][k] X[n][k]
//
// Up to eight samples: vectors run along k, so that each weight is loaded once for all samples ("dot"). More samples:
// vectors run along the samples, so that nothing need be summed across a vector ("outer").
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

inline constexpr long kAheadBytes = 4096;

template <class T, class W, int N>
void dot_rows(long rows, const W* w, long w_stride, const T* x, long count, Product<T> c) {
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
