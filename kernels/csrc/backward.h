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

inline constexpr long kStepColumns = 12;    // of a panel that go through both products at once
inline constexpr long kChainSamples = 64;   // samples whose terms are summed in one chain of roundings
inline constexpr long kFusedSamples = 128;  // with more, grad_x is formed in a pass of its own, some samples at a time

// What becomes of the gradient of kStepColumns columns of a panel.
template <class T>
class Sink {
 public:
  Sink(const Target& t, const Panels<T>& w) : t_(t), w_(w), a_(t.adam ? *t.adam : AdamNumbers{}) {}

  double square = 0;  // kNorm

  // g [columns][16] belongs at columns k .. of panel p; it may be changed.
  void run(long p, long k, long columns, T* g) {
    const long ragged = std::max(k, w_.full(p));
    for (long i = ragged - k; i < columns; ++i) hide(p, k + i, g + i * kPanel);
    const long at = (w_.starts[p] + k) * kPanel, count = columns * kPanel;
    switch (t_.mode) {
      case kWrite:
        std::copy(g, g + count, static_cast<T*>(t_.grad) + at);
        break;
      case kNorm:
        for (long i = 0; i < count; ++i) square += static_cast<double>(g[i]) * g[i];
        break;
      case kAdam:
        a_.weight_decay == 0 && a_.maximize == 0 ? adam<true>(at, count, g) : adam<false>(at, count, g);
        if (!(a_.eps > 0))  // the padding's step was 0 / 0
          for (long i = ragged - k; i < columns; ++i) hide(p, k + i, static_cast<T*>(t_.weight) + at + i * kPanel);
        break;
      default:
        break;
    }
  }
  // Fetches columns k .. k + kStepColumns of panel p, or what follows it, with the moments.
  void fetch(long p, long k) const {
    const long at = (w_.starts[p] + k) * kPanel;
    for (long i = 0; i < kStepColumns * kPanel; i += 64 / static_cast<long>(sizeof(T))) {
      prefetch(w_.weight + at + i);
      if (t_.mode == kAdam) prefetch(static_cast<const T*>(t_.exp_avg) + at + i), prefetch(static_cast<const T*>(t_.exp_avg_sq) + at + i);
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
  template <bool kPlain>
  void adam(long at, long count, const T* grad) const {
    T *w = static_cast<T*>(t_.weight) + at, *m = static_cast<T*>(t_.exp_avg) + at, *v = static_cast<T*>(t_.exp_avg_sq) + at;
    for (long i = 0; i < count; i += kLanes<T>) {
      Vec<T> g = load(grad + i), wv = load(w + i), mv = load(m + i), vv = load(v + i);
      if (!kPlain && a_.maximize != 0) g = -g;
      if (!kPlain && a_.weight_decay != 0) a_.decoupled != 0 ? wv *= keep_ : g += decay_ * wv;
      mv += first_ * (g - mv);
      vv = beta2_ * vv + second_ * (g * g);
      wv -= step_ * mv / (square_root<T>(vv) * correction_ + eps_);
      store(w + i, wv);
      store(m + i, mv);
      store(v + i, vv);
    }
  }

  const Target& t_;
  const Panels<T>& w_;
  const AdamNumbers a_;
  const T first_ = 1 - a_.beta1, second_ = 1 - a_.beta2, beta2_ = a_.beta2, step_ = a_.step_size, eps_ = a_.eps,
          correction_ = 1 / a_.correction2_sqrt, decay_ = a_.weight_decay, keep_ = 1 - a_.lr * a_.weight_decay;
};

// The gradient g of 32 rows' products, as both products want it.
template <class T>
struct PairGradient {
  T* by_sample;  // [n][32]
  T* by_row;     // [32][padded]
};

// n in whole vectors.
template <class T>
constexpr long padded(long n) {
  return round_up(n, static_cast<long>(kLanes<T>));
}

template <class T>
void linear_gradient(const Source& s, long rows, long n, long row, T* g) {
  const T *grad = static_cast<const T*>(s.grad_y) + row, *of = static_cast<const T*>(s.relu_of);
  const long count = std::min(kPairRows, rows - row);
  const T scale = static_cast<T>(s.scale);
  for (long i = 0; i < n; ++i, g += kPairRows, grad += rows) {
    for (long r = 0; r < count; ++r) g[r] = of && !(of[i * rows + row + r] > 0) ? T(0) : grad[r] * scale;
    std::fill(g + count, g + kPairRows, T(0));
  }
}

template <class T>
void affine_gradient(const Source& s, long rows, long n, long row, T* g) {
  constexpr int L = kLanes<T>;
  const long features = rows / 2, first = row / 2, dims = std::min(kPanel, features - first);
  const T scale = static_cast<T>(s.scale);
  std::fill(g, g + n * kPairRows, T(0));
  for (long i = 0; i < n; ++i, g += kPairRows)
    for (long d = 0; d < dims; d += L) {
      const long at = i * features + first + d, count = std::min<long>(L, dims - d);
      const auto get = [&](const void* p) {
        const T* from = static_cast<const T*>(p) + at;
        prefetch(from + kPanel);  // of the next rows; the next sample's lie pages away
        return count == L ? load(from) : load_part<T>(from, count);
      };
      const Vec<T> a = get(s.log_scale), grad_z = get(s.grad_z);
      const T grad_ladj = static_cast<const T*>(s.grad_ladj)[i];
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
      grad_a *= slope_of<T>(a, s.map);
      T pairs[2 * L];
      zip<T>(grad_shift * scale, grad_a * scale, pairs);
      std::copy(pairs, pairs + 2 * count, g + 2 * d);
      if (s.grad_x) {
        T* to = static_cast<T*>(s.grad_x) + at;
        prefetch(to + kPanel);
        count == L ? store(to, grad_x) : store_part(to, grad_x, count);
      }
    }
}

template <class T>
void make_gradient(const Source& s, long rows, long n, long row, const PairGradient<T>& g, T* grad_bias) {
  s.log_scale ? affine_gradient(s, rows, n, row, g.by_sample) : linear_gradient(s, rows, n, row, g.by_sample);
  double total[kPairRows] = {};
  const long wide = padded<T>(n);
  for (long i = 0; i < wide; ++i)
    for (long r = 0; r < kPairRows; ++r) g.by_row[r * wide + i] = i < n ? g.by_sample[i * kPairRows + r] : T(0);
  if (grad_bias == nullptr) return;
  for (long i = 0; i < n; ++i)
    for (long r = 0; r < kPairRows; ++r) total[r] += g.by_sample[i * kPairRows + r];
  for (long r = 0; r < std::min(kPairRows, rows - row); ++r) grad_bias[row + r] = static_cast<T>(total[r]);
}

// C [columns][16] = g x: the gradient of columns of a panel whose rows start at g; x [n][x_stride].
template <class T>
void weight_product(long n, const T* g, const T* x, long x_stride, long columns, T* c) {
  constexpr int V = std::min(kPanelVectors<T>, 2), S = kMostOuter<V> > kStepColumns ? kStepColumns : kMostOuter<V>;
  for (long k = 0; k < columns; k += S)  // x and C have room for whole steps
    for (int v = 0; v < kPanelVectors<T>; v += V)
      for (long first = 0; first < n || first == 0; first += kChainSamples)
        outer<T, V, S, 1, false>(std::min(n - first, kChainSamples), g + first * kPairRows + v * kLanes<T>, kPairRows, kLanes<T>,
                                 x + first * x_stride + k, x_stride, c + k * kPanel + v * kLanes<T>, kPanel, first > 0);
}

// grad_x [columns][padded n] += columns of a panel, w, times its rows' g [16][padded n].
template <class T>
void input_product(long wide, const T* g, const T* w, long columns, T* grad_x) {
  const auto some = [&](auto vectors, auto count, long v, long k) {
    outer<T, decltype(vectors)::value, decltype(count)::value, kPanel, false>(kPanel, g + v, wide, kLanes<T>, w + k * kPanel, 1,
                                                                              grad_x + k * wide + v, wide, true);
  };
  const auto all = [&](auto vectors, long v) {
    constexpr long most = std::min<long>(kMostOuter<decltype(vectors)::value>, kStepColumns);
    long k = 0;
    for (; k + most <= columns; k += most) some(vectors, std::integral_constant<int, most>{}, v, k);
    for (; k + 4 <= columns; k += 4) some(vectors, std::integral_constant<int, 4>{}, v, k);
    for (; k < columns; ++k) some(vectors, std::integral_constant<int, 1>{}, v, k);
  };
  long v = 0;
  for (; v + 2 * kLanes<T> <= wide; v += 2 * kLanes<T>) all(std::integral_constant<int, 2>{}, v);
  if (v < wide) all(std::integral_constant<int, 1>{}, v);
}

// Both products and the sink for columns k0..k1 of panel p; g: its half of a pair's. x and grad_x (null: not wanted) start at k0.
template <class T>
void panel_backward(const Panels<T>& w, long p, long k0, long k1, long n, const T* by_sample, const T* by_row, const T* x, long x_stride,
                    T* grad_x, bool weights, Sink<T>& sink) {
  const long end = std::min(k1, w.visible(p)), wide = padded<T>(n);
  alignas(64) T stage[kStepColumns * kPanel];
  for (long k = k0; k < end; k += kStepColumns) {
    const long columns = std::min(kStepColumns, end - k), next = k + 2 * kStepColumns;
    if (next < end)
      sink.fetch(p, next);
    else if (p + 1 < w.count())
      sink.fetch(p + 1, k0 + next - end);
    if (grad_x) input_product(wide, by_row, w.panel(p) + k * kPanel, columns, grad_x + (k - k0) * wide);
    if (!weights) continue;
    weight_product(n, by_sample, x + (k - k0), x_stride, columns, stage);
    sink.run(p, k, columns, stage);
  }
  if (weights) sink.rest(p, std::max(k0, end), k1);
}

// Columns k0..k1 of x [n][stride] as [n][to_stride], and room for a whole step behind them.
template <class T>
void take_columns(const T* x, long n, long stride, long k0, long k1, T* to, long to_stride) {
  for (long s = 0; s < n; ++s) {
    T* end = std::copy(x + s * stride + k0, x + s * stride + k1, to + s * to_stride);
    std::fill(end, to + (s + 1) * to_stride, T(0));
  }
}

// to [n][stride], columns k0.. = from [columns][padded n].
template <class T>
void give_columns(const T* from, long columns, long n, T* to, long stride) {
  constexpr long kBlock = 16;
  const long wide = padded<T>(n);
  for (long k0 = 0; k0 < columns; k0 += kBlock)
    for (long s = 0; s < n; ++s)
      for (long k = k0; k < std::min(k0 + kBlock, columns); ++k) to[s * stride + k] = from[k * wide + s];
}

// Of strips of x: room for a whole step, and no power of two, which would put all samples into one set of the cache.
inline long strip_stride(long columns) { return round_up(columns + kStepColumns, 16L) | 16; }

template <class T>
void layer_pass(const Team& team, const Panels<T>& w, const Source& source, const T* x, long n, T* grad_x, T* grad_bias,
                const Target& target, bool weights) {
  const long panels = w.count(), pairs = (panels + 1) / 2, wide = padded<T>(n), pair_numel = kPairRows * (n + wide);
  const auto pair_of = [&](T* memory, long pair) {
    memory += pair * pair_numel;
    return PairGradient<T>{memory + kPairRows * wide, memory};
  };
  const auto both = [&](long pair, long k0, long k1, const PairGradient<T>& g, const T* xs, long x_stride, T* grad, Sink<T>& sink) {
    for (long p = 2 * pair; p < std::min(2 * pair + 2, panels); ++p) {
      const long half = p % 2 * kPanel;
      panel_backward(w, p, k0, k1, n, g.by_sample + half, g.by_row + half * wide, xs, x_stride, grad, weights, sink);
    }
  };
  if (w.columns > w.rows) {
    T* shared = Scratch::get<T>(Scratch::kShared, pairs * pair_numel);
    team.each(pairs, [&](long pair) {
      make_gradient(source, w.rows, n, pair * kPairRows, pair_of(shared, pair), grad_bias);
    });
    const long strip = std::clamp(round_up(16384 / std::max(n, 1L), kStepColumns), 4 * kStepColumns, 64 * kStepColumns);
    const long strips = (w.columns + strip - 1) / strip, stride = strip_stride(strip);
    std::vector<double> squares(strips);
    team.each(strips, [&](long i) {
      const FlushDenormals flush;
      const long k0 = i * strip, k1 = std::min(k0 + strip, w.columns);
      T* xs = Scratch::get<T>(Scratch::kInput, n * stride + strip * wide);
      T* grad = grad_x ? xs + n * stride : nullptr;
      if (weights) take_columns(x, n, w.columns, k0, k1, xs, stride);
      if (grad) std::fill(grad, grad + (k1 - k0) * wide, T(0));
      Sink<T> sink(target, w);
      for (long pair = 0; pair < pairs; ++pair) both(pair, k0, k1, pair_of(shared, pair), xs, stride, grad, sink);
      if (grad) give_columns(grad, k1 - k0, n, grad_x + k0, w.columns);
      squares[i] = sink.square;
    });
    if (target.mode == kNorm)
      for (const double one : squares) *static_cast<double*>(target.grad) += one;
    return;
  }
  const long parts = parts_of(w, n), stride = strip_stride(w.columns);
  T* xs = Scratch::get<T>(Scratch::kShared, n * stride + parts * w.columns * wide);
  T* shares = xs + n * stride;
  if (weights) {
    const Split samples(n, std::max(1L, 16384 / std::max(w.columns, 1L)));
    team.each(samples.count, [&](long i) {
      take_columns(x + samples.begin(i) * w.columns, samples.size(i), w.columns, 0, w.columns, xs + samples.begin(i) * stride, stride);
    });
  }
  std::vector<double> squares(parts);
  const auto pair_at = [&](long part) { return (w.panel_at(static_cast<double>(part) / parts) + 1) / 2; };
  team.each(parts, [&](long part) {
    const FlushDenormals flush;
    T* grad = grad_x ? shares + part * w.columns * wide : nullptr;
    if (grad) std::fill(grad, grad + w.columns * wide, T(0));
    const PairGradient<T> g = pair_of(Scratch::get<T>(Scratch::kGradient, pair_numel), 0);
    Sink<T> sink(target, w);
    for (long pair = pair_at(part); pair < pair_at(part + 1); ++pair) {
      make_gradient(source, w.rows, n, pair * kPairRows, g, grad_bias);
      both(pair, 0, w.columns, g, xs, stride, grad, sink);
    }
    squares[part] = sink.square;
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
    give_columns(sum, columns.size(i), n, grad_x + k0, w.columns);
  });
}

// `s` with its pointers moved to sample n.
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

// grad_x [n][columns] (null: not wanted), grad_bias [rows] (null: not wanted), and what the target says of the weight.
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
  if (grad_x) {
    const Split chunks(n, kFusedSamples);
    for (long i = 0; i < chunks.count; ++i)
      layer_pass<T>(team, w, from_sample<T>(source, chunks.begin(i), w.rows), nullptr, chunks.size(i),
                    grad_x + chunks.begin(i) * w.columns, nullptr, none, false);
  }
  layer_pass<T>(team, w, source, x, n, nullptr, grad_bias, target, target.mode != kNone);
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
