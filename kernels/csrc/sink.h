// What becomes of the gradient of a weight: it is written, or Adam takes a step with it, or its squares are added up.
#pragma once

#include "functions.h"
#include "panels.h"

namespace fastmaf {
namespace FASTMAF_ISA {

inline constexpr int64_t kStepColumns = 12;    // that go through both products at once

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
  template <int64_t kStride>
  void run(int64_t p, int64_t k, int64_t columns, T* g) {
    const int64_t ragged = std::max(k, w_.full(p));
    for (int64_t i = ragged - k; i < columns; ++i) hide(p, k + i, g + i * kStride);
    const int64_t at = (w_.starts[p] + k) * kPanel;
    switch (t_.mode) {
      case kWrite:
        for (int64_t i = 0; i < columns; ++i)
          std::copy(g + i * kStride, g + i * kStride + kPanel, static_cast<T*>(t_.grad) + at + i * kPanel);
        break;
      case kNorm:
        for (int64_t i = 0; i < columns; ++i)
          for (int64_t r = 0; r < kPanel; ++r) squares_[r] += static_cast<double>(g[i * kStride + r]) * g[i * kStride + r];
        break;
      case kAdam:
        plain_ ? adam<true, kStride>(at, columns, g) : adam<false, kStride>(at, columns, g);
        if (!(a_.eps > 0))  // the padding's step was 0 / 0
          for (int64_t i = ragged - k; i < columns; ++i) hide(p, k + i, static_cast<T*>(t_.weight) + at + i * kPanel);
        break;
      default:
        break;
    }
  }
  // Adds what the first columns of panel p need.
  template <class L>
  void needs(int64_t p, L& lines) const {
    lines.add(w_.panel(p));
    if (t_.mode != kAdam) return;
    lines.add(static_cast<const T*>(t_.exp_avg) + w_.starts[p] * kPanel);
    lines.add(static_cast<const T*>(t_.exp_avg_sq) + w_.starts[p] * kPanel);
  }
  // Fetches columns k .. k + kStepColumns of panel p, or what follows it, with the moments.
  void fetch(int64_t p, int64_t k) const {
    const int64_t at = (w_.starts[p] + k) * kPanel;
    for (int64_t i = 0; i < kStepColumns * kPanel; i += 64 / static_cast<int64_t>(sizeof(T))) {
      FASTMAF_PREFETCH(w_.weight + at + i);
      if (t_.mode == kAdam)
        FASTMAF_PREFETCH(static_cast<const T*>(t_.exp_avg) + at + i), FASTMAF_PREFETCH(static_cast<const T*>(t_.exp_avg_sq) + at + i);
    }
  }
  // The columns from k on that no row of panel p sees, but that it has.
  void rest(int64_t p, int64_t k, int64_t k1) {
    k1 = std::min(k1, w_.width(p));
    T* grad = static_cast<T*>(t_.grad);
    if (t_.mode == kWrite && k < k1) std::fill(grad + (w_.starts[p] + k) * kPanel, grad + (w_.starts[p] + k1) * kPanel, T(0));
  }

 private:
  // Sets the lanes of a column to zero that the mask hides.
  void hide(int64_t p, int64_t k, T* column) const {
    for (int64_t i = 0; i < kPanel; ++i)
      if (p * kPanel + i >= w_.rows || w_.prefix[p * kPanel + i] <= k) column[i] = 0;
  }

  // kPlain: without weight decay, and minimising.
  template <bool kPlain, int64_t kStride>
  void adam(int64_t at, int64_t columns, const T* grad) const {
    T *w = static_cast<T*>(t_.weight) + at, *m = static_cast<T*>(t_.exp_avg) + at, *v = static_cast<T*>(t_.exp_avg_sq) + at;
    // Copies, which no store below can change.
    const T first = first_, second = second_, step = step_, eps = eps_, correction = correction_;
    for (int64_t i = 0; i < columns; ++i, grad += kStride)
      for (int64_t j = 0; j < kPanel; j += kLanes<T>, w += kLanes<T>, m += kLanes<T>, v += kLanes<T>) {
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

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
