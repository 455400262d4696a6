// One pass over a weight that gives the gradient of its layer's input and consumes its own: writes it, or takes Adam's step with it in
// place, so that it is never stored and the weight is read once for both.
//
//     grad_x[n][k]  = sum_j g[n][j] W[j][k]          g: gradient of the layer's product, before its activation or map
//     grad_W[j][k]  = sum_n g[n][j] x[n][k]          0 where the mask hides
//
// A layer with more columns than rows is cut into strips of columns, each of which makes its own grad_x; another one into runs of
// panels, whose shares of grad_x are added up in order. The cuts depend on shapes alone.
#pragma once

#include "forward.h"
#include "gradient.h"
#include "sink.h"

namespace fastmaf {
namespace FASTMAF_ISA {

inline constexpr int64_t kChainSamples = 64;   // samples whose terms are summed in one chain of roundings
inline constexpr int64_t kFusedSamples = 256;  // with more, grad_x is formed in a pass of its own, some samples at a time

// Addresses of what the next columns of a group of panels need from memory, a cache line each, relative to their first column. One is
// fetched with each term of a product, so that memory is read all the time and not in bursts.
template <class T>
class Lines {
 public:
  void add(const T* at) {
    for (int64_t i = 0; i < kStepColumns * kPanel; i += kLine) lines_[count_++] = at + i;
  }
  // After the last one.
  void close() { std::fill(lines_ + count_, lines_ + count_ + kMostTerms, count_ > 0 ? lines_[count_ - 1] : nullptr); }
  int64_t count() const { return count_; }
  const T* const* from(int64_t line) const { return lines_ + std::min(line, count_); }

 private:
  static constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T)), kMostTerms = std::max(kGradientRows, kChainSamples);
  const T* lines_[kGradientPanels * 3 * kStepColumns * kPanel / kLine + kMostTerms];
  int64_t count_ = 0;
};

// Of the gradients of kStepColumns columns of two panels, [column][32].
inline constexpr int64_t kStage = 2 * kPanel;

// C [columns][kStage] = g x for one or two panels, whose rows start at g; x [n][x_stride]. Fetches from `line` on, k0 columns further.
template <class T>
void weight_product(int64_t panels, int64_t n, const T* g, const T* x, int64_t x_stride, int64_t columns, T* c, const Lines<T>& lines,
                    int64_t& line, int64_t k0) {
  constexpr int S = std::min<int>(kStepColumns, kMostOuter<2>);
  const auto all = [&](auto vectors, int64_t v) {
    for (int64_t k = 0; k < columns; k += S)  // x and C have room for whole steps
      for (int64_t first = 0; first < n || first == 0; first += kChainSamples) {
        const int64_t count = std::min(n - first, kChainSamples);
        const T* const* fetch = lines.from(line);
        line += count;
        outer<T, decltype(vectors)::value, S, 1, 1>(
            count, g + first * kGradientRows + v, kGradientRows, kLanes<T>, [&](int64_t i) { return x + (first + i) * x_stride + k; },
            c + k * kStage + v, kStage, kLanes<T>, first > 0, nullptr, [&](int64_t i, int) { return fetch[i] + k0 * kPanel; });
      }
  };
  int64_t v = 0;
  for (; v + 2 * kLanes<T> <= panels * kPanel; v += 2 * kLanes<T>) all(std::integral_constant<int, 2>{}, v);
  if (v < panels * kPanel) all(std::integral_constant<int, 1>{}, v);
}

