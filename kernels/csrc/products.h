// Products of panels and tiles of samples, before anything is made of them: of narrow tiles with vectors of rows, of wide ones with vectors
// of samples, or by the matrix unit.
#pragma once

#include <atomic>

#include "amx.h"
#include "thread_pool.h"
#include "tiles.h"

namespace fastmaf {
namespace FASTMAF_ISA {

inline constexpr int64_t kPairRows = 2 * kPanel;  // rows that are multiplied together: two panels
// Columns that are multiplied before the next tile takes its turn, so that a pair of panels stays in the first-level cache meanwhile.
inline constexpr int64_t kBlockColumns = 128;

// Biases by panels, with zeros behind the last row.
template <class T>
class Bias {
 public:
  // null: no bias.
  Bias(const T* bias, int64_t rows) : bias_(bias), pair_((rows - 1) / kPairRows) {
    if (bias) std::copy(bias + pair_ * kPairRows, bias + rows, last_);
  }
  // Of panels p and, where p is even, p + 1.
  const T* of(int64_t p) const { return bias_ && p / 2 < pair_ ? bias_ + p * kPanel : last_ + p % 2 * kPanel; }

 private:
  const T* bias_;
  int64_t pair_;
  T last_[kPairRows] = {};
};

template <class T>
inline const T kZeros[kPairRows] = {};

// c [samples][c_stride] += (add) or = start plus columns k0..k1 of a panel times a narrow tile; `ahead` of them the panel is fetched.
template <class T, class W>
void narrow_product(const Panels<W>& w, int64_t p, int64_t k0, int64_t k1, const T* x, int64_t samples, T* c, int64_t c_stride, bool add,
                    const T* start, int64_t ahead) {
  constexpr int V = std::min(kPanelVectors<T>, 2);
  const W* a = w.panel(p) + k0 * kPanel;
  const int64_t count = std::max<int64_t>(0, std::min<int64_t>(k1, w.visible(p)) - k0);
  if (count == 0 && add) return;
  with_count<kMostNarrow>(samples, [&](auto s) {
    constexpr int S = decltype(s)::value;
    // The stream of a single sample is so plain that the processor fetches it itself, and better.
    for (int v = 0; v < kPanelVectors<T>; v += V)
      outer<T, V, S, 1, (S > 1 ? V : 0), 1, Start::kLanes>(
          count, a + v * kLanes<T>, kPanel, kLanes<T>, [&](int64_t i) { return x + (k0 + i) * S; }, c + v * kLanes<T>, c_stride, kLanes<T>,
          add, start + v * kLanes<T>, [&](int64_t i, int f) { return a + (v + f) * kLanes<T> + i * kPanel + ahead; });
  });
}

// The same for `panels` panels, one or two, whose rows lie one after the other in c.
template <class T, class W>
void narrow_products(const Panels<W>& w, int64_t p, int64_t panels, int64_t k0, int64_t k1, const T* x, int64_t samples, T* c,
                     int64_t c_stride, bool add, const T* start, int64_t ahead) {
  if constexpr (kPanelVectors<T> == 1) {
    // Two vectors that share what is broadcast, where that is what takes time.
    if (panels == 2 && samples > 6) {
      const int64_t both = std::max<int64_t>(0, std::min<int64_t>(k1, w.visible(p)) - k0);
      with_count<kMostNarrow>(samples, [&](auto s) {
        constexpr int S = decltype(s)::value;
        if constexpr (S > 6)
          outer<T, 2, S, 1, 2, 1, Start::kLanes>(both, w.panel(p) + k0 * kPanel, kPanel, w.panel(p + 1) - w.panel(p),
                                                 [&](int64_t i) { return x + (k0 + i) * S; }, c, c_stride, kPanel, add, start,
                                                 [&](int64_t i, int f) { return w.panel(p + f) + (k0 + i) * kPanel + ahead; });
      });
      narrow_product(w, p + 1, k0 + both, k1, x, samples, c + kPanel, c_stride, true, kZeros<T>, ahead);
      return;
    }
  }
  for (int64_t i = 0; i < panels; ++i)
    narrow_product(w, p + i, k0, k1, x, samples, c + i * kPanel, c_stride, add, start + i * kPanel, ahead);
}

// Columns of a panel as T.
template <class T, class W>
const T* widened(const W* columns, int64_t count, T* memory) {
  if constexpr (std::is_same_v<T, W>) return columns;
  for (int64_t i = 0; i < count * kPanel; i += kLanes<T>) store(memory + i, load(columns + i));
  return memory;
}

// c [tile][c_rows][16] += (add) or = start plus columns k0..k1 of a panel times `count` wide tiles, x [tile][columns][16]. `next`: the
// weights that are read afterwards.
template <class T, class W>
void wide_product(const Panels<W>& w, int64_t p, int64_t k0, int64_t k1, const T* x, int64_t count, T* c, int64_t c_rows, bool add,
                  const T* start, const W* next) {
  constexpr int L = kLanes<T>, kVectors = std::min<int>(kWide / L, 2), kRows = kRegisters == 32 ? 16 / kVectors : 4;
  k1 = std::max(k0, std::min<int64_t>(k1, w.visible(p)));
  if (k0 == k1 && add) return;
  alignas(64) T memory[std::is_same_v<T, W> ? 1 : kBlockColumns * kPanel];
  do {
    const int64_t stop = std::min(k0 + kBlockColumns, k1), columns = stop - k0;
    const W* weight = w.panel(p) + k0 * kPanel;
    const T* a = widened(weight, columns, memory);
    for (int64_t t = 0; t < count; ++t) {
      // Each tile fetches its share of the columns that come next, so that memory is read all the time.
      const W* fetch = (stop < k1 ? weight + columns * kPanel : next) + t * columns / count * kPanel;
      const int64_t step = kPanel / count;
      const T* from = x + (t * w.columns + k0) * kWide;
      T* to = c + t * c_rows * kWide;
      for (int64_t v = 0; v < kWide; v += kVectors * L)
        for (int64_t r = 0; r < kPanel; r += kRows) {
          const auto row = [&](int64_t i) { return a + i * kPanel + r; };
          outer<T, kVectors, kRows, 1, 1, 1, Start::kNumbers>(columns, from + v, kWide, L, row, to + r * kWide + v, kWide, L, add,
                                                              start + r, [&](int64_t i, int) { return fetch + i * step; });
        }
    }
    k0 = stop, add = true, start = kZeros<T>;
  } while (k0 < k1);
}

// Activations of a layer from some column on, and those of wide tiles once more as the matrix unit wants them (null: it is not used).
template <class T>
struct Operand {
  const T* x;
  const bfloat16* parts = nullptr;
  int64_t parts_stride = 0;  // of a tile
};

// Products of one or two panels and all tiles. Rows of c lie, behind one another, tile by tile and `c_rows` of them reserved, as
// [row][16] of a wide tile and as [sample][row] of a narrow one.
template <class T, class W>
void products(const Panels<W>& w, const Tiles& tiles, int64_t p, int64_t panels, int64_t k0, int64_t k1, const Operand<T>& operand, T* c,
              int64_t c_rows, const T* start) {
#if defined(FASTMAF_HAS_AMX)
  if constexpr (std::is_same_v<W, bfloat16>)
    if (operand.parts) {
      for (int64_t t = 0; t < tiles.count; ++t)
        for (int64_t r = 0; r < panels * kPanel; ++r) store(c + (t * c_rows + r) * kWide, broadcast(start[r]));
      return multiply_tiles(w, p, panels, k0, k1, operand.parts, operand.parts_stride, tiles.count, c, c_rows * kWide, true);
    }
#endif
  if (tiles.wide) {
    for (int64_t i = 0; i < panels; ++i)
      wide_product(w, p + i, k0, k1, operand.x, tiles.count, c + i * kPanel * kWide, c_rows, false, start + i * kPanel,
                   w.panel(std::min(p + i + 1, w.count() - 1)) + k0 * kPanel);
    return;
  }
  const int64_t end = std::max(k0, std::min<int64_t>(k1, w.visible(p + panels - 1)));
  const int64_t block = tiles.count == 1 ? 1024 : 256;  // sums should be short even so
  int64_t k = k0;
  do {
    const int64_t stop = std::min(k + block, end);
    for (int64_t t = 0; t < tiles.count; ++t)
      narrow_products(w, p, panels, k, stop, operand.x + tiles.offset(t, w.columns), tiles.size(t), c + tiles.offset(t, c_rows), c_rows,
                      k > k0, k > k0 ? kZeros<T> : start, t == 0 ? kAhead : 0);
    k = stop;
  } while (k < end);
}

// Columns k0..k1 of wide tiles for the matrix unit, in memory that get(numbers) gives. Null where it is not used: without one, with
// other weights, for few samples, and where a number is not finite.
template <class T, class W, class Get>
Operand<T> operand_of(const Team& team, const Panels<W>& w, const Tiles& tiles, const T* x, int64_t k0, int64_t k1, const Get& get) {
#if defined(FASTMAF_HAS_AMX)
  if constexpr (std::is_same_v<W, bfloat16>)
    if (tiles.wide && amx_ready()) {
      const int64_t stride = split_numbers(k1 - k0);
      bfloat16* parts = get(tiles.count * stride);
      std::atomic<bool> finite{true};
      team.each(tiles.count, [&](int64_t t) {
        if (!split_activations(x + (t * w.columns + k0) * kWide, k1 - k0, parts + t * stride)) finite = false;
      });
      if (finite) return {x, parts, stride};
    }
#endif
  return {x};
}

// Where row r of a tile starts in such products.
inline int64_t row_at(const Tiles& tiles, int64_t r) { return tiles.wide ? r * kWide : r; }

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
