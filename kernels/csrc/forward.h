// The forward passes of layers, by a team: who multiplies which panels, and what is made of the products.
//
// A layer with more columns than rows is cut into strips of columns, whose products are added up in order; another one into runs of
// panels. The cuts depend on shapes alone, so a result does not depend on the threads.
#pragma once

#include <vector>

#include "affine_rows.h"
#include "products.h"

namespace fastmaf {
namespace FASTMAF_ISA {

inline constexpr int64_t kChunk = 128;  // samples that go through a weight together

// A thread that gets less than this many multiply-adds costs more to wake than it saves.
inline constexpr double kWorkPerThread = 65536;

// Into how many parts the work on a layer is cut.
template <class W>
int64_t parts_of(const Panels<W>& w, int64_t n) {
  const double work = static_cast<double>(w.starts[w.count()]) * kPanel * std::max(1.0, n / 8.0);
  return std::clamp<int64_t>(static_cast<int64_t>(work / (kWorkPerThread / 2)), 1, 128);
}

template <class W>
int64_t useful_threads(const Panels<W>& w, int64_t n, int64_t threads) {
  const double work = static_cast<double>(w.starts[w.count()]) * kPanel * n;
  return std::max<int64_t>(1, std::min(threads, static_cast<int64_t>(work / kWorkPerThread)));
}

// Numbers that `multiply` shares out to its epilogues as parts.
template <class W>
int64_t forward_parts(const Panels<W>& w, const Tiles& tiles) {
  return w.columns > w.rows ? tiles.count * ((w.count() + kGroupPanels - 1) / kGroupPanels) : parts_of(w, tiles.n);
}

// Calls epilogue(part, tile, row, rows, c, c_rows) with the products c of some rows of one tile, laid out as in `products`; rows that the
// layer does not have give anything, up to whole pairs of panels.
template <class T, class W, class Epilogue>
void multiply(const Team& team, const Panels<W>& w, const T* bias_of_rows, const Tiles& tiles, const T* x, const Epilogue& epilogue) {
  const Bias<T> bias(bias_of_rows, w.rows);
  const int64_t panels = w.count(), padded = (panels + 1) / 2 * kPairRows + kPanel;  // no power of two
  const auto input = [](int64_t numbers) { return Scratch::get<bfloat16>(Scratch::kInput, numbers); };
  if (w.columns > w.rows) {
    const int64_t strip = std::clamp<int64_t>(round_up(65536 / tiles.n, 64), 64, 1024), strips = (w.columns + strip - 1) / strip;
    const int64_t numel = tiles.numel(padded), groups = (panels + kGroupPanels - 1) / kGroupPanels;
    T* shared = Scratch::get<T>(Scratch::kShared, strips * numel);
    team.each(strips, [&](int64_t i) {
      const int64_t k0 = i * strip, k1 = std::min(k0 + strip, w.columns);
      const Operand<T> operand = operand_of(Team(1), w, tiles, x, k0, k1, input);
      const UnitInUse unit(operand.parts != nullptr);
      for (int64_t p = 0; p < panels; p += 2) {
        const int64_t both = std::min<int64_t>(2, panels - p);
        if (w.visible(p + both - 1) > k0 || i == 0)
          products(w, tiles, p, both, k0, k1, operand, shared + i * numel + row_at(tiles, p * kPanel), padded,
                   i == 0 ? bias.of(p) : kZeros<T>);
      }
    });
    team.each(tiles.count * groups, [&](int64_t part) {
      const int64_t t = part / groups, p0 = part % groups * kGroupPanels, p1 = std::min(p0 + kGroupPanels, panels);
      const int64_t runs = tiles.wide ? 1 : tiles.size(t), run = kPairRows * (tiles.wide ? kWide : 1);
      T* const tile = shared + tiles.offset(t, padded);
      for (int64_t p = p0; p < p1; p += 2) {
        const int64_t count = (w.visible(std::min(p + 1, panels - 1)) + strip - 1) / strip;
        for (int64_t s = 0; s < runs; ++s) {
          T* c = tile + row_at(tiles, p * kPanel) + s * padded;
          for (int64_t i = 1; i < count; ++i)
            for (int64_t j = 0; j < run; j += kLanes<T>) store(c + j, load(c + j) + load(c + i * numel + j));
        }
      }
      epilogue(part, t, p0 * kPanel, (p1 - p0) * kPanel, tile + row_at(tiles, p0 * kPanel), padded);
    });
    return;
  }
  const int64_t parts = parts_of(w, tiles.n);
  const Operand<T> operand =
      operand_of(team, w, tiles, x, 0, w.columns, [](int64_t numbers) { return Scratch::get<bfloat16>(Scratch::kShared, numbers); });
  team.each(parts, [&](int64_t part) {
    const UnitInUse unit(operand.parts != nullptr);
    const auto even = [&](double at) { return std::min<int64_t>(round_up(w.panel_at(at), 2), panels); };
    T* c = Scratch::get<T>(Scratch::kProduct, tiles.numel(kGroupRows));
    const int64_t end = even((part + 1.0) / parts);
    for (int64_t p0 = even(static_cast<double>(part) / parts); p0 < end; p0 += kGroupPanels) {
      const int64_t p1 = std::min(p0 + kGroupPanels, end);
      for (int64_t p = p0; p < p1; p += 2)
        products(w, tiles, p, std::min<int64_t>(2, p1 - p), 0, w.columns, operand, c + row_at(tiles, (p - p0) * kPanel), kGroupRows,
                 bias.of(p));
      for (int64_t t = 0; t < tiles.count; ++t)
        epilogue(part, t, p0 * kPanel, (p1 - p0) * kPanel, c + tiles.offset(t, kGroupRows), kGroupRows);
    }
  });
}

template <class T>
FASTMAF_INLINE Vec<T> activated(Vec<T> v, bool relu) {
  const Vec<T> zero = {};
  return relu ? ((v < zero) ? zero : v) : v;  // NaN stays NaN
}

// y = act(W x + bias + terms), from tiles to tiles; see add_terms.
template <class T, class W>
void linear_forward(const Team& team, const Panels<W>& w, const T* bias, const T* terms, const Tiles& tiles, const T* x, bool relu, T* y) {
  constexpr int64_t L = kLanes<T>;
  multiply<T>(team, w, bias, tiles, x, [&](int64_t, int64_t t, int64_t row, int64_t rows, T* c, int64_t c_rows) {
    const int64_t size = tiles.size(t);
    add_terms(tiles, t, terms, w.rows, row, rows, c, c_rows);
    T* to = y + tiles.offset(t, w.rows) + row * size;
    rows = std::min(rows, w.rows - row);
    if (tiles.wide || size == 1) {
      const int64_t count = rows * size, whole = count / L * L;
      for (int64_t i = 0; i < whole; i += L) store(to + i, activated<T>(load(c + i), relu));
      if (whole < count) store_part(to + whole, activated<T>(load(c + whole), relu), count - whole);
    } else {
      each_row(c, c_rows, size, rows, [&](int64_t r, int64_t s, Vec<T> v) {
        store_part(to + r * size + s, activated<T>(v, relu), std::min(L, size - s));
      });
    }
  });
}

// The output layer and its map; adds each sample's sum of log-scales to totals [forward_parts][n].
template <class T, class W>
void affine_forward(const Team& team, const Panels<W>& w, const AffineMap& map, const T* bias, const T* terms, const Tiles& tiles,
                    const T* h, const AffineTiles<T>& at, double* totals) {
  const int64_t features = w.rows / 2;
  multiply<T>(team, w, bias, tiles, h, [&](int64_t part, int64_t t, int64_t row, int64_t rows, T* c, int64_t c_rows) {
    add_terms(tiles, t, terms, w.rows, row, rows, c, c_rows);
    affine_rows(map, tiles, t, c, c_rows, row / 2, std::min(rows / 2, features - row / 2), features, at,
                totals + part * tiles.n + tiles.begin(t));
  });
}

// Adds the totals [parts][n], in order, to ladj [n] with the sign of the map, and sets them to zero.
inline void add_totals(std::vector<double>& totals, double sign, int64_t n, double* ladj) {
  for (std::size_t part = 0; part < totals.size(); part += n)
    for (int64_t s = 0; s < n; ++s) ladj[s] += sign * std::exchange(totals[part + s], 0.0);
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