// grad_x [columns][padded n] += columns of some panels, at w[0..panels], times their rows' g. Fetches as `weight_product` does.
template <class T>
void input_product(int64_t panels, int64_t wide, int fold, const T* g, const T* const* w, int64_t columns, T* grad_x, const Lines<T>& lines,
                   int64_t& line, int64_t k0) {
  constexpr int64_t kTileStep = kLanes<T> < kWide ? kLanes<T> : kGradientRows * kWide;  // to the next vector of samples
  const auto some = [&](auto vectors, auto count, auto folds, int64_t v, int64_t k) {
    constexpr int F = decltype(folds)::value;
    const T* const* fetch = lines.from(line);
    line += kPanel / F * panels;
    outer<T, decltype(vectors)::value, decltype(count)::value, kPanel, 1, F>(
        kPanel / F * panels, in_tile(g, v, 0, kGradientRows), kWide, kTileStep,
        [&](int64_t i) { return w[i * F / kPanel] + k * kPanel + i * F % kPanel; }, grad_x + k * wide + v, wide, kLanes<T>, true, nullptr,
        [&](int64_t i, int) { return fetch[i] + k0 * kPanel; });
  };
  const auto all = [&](auto vectors, auto folds, int64_t v) {
    constexpr int64_t most = std::min<int64_t>(kMostOuter<decltype(vectors)::value>, kStepColumns);
    int64_t k = 0;
    for (; k + most <= columns; k += most) some(vectors, std::integral_constant<int, most>{}, folds, v, k);
    for (; k + 4 <= columns; k += 4) some(vectors, std::integral_constant<int, 4>{}, folds, v, k);
    for (; k < columns; ++k) some(vectors, std::integral_constant<int, 1>{}, folds, v, k);
  };
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, 2> two;
  if constexpr (sizeof(T) == 4)
    if (fold == 2) return all(one, two, 0);
  int64_t v = 0;
  for (; v + 2 * kLanes<T> <= wide; v += 2 * kLanes<T>) all(two, one, v);
  if (v < wide) all(one, one, v);
}

// Both products and the sink for columns k0..k1 of a group of panels. x and grad_x (null: not wanted) start at k0.
template <class T>
void group_backward(const Panels<T>& w, int64_t group, int64_t k0, int64_t k1, int64_t n, const Gradient<T>& g, const T* x,
                    int64_t x_stride, T* grad_x, bool weights, Sink<T>& sink) {
  const int64_t p0 = group * kGradientPanels, p1 = std::min(p0 + kGradientPanels, w.count()), wide = padded<T>(n);
  const int fold = fold_of<T>(n);
  const int64_t most = std::min(k1, w.visible(p1 - 1));
  alignas(64) T stage[kStepColumns * kStage];
  Lines<T> lines;
  for (int64_t p = p0; p < p1; ++p) sink.needs(p, lines);
  lines.close();
  // Few samples do not have as many terms as there are lines.
  const bool bursts = n * kGradientPanels / 2 < lines.count();
  int64_t k = k0;
  for (int64_t p = p0; p < p1; ++p) {
    // Panels of one width go together, as far as the last one sees: what the others store there is padding.
    const int64_t end = std::min(most, w.width(p)), active = p1 - p;
    for (; k < end; k += kStepColumns) {
      const int64_t columns = std::min(kStepColumns, end - k), next = k + 2 * kStepColumns;
      const T* at[kGradientPanels];
      for (int64_t i = 0; i < active; ++i) {
        at[i] = w.panel(p + i) + k * kPanel;
        if (bursts && next < end) sink.fetch(p + i, next);
      }
      int64_t line = bursts || k + kStepColumns >= end ? lines.count() : 0;
      const int64_t ahead = line == 0 ? k + kStepColumns : 0;
      if (grad_x)
        input_product(active, wide, fold, g.by_row + (p - p0) * kPanel / fold * kWide, at, columns, grad_x + (k - k0) * wide, lines, line,
                      ahead);
      if (!weights) continue;
      for (int64_t i = 0; i < active; i += 2) {
        const int64_t panels = std::min<int64_t>(2, active - i);
        weight_product(panels, n, g.by_sample + (p - p0 + i) * kPanel, x + (k - k0), x_stride, columns, stage, lines, line,
                       ahead);
        for (int64_t j = 0; j < panels; ++j) sink.template run<kStage>(p + i + j, k, columns, stage + j * kPanel);
      }
    }
    k = std::max(k0, end);
    if (weights) sink.rest(p, k, k1);
  }
}

