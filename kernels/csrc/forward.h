// The forward passes of both kinds of layers, by a team: who multiplies which rows, and what is made of the products.
#pragma once

#include "bound.h"
#include "matmul.h"
#include "thread_team.h"

namespace fastmaf {

// A thread that gets less than this many multiply-adds costs more to wake than it saves.
inline constexpr double kWorkPerThread = 65536;

template <class W>
long useful_threads(const Packed<W>& p, long n, long threads) {
  const double work = p.area_before(p.rows) * n;
  return std::max(1L, std::min(threads, static_cast<long>(work / kWorkPerThread)));
}

// Room for the activations of every tile of a batch in turn.
template <class T>
long pack_numel(long columns, long n) {
  const long last = n % kTileSamples;
  const long whole = n >= kTileSamples ? Activations<T>::numel(columns, Shape::of<T>(kTileSamples)) : 0;
  return std::max(whole, Activations<T>::numel(columns, Shape::of<T>(last)));
}

// Calls epilogue(part, row0, row1, C) with C = W x for the rows of every part of the team's work, block by block.
template <class T, class W, class Epilogue>
void forward_tile(const Packed<const W>& p, const T* x, Shape shape, T* pack, Team& team, Epilogue&& epilogue) {
  const Activations<T> a = Activations<T>::over(pack, p.columns, shape);
  long begin, end;
  team.share(p.columns, 64, begin, end);
  a.fill(x, p.columns, begin, end);
  team.sync();
  // Where x is wider than one block of columns, many rows share it while it is in cache; else a block's product should be.
  const long rows = (p.columns > kDotColumns ? 40 : 16) * kGroupRows;
  T* memory = Scratch::get<T>(Scratch::kProduct, rows * shape.padded);
  const Product<T> c = shape.dot ? Product<T>{memory, 1, rows} : Product<T>{memory, shape.padded, 1};
  team.each_part([&](long part, double from, double to) {
    const long row1 = p.row_at(to, kGroupRows);
    for (long r = p.row_at(from, kGroupRows); r < row1; r += rows) {
      const long r1 = std::min(r + rows, row1);
      std::fill(memory, memory + rows * shape.padded, T(0));
      multiply_blocked(p, r, r1, a, c);
      epilogue(part, r, r1, c);
    }
  });
  team.sync();  // before another tile of samples takes the same memory
}

// y [n][rows] = act(W x + bias). `pack` is shared: pack_numel numbers. Every thread returns when all of y is there.
template <class T, class W>
void linear_forward(Team& team, const Packed<const W>& p, const T* bias, const T* x, long n, bool relu, T* y, T* pack) {
  for (long n0 = 0; n0 < n; n0 += kTileSamples) {
    const Shape shape = Shape::of<T>(std::min(n - n0, kTileSamples));
    forward_tile<T, W>(p, x + n0 * p.columns, shape, pack, team, [&](long, long row0, long row1, const Product<T>& c) {
      for (long s = 0; s < shape.samples; ++s) {
        const T* from = c.data + s * c.sample;
        T* to = y + (n0 + s) * p.rows;
        for (long r = row0; r < row1; ++r) {
          const T value = from[(r - row0) * c.row] + bias[r];
          to[r] = relu && value < 0 ? T(0) : value;  // NaN stays NaN
        }
      }
    });
  }
}

// The output layer and the affine transform: the [n][2D] product lives in a block of rows at a time. Adds each sample's sum of
// log-scales over a part's rows to totals [part][n]; log_scale null: not wanted.
template <class T, class W>
void affine_forward(Team& team, const Packed<const W>& p, const T* bias, const T* h, const T* x, long n, Bound bound, T* z,
                    T* log_scale, double* totals, T* pack) {
  constexpr int L = kLanes<T>;
  const long features = p.rows / 2;
  for (long n0 = 0; n0 < n; n0 += kTileSamples) {
    const Shape shape = Shape::of<T>(std::min(n - n0, kTileSamples));
    forward_tile<T, W>(p, h + n0 * p.columns, shape, pack, team, [&](long part, long row0, long row1, const Product<T>& c) {
      constexpr long kDims = 20 * kGroupRows;
      T shift[kDims], raw[kDims];
      const long d0 = row0 / 2, dims = (row1 - row0) / 2;
      for (long s = 0; s < shape.samples; ++s) {
        const T *from = c.data + s * c.sample, *b = bias + row0;
        if (c.row == 1)  // a loop that a compiler makes vectors of
          for (long d = 0; d < dims; ++d) shift[d] = from[2 * d] + b[2 * d], raw[d] = from[2 * d + 1] + b[2 * d + 1];
        else
          for (long d = 0; d < dims; ++d) {
            shift[d] = from[2 * d * c.row] + b[2 * d];
            raw[d] = from[(2 * d + 1) * c.row] + b[2 * d + 1];
          }
        const long at = (n0 + s) * features + d0;
        double sums[L] = {}, sum_a = 0;
        for (long d = 0; d < dims; d += L) {
          const long count = std::min<long>(L, dims - d);
          const bool whole = count == L;
          const Vec<T> u = whole ? load(raw + d) : load_part<T>(raw + d, count);
          const Vec<T> m = whole ? load(shift + d) : load_part<T>(shift + d, count);
          const Vec<T> xv = whole ? load(x + at + d) : load_part<T>(x + at + d, count);
          const Vec<T> a = bound_log_scale<T>(u, bound);
          const Vec<T> zv = (xv - m) * exponential(-a);
          whole ? store(z + at + d, zv) : store_part(z + at + d, zv, count);
          if (log_scale) whole ? store(log_scale + at + d, a) : store_part(log_scale + at + d, a, count);
          T terms[L];  // zero beyond count: so is u there, and what no bound makes of it
          store(terms, a);
          for (int j = 0; j < L; ++j) sums[j] += terms[j];
        }
        for (const double one : sums) sum_a += one;
        totals[part * n + n0 + s] += sum_a;
      }
    });
  }
}

// ladj [n] = -(the totals [parts][n], summed in the order of the parts: repeatable, whichever thread took which).
template <class T>
void sum_totals(const std::vector<double>& totals, long n, T* ladj) {
  for (long s = 0; s < n; ++s) {
    double total = 0;
    for (std::size_t at = s; at < totals.size(); at += n) total += totals[at];
    ladj[s] = static_cast<T>(-total);
  }
}

}  // namespace fastmaf
