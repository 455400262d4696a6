// One pass over a weight that gives the gradient of its layer's input and does what is wanted with its own: writes it, or
// takes Adam's step with it in place, so that it is never stored and the weight is read once for both.
//
//     grad_x[n][k]  = sum_j g[n][j] W[j][k]          g: gradient of the layer's product, before its activation
//     grad_W[j][k]  = sum_n g[n][j] x[n][k]          0 where the mask hides
//
// The weight is walked in blocks of a few rows by some columns that stay in cache between the two products. A layer with
// more columns than rows is shared out by columns, so that every grad_x belongs to one thread; else by rows, with grad_x
// summed over the threads in order.
#include <vector>

#include "forward.h"
#include "gradients.h"

namespace fastmaf {
namespace {

// Rows of a block. Few, so that a small batch's block is still in the first-level cache for its second product; with many
// samples that product is far away anyhow, and grad_x should be read and written less often.
constexpr long kBlockRows = 8, kDeepBlockRows = 32;
constexpr long kDeepSamples = 32;
constexpr long kStripRows = 64;  // rows whose g is formed, and whose share of grad_x is summed, at once
constexpr long kMostColumns = 512;
constexpr int kWide = 3;  // vectors, and
constexpr int kHigh = 4;         // rows or samples, of which the accumulators of one inner loop fill the registers

// Columns that go together: x and grad_x of all samples for them should stay in the second-level cache.
template <class T>
long strip_columns(long n) {
  return std::clamp(round_up(8192 / std::max(n, 1L), 64), 64L, kMostColumns);
}

// ---- the two products over one block

// grad_x[n][k] += sum over the block's rows: S samples, C vectors from w on.
template <class T, int S, int C, bool Fetch>
void input_product(long rows, const T* w, long w_stride, const T* g, long g_stride, T* grad_x, long ld) {
  constexpr int L = kLanes<T>;
  Vec<T> acc[S][C] = {};
  for (long j = 0; j < rows; ++j, w += w_stride, g += g_stride) {
    Vec<T> wv[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      wv[c] = load(w + c * L);
      if (Fetch && (C == 1 || c % 2 == 0)) prefetch(w + rows * w_stride + c * L);
    }
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
      const Vec<T> gv = broadcast(g[s]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[s][c] += gv * wv[c];
    }
  }
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(grad_x + s * ld + c * L, load(grad_x + s * ld + c * L) + acc[s][c]);
}

template <class T, int C>
void input_products(long n, long rows, const T* w, long w_stride, const T* g, T* grad_x, long ld) {
  long s = 0;
  if (n >= kHigh) input_product<T, kHigh, C, true>(rows, w, w_stride, g, n, grad_x, ld), s = kHigh;
  for (; s + kHigh <= n; s += kHigh) input_product<T, kHigh, C, false>(rows, w, w_stride, g + s, n, grad_x + s * ld, ld);
  for (; s < n; ++s) input_product<T, 1, C, false>(rows, w, w_stride, g + s, n, grad_x + s * ld, ld);
}

// grad_W of R rows and C vectors of columns. Large batches are summed in parts: one chain of roundings would grow with them.
constexpr long kSamplesInChain = 32;
template <class T, int R, int C>
inline void weight_product(long n, const T* g, const T* x, long ld, Vec<T> (&acc)[R][C]) {
  constexpr int L = kLanes<T>;
  for (long s0 = 0; s0 == 0 || s0 < n; s0 += kSamplesInChain) {
    const long s1 = std::min(n, s0 + kSamplesInChain);
    Vec<T> sum[R][C] = {};
    for (long s = s0; s < s1; ++s) {
      Vec<T> xv[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) xv[c] = load(x + s * ld + c * L);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Vec<T> gv = broadcast(g[r * n + s]);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) sum[r][c] += gv * xv[c];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r][c] = s0 == 0 ? sum[r][c] : acc[r][c] + sum[r][c];
  }
}

template <class T, class Target>
class Backward {
 public:
  Backward(const Packed<const T>& p, long n, const Target& target) : p_(p), n_(n), sink(target) {}

  // Rows row0..row1, columns k0..k1. g [row1 - row0][n]; x and grad_x [n][ld] start at column k0; grad_x null: not wanted.
  void block(long row0, long row1, long k0, long k1, const T* g, const T* x, T* grad_x, long ld) {
    p_.groups(row0, row1, n_ < kDeepSamples ? kBlockRows : kDeepBlockRows, [&](const Tile& tile, long r0, long r1) {
      const long end = std::min(k1, p_.template visible<T>(tile, r1));
      if (grad_x && end > k0) inputs(tile, r0, r1, k0, end, g + (r0 - row0) * n_, grad_x, ld);
      if constexpr (!std::is_same_v<Target, NoWeightGradient>) {
        for (long r = r0; r < r1; r += kHigh) {
          const T* gr = g + (r - row0) * n_;
          switch (std::min<long>(kHigh, r1 - r)) {
            case 4: weights<4>(tile, r, k0, end, gr, x, ld); break;
            case 3: weights<3>(tile, r, k0, end, gr, x, ld); break;
            case 2: weights<2>(tile, r, k0, end, gr, x, ld); break;
            default: weights<1>(tile, r, k0, end, gr, x, ld);
          }
        }
        for (long r = r0; r < r1; ++r) {
          const long from = std::max(k0, end), to = std::min<long>(k1, tile.width);
          sink.skip(offset(tile, r) + from, to - from);
        }
      }
    });
  }

