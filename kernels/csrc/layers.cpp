// The passes of single layers, each with a team of its own.
#include <numeric>
#include <vector>

#include "backward.h"

namespace fastmaf {

template <class T, class W>
void masked_linear(const Packed<const W>& p, const T* bias, const T* x, long n, bool relu, T* y, long threads) {
  T* pack = Scratch::get<T>(Scratch::kPack, pack_numel<T>(p.columns, n));
  run_team(useful_threads(p, n, threads),
           [&](Team& team) { linear_forward<T, W>(team, p, bias, x, n, relu, y, pack); });
}

template <class T, class W>
void affine_output(const Packed<const W>& p, const T* bias, const T* h, const T* x, long n, Bound bound, T* z, T* ladj,
                   T* log_scale, long threads) {
  threads = useful_threads(p, n, threads);
  T* pack = Scratch::get<T>(Scratch::kPack, pack_numel<T>(p.columns, n));
  std::vector<double> totals(most_parts(threads) * n, 0.0);
  run_team(threads, [&](Team& team) {
    affine_forward<T, W>(team, p, bias, h, x, n, bound, z, log_scale, totals.data(), pack);
  });
  sum_totals(totals, n, ladj);
}

template <class T, class Source, class Target>
void linear_backward(const Packed<const T>& p, const Source& source, const T* x, long n, T* grad_x, T* grad_bias,
                     const Target& target, long threads) {
  threads = useful_threads(p, n, threads);
  T* shared = Scratch::get<T>(Scratch::kGradient, shared_numel(p, n, threads));
  const auto run = [&](const Target& to) {
    run_team(threads, [&](Team& team) { layer_backward(team, p, source, x, n, grad_x, grad_bias, to, shared); });
  };
  if constexpr (std::is_same_v<Target, SquaredNorm>) {
    std::vector<double> of_item(most_items(p, n, threads), 0.0);
    run({target.total, of_item.data()});
    *target.total = std::accumulate(of_item.begin(), of_item.end(), 0.0);
  } else {
    run(target);
  }
}

template void masked_linear(const Packed<const float>&, const float*, const float*, long, bool, float*, long);
template void masked_linear(const Packed<const bfloat16>&, const float*, const float*, long, bool, float*, long);
template void masked_linear(const Packed<const double>&, const double*, const double*, long, bool, double*, long);

template void affine_output(const Packed<const float>&, const float*, const float*, const float*, long, Bound, float*, float*,
                            float*, long);
template void affine_output(const Packed<const bfloat16>&, const float*, const float*, const float*, long, Bound, float*,
                            float*, float*, long);
template void affine_output(const Packed<const double>&, const double*, const double*, const double*, long, Bound, double*,
                            double*, double*, long);

#define FASTMAF_BACKWARD(T, Source, Target) \
  template void linear_backward(const Packed<const T>&, const Source&, const T*, long, T*, T*, const Target&, long);
#define FASTMAF_TARGETS(T, Source)              \
  FASTMAF_BACKWARD(T, Source, WriteGradient<T>) \
  FASTMAF_BACKWARD(T, Source, AdamStep<T>)      \
  FASTMAF_BACKWARD(T, Source, NoWeightGradient) \
  FASTMAF_BACKWARD(T, Source, SquaredNorm)
FASTMAF_TARGETS(float, LinearGradient<float>)
FASTMAF_TARGETS(float, AffineGradient<float>)
FASTMAF_TARGETS(double, LinearGradient<double>)
FASTMAF_TARGETS(double, AffineGradient<double>)

}  // namespace fastmaf
