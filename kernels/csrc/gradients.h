// The two ends of a backward pass: where the gradient g of a layer's product comes from, and what becomes of its weight's.
#pragma once

#include "bound.h"
#include "products.h"
#include "thread_team.h"

namespace fastmaf {

// fill(source, ...) forms g [n][kGradientStride] for row0..row1, at most kStripRows of them.

template <class T>
void fill(const LinearGradient<T>& s, long rows, long n, long row0, long row1, T* g) {
  for (long i = 0; i < n; ++i, g += kGradientStride) {
    const T* grad = s.grad_y + i * rows + row0;
    const T* of = s.relu_of ? s.relu_of + i * rows + row0 : nullptr;
    for (long r = 0; r < row1 - row0; ++r) g[r] = of && !(of[r] > 0) ? T(0) : grad[r] * s.scale;
  }
}

template <class T>
void fill(const AffineGradient<T>& s, long rows, long n, long row0, long row1, T* g) {
  constexpr int L = kLanes<T>;
  const long features = rows / 2, d1 = row1 / 2;
  for (long i = 0; i < n; ++i, g += kGradientStride)
    for (long d = row0 / 2; d < d1; d += L) {
      const long at = i * features + d, count = std::min<long>(L, d1 - d);
      const auto get = [&](const T* p) { return count == L ? load(p + at) : load_part<T>(p + at, count); };
      const Vec<T> a = get(s.log_scale), grad_z = get(s.grad_z);
      const Vec<T> grad_x = grad_z * exponential(-a);
      Vec<T> grad_a = -(grad_z * get(s.z)) - s.grad_ladj[i];
      if (s.grad_log_scale) grad_a += get(s.grad_log_scale);
      grad_a *= bound_slope<T>(a, s.bound);
      T pairs[2][L];
      store(pairs[0], -grad_x * s.scale);
      store(pairs[1], grad_a * s.scale);
      T* to = g + 2 * d - row0;
      if (count == L) {
        for (long j = 0; j < 2 * L; ++j) to[j] = pairs[j % 2][j / 2];
        if (s.grad_x) store(s.grad_x + at, grad_x);
      } else {
        for (long j = 0; j < 2 * count; ++j) to[j] = pairs[j % 2][j / 2];
        if (s.grad_x) store_part(s.grad_x + at, grad_x, count);
      }
    }
}

// The sums of g over the samples.
template <class T>
void sum_samples(const T* g, long rows, long n, T* grad_bias) {
  double total[kStripRows] = {};
  for (long s = 0; s < n; ++s, g += kGradientStride)
    for (long r = 0; r < rows; ++r) total[r] += g[r];
  for (long r = 0; r < rows; ++r) grad_bias[r] = static_cast<T>(total[r]);
}

// What becomes of grad_W: run() takes part of one row of it, which belongs at `at` in packed storage. Of `room` columns that the
// storage has there, the first `count` are visible (none, if it is not positive); g is in whole vectors and may be changed.

template <class T>
struct Sink;

template <class T>
struct Sink<WriteGradient<T>> {
  explicit Sink(const WriteGradient<T>& t) : grad(t.grad) {}
  T* grad;
  void run(long at, T* g, long count, long room, Ahead<T>&) {
    count = std::max(count, 0L);
    std::copy(g, g + count, grad + at);
    std::fill(grad + at + count, grad + at + std::max(room, count), T(0));
  }
};

template <class T>
struct Sink<AdamStep<T>> {
  explicit Sink(const AdamStep<T>& t)
      : t(t), first(1 - t.beta1), second(1 - t.beta2), beta2(t.beta2), step_size(t.step_size), eps(t.eps),
        correction(1 / t.correction2_sqrt), decay(t.weight_decay), keep(1 - t.lr * t.weight_decay) {}
  const AdamStep<T> t;
  const T first, second, beta2, step_size, eps, correction, decay, keep;
  FlushDenormals flush;

  // As plain a loop over memory as Adam by itself would be.
  void run(long at, T* g, long count, long room, Ahead<T>& ahead) {
    if (count <= 0) return;
    constexpr int L = kLanes<T>;
    long whole = count / L * L;
    const long rest = count - whole;
    // The last vector reaches into the padding. That is zero, and stays so in a step whose gradient is zero: but for 0 / 0.
    if (rest > 0 && whole + L <= room && eps > 0) {
      store(g + whole, keep_first<T>(load(g + whole), rest));
      whole += L;
    }
    t.weight_decay == 0 && !t.maximize ? whole_vectors<true>(at, g, whole, ahead) : whole_vectors<false>(at, g, whole, ahead);
    if (whole >= count) return;
    T *w = t.weight + at + whole, *m = t.exp_avg + at + whole, *v = t.exp_avg_sq + at + whole;
    Vec<T> wv = load_part<T>(w, rest), mv = load_part<T>(m, rest), vv = load_part<T>(v, rest);
    update<false>(load(g + whole), wv, mv, vv);
    store_part(w, wv, rest);
    store_part(m, mv, rest);
    store_part(v, vv, rest);
  }

 private:
  // kPlain: without weight decay, and minimising.
  template <bool kPlain>
  void update(Vec<T> g, Vec<T>& w, Vec<T>& m, Vec<T>& v) const {
    if (!kPlain && t.maximize) g = -g;
    if (!kPlain && t.weight_decay != 0) t.decoupled ? w *= keep : g += decay * w;
    m += first * (g - m);
    v = beta2 * v + second * (g * g);
    w -= step_size * m / (square_root<T>(v) * correction + eps);
  }
  template <bool kPlain>
  void whole_vectors(long at, const T* g, long count, Ahead<T>& ahead) const {
    constexpr int L = kLanes<T>;
    T *w = t.weight + at, *m = t.exp_avg + at, *v = t.exp_avg_sq + at;
    for (long k = 0; k < count; k += L) {
      if (k % (2 * kLineNumbers<T>) == 0) ahead.step();  // the products fetch the other half
      Vec<T> wv = load(w + k), mv = load(m + k), vv = load(v + k);
      update<kPlain>(load(g + k), wv, mv, vv);
      store(w + k, wv);
      store(m + k, mv);
      store(v + k, vv);
    }
  }
};

template <>
struct Sink<NoWeightGradient> {
  explicit Sink(const NoWeightGradient&) {}
};

template <>
struct Sink<SquaredNorm> {
  explicit Sink(const SquaredNorm&) {}
  double sum_of_squares = 0;
  template <class T>
  void run(long, const T* g, long count, long, Ahead<T>&) {
    constexpr int L = kLanes<T>;
    for (long k = 0; k < count; k += L) {
      const Vec<T> v = keep_first<T>(load(g + k), count - k);
      sum_of_squares += sum<T>(v * v);
    }
  }
};

}  // namespace fastmaf