 private:
  static long offset(const Tile& tile, long r) { return tile.offset + (r - tile.row_start) * tile.width; }

  void inputs(const Tile& tile, long r0, long r1, long k0, long end, const T* g, T* grad_x, long ld) const {
    constexpr int L = kLanes<T>;
    const T* w = p_.row(tile, r0);
    const long rows = r1 - r0;
    long k = k0;
    for (; k + kWide * L <= end; k += kWide * L)
      input_products<T, kWide>(n_, rows, w + k, tile.width, g, grad_x + (k - k0), ld);
    for (; k + L <= end; k += L) input_products<T, 1>(n_, rows, w + k, tile.width, g, grad_x + (k - k0), ld);
    if (k < end) {  // the last columns of a weight that is no whole number of vectors wide
      T padded[kDeepBlockRows * L];
      for (long r = 0; r < rows; ++r) store(padded + r * L, load_part<T>(w + r * tile.width + k, end - k));
      input_products<T, 1>(n_, rows, padded, L, g, grad_x + (k - k0), ld);
    }
  }

  template <int R>
  void weights(const Tile& tile, long r, long k0, long end, const T* g, const T* x, long ld) {
    long k = k0;
    for (; k + kWide * kLanes<T> <= end; k += kWide * kLanes<T>) columns<R, kWide>(tile, r, k, k0, g, x + (k - k0), ld);
    for (; k < end; k += kLanes<T>) columns<R, 1>(tile, r, k, k0, g, x + (k - k0), ld);
    if constexpr (kStaged)
      for (int i = 0; i < R; ++i) sink.run(offset(tile, r + i) + k0, stage_[i], std::min(end, p_.prefix[r + i]) - k0, tile.width);
  }

  template <int R, int C>
  void columns(const Tile& tile, long r, long k, long k0, const T* g, const T* x, long ld) {
    constexpr int L = kLanes<T>;
    Vec<T> acc[R][C];
    weight_product<T, R, C>(n_, g, x, ld, acc);
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        if constexpr (kStaged)
          store(stage_[i] + (k - k0) + c * L, acc[i][c]);
        else
          sink.apply(offset(tile, r + i) + k + c * L, acc[i][c], p_.prefix[r + i] - k - c * L, tile.width - k - c * L);
      }
  }

  static constexpr bool kStaged = std::is_same_v<Target, AdamStep<T>>;
  T stage_[kHigh][kMostColumns + 16];
  const Packed<const T>& p_;
  const long n_;

 public:
  Sink<Target> sink;
};

template <class T>
void sum_rows(const T* g, long rows, long n, T* grad_bias) {
  for (long r = 0; r < rows; ++r) {
    double total = 0;
    for (long s = 0; s < n; ++s) total += g[r * n + s];
    grad_bias[r] = static_cast<T>(total);
  }
}

// Columns k0..k1 of x [n][stride], each sample's rounded up to whole vectors with zeros.
template <class T>
void take_columns(const T* x, long n, long stride, long k0, long k1, T* to, long ld) {
  const long count = k1 - k0, padded = std::min(ld, round_up(count, kLanes<T>));
  for (long s = 0; s < n; ++s) {
    std::copy(x + s * stride + k0, x + s * stride + k1, to + s * ld);
    std::fill(to + s * ld + count, to + s * ld + padded, T(0));
  }
}

// The column before which `part` of `parts` of the visible weights lie.
template <class W>
long column_boundary(const Packed<W>& p, long part, long parts) {
  if (part == 0) return 0;
  if (part >= parts) return p.columns;
  double all = 0;
  for (long r = 0; r < p.rows; ++r) all += p.prefix[r];
  long low = 0, high = (p.columns + 63) / 64;
  while (low < high) {
    const long middle = (low + high) / 2;
    double area = 0;
    for (long r = 0; r < p.rows; ++r) area += std::min<double>(p.prefix[r], 64.0 * middle);
    (area * parts < all * part ? low = middle + 1 : high = middle);
  }
  return std::min(64 * low, p.columns);
}

}  // namespace

