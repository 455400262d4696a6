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

namespace fastmaf {
namespace FASTMAF_ISA {

inline constexpr long kStepColumns = 12;    // that go through both products at once
inline constexpr long kGradientPanels = 8;  // whose rows' gradients are formed together
inline constexpr long kGradientRows = kGradientPanels * kPanel;
inline constexpr long kChainSamples = 64;   // samples whose terms are summed in one chain of roundings
inline constexpr long kFusedSamples = 256;  // with more, grad_x is formed in a pass of its own, some samples at a time

// What becomes of the gradient of kStepColumns columns of a panel.
template <class T>
class Sink {
 public:
  Sink(const Target& t, const Panels<T>& w) : t_(t), w_(w), a_(t.adam ? *t.adam : AdamNumbers{}) {}

  // kNorm: the sum of the squares so far.
  double square() const {
    double sum = 0;
    for (const double lane : squares_) sum += lane;
    return sum;
  }

  // g, 16 numbers of each column kStride apart, belongs at columns k .. of panel p; it may be changed.
  template <long kStride>
  void run(long p, long k, long columns, T* g) {
    const long ragged = std::max(k, w_.full(p));
    for (long i = ragged - k; i < columns; ++i) hide(p, k + i, g + i * kStride);
    const long at = (w_.starts[p] + k) * kPanel;
    switch (t_.mode) {
      case kWrite:
        for (long i = 0; i < columns; ++i) std::copy(g + i * kStride, g + i * kStride + kPanel, static_cast<T*>(t_.grad) + at + i * kPanel);
        break;
      case kNorm:
        for (long i = 0; i < columns; ++i)
          for (long r = 0; r < kPanel; ++r) squares_[r] += static_cast<double>(g[i * kStride + r]) * g[i * kStride + r];
        break;
      case kAdam:
        plain_ ? adam<true, kStride>(at, columns, g) : adam<false, kStride>(at, columns, g);
        if (!(a_.eps > 0))  // the padding's step was 0 / 0
          for (long i = ragged - k; i < columns; ++i) hide(p, k + i, static_cast<T*>(t_.weight) + at + i * kPanel);
        break;
      default:
        break;
    }
  }
  // Adds what the first columns of panel p need.
  template <class L>
  void needs(long p, L& lines) const {
    lines.add(w_.panel(p));
    if (t_.mode != kAdam) return;
    lines.add(static_cast<const T*>(t_.exp_avg) + w_.starts[p] * kPanel);
    lines.add(static_cast<const T*>(t_.exp_avg_sq) + w_.starts[p] * kPanel);
  }
  // Fetches columns k .. k + kStepColumns of panel p, or what follows it, with the moments.
  void fetch(long p, long k) const {
    const long at = (w_.starts[p] + k) * kPanel;
    for (long i = 0; i < kStepColumns * kPanel; i += 64 / static_cast<long>(sizeof(T))) {
      FASTMAF_PREFETCH(w_.weight + at + i);
      if (t_.mode == kAdam) FASTMAF_PREFETCH(static_cast<const T*>(t_.exp_avg) + at + i), FASTMAF_PREFETCH(static_cast<const T*>(t_.exp_avg_sq) + at + i);
    }
  }
  // The columns from k on that no row of panel p sees, but that it has.
  void rest(long p, long k, long k1) {
    k1 = std::min(k1, w_.width(p));
    T* grad = static_cast<T*>(t_.grad);
    if (t_.mode == kWrite && k < k1) std::fill(grad + (w_.starts[p] + k) * kPanel, grad + (w_.starts[p] + k1) * kPanel, T(0));
  }

 private:
  // Sets the lanes of a column to zero that the mask hides.
  void hide(long p, long k, T* column) const {
    for (long i = 0; i < kPanel; ++i)
      if (p * kPanel + i >= w_.rows || w_.prefix[p * kPanel + i] <= k) column[i] = 0;
  }

