// The two ends of a backward pass: where the gradient g of a layer's product comes from, and what becomes of its weight's.
#pragma once

#include "bound.h"
#include "team.h"

namespace fastmaf {

// fill(source, ...) forms g [rows][n] for row0..row1.

template <class T>
void fill(const LinearGradient<T>& s, long rows, long n, long row0, long row1, T* g) {
  for (long i = 0; i < n; ++i)
    for (long r = row0; r < row1; ++r) {
      const long at = i * rows + r;
      g[(r - row0) * n + i] = s.relu_of && !(s.relu_of[at] > 0) ? T(0) : s.grad_y[at] * s.scale;
    }
}

template <class T>
void fill(const AffineGradient<T>& s, long rows, long n, long row0, long row1, T* g) {
  constexpr int L = kLanes<T>;
  const long features = rows / 2, d1 = row1 / 2;
  for (long i = 0; i < n; ++i)
    for (long d = row0 / 2; d < d1; d += L) {
      const long at = i * features + d, count = std::min<long>(L, d1 - d);
      const auto get = [&](const T* p) { return count == L ? load(p + at) : load_part<T>(p + at, count); };
      const Vec<T> a = get(s.log_scale), grad_z = get(s.grad_z);
      const Vec<T> grad_x = grad_z * exponential(-a);
      const Vec<T> grad_a = (get(s.grad_log_scale) - grad_z * get(s.z) - s.grad_ladj[i]) * bound_slope<T>(a, s.bound);
      T shift[L], scale[L];
      store(shift, -grad_x * s.scale);
      store(scale, grad_a * s.scale);
      for (long j = 0; j < count; ++j) {
        g[(2 * (d + j) - row0) * n + i] = shift[j];
        g[(2 * (d + j) + 1 - row0) * n + i] = scale[j];
      }
      if (s.grad_x) store_part(s.grad_x + at, grad_x, count);
    }
}

template <class T>
inline constexpr long kAhead = 4096 / sizeof(T);

// What becomes of grad_W. `apply` takes a vector of it at `at` in packed storage, of which `valid` numbers are visible
// and `room` lie in the row; Adam's `run` a row's visible part. `skip` is told of columns that no row of the block sees.

template <class T>
struct Sink;

template <class T>
struct Sink<WriteGradient<T>> {
  explicit Sink(const WriteGradient<T>& t) : grad(t.grad) {}
  T* grad;
  void apply(long at, Vec<T> v, long valid, long room) {
    if (valid < kLanes<T>) v = keep_first<T>(v, valid);
    room >= kLanes<T> ? store(grad + at, v) : store_part(grad + at, v, room);
  }
  void skip(long at, long count) { std::fill(grad + at, grad + at + std::max(count, 0L), T(0)); }
};

template <class T>
struct Sink<AdamStep<T>> {
  explicit Sink(const AdamStep<T>& t)
      : t(t), first(1 - t.beta1), second(1 - t.beta2), beta2(t.beta2), step_size(t.step_size), eps(t.eps),
        correction(1 / t.correction2_sqrt), decay(t.weight_decay), keep(1 - t.lr * t.weight_decay) {}
  const AdamStep<T>& t;
  const T first, second, beta2, step_size, eps, correction, decay, keep;
  FlushDenormals flush;

  void update(Vec<T> g, Vec<T>& w, Vec<T>& m, Vec<T>& v) const {
    if (t.maximize) g = -g;
    if (t.weight_decay != 0) t.decoupled ? w *= keep : g += decay * w;
    m += first * (g - m);
    v = beta2 * v + second * (g * g);
    w -= step_size * m / (square_root<T>(v) * correction + eps);
  }
  // A run of a row's gradient at once: as plain a loop over memory as Adam by itself would be.
  void run(long at, const T* g, long count, long width) const {
    constexpr int L = kLanes<T>;
    T *w = t.weight + at, *m = t.exp_avg + at, *v = t.exp_avg_sq + at;
    // The same columns of a row below: in a narrow tile of one about a page on, in a wide one of the next.
    const long ahead = std::max(1L, kAhead<T> / std::max(width, 1L)) * width;
    long k = 0;
    for (; k + L <= count; k += L) {
      if (k % kLineNumbers<T> == 0) {
        prefetch(m + k + ahead);
        prefetch(v + k + ahead);
      }
      Vec<T> wv = load(w + k), mv = load(m + k), vv = load(v + k);
      update(load(g + k), wv, mv, vv);
      store(w + k, wv);
      store(m + k, mv);
      store(v + k, vv);
    }
    if (k < count) {
      const long rest = count - k;
      Vec<T> wv = load_part<T>(w + k, rest), mv = load_part<T>(m + k, rest), vv = load_part<T>(v + k, rest);
      update(load(g + k), wv, mv, vv);
      store_part(w + k, wv, rest);
      store_part(m + k, mv, rest);
      store_part(v + k, vv, rest);
    }
  }
  void skip(long, long) {}
};

template <>
struct Sink<NoWeightGradient> {
  explicit Sink(const NoWeightGradient&) {}
};

template <>
struct Sink<SquaredNorm> {
  explicit Sink(const SquaredNorm& t) : total(t.total) {}
  double* total;
  double sum_of_squares = 0;
  template <class V>
  void apply(long, V v, long valid, long) {
    using T = std::decay_t<decltype(sum_element(v))>;
    if (valid < kLanes<T>) v = keep_first<T>(v, valid);
    sum_of_squares += sum<T>(v * v);
  }
  void skip(long, long) {}

 private:
  static float sum_element(Vec<float>);
  static double sum_element(Vec<double>);
};

}  // namespace fastmaf
