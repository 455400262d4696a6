// One pass over a weight that gives the gradient of its layer's input and does what is wanted with its own: writes it, or
// takes Adam's step with it in place, so that it is never stored and the weight is read once for both.
//
//     grad_x[n][k]  = sum_j g[n][j] W[j][k]          g: gradient of the layer's product, before its activation
//     grad_W[j][k]  = sum_n g[n][j] x[n][k]          0 where the mask hides
//
// The weight is walked in blocks of a few rows by some columns that stay in cache between the two products. A layer with
// more columns than rows is cut into strips of columns, each of which makes its own grad_x; else into parts of the rows, with
// grad_x summed over the parts in order. Threads take strips and parts as they come: the result is the same.
#pragma once

#include <utility>

#include "forward.h"
#include "gradients.h"

namespace fastmaf {

// Rows of a block. Few, so that a small batch's block is still in cache for its second product; with many samples that product
// is far away anyhow, and grad_x should be read and written less often.
inline constexpr long kBlockRows = 8, kDeepBlockRows = 32;
inline constexpr long kDeepSamples = 32;

// Columns that go together: x and grad_x of all samples for them should stay in the second-level cache.
inline long strip_columns(long n) { return std::clamp(round_up(8192 / std::max(n, 1L), 64), 64L, kMostColumns); }

template <class T, class Target>
class Backward {
 public:
  Backward(const Packed<const T>& p, long n, const Target& target) : sink(target), p_(p), n_(n) {
    if constexpr (std::is_same_v<Target, AdamStep<T>>) {
      ahead_.others[0] = target.exp_avg - p.weight;
      ahead_.others[1] = target.exp_avg_sq - p.weight;
    }
  }
  Sink<Target> sink;

  // Rows row0..row1, columns k0..k1. g, x and grad_x start at row0 and k0; grad_x null: not wanted.
  void block(long row0, long row1, long k0, long k1, const T* g, const T* x, T* grad_x) {
    p_.groups(row0, row1, n_ < kDeepSamples ? kBlockRows : kDeepBlockRows, [&](const Tile& tile, long r0, long r1) {
      const long columns = std::min(k1, p_.template visible<T>(tile, r1)) - k0;
      const T* gr = g + (r0 - row0);
      if (columns > 0) ahead_.start(p_.row(tile, r1) + k0, r1 - r0, columns, tile.width);
      if (grad_x && columns > 0) input_product(n_, r1 - r0, p_.row(tile, r0) + k0, tile.width, gr, grad_x, columns, ahead_);
      if constexpr (!std::is_same_v<Target, NoWeightGradient>)
        for (long r = r0; r < r1; r += kHigh, gr += kHigh) switch (std::min<long>(kHigh, r1 - r)) {
            case 4: weights<4>(tile, r, k0, k1, columns, gr, x); break;
            case 3: weights<3>(tile, r, k0, k1, columns, gr, x); break;
            case 2: weights<2>(tile, r, k0, k1, columns, gr, x); break;
            default: weights<1>(tile, r, k0, k1, columns, gr, x);
          }
    });
  }

 private:
  template <int R>
  void weights(const Tile& tile, long r, long k0, long k1, long columns, const T* g, const T* x) {
    if (columns > 0) weight_product<T, R>(n_, g, x, stage_, columns, ahead_);
    for (int i = 0; i < R; ++i)
      sink.run(tile.offset + (r + i - tile.row_start) * tile.width + k0, stage_ + i * kStride,
               std::min(columns, p_.prefix[r + i] - k0), std::min<long>(k1, tile.width) - k0, ahead_);
  }