  // kPlain: without weight decay, and minimising.
  template <bool kPlain, long kStride>
  void adam(long at, long columns, const T* grad) const {
    T *w = static_cast<T*>(t_.weight) + at, *m = static_cast<T*>(t_.exp_avg) + at, *v = static_cast<T*>(t_.exp_avg_sq) + at;
    // Copies, which no store below can change.
    const T first = first_, second = second_, step = step_, eps = eps_, correction = correction_;
    for (long i = 0; i < columns; ++i, grad += kStride)
      for (long j = 0; j < kPanel; j += kLanes<T>, w += kLanes<T>, m += kLanes<T>, v += kLanes<T>) {
        Vec<T> g = load(grad + j), wv = load(w), mv = load(m), vv = load(v);
        if (!kPlain && a_.maximize != 0) g = -g;
        if (!kPlain && a_.weight_decay != 0) a_.decoupled != 0 ? wv *= keep_ : g += decay_ * wv;
        mv += first * (g - mv);
        vv += second * (g * g - vv);
        wv -= over_root<T>(step * mv, vv, correction, eps);
        store(w, wv);
        store(m, mv);
        store(v, vv);
      }
  }

  const Target& t_;
  const Panels<T>& w_;
  double squares_[kPanel] = {};  // a sum for each lane: one alone would wait for itself
  const AdamNumbers a_;
  const T first_ = 1 - a_.beta1, second_ = 1 - a_.beta2, step_ = a_.step_size, eps_ = a_.eps,
          correction_ = 1 / a_.correction2_sqrt, decay_ = a_.weight_decay, keep_ = 1 - a_.lr * a_.weight_decay;
  const bool plain_ = a_.weight_decay == 0 && a_.maximize == 0;
};

// The gradient g of the products of a group of panels' rows, as both products want it.
template <class T>
struct Gradient {
  T* by_sample;  // [padded n][kGradientRows]
  T* by_row;     // [tile][kGradientRows / fold][16 samples by fold]
};

// n in whole vectors.
template <class T>
constexpr long padded(long n) {
  return round_up(n, static_cast<long>(kLanes<T>));
}

// Where the samples fill half a vector only, two rows share one, by turns: half the multiply-adds. grad_x then has two terms of each
// sample next to each other.
template <class T>
constexpr int fold_of(long n) {
  return sizeof(T) == 4 && kLanes<T> > 1 && 2 * n <= kLanes<T> ? 2 : 1;
}

// Number i of a unit in wide tiles: of sample i, in lane i % 16 of tile i / 16.
template <class T>
T* in_tile(T* tiles, long i, long unit, long units) {
  return tiles + (i / kWide * units + unit) * kWide + i % kWide;
}

// The gradient of `count` rows of a layer's products, of the samples from i on that fill a vector: put(row of these, vector).
template <class T, class Put>
void linear_gradient(const Source& s, long rows, long row, long count, long i, const Put& put) {
  const T *grad = in_tile(static_cast<const T*>(s.grad_y), i, row, rows);
  const T* of = s.relu_of ? in_tile(static_cast<const T*>(s.relu_of), i, row, rows) : nullptr;
  const T scale = static_cast<T>(s.scale);
  const Vec<T> zero = {};
  for (long r = 0; r < count; ++r) {
    const Vec<T> g = load(grad + r * kWide) * scale;
    put(r, of ? ((load(of + r * kWide) > zero) ? g : zero) : g);
  }
}

template <class T, class Put>
void affine_gradient(const Source& s, long rows, long row, long count, long i, long n, const Put& put) {
  constexpr long L = kLanes<T>;
  const long features = rows / 2;
  const T scale = static_cast<T>(s.scale);
  const Vec<T> grad_ladj = load_part<T>(static_cast<const T*>(s.grad_ladj) + i, std::min(L, n - i));
  for (long d = 0; d < count / 2; ++d) {
    const auto get = [&](const void* p) { return load(in_tile(static_cast<const T*>(p), i, row / 2 + d, features)); };
    const Vec<T> a = get(s.log_scale), grad_z = get(s.grad_z);
    Vec<T> grad_x, grad_shift, grad_a;
    if (s.map.form == kShiftFirst) {
      grad_x = grad_z * exponential(-a);
      grad_shift = -grad_x;
      grad_a = -(grad_z * get(s.z)) - grad_ladj;
    } else {
      grad_x = grad_z * exponential(a);
      grad_shift = grad_z;
      grad_a = grad_x * get(s.x) + grad_ladj;
    }
    if (s.grad_log_scale) grad_a += get(s.grad_log_scale);
    put(2 * d, grad_shift * scale);
    put(2 * d + 1, grad_a * slope_of<T>(a, s.map) * scale);
    if (s.grad_x) store(in_tile(static_cast<T*>(s.grad_x), i, row / 2 + d, features), grad_x);
  }
}

// g, and grad_bias (null: not wanted), of the group of rows from `row` on.
template <class T>
void make_gradient(const Source& s, long rows, long n, long row, const Gradient<T>& g, T* grad_bias) {
  constexpr long L = kLanes<T>;
  const long wide = padded<T>(n), count = std::min(kGradientRows, rows - row), whole = round_up(count, kPanel);
  for (long i = 0; i < wide; i += L) {
    T* const to = in_tile(g.by_row, i, 0, kGradientRows);
    // Lanes behind the last sample count for nothing, whatever is in them.
    const auto put = [&](long r, Vec<T> v) {
      if (n - i < L) v = first_lanes<T>(v, n - i);
      store(to + r * kWide, v);
    };
    s.log_scale ? affine_gradient<T>(s, rows, row, count, i, n, put) : linear_gradient<T>(s, rows, row, count, i, put);
    for (long r = count; r < whole; ++r) put(r, Vec<T>{});
    for (long r = 0; r < whole; r += L) {
      Vec<T> block[L];
      for (long j = 0; j < L; ++j) block[j] = load(to + (r + j) * kWide);
      transpose<T>(block);
      for (long j = 0; j < L; ++j) store(g.by_sample + (i + j) * kGradientRows + r, block[j]);
    }
  }
  for (long r = 0; grad_bias && r < count; ++r) {
    double total = 0;
    for (long i = 0; i < wide; i += 4 * L) {  // short sums before they are widened
      Vec<T> sum = {};
      for (long j = i; j < std::min(wide, i + 4 * L); j += L) sum += load(in_tile(g.by_row, j, r, kGradientRows));
      total += lane_sum<T>(sum, L);
    }
    grad_bias[row + r] = static_cast<T>(total);
  }
  if (fold_of<T>(n) == 2)
    for (long r = 0; r < whole; r += 2) {
      Vec<T> low, high;
      zip<T>(load(g.by_row + r * kWide), load(g.by_row + (r + 1) * kWide), low, high);
      store(g.by_row + r / 2 * kWide, low);
    }
}

// Addresses of what the next columns of a group of panels need from memory, a cache line each, relative to their first column. One is
// fetched with each term of a product, so that memory is read all the time and not in bursts.
template <class T>
class Lines {
 public:
  void add(const T* at) {
    for (long i = 0; i < kStepColumns * kPanel; i += kLine) lines_[count_++] = at + i;
  }
  // After the last one.
  void close() { std::fill(lines_ + count_, lines_ + count_ + kMostTerms, count_ > 0 ? lines_[count_ - 1] : nullptr); }
  long count() const { return count_; }
  const T* const* from(long line) const { return lines_ + std::min(line, count_); }

