// What the forward passes of both kinds of layers share: who multiplies which rows.
#pragma once

#include "matmul.h"
#include "team.h"

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

// Calls epilogue(row0, row1, C) with C = W x for this thread's rows, block by block.
template <class T, class W, class Epilogue>
void forward_tile(const Packed<const W>& p, const T* x, Shape shape, T* pack, Team& team, Epilogue&& epilogue) {
  const Activations<T> a = Activations<T>::over(pack, p.columns, shape);
  long begin, end;
  team.share(p.columns, 64, begin, end);
  a.fill(x, p.columns, begin, end);
  team.sync();
  long row0, row1;
  p.share(team.rank, team.size, kGroupRows, row0, row1);
  // Where x is wider than one block of columns, many rows share it while it is in cache; else a block's product should be.
  const long rows = (p.columns > kDotColumns ? 40 : 4) * kGroupRows;
  T* memory = Scratch::get<T>(Scratch::kProduct, rows * shape.padded);
  const Product<T> c = shape.dot ? Product<T>{memory, 1, rows} : Product<T>{memory, shape.padded, 1};
  for (long r = row0; r < row1; r += rows) {
    const long r1 = std::min(r + rows, row1);
    std::fill(memory, memory + rows * shape.padded, T(0));
    multiply_blocked(p, r, r1, a, c);
    epilogue(r, r1, c);
  }
  team.sync();  // before another tile of samples takes the same memory
}

}  // namespace fastmaf