  T stage_[kHigh * kStride];
  Ahead<T> ahead_;
  const Packed<const T>& p_;
  const long n_;
};

// Sets `columns` columns of every sample, in whole vectors, to zero.
template <class T>
void clear(T* strip, long n, long columns) {
  for (long s = 0; s < n; ++s) std::fill_n(strip + s * kStride, round_up(std::max(columns, 0L), kLanes<T>), T(0));
}

// Columns k0..k1 of x [n][stride], each sample's in whole vectors with zeros behind.
template <class T>
void take_columns(const T* x, long n, long stride, long k0, long k1, T* to) {
  for (long s = 0; s < n; ++s) {
    T* end = std::copy(x + s * stride + k0, x + s * stride + k1, to + s * kStride);
    std::fill(end, to + s * kStride + round_up(k1 - k0, kLanes<T>), T(0));
  }
}

// Numbers that the threads of a backward pass share.
template <class T>
long shared_numel(const Packed<const T>& p, long n, long threads) {
  // By columns: g of all rows, a strip of rows after another. By rows: each part's grad_x.
  return p.columns > p.rows ? round_up(p.rows, kStripRows) / kStripRows * n * kGradientStride
                            : most_parts(threads) * n * (round_up(p.columns, kLanes<T>) + 16);
}

// Into how many items the work is cut at most.
template <class T>
long most_items(const Packed<const T>& p, long n, long threads) {
  return p.columns > p.rows ? (p.columns + strip_columns(n) - 1) / strip_columns(n) : most_parts(threads);
}

// One layer, by a team; `shared` holds shared_numel numbers. Every thread returns when everything is done.
template <class T, class Source, class Target>
void layer_backward(Team& team, const Packed<const T>& p, const Source& source, const T* x, long n, T* grad_x, T* grad_bias,
                    const Target& target, T* shared) {
  const long strip = strip_columns(n), g_numel = n * kGradientStride;
  T* x_strip = Scratch::get<T>(Scratch::kPack, 2 * n * kStride + g_numel);
  T* grad_strip = x_strip + n * kStride;
  T* g_strip = grad_strip + n * kStride;
  T* grad = grad_x ? grad_strip : nullptr;
  Backward<T, Target> backward(p, n, target);
  const auto take_rows = [&](long r0, long r1, T* g) {
    fill(source, p.rows, n, r0, r1, g);
    if (grad_bias) sum_samples(g, r1 - r0, n, grad_bias + r0);
  };
  const auto finish = [&](long item) {
    if constexpr (std::is_same_v<Target, SquaredNorm>) target.of_item[item] = std::exchange(backward.sink.sum_of_squares, 0);
    (void)item;
  };
  if (p.columns > p.rows) {
    const auto g_of = [&](long row) { return shared + row / kStripRows * g_numel; };
    long begin, end;
    team.share(p.rows, kStripRows, begin, end);
    for (long r0 = begin; r0 < end; r0 += kStripRows) take_rows(r0, std::min(r0 + kStripRows, end), g_of(r0));
    team.sync();
    team.each((p.columns + strip - 1) / strip, [&](long item) {
      const long k0 = item * strip, k1 = std::min(k0 + strip, p.columns);
      take_columns(x, n, p.columns, k0, k1, x_strip);
      if (grad_x) clear(grad_strip, n, k1 - k0);
      for (long r0 = 0; r0 < p.rows; r0 += kStripRows)
        backward.block(r0, std::min(r0 + kStripRows, p.rows), k0, k1, g_of(r0), x_strip, grad);
      if (grad_x)
        for (long s = 0; s < n; ++s) std::copy_n(grad_strip + s * kStride, k1 - k0, grad_x + s * p.columns + k0);
      finish(item);
    });
  } else {
    const long wide = round_up(p.columns, kLanes<T>) + 16;
    const bool once = p.columns <= strip;
    if (once) take_columns(x, n, p.columns, 0, p.columns, x_strip);
    team.each_part([&](long part, double from, double to) {
      T* mine = shared + part * n * wide;
      if (grad_x) std::fill(mine, mine + n * wide, T(0));
      const long row1 = p.row_at(to, kDeepBlockRows);
      for (long r0 = p.row_at(from, kDeepBlockRows); r0 < row1; r0 += kStripRows) {
        const long r1 = std::min(r0 + kStripRows, row1);
        take_rows(r0, r1, g_strip);
        for (long k0 = 0; k0 < p.columns; k0 += strip) {
          const long k1 = std::min(k0 + strip, p.columns);
          if (!once) take_columns(x, n, p.columns, k0, k1, x_strip);
          const long seen = std::min(k1, round_up(p.prefix[r1 - 1], kLanes<T>)) - k0;
          if (grad_x) clear(grad_strip, n, seen);
          backward.block(r0, r1, k0, k1, g_strip, x_strip, grad);
          if (grad_x)
            for (long s = 0; s < n; ++s)
              for (long k = 0; k < seen; k += kLanes<T>) {
                T* sum = mine + s * wide + k0 + k;
                store(sum, load(sum) + load(grad_strip + s * kStride + k));
              }
        }
      }
      finish(part);
    });
    team.sync();
    if (grad_x) {
      long k0, k1;
      team.share(p.columns, 16, k0, k1);
      for (long s = 0; s < n; ++s)
        for (long k = k0; k < k1; ++k) {
          T total = 0;
          for (long part = 0; part < team.parts(); ++part) total += shared[(part * n + s) * wide + k];
          grad_x[s * p.columns + k] = total;
        }
    }
  }
  team.sync();
}

}  // namespace fastmaf