template <class T, class Source, class Target>
void linear_backward(const Packed<const T>& p, const Source& source, const T* x, long n, T* grad_x, T* grad_bias,
                     const Target& target, long threads) {
  threads = useful_threads(p, n, threads);
  const bool by_columns = p.columns > p.rows;
  const long strip = strip_columns<T>(n), ld = strip + 16;
  // By columns: g of all rows. By rows: each thread's grad_x.
  const long wide = round_up(p.columns, kLanes<T>) + 16;
  T* shared = Scratch::get<T>(Scratch::kGradient, by_columns ? p.rows * n : threads * n * wide);
  std::vector<double> squares(threads, 0.0);
  run_team(threads, [&](Team& team) {
    T* x_strip = Scratch::get<T>(Scratch::kPack, 2 * n * ld + kStripRows * n);
    T* grad_strip = x_strip + n * ld;
    T* g_strip = grad_strip + n * ld;
    Backward<T, Target> backward(p, n, target);
    if (by_columns) {
      long r0, r1;
      team.share(p.rows, 16, r0, r1);
      fill(source, p.rows, n, r0, r1, shared + r0 * n);
      if (grad_bias) sum_rows(shared + r0 * n, r1 - r0, n, grad_bias + r0);
      team.sync();
      const long end = column_boundary(p, team.rank + 1, team.size);
      for (long k0 = column_boundary(p, team.rank, team.size); k0 < end; k0 += strip) {
        const long k1 = std::min(k0 + strip, end);
        take_columns(x, n, p.columns, k0, k1, x_strip, ld);
        std::fill(grad_strip, grad_strip + n * ld, T(0));
        backward.block(0, p.rows, k0, k1, shared, x_strip, grad_x ? grad_strip : nullptr, ld);
        if (grad_x)
          for (long s = 0; s < n; ++s) std::copy(grad_strip + s * ld, grad_strip + s * ld + k1 - k0, grad_x + s * p.columns + k0);
      }
    } else {
      T* mine = shared + team.rank * n * wide;
      std::fill(mine, mine + n * wide, T(0));
      long row0, row1;
      p.share(team.rank, team.size, kDeepBlockRows, row0, row1);
      const bool once = p.columns <= strip;
      if (once) take_columns(x, n, p.columns, 0, p.columns, x_strip, ld);
      for (long r0 = row0; r0 < row1; r0 += kStripRows) {
        const long r1 = std::min(r0 + kStripRows, row1);
        fill(source, p.rows, n, r0, r1, g_strip);
        if (grad_bias) sum_rows(g_strip, r1 - r0, n, grad_bias + r0);
        for (long k0 = 0; k0 < p.columns; k0 += strip) {
          const long k1 = std::min(k0 + strip, p.columns);
          if (!once) take_columns(x, n, p.columns, k0, k1, x_strip, ld);
          const long seen = std::min(k1, round_up(p.prefix[r1 - 1], kLanes<T>)) - k0;
          for (long s = 0; s < n && seen > 0; ++s) std::fill(grad_strip + s * ld, grad_strip + s * ld + round_up(seen, kLanes<T>), T(0));
          backward.block(r0, r1, k0, k1, g_strip, x_strip, grad_x ? grad_strip : nullptr, ld);
          if (grad_x)
            for (long s = 0; s < n; ++s)
              for (long k = 0; k < seen; k += kLanes<T>) {
                T* to = mine + s * wide + k0 + k;
                store(to, load(to) + load(grad_strip + s * ld + k));
              }
        }
      }
      team.sync();
      if (grad_x) {
        long k0, k1;
        team.share(p.columns, 16, k0, k1);
        for (long s = 0; s < n; ++s)
          for (long k = k0; k < k1; ++k) {
            T total = 0;
            for (long t = 0; t < team.size; ++t) total += shared[(t * n + s) * wide + k];
            grad_x[s * p.columns + k] = total;
          }
      }
    }
    if constexpr (std::is_same_v<Target, SquaredNorm>) squares[team.rank] = backward.sink.sum_of_squares;
  });
  if constexpr (std::is_same_v<Target, SquaredNorm>) {
    *target.total = 0;
    for (double s : squares) *target.total += s;
  }
}

#define FASTMAF_BACKWARD(T, Source, Target)                                                                            \
  template void linear_backward(const Packed<const T>&, const Source&, const T*, long, T*, T*, const Target&, long);
#define FASTMAF_TARGETS(T, Source)                 \
  FASTMAF_BACKWARD(T, Source, WriteGradient<T>)    \
  FASTMAF_BACKWARD(T, Source, AdamStep<T>)         \
  FASTMAF_BACKWARD(T, Source, NoWeightGradient)    \
  FASTMAF_BACKWARD(T, Source, SquaredNorm)
FASTMAF_TARGETS(float, LinearGradient<float>)
FASTMAF_TARGETS(float, AffineGradient<float>)
FASTMAF_TARGETS(double, LinearGradient<double>)
FASTMAF_TARGETS(double, AffineGradient<double>)

}  // namespace fastmaf
