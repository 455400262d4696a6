// The forward passes of layers, by a team: who multiplies which panels, and what is made of the products.
//
// A layer with more columns than rows is cut into strips of columns, whose products are added up in order; another one into runs of
// panels. The cuts depend on shapes alone, so a result does not depend on the threads.
#pragma once

#include <atomic>
#include <vector>

#include "affine_map.h"
#include "amx.h"
#include "thread_pool.h"
#include "tiles.h"

namespace fastmaf {
namespace FASTMAF_ISA {

inline constexpr long kPairRows = 2 * kPanel;  // rows that are multiplied together: two panels
// Panels whose products are finished before anything is made of them.
inline constexpr long kGroupPanels = 8;
inline constexpr long kGroupRows = kGroupPanels * kPanel;
inline constexpr long kChunk = 128;  // samples that go through a weight together
// Columns that are multiplied before the next tile takes its turn, so that a pair of panels stays in the first-level cache meanwhile.
inline constexpr long kBlockColumns = 128;

// A thread that gets less than this many multiply-adds costs more to wake than it saves.
inline constexpr double kWorkPerThread = 65536;

// Into how many parts the work on a layer is cut.
template <class W>
long parts_of(const Panels<W>& w, long n) {
  const double work = static_cast<double>(w.starts[w.count()]) * kPanel * std::max(1.0, n / 8.0);
  return std::clamp(static_cast<long>(work / (kWorkPerThread / 2)), 1L, 128L);
}

template <class W>
long useful_threads(const Panels<W>& w, long n, long threads) {
  const double work = static_cast<double>(w.starts[w.count()]) * kPanel * n;
  return std::max(1L, std::min(threads, static_cast<long>(work / kWorkPerThread)));
}

// Biases by panels, with zeros behind the last row.
template <class T>
class Bias {
 public:
  // null: no bias.
  Bias(const T* bias, long rows) : bias_(bias), pair_((rows - 1) / kPairRows) {
    if (bias) std::copy(bias + pair_ * kPairRows, bias + rows, last_);
  }
  // Of panels p and, where p is even, p + 1.
  const T* of(long p) const { return bias_ && p / 2 < pair_ ? bias_ + p * kPanel : last_ + p % 2 * kPanel; }

