// The kernels of one instruction set: this file is compiled once for each, with FASTMAF_ISA its name.
#include "inverse.h"

namespace fastmaf {
namespace FASTMAF_ISA {
namespace {

template <class T, class W>
struct Entry {
  static void forward(const Flow& flow, const void* x, int64_t n, void* z, void* ladj, void* saved, long threads) {
    flow_forward<T, W>(flow, static_cast<const T*>(x), n, static_cast<T*>(z), static_cast<T*>(ladj), static_cast<T*>(saved), threads);
  }
  static void inverse(const Flow& flow, const void* z, int64_t n, void* x, void* ladj, long threads) {
    flow_inverse<T, W>(flow, static_cast<const T*>(z), n, static_cast<T*>(x), static_cast<T*>(ladj), threads);
  }
  static void backward(const Flow& flow, const void* grad_z, const void* grad_ladj, const void* saved, int64_t n, void* grad_x,
                       void* const* grad_biases, const Target* targets, long threads) {
    flow_backward<T>(flow, static_cast<const T*>(grad_z), static_cast<const T*>(grad_ladj), static_cast<const T*>(saved), n,
                     static_cast<T*>(grad_x), grad_biases, targets, threads);
  }
  static void linear(const Layer& layer, const void* x, int64_t n, bool relu, void* y, long threads) {
    const Panels<W> w(layer);
    const Team team(useful_threads(w, n, threads));
    linear_forward<T>(team, w, static_cast<const T*>(layer.bias), static_cast<const T*>(x), n, relu, static_cast<T*>(y));
  }
  static void affine(const Layer& layer, const AffineMap& map, const void* h, const void* x, int64_t n, void* z, void* ladj,
                     void* log_scale, long threads) {
    const Panels<W> w(layer);
    const Team team(useful_threads(w, n, threads));
    std::vector<double> totals(forward_parts(w, n) * n), sums(n);
    affine_forward<T>(team, w, map, static_cast<const T*>(layer.bias), static_cast<const T*>(h), static_cast<const T*>(x), n,
                      static_cast<T*>(z), static_cast<T*>(log_scale), totals.data());
    add_totals(totals, map.sign(), n, sums);
    std::copy(sums.begin(), sums.end(), static_cast<T*>(ladj));
  }
  static void backward_of_layer(const Layer& layer, const Source& source, const void* x, int64_t n, void* grad_x, void* grad_bias,
                                const Target& target, long threads) {
    const Panels<T> w(layer);
    const Team team(useful_threads(w, n, threads));
    layer_backward<T>(team, w, source, static_cast<const T*>(x), n, static_cast<T*>(grad_x), static_cast<T*>(grad_bias), target);
  }
  static constexpr Kernels kernels() { return {forward, inverse, backward, linear, affine, backward_of_layer}; }
};

}  // namespace

// For weights of Dtype `weight` beside activations of the type that goes with it.
extern const Kernels kernels[3];
const Kernels kernels[3] = {Entry<float, float>::kernels(), Entry<double, double>::kernels(), Entry<float, bfloat16>::kernels()};

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