 private:
  static constexpr long kLine = 64 / static_cast<long>(sizeof(T)), kMostTerms = std::max(kGradientRows, kChainSamples);
  const T* lines_[kGradientPanels * 3 * kStepColumns * kPanel / kLine + kMostTerms];
  long count_ = 0;
};

// Of the gradients of kStepColumns columns of two panels, [column][32].
inline constexpr long kStage = 2 * kPanel;

// C [columns][kStage] = g x for one or two panels, whose rows start at g; x [n][x_stride]. Fetches from `line` on, k0 columns further.
template <class T>
void weight_product(long panels, long n, const T* g, const T* x, long x_stride, long columns, T* c, const Lines<T>& lines, long& line, long k0) {
  constexpr int S = std::min<int>(kStepColumns, kMostOuter<2>);
  const auto all = [&](auto vectors, long v) {
    for (long k = 0; k < columns; k += S)  // x and C have room for whole steps
      for (long first = 0; first < n || first == 0; first += kChainSamples) {
        const long count = std::min(n - first, kChainSamples);
        const T* const* fetch = lines.from(line);
        line += count;
        outer<T, decltype(vectors)::value, S, 1, 1>(
            count, g + first * kGradientRows + v, kGradientRows, kLanes<T>, [&](long i) { return x + (first + i) * x_stride + k; },
            c + k * kStage + v, kStage, kLanes<T>, first > 0, nullptr, [&](long i, int) { return fetch[i] + k0 * kPanel; });
      }
  };
  long v = 0;
  for (; v + 2 * kLanes<T> <= panels * kPanel; v += 2 * kLanes<T>) all(std::integral_constant<int, 2>{}, v);
  if (v < panels * kPanel) all(std::integral_constant<int, 1>{}, v);
}

// grad_x [columns][padded n] += columns of some panels, at w[0..panels], times their rows' g. Fetches as `weight_product` does.
template <class T>
void input_product(long panels, long wide, int fold, const T* g, const T* const* w, long columns, T* grad_x, const Lines<T>& lines,
                   long& line, long k0) {
  constexpr long kTileStep = kLanes<T> < kWide ? kLanes<T> : kGradientRows * kWide;  // to the next vector of samples
  const auto some = [&](auto vectors, auto count, auto folds, long v, long k) {
    constexpr int F = decltype(folds)::value;
    const T* const* fetch = lines.from(line);
    line += kPanel / F * panels;
    outer<T, decltype(vectors)::value, decltype(count)::value, kPanel, 1, F>(
        kPanel / F * panels, in_tile(g, v, 0, kGradientRows), kWide, kTileStep, [&](long i) { return w[i * F / kPanel] + k * kPanel + i * F % kPanel; },
        grad_x + k * wide + v, wide, kLanes<T>, true, nullptr, [&](long i, int) { return fetch[i] + k0 * kPanel; });
  };
  const auto all = [&](auto vectors, auto folds, long v) {
    constexpr long most = std::min<long>(kMostOuter<decltype(vectors)::value>, kStepColumns);
    long k = 0;
    for (; k + most <= columns; k += most) some(vectors, std::integral_constant<int, most>{}, folds, v, k);
    for (; k + 4 <= columns; k += 4) some(vectors, std::integral_constant<int, 4>{}, folds, v, k);
    for (; k < columns; ++k) some(vectors, std::integral_constant<int, 1>{}, folds, v, k);
  };
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, 2> two;
  if constexpr (sizeof(T) == 4)
    if (fold == 2) return all(one, two, 0);
  long v = 0;
  for (; v + 2 * kLanes<T> <= wide; v += 2 * kLanes<T>) all(two, one, v);
  if (v < wide) all(one, one, v);
}

// Both products and the sink for columns k0..k1 of a group of panels. x and grad_x (null: not wanted) start at k0.
template <class T>
void group_backward(const Panels<T>& w, long group, long k0, long k1, long n, const Gradient<T>& g, const T* x, long x_stride, T* grad_x,
                    bool weights, Sink<T>& sink) {
  const long p0 = group * kGradientPanels, p1 = std::min(p0 + kGradientPanels, w.count()), wide = padded<T>(n);
  const int fold = fold_of<T>(n);
  const long most = std::min(k1, w.visible(p1 - 1));
  alignas(64) T stage[kStepColumns * kStage];
  Lines<T> lines;
  for (long p = p0; p < p1; ++p) sink.needs(p, lines);
  lines.close();
  // Few samples do not have as many terms as there are lines.
  const bool bursts = n * kGradientPanels / 2 < lines.count();
  long k = k0;
  for (long p = p0; p < p1; ++p) {
    // Panels of one width go together, as far as the last one sees: what the others store there is padding.
    const long end = std::min(most, w.width(p)), active = p1 - p;
    for (; k < end; k += kStepColumns) {
      const long columns = std::min(kStepColumns, end - k), next = k + 2 * kStepColumns;
      const T* at[kGradientPanels];
      for (long i = 0; i < active; ++i) {
        at[i] = w.panel(p + i) + k * kPanel;
        if (bursts && next < end) sink.fetch(p + i, next);
      }
      long line = bursts || k + kStepColumns >= end ? lines.count() : 0;
      const long ahead = line == 0 ? k + kStepColumns : 0;
      if (grad_x)
        input_product(active, wide, fold, g.by_row + (p - p0) * kPanel / fold * kWide, at, columns, grad_x + (k - k0) * wide, lines, line, ahead);
      if (!weights) continue;
      for (long i = 0; i < active; i += 2) {
        const long panels = std::min(2L, active - i);
        weight_product(panels, n, g.by_sample + (p - p0 + i) * kPanel, x + (k - k0), x_stride, columns, stage, lines, line,
                       ahead);
        for (long j = 0; j < panels; ++j) sink.template run<kStage>(p + i + j, k, columns, stage + j * kPanel);
      }
    }
    k = std::max(k0, end);
    if (weights) sink.rest(p, k, k1);
  }
}

// Units k0..k1 of samples i0..i1 from tiles of so many units, as to [samples][to_stride], zero behind them; i0 in whole tiles.
template <class T>
void take_columns(const T* x, long units, long i0, long i1, long k0, long k1, T* to, long to_stride) {
  constexpr long L = kLanes<T>;
  for (long i = i0; i < i1; i += L) {
    const long samples = std::min(L, i1 - i);
    long k = k0;
    for (; k < k1; k += L) {
      Vec<T> block[L];
      for (long j = 0; j < L; ++j) block[j] = k + j < k1 ? load(in_tile(x, i, k + j, units)) : Vec<T>{};
      transpose<T>(block);
      for (long j = 0; j < samples; ++j) store(to + (i - i0 + j) * to_stride + k - k0, block[j]);
    }
    for (long j = 0; j < samples; ++j) std::fill(to + (i - i0 + j) * to_stride + k - k0, to + (i - i0 + j + 1) * to_stride, T(0));
  }
}

// Units k0 .. k0 + columns of tiles of so many units = from [columns][padded n].
template <class T>
void give_columns(const T* from, long columns, long n, T* tiles, long k0, long units) {
  constexpr long L = kLanes<T>;
  const long wide = padded<T>(n);
  const bool fold = fold_of<T>(n) == 2;
  for (long i = 0; i < wide; i += L)
    for (long k = 0; k < columns; ++k) {
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
inline long strip_stride(long columns) { return round_up(columns + kStepColumns, 16L) | 16; }

template <class T>
void layer_pass(const Team& team, const Panels<T>& w, const Source& source, const T* x, long n, T* grad_x, T* grad_bias,
                const Target& target, bool weights) {
  const long groups = (w.count() + kGradientPanels - 1) / kGradientPanels, wide = padded<T>(n), room = kGradientRows * round_up(n, kWide), numel = 2 * room;
  const auto gradient_of = [&](T* memory, long group) {
    memory += group * numel;
    return Gradient<T>{memory + room, memory};
  };
  if (w.columns > w.rows) {
    T* shared = Scratch::get<T>(Scratch::kShared, groups * numel);
    team.each(groups, [&](long group) {
      make_gradient(source, w.rows, n, group * kGradientRows, gradient_of(shared, group), grad_bias);
    });
    const long strip = std::clamp(round_up(16384 / std::max(n, 1L), kStepColumns), 4 * kStepColumns, 64 * kStepColumns);
    const long strips = (w.columns + strip - 1) / strip, stride = strip_stride(strip);
    std::vector<double> squares(strips);
    team.each(strips, [&](long i) {
      const FlushDenormals flush;
      const long k0 = i * strip, k1 = std::min(k0 + strip, w.columns);
      T* xs = Scratch::get<T>(Scratch::kInput, n * stride + (grad_x ? strip * wide : 0));
      T* grad = grad_x ? xs + n * stride : nullptr;
      if (weights) take_columns(x, w.columns, 0, n, k0, k1, xs, stride);
      if (grad) std::fill(grad, grad + (k1 - k0) * wide, T(0));
      Sink<T> sink(target, w);
      for (long group = 0; group < groups; ++group)
        group_backward(w, group, k0, k1, n, gradient_of(shared, group), xs, stride, grad, weights, sink);
      if (grad) give_columns(grad, k1 - k0, n, grad_x, k0, w.columns);
      squares[i] = sink.square();
    });
    if (target.mode == kNorm)
      for (const double one : squares) *static_cast<double*>(target.grad) += one;
    return;
  }
  // Each part has a grad_x of its own, which should be small beside its weights.
  const long rows = w.starts[w.count()] * kPanel / std::max(1L, w.columns);
  const long parts = std::clamp(rows / kGradientRows, 1L, std::min(parts_of(w, n), 32L)), stride = strip_stride(w.columns);
  T* xs = Scratch::get<T>(Scratch::kShared, n * stride + (grad_x ? parts * w.columns * wide : 0));
  T* shares = xs + n * stride;
  if (weights) {
    const long step = round_up(16384 / std::max(w.columns, 1L), kWide) | kWide;
    team.each((n + step - 1) / step, [&](long i) {
      take_columns(x, w.columns, i * step, std::min((i + 1) * step, n), 0, w.columns, xs + i * step * stride, stride);
    });
  }
  std::vector<double> squares(parts);
  const auto group_at = [&](long part) {
    return (w.panel_at(static_cast<double>(part) / parts) + kGradientPanels - 1) / kGradientPanels;
  };
  team.each(parts, [&](long part) {
    const FlushDenormals flush;
    T* grad = grad_x ? shares + part * w.columns * wide : nullptr;
    if (grad) std::fill(grad, grad + w.columns * wide, T(0));
    const Gradient<T> g = gradient_of(Scratch::get<T>(Scratch::kGradient, numel), 0);
    Sink<T> sink(target, w);
    for (long group = group_at(part); group < group_at(part + 1); ++group) {
      make_gradient(source, w.rows, n, group * kGradientRows, g, grad_bias);
      group_backward(w, group, 0, w.columns, n, g, xs, stride, grad, weights, sink);
    }
    squares[part] = sink.square();
  });
  if (target.mode == kNorm)
    for (const double one : squares) *static_cast<double*>(target.grad) += one;
  if (grad_x == nullptr) return;
  const Split columns(w.columns, std::max(16L, 16384 / std::max(wide, 1L)));
  team.each(columns.count, [&](long i) {
    const long k0 = columns.begin(i), count = columns.size(i) * wide;
    T* sum = shares + k0 * wide;
    for (long part = 1; part < parts; ++part)
      for (long j = 0; j < count; j += kLanes<T>) store(sum + j, load(sum + j) + load(sum + part * w.columns * wide + j));
    give_columns(sum, columns.size(i), n, grad_x, k0, w.columns);
  });
}

// `s` with its pointers moved to sample n, the first of a tile.
template <class T>
Source from_sample(Source s, long n, long rows) {
  const auto move = [&](const void*& p, long stride) {
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
void layer_backward(const Team& team, const Panels<T>& w, const Source& source, const T* x, long n, T* grad_x, T* grad_bias,
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
    for (long i = 0; i < n; i += kFusedSamples)
      layer_pass<T>(team, w, from_sample<T>(source, i, w.rows), nullptr, std::min(kFusedSamples, n - i), grad_x + i * w.columns, nullptr,
                    none, false);
  layer_pass<T>(team, w, source, x, n, nullptr, grad_bias, target, target.mode != kNone);
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