 private:
  const T* bias_;
  long pair_;
  T last_[kPairRows] = {};
};

template <class T>
inline const T kZeros[kPairRows] = {};

// c [samples][c_stride] += (add) or = start plus columns k0..k1 of a panel times a narrow tile; `ahead` of them the panel is fetched.
template <class T, class W>
void narrow_product(const Panels<W>& w, long p, long k0, long k1, const T* x, long samples, T* c, long c_stride, bool add, const T* start,
                    long ahead) {
  constexpr int V = std::min(kPanelVectors<T>, 2);
  const W* a = w.panel(p) + k0 * kPanel;
  const long count = std::max(0L, std::min<long>(k1, w.visible(p)) - k0);
  if (count == 0 && add) return;
  with_count<kMostNarrow>(samples, [&](auto s) {
    constexpr int S = decltype(s)::value;
    // The stream of a single sample is so plain that the processor fetches it itself, and better.
    for (int v = 0; v < kPanelVectors<T>; v += V)
      outer<T, V, S, 1, (S > 1 ? V : 0), 1, Start::kLanes>(count, a + v * kLanes<T>, kPanel, kLanes<T>,
                                                           [&](long i) { return x + (k0 + i) * S; }, c + v * kLanes<T>, c_stride, kLanes<T>,
                                                           add, start + v * kLanes<T>,
                                                           [&](long i, int f) { return a + (v + f) * kLanes<T> + i * kPanel + ahead; });
  });
}

// The same for `panels` panels, one or two, whose rows lie one after the other in c.
template <class T, class W>
void narrow_products(const Panels<W>& w, long p, long panels, long k0, long k1, const T* x, long samples, T* c, long c_stride, bool add,
                     const T* start, long ahead) {
  if constexpr (kPanelVectors<T> == 1) {
    // Two vectors that share what is broadcast, where that is what takes time.
    if (panels == 2 && samples > 6) {
      const long both = std::max(0L, std::min<long>(k1, w.visible(p)) - k0);
      with_count<kMostNarrow>(samples, [&](auto s) {
        constexpr int S = decltype(s)::value;
        if constexpr (S > 6)
          outer<T, 2, S, 1, 2, 1, Start::kLanes>(both, w.panel(p) + k0 * kPanel, kPanel, w.panel(p + 1) - w.panel(p),
                                                 [&](long i) { return x + (k0 + i) * S; }, c, c_stride, kPanel, add, start,
                                                 [&](long i, int f) { return w.panel(p + f) + (k0 + i) * kPanel + ahead; });
      });
      narrow_product(w, p + 1, k0 + both, k1, x, samples, c + kPanel, c_stride, true, kZeros<T>, ahead);
      return;
    }
  }
  for (long i = 0; i < panels; ++i)
    narrow_product(w, p + i, k0, k1, x, samples, c + i * kPanel, c_stride, add, start + i * kPanel, ahead);
}

// Columns of a panel as T.
template <class T, class W>
const T* widened(const W* columns, long count, T* memory) {
  if constexpr (std::is_same_v<T, W>) return columns;
  for (long i = 0; i < count * kPanel; i += kLanes<T>) store(memory + i, load(columns + i));
  return memory;
}

// c [tile][c_rows][16] += (add) or = start plus columns k0..k1 of a panel times `count` wide tiles, x [tile][columns][16]. `next`: the
// weights that are read afterwards.
template <class T, class W>
void wide_product(const Panels<W>& w, long p, long k0, long k1, const T* x, long count, T* c, long c_rows, bool add, const T* start,
                  const W* next) {
  constexpr int L = kLanes<T>, kVectors = std::min<int>(kWide / L, 2), kRows = kRegisters == 32 ? 16 / kVectors : 4;
  k1 = std::max(k0, std::min<long>(k1, w.visible(p)));
  if (k0 == k1 && add) return;
  alignas(64) T memory[std::is_same_v<T, W> ? 1 : kBlockColumns * kPanel];
  do {
    const long stop = std::min(k0 + kBlockColumns, k1), columns = stop - k0;
    const W* weight = w.panel(p) + k0 * kPanel;
    const T* a = widened(weight, columns, memory);
    for (long t = 0; t < count; ++t) {
      // Each tile fetches its share of the columns that come next, so that memory is read all the time.
      const W* fetch = (stop < k1 ? weight + columns * kPanel : next) + t * columns / count * kPanel;
      const long step = kPanel / count;
      const T* from = x + (t * w.columns + k0) * kWide;
      T* to = c + t * c_rows * kWide;
      for (long v = 0; v < kWide; v += kVectors * L)
        for (long r = 0; r < kPanel; r += kRows) {
          const auto row = [&](long i) { return a + i * kPanel + r; };
          outer<T, kVectors, kRows, 1, 1, 1, Start::kNumbers>(columns, from + v, kWide, L, row, to + r * kWide + v, kWide, L, add, start + r,
                                                              [&](long i, int) { return fetch + i * step; });
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
  long parts_stride = 0;  // of a tile
};

// Products of one or two panels and all tiles. Rows of c lie, behind one another, tile by tile and `c_rows` of them reserved, as
// [row][16] of a wide tile and as [sample][row] of a narrow one.
template <class T, class W>
void products(const Panels<W>& w, const Tiles& tiles, long p, long panels, long k0, long k1, const Operand<T>& operand, T* c, long c_rows,
              const T* start) {
#if defined(FASTMAF_HAS_AMX)
  if constexpr (std::is_same_v<W, bfloat16>)
    if (operand.parts) {
      for (long t = 0; t < tiles.count; ++t)
        for (long r = 0; r < panels * kPanel; ++r) store(c + (t * c_rows + r) * kWide, broadcast(start[r]));
      return multiply_tiles(w, p, panels, k0, k1, operand.parts, operand.parts_stride, tiles.count, c, c_rows * kWide, true);
    }
#endif
  if (tiles.wide) {
    for (long i = 0; i < panels; ++i)
      wide_product(w, p + i, k0, k1, operand.x, tiles.count, c + i * kPanel * kWide, c_rows, false, start + i * kPanel,
                   w.panel(std::min(p + i + 1, w.count() - 1)) + k0 * kPanel);
    return;
  }
  const long end = std::max(k0, std::min<long>(k1, w.visible(p + panels - 1)));
  const long block = tiles.count == 1 ? 1024 : 256;  // sums should be short even so
  long k = k0;
  do {
    const long stop = std::min(k + block, end);
    for (long t = 0; t < tiles.count; ++t)
      narrow_products(w, p, panels, k, stop, operand.x + tiles.offset(t, w.columns), tiles.size(t), c + tiles.offset(t, c_rows), c_rows,
                      k > k0, k > k0 ? kZeros<T> : start, t == 0 ? kAhead : 0);
    k = stop;
  } while (k < end);
}

// Columns k0..k1 of wide tiles for the matrix unit, in memory that get(numbers) gives. Null where it is not used: without one, with
// other weights, for few samples, and where a number is not finite.
template <class T, class W, class Get>
Operand<T> operand_of(const Team& team, const Panels<W>& w, const Tiles& tiles, const T* x, long k0, long k1, const Get& get) {
#if defined(FASTMAF_HAS_AMX)
  if constexpr (std::is_same_v<W, bfloat16>)
    if (tiles.wide && amx_ready()) {
      const long stride = split_numbers(k1 - k0);
      bfloat16* parts = get(tiles.count * stride);
      std::atomic<bool> finite{true};
      team.each(tiles.count, [&](long t) {
        if (!split_activations(x + (t * w.columns + k0) * kWide, k1 - k0, parts + t * stride)) finite = false;
      });
      if (finite) return {x, parts, stride};
    }
#endif
  return {x};
}

// Where row r of a tile starts in such products.
inline long row_at(const Tiles& tiles, long r) { return tiles.wide ? r * kWide : r; }

// Numbers that `multiply` shares out to its epilogues as parts.
template <class W>
long forward_parts(const Panels<W>& w, const Tiles& tiles) {
  return w.columns > w.rows ? tiles.count * ((w.count() + kGroupPanels - 1) / kGroupPanels) : parts_of(w, tiles.n);
}

// Calls epilogue(part, tile, row, rows, c, c_rows) with the products c of some rows of one tile, laid out as in `products`; rows that the
// layer does not have give anything, up to whole pairs of panels.
template <class T, class W, class Epilogue>
void multiply(const Team& team, const Panels<W>& w, const T* bias_of_rows, const Tiles& tiles, const T* x, const Epilogue& epilogue) {
  const Bias<T> bias(bias_of_rows, w.rows);
  const long panels = w.count(), padded = (panels + 1) / 2 * kPairRows + kPanel;  // no power of two
  const auto input = [](long numbers) { return Scratch::get<bfloat16>(Scratch::kInput, numbers); };
  if (w.columns > w.rows) {
    const long strip = std::clamp(round_up(65536 / tiles.n, 64L), 64L, 1024L), strips = (w.columns + strip - 1) / strip;
    const long numel = tiles.numel(padded), groups = (panels + kGroupPanels - 1) / kGroupPanels;
    T* shared = Scratch::get<T>(Scratch::kShared, strips * numel);
    team.each(strips, [&](long i) {
      const long k0 = i * strip, k1 = std::min(k0 + strip, w.columns);
      const Operand<T> operand = operand_of(Team(1), w, tiles, x, k0, k1, input);
      const UnitInUse unit(operand.parts != nullptr);
      for (long p = 0; p < panels; p += 2) {
        const long both = std::min(2L, panels - p);
        if (w.visible(p + both - 1) > k0 || i == 0)
          products(w, tiles, p, both, k0, k1, operand, shared + i * numel + row_at(tiles, p * kPanel), padded, i == 0 ? bias.of(p) : kZeros<T>);
      }
    });
    team.each(tiles.count * groups, [&](long part) {
      const long t = part / groups, p0 = part % groups * kGroupPanels, p1 = std::min(p0 + kGroupPanels, panels);
      const long runs = tiles.wide ? 1 : tiles.size(t), run = kPairRows * (tiles.wide ? kWide : 1);
      T* const tile = shared + tiles.offset(t, padded);
      for (long p = p0; p < p1; p += 2) {
        const long count = (w.visible(std::min(p + 1, panels - 1)) + strip - 1) / strip;
        for (long s = 0; s < runs; ++s) {
          T* c = tile + row_at(tiles, p * kPanel) + s * padded;
          for (long i = 1; i < count; ++i)
            for (long j = 0; j < run; j += kLanes<T>) store(c + j, load(c + j) + load(c + i * numel + j));
        }
      }
      epilogue(part, t, p0 * kPanel, (p1 - p0) * kPanel, tile + row_at(tiles, p0 * kPanel), padded);
    });
    return;
  }
  const long parts = parts_of(w, tiles.n);
  const Operand<T> operand =
      operand_of(team, w, tiles, x, 0, w.columns, [](long numbers) { return Scratch::get<bfloat16>(Scratch::kShared, numbers); });
  team.each(parts, [&](long part) {
    const UnitInUse unit(operand.parts != nullptr);
    const auto even = [&](double at) { return std::min(round_up(w.panel_at(at), 2L), panels); };
    T* c = Scratch::get<T>(Scratch::kProduct, tiles.numel(kGroupRows));
    const long end = even((part + 1.0) / parts);
    for (long p0 = even(static_cast<double>(part) / parts); p0 < end; p0 += kGroupPanels) {
      const long p1 = std::min(p0 + kGroupPanels, end);
      for (long p = p0; p < p1; p += 2)
        products(w, tiles, p, std::min(2L, p1 - p), 0, w.columns, operand, c + row_at(tiles, (p - p0) * kPanel), kGroupRows, bias.of(p));
      for (long t = 0; t < tiles.count; ++t)
        epilogue(part, t, p0 * kPanel, (p1 - p0) * kPanel, c + tiles.offset(t, kGroupRows), kGroupRows);
    }
  });
}

// Calls body(row of the block, numbers of its samples) for rows of a narrow tile of several samples, products c [sample][c_rows].
template <class T, class Body>
FASTMAF_INLINE void each_row(const T* c, long c_rows, long samples, long rows, const Body& body) {
  constexpr long L = kLanes<T>;
  for (long r = 0; r < rows; r += L)
    for (long s = 0; s < samples; s += L) {
      Vec<T> block[L];
      for (long i = 0; i < L; ++i) block[i] = s + i < samples ? load(c + (s + i) * c_rows + r) : Vec<T>{};
      transpose<T>(block);
      for (long j = 0; j < std::min(L, rows - r); ++j) body(r + j, s, block[j]);
    }
}

template <class T>
FASTMAF_INLINE Vec<T> activated(Vec<T> v, bool relu) {
  const Vec<T> zero = {};
  return relu ? ((v < zero) ? zero : v) : v;  // NaN stays NaN
}

// y = act(W x + bias), from tiles to tiles.
template <class T, class W>
void linear_forward(const Team& team, const Panels<W>& w, const T* bias, const Tiles& tiles, const T* x, bool relu, T* y) {
  constexpr long L = kLanes<T>;
  multiply<T>(team, w, bias, tiles, x, [&](long, long t, long row, long rows, const T* c, long c_rows) {
    const long size = tiles.size(t);
    T* to = y + tiles.offset(t, w.rows) + row * size;
    rows = std::min(rows, w.rows - row);
    if (tiles.wide || size == 1) {
      const long count = rows * size, whole = count / L * L;
      for (long i = 0; i < whole; i += L) store(to + i, activated<T>(load(c + i), relu));
      if (whole < count) store_part(to + whole, activated<T>(load(c + whole), relu), count - whole);
    } else {
      each_row(c, c_rows, size, rows, [&](long r, long s, Vec<T> v) {
        store_part(to + r * size + s, activated<T>(v, relu), std::min(L, size - s));
      });
    }
  });
}

// z of the map for x; `a` is its log-scale.
template <class T>
FASTMAF_INLINE Vec<T> mapped(const AffineMap& map, Vec<T> shift, Vec<T> a, Vec<T> x) {
  return map.form == kShiftFirst ? (x - shift) * exponential(-a) : x * exponential(a) + shift;
}

// Adds numbers [rows][size], vectors get(place), up over the rows, in runs of 8 and then in double: narrower sums would be long chains of
// roundings. Gets up to a vector behind them.
template <class T, class Get>
void add_rows(const Get& get, long rows, long size, double* sums) {
  constexpr long L = kLanes<T>, kRun = 8;
  if (size == 1) {
    for (long r = 0; r < rows; r += kRun * L) {
      Vec<T> sum = {};
      double rest = 0;
      for (long i = r; i < std::min(rows, r + kRun * L); i += L)
        if (i + L <= rows && L >= 8)
          sum += get(i);
        else
          rest += lane_sum<T>(get(i), rows - i);
      *sums += lane_sum<T>(sum, L) + rest;
    }
    return;
  }
  for (long s = 0; s < size; s += L)
    for (long r = 0; r < rows; r += kRun) {
      Vec<T> sum = {};
      for (long i = r; i < std::min(rows, r + kRun); ++i) sum += get(i * size + s);
      T lanes[L];
      store(lanes, sum);
      for (long j = 0; j < std::min(L, size - s); ++j) sums[s + j] += lanes[j];
    }
}

// The rows of one sample's products as shifts and raw log-scales, in whole vectors.
template <class T>
FASTMAF_INLINE void deal(const T* c, long dims, T* shifts, T* raws) {
  for (long d = 0; d < dims; d += kLanes<T>) {
    Vec<T> shift, raw;
    unzip<T>(load(c + 2 * d), load(c + 2 * d + kLanes<T>), shift, raw);
    store(shifts + d, shift), store(raws + d, raw);
  }
}

// Where the element-wise map of an output layer reads and writes, in tiles. z of dimension d goes to place places[d] (null: d) of z; and
// own, if not null, has all in order. log_scale may be null.
template <class T>
struct AffineTiles {
  const T* x;
  T* z;
  const int32_t* places;
  T *own, *log_scale;
};

// The map of `dims` dimensions from d0 on, of one tile; c as `multiply` gives it. Adds the log-scales to sums.
template <class T>
void affine_rows(const AffineMap& map, const Tiles& tiles, long t, const T* c, long c_rows, long d0, long dims, long features,
                 const AffineTiles<T>& at, double* sums) {
  constexpr long L = kLanes<T>, kDims = kGroupRows / 2, kMost = kDims * std::max(kWide, kMostNarrow) + L;
  const long size = tiles.size(t), first = tiles.offset(t, features), count = dims * size;
  const T* x = at.x + first + d0 * size;
  T* z = at.z + first;
  T scales[kMost];
  T* const a_of = at.log_scale && tiles.wide ? at.log_scale + first + d0 * size : scales;
  if (tiles.wide) {
    for (long d = 0; d < dims; ++d)
      for (long v = 0; v < kWide; v += L) {
        const Vec<T> a = log_scale_of<T>(load(c + (2 * d + 1) * kWide + v), map);
        const Vec<T> zv = mapped<T>(map, load(c + 2 * d * kWide + v), a, load(x + d * kWide + v));
        store(a_of + d * kWide + v, a);
        store(z + (at.places ? at.places[d0 + d] : d0 + d) * kWide + v, zv);
        if (at.own) store(at.own + first + (d0 + d) * kWide + v, zv);
      }
  } else {
    T shifts[kMost], raws[kMost], zs[kMost];
    if (size == 1)
      deal(c, dims, shifts, raws);
    else
      each_row(c, c_rows, size, 2 * dims, [&](long r, long s, Vec<T> v) {
        T* to = (r % 2 ? raws : shifts) + r / 2 * size + s;
        // What spills over lies in the next row, whose turn comes after.
        size <= L || size - s >= L ? store(to, v) : store_part(to, v, size - s);
      });
    for (long i = 0; i < count; i += L) {
      const Vec<T> a = log_scale_of<T>(load(raws + i), map);
      store(scales + i, a);
      store(zs + i, mapped<T>(map, load(shifts + i), a, i + L <= count ? load(x + i) : load_part<T>(x + i, count - i)));
    }
    if (at.log_scale) std::copy(scales, scales + count, at.log_scale + first + d0 * size);
    if (at.places)
      for (long d = 0; d < dims; ++d) std::copy(zs + d * size, zs + (d + 1) * size, z + at.places[d0 + d] * size);
    else
      std::copy(zs, zs + count, z + d0 * size);
  }
  double of_lanes[std::max(kWide, kMostNarrow)] = {};
  add_rows<T>([&](long i) { return load(a_of + i); }, dims, size, of_lanes);
  for (long s = 0; s < tiles.used(t); ++s) sums[s] += of_lanes[s];
}

// The output layer and its map; adds each sample's sum of log-scales to totals [forward_parts][n].
template <class T, class W>
void affine_forward(const Team& team, const Panels<W>& w, const AffineMap& map, const T* bias, const Tiles& tiles, const T* h,
                    const AffineTiles<T>& at, double* totals) {
  const long features = w.rows / 2;
  multiply<T>(team, w, bias, tiles, h, [&](long part, long t, long row, long rows, const T* c, long c_rows) {
    affine_rows(map, tiles, t, c, c_rows, row / 2, std::min(rows / 2, features - row / 2), features, at,
                totals + part * tiles.n + tiles.begin(t));
  });
}

// Adds the totals [parts][n], in order, to ladj [n] with the sign of the map, and sets them to zero.
inline void add_totals(std::vector<double>& totals, double sign, long n, double* ladj) {
  for (std::size_t part = 0; part < totals.size(); part += n)
    for (long s = 0; s < n; ++s) ladj[s] += sign * std::exchange(totals[part + s], 0.0);
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
