// A weight in panels, and the one inner loop that all passes use: an outer product of vectors and broadcast numbers, summed in registers.
//
//     C[s][v] += sum_i A[i][v] B[i][s]          v: the lanes of one or two vectors; s: up to kMostOuter broadcast numbers
//
//                     i              A                                B
//     y = W x         columns        columns of a panel               x, packed [column][sample]
//     grad_W = g x    samples        g [sample][row]                  x [sample][column]
//     grad_x = W g    rows           g, packed [row][sample]          columns of a panel, row by row
#pragma once

#include <utility>

#include "api.h"
#include "vector.h"

namespace fastmaf {
namespace FASTMAF_ISA {

inline constexpr int64_t kPanel = 16;  // rows
// Vectors of one column of a panel.
template <class T>
inline constexpr int kPanelVectors = kPanel / kLanes<T>;

// W: the type in which the weight is stored.
template <class W>
struct Panels {
  const W* weight;
  const int64_t *starts, *prefix;
  int64_t rows, columns;

  explicit Panels(const Layer& layer)
      : weight(static_cast<const W*>(layer.weight)), starts(layer.panels), prefix(layer.prefix), rows(layer.rows),
        columns(layer.columns) {}

  int64_t count() const { return (rows + kPanel - 1) / kPanel; }
  const W* panel(int64_t p) const { return weight + starts[p] * kPanel; }
  int64_t width(int64_t p) const { return starts[p + 1] - starts[p]; }
  int64_t row_end(int64_t p) const { return std::min((p + 1) * kPanel, rows); }
  // Columns that some row of the panel sees.
  int64_t visible(int64_t p) const { return prefix[row_end(p) - 1]; }
  // Columns that all 16 rows see.
  int64_t full(int64_t p) const { return (p + 1) * kPanel <= rows ? prefix[p * kPanel] : 0; }

  // The panel before which that part of the stored columns lies.
  int64_t panel_at(double part) const {
    const int64_t n = count();
    if (part >= 1) return n;
    const int64_t wanted = static_cast<int64_t>(part * static_cast<double>(starts[n] + n * kPanelCost));
    int64_t low = 0, high = n;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      (starts[middle] + middle * kPanelCost < wanted ? low = middle + 1 : high = middle);
    }
    return low;
  }

 private:
  static constexpr int64_t kPanelCost = 8;  // columns' worth of time that a panel takes besides
};

// How far ahead of its use a column that comes from memory is fetched, in numbers.
inline constexpr int64_t kAhead = 64 * kPanel;

// Registers that the sums may take; the others hold what is loaded.
inline constexpr int kSums = kRegisters == 32 ? 24 : 12;
template <int V>
inline constexpr int kMostOuter = kSums / V;

template <class Body, int... I>
FASTMAF_INLINE void choose(int64_t n, const Body& body, std::integer_sequence<int, I...>) {
  (void)((n == I + 1 && (body(std::integral_constant<int, I + 1>{}), true)) || ...);
}
// Calls body(integral_constant n), n in 1..Most.
template <int Most, class Body>
FASTMAF_INLINE void with_count(int64_t n, const Body& body) {
  choose(n, body, std::make_integer_sequence<int, Most>{});
}

struct Nothing {};

// What sums start from: zero, a number for each lane, or one for each s.
enum class Start { kZero, kLanes, kNumbers };

// C [S][c_stride], its V vectors c_step apart, += (add) or = the sum over `count` of A and B, from `start` on. Vector v of A lies v_stride
// numbers after the first; the S numbers of B's row i lie kBSample apart from b(i) on. With term i the addresses fetch(i, 0 .. kFetch)
// are fetched. kFold = 2: two rows at once, by turns in the lanes of A, and next to each other in B.
template <class T, int V, int S, int64_t kBSample, int kFetch, int kFold = 1, Start kStart = Start::kZero, class W, class B,
          class F = Nothing>
FASTMAF_INLINE void outer(int64_t count, const W* a, int64_t a_step, int64_t v_stride, const B& b, T* c, int64_t c_stride, int64_t c_step,
                          bool add, const T* start = nullptr, const F& fetch = {}) {
  constexpr int kChains = V * S >= 8 ? 1 : V * S >= 4 ? 2 : 4;  // independent sums, to hide the latency of a multiply-add
  Vec<T> sum[kChains][S][V] = {};
  if constexpr (kStart != Start::kZero) {
#pragma GCC unroll 24
    for (int s = 0; s < S; ++s)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[0][s][v] = kStart == Start::kLanes ? load(start + v * kLanes<T>) : broadcast(start[s]);
  }
  const auto step = [&](int64_t i, auto chain) FASTMAF_INLINE_LAMBDA {
    Vec<T> av[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) av[v] = load(a + i * a_step + v * v_stride);
    if constexpr (kFetch > 0) FASTMAF_PREFETCH(fetch(i, 0));
    if constexpr (kFetch > 1) FASTMAF_PREFETCH(fetch(i, 1));
    const T* row = b(i);
#pragma GCC unroll 24
    for (int s = 0; s < S; ++s) {
      Vec<T> bv;
      if constexpr (kFold == 2)
        bv = broadcast_pair(row + s * kBSample);
      else
        bv = broadcast(row[s * kBSample]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[chain][s][v] += av[v] * bv;
    }
  };
  int64_t i = 0;
  if constexpr (kChains > 1) {
    for (; i + kChains <= count; i += kChains) {
      step(i, std::integral_constant<int, 0>{});
      step(i + 1, std::integral_constant<int, 1>{});
      if constexpr (kChains > 2) step(i + 2, std::integral_constant<int, 2>{}), step(i + 3, std::integral_constant<int, 3>{});
    }
  }
  for (; i < count; ++i) step(i, std::integral_constant<int, 0>{});
#pragma GCC unroll 24
  for (int s = 0; s < S; ++s)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      Vec<T> total = sum[0][s][v];
#pragma GCC unroll 4
      for (int chain = 1; chain < kChains; ++chain) total += sum[chain][s][v];
      T* to = c + s * c_stride + v * c_step;
      store(to, add ? load(to) + total : total);
    }
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
