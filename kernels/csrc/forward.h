// The forward passes of layers, by a team: who multiplies which panels, and what is made of the products.
//
// Samples are packed in tiles of as many as fit the registers, [column][sample]. A layer with more columns than rows is cut into
// strips of columns, whose products are added up in order; another one into runs of panels. The cuts depend on shapes alone, so a
// result does not depend on the threads.
#pragma once

#include <vector>

#include "affine_map.h"
#include "panels.h"
#include "thread_pool.h"

namespace fastmaf {
namespace FASTMAF_ISA {

inline constexpr long kPairRows = 2 * kPanel;  // rows that are multiplied together: two panels
inline constexpr long kMostTile = kMostOuter<2>;
// Panels whose products are finished before anything is made of them: a sample's numbers lie pages apart from the next one's, so that
// several cache lines of each should be used at a time.
inline constexpr long kGroupPanels = 8;
inline constexpr long kPartSamples = 8;  // whose sums over strips are one part of the work
inline constexpr long kChunk = 128;  // samples that go through a weight together

// A thread that gets less than this many multiply-adds costs more to wake than it saves.
inline constexpr double kWorkPerThread = 65536;

// 0..n in parts of nearly equal size, none larger than `most`.
struct Split {
  long n, count;
  Split(long n, long most) : n(n), count(std::max(1L, (n + most - 1) / most)) {}
  long begin(long i) const { return n / count * i + std::min(i, n % count); }
  long size(long i) const { return n / count + (i < n % count); }
};

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

// Columns k0..k1 of x [samples][stride] as [column][samples].
template <class T>
void pack(const T* x, long stride, long samples, long k0, long k1, T* to) {
  if (samples == 1) {
    std::copy(x + k0, x + k1, to);
    return;
  }
  constexpr long kBlock = 16;
  for (; k0 < k1; k0 += kBlock, to += kBlock * samples) {
    const long count = std::min(kBlock, k1 - k0);
    for (long s = 0; s < samples; ++s)
      for (long k = 0; k < count; ++k) to[k * samples + s] = x[s * stride + k0 + k];
  }
}

// C [samples][c_stride] += or = columns k0..k1 of one panel times x [column][samples]; `ahead` of them the panel is fetched.
template <class T, class W>
void panel_product(const Panels<W>& w, long p, long k0, long k1, const T* x, long samples, T* c, long c_stride, bool add, long ahead) {
  constexpr int V = std::min(kPanelVectors<T>, 2);
  const W* a = w.panel(p) + k0 * kPanel;
  const long count = std::max(0L, std::min<long>(k1, w.visible(p)) - k0);
  if (count == 0 && add) return;
  with_count<kMostTile>(samples, [&](auto s) {
    constexpr int S = decltype(s)::value;
    // The stream of a single sample is so plain that the processor fetches it itself, and better.
    for (int v = 0; v < kPanelVectors<T>; v += V)
      outer<T, V, S, 1, (S > 1)>(count, a + v * kLanes<T>, kPanel, kLanes<T>, [&](long i) { return x + (k0 + i) * S; },
                              c + v * kLanes<T>, c_stride, add, ahead);
  });
}

// The same for `panels` panels, one or two, whose rows lie one after the other in C.
template <class T, class W>
void pair_product(const Panels<W>& w, long p, long panels, long k0, long k1, const T* x, long samples, T* c, long c_stride, bool add,
                  long ahead) {
  if constexpr (kPanelVectors<T> == 1) {
    // Two vectors that share what is broadcast, where that is what takes time.
    if (panels == 2 && samples > 6) {
      const long both = std::max(0L, std::min<long>(k1, w.visible(p)) - k0);
      with_count<kMostTile>(samples, [&](auto s) {
        constexpr int S = decltype(s)::value;
        if constexpr (S > 6)
          outer<T, 2, S, 1, true>(both, w.panel(p) + k0 * kPanel, kPanel, w.panel(p + 1) - w.panel(p),
                                  [&](long i) { return x + (k0 + i) * S; }, c, c_stride, add, ahead);
      });
      panel_product(w, p + 1, k0 + both, k1, x, samples, c + kPanel, c_stride, true, ahead);
      return;
    }
  }
  for (long i = 0; i < panels; ++i) panel_product(w, p + i, k0, k1, x, samples, c + i * kPanel, c_stride, add, ahead);
}

// Columns that are multiplied before the next tile of samples takes its turn: a pair of panels should stay in the first-level cache
// meanwhile. One tile alone goes through all that it has, up to a length that keeps sums short.
inline long block_columns(long tiles) { return tiles == 1 ? 1024 : 256; }

// Calls epilogue(part, sample, row, rows, c) with the products c of some rows and one sample, without bias; rows that the layer does not
// have give zero, up to whole panels or pairs of them. part < forward_parts.
template <class T, class W, class Epilogue>
void multiply(const Team& team, const Panels<W>& w, const T* x, long n, const Epilogue& epilogue) {
  if (n == 0) return;
  const Split chunks(n, kChunk);
  const long panels = w.count(), padded = (panels + 1) / 2 * kPairRows + kPanel;  // no power of two
  for (long chunk = 0; chunk < chunks.count; ++chunk) {
    const long first = chunks.begin(chunk), samples = chunks.size(chunk);
    const T* xs = x + first * w.columns;
    const Split tiles(samples, kMostTile);
    const long block = block_columns(tiles.count);
    // All tiles of one pair of panels, columns k0..k1; `packed` starts at column `origin` of each tile.
    const auto pair = [&](long p, long k0, long k1, const T* packed, long stride, T* c, long c_stride) {
      const long end = std::max(k0, std::min<long>(k1, w.visible(std::min(p + 1, panels - 1))));
      long k = k0;
      do {
        const long stop = std::min(k + block, end);
        for (long t = 0; t < tiles.count; ++t)
          pair_product(w, p, std::min(2L, panels - p), k, stop, packed + tiles.begin(t) * stride - k0 * tiles.size(t), tiles.size(t),
                       c + tiles.begin(t) * c_stride, c_stride, k > k0, t == 0 ? kAhead : 0);
        k = stop;
      } while (k < end);
    };
    if (w.columns > w.rows) {
      const long strip = std::clamp(round_up(65536 / std::max(samples, 1L), 64L), 64L, 1024L), strips = (w.columns + strip - 1) / strip;
      T* shared = Scratch::get<T>(Scratch::kShared, strips * samples * padded);
      team.each(strips, [&](long i) {
        const long k0 = i * strip, k1 = std::min(k0 + strip, w.columns);
        T* packed = Scratch::get<T>(Scratch::kInput, strip * samples);
        for (long t = 0; t < tiles.count; ++t)
          pack(xs + tiles.begin(t) * w.columns, w.columns, tiles.size(t), k0, k1, packed + tiles.begin(t) * (k1 - k0));
        for (long p = 0; p < panels; p += 2)
          if (w.visible(std::min(p + 1, panels - 1)) > k0 || i == 0)
            pair(p, k0, k1, packed, k1 - k0, shared + i * samples * padded + p * kPanel, padded);
      });
      const Split parts(samples, kPartSamples);
      team.each(parts.count, [&](long part) {
        for (long s = parts.begin(part); s < parts.begin(part) + parts.size(part); ++s)
          for (long p = 0; p < panels; p += 2) {
            T* c = shared + s * padded + p * kPanel;
            const long count = (w.visible(std::min(p + 1, panels - 1)) + strip - 1) / strip;
            for (long i = 1; i < count; ++i)
              for (long r = 0; r < kPairRows; ++r) c[r] += c[i * samples * padded + r];
            epilogue(part, first + s, p * kPanel, kPairRows, c);
          }
      });
    } else {
      T* packed = Scratch::get<T>(Scratch::kShared, w.columns * samples);
      const auto fill = [&](long t) {
        pack(xs + tiles.begin(t) * w.columns, w.columns, tiles.size(t), 0, w.columns, packed + tiles.begin(t) * w.columns);
      };
      if (samples * w.columns < 16384)
        for (long t = 0; t < tiles.count; ++t) fill(t);
      else
        team.each(tiles.count, fill);
      const long parts = parts_of(w, samples);
      team.each(parts, [&](long part) {
        const auto even = [&](double at) { return std::min(round_up(w.panel_at(at), 2L), panels); };
        constexpr long rows = kGroupPanels * kPanel;
        T* c = Scratch::get<T>(Scratch::kProduct, samples * rows);
        const long end = even((part + 1.0) / parts);
        for (long p0 = even(static_cast<double>(part) / parts); p0 < end; p0 += kGroupPanels) {
          const long p1 = std::min(p0 + kGroupPanels, end);
          for (long p = p0; p < p1; p += 2) pair(p, 0, w.columns, packed, w.columns, c + (p - p0) * kPanel, rows);
          for (long s = 0; s < samples; ++s) epilogue(part, first + s, p0 * kPanel, (p1 - p0) * kPanel, c + s * rows);
        }
      });
    }
  }
}

// Parts that `multiply` numbers.
template <class W>
long forward_parts(const Panels<W>& w, long n) {
  return w.columns > w.rows ? kChunk / kPartSamples : parts_of(w, std::min(n, kChunk));
}

// y [n][rows] = act(W x + bias).
template <class T, class W>
void linear_forward(const Team& team, const Panels<W>& w, const T* bias, const T* x, long n, bool relu, T* y) {
  constexpr int L = kLanes<T>;
  multiply<T>(team, w, x, n, [&](long, long s, long row, long rows, const T* c) {
    T* to = y + s * w.rows + row;
    const long count = std::min(rows, w.rows - row);
    long r = 0;
    for (; r + L <= count; r += L) {
      const Vec<T> v = load(c + r) + load(bias + row + r), zero = {};
      store(to + r, relu ? ((v < zero) ? zero : v) : v);  // NaN stays NaN
    }
    for (; r < count; ++r) {
      const T v = c[r] + bias[row + r];
      to[r] = relu && v < 0 ? T(0) : v;
    }
  });
}

// z, and log_scale (null: not wanted), of some dimensions from their rows' products; returns the sum of the log-scales.
template <class T>
double affine_rows(const AffineMap& map, const T* c, const T* bias, long dims, const T* x, T* z, T* log_scale) {
  constexpr int L = kLanes<T>;
  constexpr long kNext = kGroupPanels / 2 * kPanel;  // the next group's
  Vec<T> sum = {};
  double others = 0;
  for (long d = 0; d < dims; d += L) {
    FASTMAF_PREFETCH(x + d + kNext);
    if (z != x) FASTMAF_PREFETCH(z + d + kNext);
    if (log_scale) FASTMAF_PREFETCH(log_scale + d + kNext);
    const long count = std::min<long>(L, dims - d);
    const bool whole = count == L;
    const auto rows = [&](long at) {
      const long left = std::clamp<long>(2 * dims - at, 0, L);
      return load(c + at) + (left == L ? load(bias + at) : load_part<T>(bias + at, left));
    };
    Vec<T> shift, raw;
    unzip<T>(rows(2 * d), rows(2 * d + L), shift, raw);
    const Vec<T> xv = whole ? load(x + d) : load_part<T>(x + d, count);
    const Vec<T> a = log_scale_of<T>(raw, map);
    const Vec<T> zv = map.form == kShiftFirst ? (xv - shift) * exponential(-a) : xv * exponential(a) + shift;
    whole ? store(z + d, zv) : store_part(z + d, zv, count);
    if (log_scale) whole ? store(log_scale + d, a) : store_part(log_scale + d, a, count);
    if (whole && L >= 8)
      sum += a;  // a few terms in each lane; narrow vectors would have long chains of roundings
    else
      others += lane_sum<T>(a, count);
  }
  return lane_sum<T>(sum, L) + others;
}

// The output layer and its map; adds each sample's sum of log-scales to totals [forward_parts][n]. z may be x.
template <class T, class W>
void affine_forward(const Team& team, const Panels<W>& w, const AffineMap& map, const T* bias, const T* h, const T* x, long n, T* z,
                    T* log_scale, double* totals) {
  const long features = w.rows / 2;
  multiply<T>(team, w, h, n, [&](long part, long s, long row, long rows, const T* c) {
    const long at = s * features + row / 2;
    totals[part * n + s] += affine_rows(map, c, bias + row, std::min(rows / 2, features - row / 2), x + at, z + at,
                                        log_scale ? log_scale + at : nullptr);
  });
}

// Adds the totals [parts][n], in order, to ladj [n] with the sign of the map, and sets them to zero.
inline void add_totals(std::vector<double>& totals, double sign, long n, std::vector<double>& ladj) {
  for (std::size_t part = 0; part < totals.size(); part += n)
    for (long s = 0; s < n; ++s) ladj[s] += sign * std::exchange(totals[part + s], 0.0);
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