// Units k0..k1 of samples i0..i1 from tiles of so many units, as to [samples][to_stride], zero behind them; i0 in whole tiles.
template <class T>
void take_columns(const T* x, int64_t units, int64_t i0, int64_t i1, int64_t k0, int64_t k1, T* to, int64_t to_stride) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t i = i0; i < i1; i += L) {
    const int64_t samples = std::min(L, i1 - i);
    int64_t k = k0;
    for (; k < k1; k += L) {
      Vec<T> block[L];
      for (int64_t j = 0; j < L; ++j) block[j] = k + j < k1 ? load(in_tile(x, i, k + j, units)) : Vec<T>{};
      transpose<T>(block);
      for (int64_t j = 0; j < samples; ++j) store(to + (i - i0 + j) * to_stride + k - k0, block[j]);
    }
    for (int64_t j = 0; j < samples; ++j) std::fill(to + (i - i0 + j) * to_stride + k - k0, to + (i - i0 + j + 1) * to_stride, T(0));
  }
}

// Units k0 .. k0 + columns of tiles of so many units = from [columns][padded n].
template <class T>
void give_columns(const T* from, int64_t columns, int64_t n, T* tiles, int64_t k0, int64_t units) {
  constexpr int64_t L = kLanes<T>;
  const int64_t wide = padded<T>(n);
  const bool fold = fold_of<T>(n) == 2;
  for (int64_t i = 0; i < wide; i += L)
    for (int64_t k = 0; k < columns; ++k) {
      Vec<T> v = load(from + k * wide + i);
      if (fold) {
        Vec<T> even, odd;
        unzip<T>(v, Vec<T>{}, even, odd);
        v = even + odd;
      }
      store(in_tile(tiles, i, k0 + k, units), v);
    }
}

// Of strips of x: room for a whole step, and no power of two, which would put all samples into one set of the cache.
inline int64_t strip_stride(int64_t columns) { return round_up(columns + kStepColumns, 16) | 16; }

template <class T>
void layer_pass(const Team& team, const Panels<T>& w, const Source& source, const T* x, int64_t n, T* grad_x, T* grad_bias,
                const Target& target, bool weights) {
  const int64_t groups = (w.count() + kGradientPanels - 1) / kGradientPanels, wide = padded<T>(n),
                room = kGradientRows * round_up(n, kWide), numel = 2 * room;
  const auto gradient_of = [&](T* memory, int64_t group) {
    memory += group * numel;
    return Gradient<T>{memory + room, memory};
  };
  if (w.columns > w.rows) {
    T* shared = Scratch::get<T>(Scratch::kShared, groups * numel);
    team.each(groups, [&](int64_t group) {
      make_gradient(source, w.rows, n, group * kGradientRows, gradient_of(shared, group), grad_bias);
    });
    const int64_t strip = std::clamp<int64_t>(round_up(16384 / std::max<int64_t>(n, 1), kStepColumns), 4 * kStepColumns, 64 * kStepColumns);
    const int64_t strips = (w.columns + strip - 1) / strip, stride = strip_stride(strip);
    std::vector<double> squares(strips);
    team.each(strips, [&](int64_t i) {
      const FlushDenormals flush;
      const int64_t k0 = i * strip, k1 = std::min(k0 + strip, w.columns);
      T* xs = Scratch::get<T>(Scratch::kInput, n * stride + (grad_x ? strip * wide : 0));
      T* grad = grad_x ? xs + n * stride : nullptr;
      if (weights) take_columns(x, w.columns, 0, n, k0, k1, xs, stride);
      if (grad) std::fill(grad, grad + (k1 - k0) * wide, T(0));
      Sink<T> sink(target, w);
      for (int64_t group = 0; group < groups; ++group)
        group_backward(w, group, k0, k1, n, gradient_of(shared, group), xs, stride, grad, weights, sink);
      if (grad) give_columns(grad, k1 - k0, n, grad_x, k0, w.columns);
      squares[i] = sink.square();
    });
    if (target.mode == kNorm)
      for (const double one : squares) *static_cast<double*>(target.grad) += one;
    return;
  }
  // Each part has a grad_x of its own, which should be small beside its weights.
  const int64_t rows = w.starts[w.count()] * kPanel / std::max<int64_t>(1, w.columns);
  const int64_t parts = std::clamp<int64_t>(rows / kGradientRows, 1, std::min<int64_t>(parts_of(w, n), 32)),
                stride = strip_stride(w.columns);
  T* xs = Scratch::get<T>(Scratch::kShared, n * stride + (grad_x ? parts * w.columns * wide : 0));
  T* shares = xs + n * stride;
  if (weights) {
    const int64_t step = round_up(16384 / std::max<int64_t>(w.columns, 1), kWide) | kWide;
    team.each((n + step - 1) / step, [&](int64_t i) {
      take_columns(x, w.columns, i * step, std::min((i + 1) * step, n), 0, w.columns, xs + i * step * stride, stride);
    });
  }
  std::vector<double> squares(parts);
  const auto group_at = [&](int64_t part) {
    return (w.panel_at(static_cast<double>(part) / parts) + kGradientPanels - 1) / kGradientPanels;
  };
  team.each(parts, [&](int64_t part) {
    const FlushDenormals flush;
    T* grad = grad_x ? shares + part * w.columns * wide : nullptr;
    if (grad) std::fill(grad, grad + w.columns * wide, T(0));
    const Gradient<T> g = gradient_of(Scratch::get<T>(Scratch::kGradient, numel), 0);
    Sink<T> sink(target, w);
    for (int64_t group = group_at(part); group < group_at(part + 1); ++group) {
      make_gradient(source, w.rows, n, group * kGradientRows, g, grad_bias);
      group_backward(w, group, 0, w.columns, n, g, xs, stride, grad, weights, sink);
    }
    squares[part] = sink.square();
  });
  if (target.mode == kNorm)
    for (const double one : squares) *static_cast<double*>(target.grad) += one;
  if (grad_x == nullptr) return;
  const Split columns(w.columns, std::max<int64_t>(16, 16384 / std::max<int64_t>(wide, 1)));
  team.each(columns.count, [&](int64_t i) {
    const int64_t k0 = columns.begin(i), count = columns.size(i) * wide;
    T* sum = shares + k0 * wide;
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t j = 0; j < count; j += kLanes<T>) store(sum + j, load(sum + j) + load(sum + part * w.columns * wide + j));
    give_columns(sum, columns.size(i), n, grad_x, k0, w.columns);
  });
}

