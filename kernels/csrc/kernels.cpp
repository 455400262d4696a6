// The kernels of one instruction set: this file is compiled once for each, with FASTMAF_ISA its name.
#include "inverse.h"

namespace fastmaf {
namespace FASTMAF_ISA {
namespace {

template <class T, class W>
struct Entry {
  static void forward(const Flow& flow, const int32_t* places, const void* const* terms, const void* x, int64_t n, void* z, void* ladj,
                      void* saved, void* squares, int64_t threads) {
    flow_forward<T, W>(flow, places, terms, static_cast<const T*>(x), n, static_cast<T*>(z), static_cast<T*>(ladj),
                       static_cast<T*>(saved), static_cast<T*>(squares), threads);
  }
  static void inverse(const Flow& flow, const void* const* terms, const void* z, int64_t n, void* x, void* ladj, int64_t threads) {
    flow_inverse<T, W>(flow, terms, static_cast<const T*>(z), n, static_cast<T*>(x), static_cast<T*>(ladj), threads);
  }
  static void backward(const Flow& flow, const void* grad_z, const void* grad_ladj, const void* saved, int64_t n, void* grad_x,
                       void* const* grad_biases, const Target* targets, int64_t threads) {
    flow_backward<T>(flow, static_cast<const T*>(grad_z), static_cast<const T*>(grad_ladj), static_cast<const T*>(saved), n,
                     static_cast<T*>(grad_x), grad_biases, targets, threads);
  }
  static void linear(const Layer& layer, const void* x, int64_t n, bool relu, void* y, int64_t threads) {
    const Panels<W> w(layer);
    const Team team(useful_threads(w, n, threads));
    each_chunk(n, [&](const Tiles& tiles, int64_t first) {
      T* from = Scratch::get<T>(Scratch::kState, tiles.numel(w.columns + w.rows) + 2 * kSlack);
      T* to = from + tiles.numel(w.columns) + kSlack;
      fill_tiles(team, tiles, static_cast<const T*>(x) + first * w.columns, w.columns, kInOrder, from);
      linear_forward<T>(team, w, static_cast<const T*>(layer.bias), nullptr, tiles, from, relu, to);
      give_tiles(team, tiles, to, w.rows, kInOrder, static_cast<T*>(y) + first * w.rows);
    });
  }
  static void affine(const Layer& layer, const AffineMap& map, const void* h, const void* x, int64_t n, void* z, void* ladj,
                     void* log_scale, int64_t threads) {
    const Panels<W> w(layer);
    const Team team(useful_threads(w, n, threads));
    const int64_t features = w.rows / 2;
    each_chunk(n, [&](const Tiles& tiles, int64_t first) {
      const int64_t plane = tiles.numel(features) + kSlack;
      T *hs = Scratch::get<T>(Scratch::kState, 3 * plane + tiles.numel(w.columns) + kSlack), *xs = hs + tiles.numel(w.columns) + kSlack;
      T *zs = xs + plane, *as = log_scale ? zs + plane : nullptr;
      fill_tiles(team, tiles, static_cast<const T*>(h) + first * w.columns, w.columns, kInOrder, hs);
      fill_tiles(team, tiles, static_cast<const T*>(x) + first * features, features, kInOrder, xs);
      std::vector<double> totals(forward_parts(w, tiles) * tiles.n), sums(tiles.n);
      affine_forward<T>(team, w, map, static_cast<const T*>(layer.bias), nullptr, tiles, hs, {xs, zs, nullptr, nullptr, as},
                        totals.data());
      add_totals(totals, map.sign(), tiles.n, sums.data());
      std::copy(sums.begin(), sums.end(), static_cast<T*>(ladj) + first);
      give_tiles(team, tiles, zs, features, kInOrder, static_cast<T*>(z) + first * features);
      if (as) give_tiles(team, tiles, as, features, kInOrder, static_cast<T*>(log_scale) + first * features);
    });
  }
  static void backward_of_layer(const Layer& layer, const Source& source, const void* x, int64_t n, void* grad_x, void* grad_bias,
                                const Target& target, int64_t threads) {
    const Panels<T> w(layer);
    const Team team(useful_threads(w, n, threads));
    const Tiles tiles(n, true);
    const int64_t outputs = source.log_scale ? w.rows / 2 : w.rows;
    constexpr const void* Source::*kParts[] = {&Source::grad_y, &Source::relu_of, &Source::grad_z, &Source::grad_log_scale, &Source::x,
                                               &Source::z,      &Source::log_scale};
    int64_t units = (grad_x ? 2 : 1) * w.columns + (source.grad_x ? outputs : 0);
    for (const auto part : kParts) units += source.*part ? outputs : 0;
    T* memory = Scratch::get<T>(Scratch::kState, tiles.numel(units));
    const auto take = [&](const void* from, int64_t units) -> const void* {
      if (from == nullptr) return nullptr;
      T* to = std::exchange(memory, memory + tiles.numel(units));
      fill_tiles(team, tiles, static_cast<const T*>(from), units, kInOrder, to);
      return to;
    };
    Source in_tiles = source;
    for (const auto part : kParts) in_tiles.*part = take(source.*part, outputs);
    const T* xs = static_cast<const T*>(take(x, w.columns));
    T *of_map = memory, *of_x = of_map + (source.grad_x ? tiles.numel(outputs) : 0);
    if (source.grad_x) in_tiles.grad_x = of_map;
    layer_backward<T>(team, w, in_tiles, xs, n, grad_x ? of_x : nullptr, static_cast<T*>(grad_bias), target);
    if (grad_x) give_tiles(team, tiles, of_x, w.columns, kInOrder, static_cast<T*>(grad_x));
    if (source.grad_x) give_tiles(team, tiles, of_map, outputs, kInOrder, static_cast<T*>(source.grad_x));
  }
  static bool has_matrix_unit() { return std::is_same_v<W, bfloat16> && amx_ready(); }
  static constexpr Kernels kernels() { return {forward, inverse, backward, linear, affine, backward_of_layer, has_matrix_unit}; }
};

}  // namespace

// For weights of Dtype `weight` beside activations of the type that goes with it.
extern const Kernels kernels[3];
const Kernels kernels[3] = {Entry<float, float>::kernels(), Entry<double, double>::kernels(), Entry<float, bfloat16>::kernels()};

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