// `s` with its pointers moved to sample n, the first of a tile.
template <class T>
Source from_sample(Source s, int64_t n, int64_t rows) {
  const auto move = [&](const void*& p, int64_t stride) {
    if (p) p = static_cast<const T*>(p) + n * stride;
  };
  move(s.grad_y, rows), move(s.relu_of, rows), move(s.grad_ladj, 1);
  move(s.grad_z, rows / 2), move(s.grad_log_scale, rows / 2), move(s.x, rows / 2), move(s.z, rows / 2), move(s.log_scale, rows / 2);
  if (s.grad_x) s.grad_x = static_cast<T*>(s.grad_x) + n * (rows / 2);
  return s;
}

// grad_x [columns] (null: not wanted), grad_bias [rows] (null: not wanted), and what the target says of the weight. x, grad_x and what the
// source names, but for grad_ladj, lie in wide tiles.
template <class T>
void layer_backward(const Team& team, const Panels<T>& w, const Source& source, const T* x, int64_t n, T* grad_x, T* grad_bias,
                    const Target& target) {
  if (target.mode == kNorm) *static_cast<double*>(target.grad) = 0;
  if (n <= kFusedSamples || (grad_x == nullptr && target.mode != kNone)) {
    if (grad_x || target.mode != kNone || grad_bias || source.grad_x)
      layer_pass(team, w, source, x, n, grad_x, grad_bias, target, target.mode != kNone);
    return;
  }
  // The gradient of x first, as Adam changes the weight.
  const Target none{};
  if (grad_x)
    for (int64_t i = 0; i < n; i += kFusedSamples)
      layer_pass<T>(team, w, from_sample<T>(source, i, w.rows), nullptr, std::min(kFusedSamples, n - i), grad_x + i * w.columns, nullptr,
                    none, false);
  layer_pass<T>(team, w, source, x, n, nullptr, grad_bias, target, target.mode != kNone);
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
