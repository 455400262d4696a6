// The native kernels as torch ops, fastmaf_native::*: checks, outputs, and the choice of types; the arithmetic is elsewhere.
// This file is compiled for the baseline of the architecture, so that it can tell whether the processor can run the others.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.h"

namespace {

using at::Tensor;
using at::TensorList;
using fastmaf::bfloat16;
using fastmaf::Bound;
using fastmaf::Packed;
using fastmaf::Tile;

long threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

void check_cpu(const char* op, const char* name, const Tensor& t) {
  TORCH_CHECK(t.device().is_cpu(), op, ": ", name, " must be on the CPU; found ", t.device());
  TORCH_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous; found strides ", t.strides());
}

void check(const char* op, const char* name, const Tensor& t, at::ScalarType dtype, at::IntArrayRef shape) {
  check_cpu(op, name, t);
  TORCH_CHECK(t.scalar_type() == dtype, op, ": ", name, " must be ", dtype, "; found ", t.scalar_type());
  TORCH_CHECK(t.sizes() == shape, op, ": ", name, " must have shape ", shape, "; found ", t.sizes());
}

void check_dtype(const char* op, const Tensor& x) {
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble, op,
              ": the native kernels take float32 and float64; found ", x.scalar_type());
}

// Checks that tiles, prefix and storage fit one another: a kernel trusts them.
template <class W>
Packed<W> packed(const char* op, const Tensor& weight, const Tensor& prefix, const Tensor& tiles, long columns) {
  using Number = std::remove_const_t<W>;
  const auto dtype = sizeof(Number) == 2 ? at::kBFloat16 : sizeof(Number) == 4 ? at::kFloat : at::kDouble;
  check_cpu(op, "weight", weight);
  TORCH_CHECK(weight.scalar_type() == dtype && weight.dim() == 1, op, ": weight must be packed, 1-D and ", dtype, "; found ",
              weight.scalar_type(), " ", weight.sizes());
  check_cpu(op, "tiles", tiles);
  TORCH_CHECK(tiles.scalar_type() == at::kInt && tiles.dim() == 2 && tiles.size(1) == 4 && tiles.size(0) > 0, op,
              ": tiles must be int32 [T, 4]; found ", tiles.scalar_type(), " ", tiles.sizes());
  const auto* table = reinterpret_cast<const Tile*>(tiles.const_data_ptr<int32_t>());
  const long count = tiles.size(0), rows = table[count - 1].row_end;
  check(op, "prefix", prefix, at::kLong, {rows});
  const auto* sees = prefix.const_data_ptr<int64_t>();
  long row = 0, offset = 0;
  for (long t = 0; t < count; ++t) {
    const Tile& tile = table[t];
    TORCH_CHECK(tile.row_start == row && tile.row_end > row && tile.row_end <= rows && tile.offset == offset && tile.width >= 0 &&
                    tile.width <= columns && sees[tile.row_end - 1] <= tile.width && sees[tile.row_start] >= 0,
                op, ": tile ", t, " (rows ", tile.row_start, "..", tile.row_end, ", width ", tile.width, ", offset ", tile.offset,
                ") does not continue a staircase of ", columns, " columns at row ", row, ", offset ", offset,
                ": the layout belongs to another weight");
    row = tile.row_end;
    offset += static_cast<long>(tile.row_end - tile.row_start) * tile.width;
  }
  TORCH_CHECK(weight.numel() == offset, op, ": weight must hold ", offset, " numbers for these tiles; found ", weight.numel());
  W* data;
  if constexpr (std::is_const_v<W>)
    data = static_cast<W*>(weight.const_data_ptr());
  else
    data = static_cast<W*>(weight.mutable_data_ptr());
  return {data, table, count, sees, rows, columns};
}

long batch(const char* op, const char* name, const Tensor& x) {
  TORCH_CHECK(x.dim() == 2, op, ": ", name, " must be [N, features]; found ", x.sizes());
  check_cpu(op, name, x);
  return x.size(0);
}

// Calls body(T{}) for the dtype of x.
template <class Body>
auto for_dtype(const char* op, const Tensor& x, Body&& body) {
  check_dtype(op, x);
  return x.scalar_type() == at::kDouble ? body(double{}) : body(float{});
}

// Calls body(T{}, W{}): weights are of the dtype of x, or bfloat16 beside float32.
template <class Body>
auto for_dtypes(const char* op, const Tensor& x, const Tensor& weight, Body&& body) {
  check_dtype(op, x);
  if (weight.scalar_type() == at::kBFloat16) {
    TORCH_CHECK(x.scalar_type() == at::kFloat, op, ": bfloat16 weights go with float32 activations; found ", x.scalar_type());
    return body(float{}, bfloat16{});
  }
  return x.scalar_type() == at::kDouble ? body(double{}, double{}) : body(float{}, float{});
}

// ---- masked_linear

Tensor masked_linear(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& prefix, const Tensor& tiles,
                     bool relu) {
  const char* op = "masked_linear";
  const long n = batch(op, "x", x);
  return for_dtypes(op, x, weight, [&](auto t, auto w) {
    using T = decltype(t);
    const auto p = packed<const decltype(w)>(op, weight, prefix, tiles, x.size(1));
    check(op, "bias", bias, x.scalar_type(), {p.rows});
    Tensor y = at::empty({n, p.rows}, x.options());
    fastmaf::masked_linear<T>(p, bias.const_data_ptr<T>(), x.const_data_ptr<T>(), n, relu, y.mutable_data_ptr<T>(), threads());
    return y;
  });
}

// Adam's scalars, in the order in which fastmaf_native's schemas take them.
constexpr long kAdamNumbers = 9;
template <class T>
fastmaf::AdamStep<T> adam_step(const char* op, const Tensor& weight, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                               at::ArrayRef<double> a) {
  check(op, "exp_avg", exp_avg, weight.scalar_type(), weight.sizes());
  check(op, "exp_avg_sq", exp_avg_sq, weight.scalar_type(), weight.sizes());
  TORCH_CHECK(a.size() == kAdamNumbers, op, ": expected ", kAdamNumbers, " numbers of Adam; found ", a.size());
  return {weight.mutable_data_ptr<T>(), exp_avg.mutable_data_ptr<T>(), exp_avg_sq.mutable_data_ptr<T>(),
          a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7] != 0, a[8] != 0};
}

// Checks the arguments of masked_linear's backward passes and calls body(T{}, Packed, LinearGradient, n).
template <class Body>
auto with_linear(const char* op, const Tensor& grad_y, const Tensor& x, const Tensor& y, const Tensor& weight,
                 const Tensor& prefix, const Tensor& tiles, bool relu, double scale, Body&& body) {
  const long n = batch(op, "x", x);
  return for_dtype(op, x, [&](auto t) {
    using T = decltype(t);
    const auto p = packed<const T>(op, weight, prefix, tiles, x.size(1));
    check(op, "grad_y", grad_y, x.scalar_type(), {n, p.rows});
    if (relu) check(op, "y", y, x.scalar_type(), {n, p.rows});
    const fastmaf::LinearGradient<T> source{grad_y.const_data_ptr<T>(), relu ? y.const_data_ptr<T>() : nullptr,
                                            static_cast<T>(scale)};
    return body(t, p, source, n);
  });
}

std::tuple<Tensor, Tensor, Tensor> masked_linear_backward(const Tensor& grad_y, const Tensor& x, const Tensor& y,
                                                          const Tensor& weight, const Tensor& prefix, const Tensor& tiles,
                                                          bool relu, bool need_grad_x, bool need_grad_weight) {
  const char* op = "masked_linear_backward";
  return with_linear(op, grad_y, x, y, weight, prefix, tiles, relu, 1, [&](auto t, const auto& p, const auto& source, long n) {
    using T = decltype(t);
    Tensor grad_x = need_grad_x ? at::empty_like(x) : at::empty({0}, x.options());
    Tensor grad_weight = need_grad_weight ? at::empty_like(weight) : at::empty({0}, x.options());
    Tensor grad_bias = at::empty({p.rows}, x.options());
    T* into = need_grad_x ? grad_x.mutable_data_ptr<T>() : nullptr;
    const auto run = [&](const auto& target) {
      fastmaf::linear_backward(p, source, x.const_data_ptr<T>(), n, into, grad_bias.mutable_data_ptr<T>(), target, threads());
    };
    if (need_grad_weight)
      run(fastmaf::WriteGradient<T>{grad_weight.mutable_data_ptr<T>()});
    else
      run(fastmaf::NoWeightGradient{});
    return std::make_tuple(grad_x, grad_weight, grad_bias);
  });
}

std::tuple<Tensor, Tensor> masked_linear_adam_(const Tensor& grad_y, const Tensor& x, const Tensor& y, const Tensor& weight,
                                               const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& prefix,
                                               const Tensor& tiles, bool relu, bool need_grad_x, double scale,
                                               at::ArrayRef<double> adam) {
  const char* op = "masked_linear_adam_";
  return with_linear(op, grad_y, x, y, weight, prefix, tiles, relu, scale,
                     [&](auto t, const auto& p, const auto& source, long n) {
                       using T = decltype(t);
                       const auto target = adam_step<T>(op, weight, exp_avg, exp_avg_sq, adam);
                       Tensor grad_x = need_grad_x ? at::empty_like(x) : at::empty({0}, x.options());
                       // A scale is for the weight alone: the others' gradients are not formed then.
                       TORCH_CHECK(scale == 1 || !need_grad_x, op, ": a scale goes with need_grad_x = False; found ", scale);
                       Tensor grad_bias = at::empty({scale == 1 ? p.rows : 0}, x.options());
                       fastmaf::linear_backward(p, source, x.const_data_ptr<T>(), n,
                                                need_grad_x ? grad_x.mutable_data_ptr<T>() : nullptr,
                                                scale == 1 ? grad_bias.mutable_data_ptr<T>() : nullptr, target, threads());
                       return std::make_tuple(grad_x, grad_bias);
                     });
}

double masked_linear_squared_norm(const Tensor& grad_y, const Tensor& x, const Tensor& y, const Tensor& weight,
                                  const Tensor& prefix, const Tensor& tiles, bool relu) {
  return with_linear("masked_linear_squared_norm", grad_y, x, y, weight, prefix, tiles, relu, 1,
                     [&](auto t, const auto& p, const auto& source, long n) {
                       using T = decltype(t);
                       double total = 0;
                       fastmaf::linear_backward<T>(p, source, x.const_data_ptr<T>(), n, nullptr, nullptr,
                                                   fastmaf::SquaredNorm{&total}, threads());
                       return total;
                     });
}

// ---- affine_output

std::tuple<Tensor, Tensor, Tensor> affine_output(const Tensor& h, const Tensor& weight, const Tensor& bias, const Tensor& x,
                                                 const Tensor& prefix, const Tensor& tiles, double bound, bool soft) {
  const char* op = "affine_output";
  const long n = batch(op, "h", h);
  return for_dtypes(op, x, weight, [&](auto t, auto w) {
    using T = decltype(t);
    const auto p = packed<const decltype(w)>(op, weight, prefix, tiles, h.size(1));
    TORCH_CHECK(p.rows % 2 == 0, op, ": rows come in pairs of shift and log-scale; found ", p.rows);
    check(op, "h", h, x.scalar_type(), {n, p.columns});
    check(op, "x", x, x.scalar_type(), {n, p.rows / 2});
    check(op, "bias", bias, x.scalar_type(), {p.rows});
    Tensor z = at::empty_like(x), ladj = at::empty({n}, x.options()), log_scale = at::empty_like(x);
    fastmaf::affine_output<T>(p, bias.const_data_ptr<T>(), h.const_data_ptr<T>(), x.const_data_ptr<T>(), n, Bound{bound, soft},
                              z.mutable_data_ptr<T>(), ladj.mutable_data_ptr<T>(), log_scale.mutable_data_ptr<T>(), threads());
    return std::make_tuple(z, ladj, log_scale);
  });
}

// The tensors that affine_output's backward passes start from.
struct AffineSaved {
  const Tensor &grad_z, &grad_ladj, &grad_log_scale, &h, &weight, &z, &log_scale, &prefix, &tiles;
  Bound bound;
  double scale;
};

template <class Body>
auto with_affine(const char* op, const AffineSaved& s, const Tensor* grad_x, Body&& body) {
  const long n = batch(op, "h", s.h);
  return for_dtype(op, s.h, [&](auto t) {
    using T = decltype(t);
    const auto p = packed<const T>(op, s.weight, s.prefix, s.tiles, s.h.size(1));
    const long features = p.rows / 2;
    check(op, "grad_z", s.grad_z, s.h.scalar_type(), {n, features});
    check(op, "grad_ladj", s.grad_ladj, s.h.scalar_type(), {n});
    check(op, "grad_log_scale", s.grad_log_scale, s.h.scalar_type(), {n, features});
    check(op, "z", s.z, s.h.scalar_type(), {n, features});
    check(op, "log_scale", s.log_scale, s.h.scalar_type(), {n, features});
    const fastmaf::AffineGradient<T> source{s.grad_z.const_data_ptr<T>(),
                                            s.grad_ladj.const_data_ptr<T>(),
                                            s.grad_log_scale.const_data_ptr<T>(),
                                            s.z.const_data_ptr<T>(),
                                            s.log_scale.const_data_ptr<T>(),
                                            s.bound,
                                            grad_x ? grad_x->mutable_data_ptr<T>() : nullptr,
                                            static_cast<T>(s.scale)};
    return body(t, p, source, n);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> affine_output_backward(const Tensor& grad_z, const Tensor& grad_ladj,
                                                                  const Tensor& grad_log_scale, const Tensor& h,
                                                                  const Tensor& weight, const Tensor& z, const Tensor& log_scale,
                                                                  const Tensor& prefix, const Tensor& tiles, double bound,
                                                                  bool soft, bool need_grad_weight) {
  const AffineSaved saved{grad_z, grad_ladj, grad_log_scale, h, weight, z, log_scale, prefix, tiles, {bound, soft}, 1};
  Tensor grad_x = at::empty_like(z);
  return with_affine("affine_output_backward", saved, &grad_x, [&](auto t, const auto& p, const auto& source, long n) {
    using T = decltype(t);
    Tensor grad_h = at::empty_like(h), grad_bias = at::empty({p.rows}, h.options());
    Tensor grad_weight = need_grad_weight ? at::empty_like(weight) : at::empty({0}, h.options());
    const auto run = [&](const auto& target) {
      fastmaf::linear_backward(p, source, h.const_data_ptr<T>(), n, grad_h.mutable_data_ptr<T>(),
                               grad_bias.mutable_data_ptr<T>(), target, threads());
    };
    if (need_grad_weight)
      run(fastmaf::WriteGradient<T>{grad_weight.mutable_data_ptr<T>()});
    else
      run(fastmaf::NoWeightGradient{});
    return std::make_tuple(grad_h, grad_weight, grad_bias, grad_x);
  });
}

std::tuple<Tensor, Tensor, Tensor> affine_output_adam_(const Tensor& grad_z, const Tensor& grad_ladj,
                                                       const Tensor& grad_log_scale, const Tensor& h, const Tensor& weight,
                                                       const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& z,
                                                       const Tensor& log_scale, const Tensor& prefix, const Tensor& tiles,
                                                       double bound, bool soft, bool need_inputs, double scale,
                                                       at::ArrayRef<double> adam) {
  const char* op = "affine_output_adam_";
  const AffineSaved saved{grad_z, grad_ladj, grad_log_scale, h, weight, z, log_scale, prefix, tiles, {bound, soft}, scale};
  Tensor grad_x = need_inputs ? at::empty_like(z) : at::empty({0}, z.options());
  return with_affine(op, saved, need_inputs ? &grad_x : nullptr, [&](auto t, const auto& p, const auto& source, long n) {
    using T = decltype(t);
    const auto target = adam_step<T>(op, weight, exp_avg, exp_avg_sq, adam);
    Tensor grad_h = need_inputs ? at::empty_like(h) : at::empty({0}, h.options());
    TORCH_CHECK(scale == 1 || !need_inputs, op, ": a scale goes with need_inputs = False; found ", scale);
    Tensor grad_bias = at::empty({scale == 1 ? p.rows : 0}, h.options());
    fastmaf::linear_backward(p, source, h.const_data_ptr<T>(), n, need_inputs ? grad_h.mutable_data_ptr<T>() : nullptr,
                             scale == 1 ? grad_bias.mutable_data_ptr<T>() : nullptr, target, threads());
    return std::make_tuple(grad_h, grad_bias, grad_x);
  });
}

double affine_output_squared_norm(const Tensor& grad_z, const Tensor& grad_ladj, const Tensor& grad_log_scale, const Tensor& h,
                                  const Tensor& weight, const Tensor& z, const Tensor& log_scale, const Tensor& prefix,
                                  const Tensor& tiles, double bound, bool soft) {
  const AffineSaved saved{grad_z, grad_ladj, grad_log_scale, h, weight, z, log_scale, prefix, tiles, {bound, soft}, 1};
  return with_affine("affine_output_squared_norm", saved, nullptr, [&](auto t, const auto& p, const auto& source, long n) {
    using T = decltype(t);
    double total = 0;
    fastmaf::linear_backward<T>(p, source, h.const_data_ptr<T>(), n, nullptr, nullptr, fastmaf::SquaredNorm{&total}, threads());
    return total;
  });
}

// ---- chains of blocks

void check_chain(const char* op, TensorList weights, TensorList biases, TensorList prefixes, TensorList tiles,
                 std::size_t blocks, TensorList permutations, at::ArrayRef<double> bounds, const c10::List<bool>& softs) {
  TORCH_CHECK(weights.size() == biases.size() && weights.size() == prefixes.size() && weights.size() == tiles.size(), op,
              ": weights, biases, prefixes and tiles must have one entry per layer; found ", weights.size(), ", ", biases.size(),
              ", ", prefixes.size(), ", ", tiles.size());
  TORCH_CHECK(bounds.size() == blocks && softs.size() == blocks && permutations.size() == blocks + 1 && blocks > 0 &&
                  !weights.empty(),
              op, ": bounds and softs must have one entry per block and permutations one more; found ", blocks, " blocks, ",
              bounds.size(), ", ", softs.size(), ", ", permutations.size());
}

std::tuple<Tensor, Tensor> chain_forward(const Tensor& input, TensorList weights, TensorList biases, TensorList prefixes,
                                         TensorList tiles, at::IntArrayRef depths, TensorList permutations, bool relu,
                                         at::ArrayRef<double> bounds, c10::List<bool> softs) {
  const char* op = "chain_forward";
  batch(op, "x", input);
  check_chain(op, weights, biases, prefixes, tiles, depths.size(), permutations, bounds, softs);
  Tensor x = input, ladj = at::zeros({input.size(0)}, input.options());
  std::size_t layer = 0;
  for (std::size_t b = 0; b < depths.size(); ++b) {
    TORCH_CHECK(depths[b] >= 2 && layer + depths[b] <= weights.size(), op, ": block ", b, " has ", depths[b], " layers, but only ",
                weights.size() - layer, " weights are left");
    if (permutations[b].numel() > 0) x = at::index_select(x, 1, permutations[b]);
    Tensor h = x;
    for (long k = 0; k + 1 < depths[b]; ++k, ++layer)
      h = masked_linear(h, weights[layer], biases[layer], prefixes[layer], tiles[layer], relu);
    Tensor z, term, log_scale;
    std::tie(z, term, log_scale) =
        affine_output(h, weights[layer], biases[layer], x, prefixes[layer], tiles[layer], bounds[b], softs.get(b));
    ++layer;
    x = z;
    ladj.add_(term);
  }
  TORCH_CHECK(layer == weights.size(), op, ": ", weights.size() - layer, " weights belong to no block");
  if (permutations.back().numel() > 0) x = at::index_select(x, 1, permutations.back());
  return std::make_tuple(x, ladj);
}

std::tuple<Tensor, Tensor> level_inverse(const Tensor& z, TensorList weights, TensorList biases, TensorList prefixes,
                                         TensorList tiles, TensorList schedules, TensorList permutations, bool relu,
                                         at::ArrayRef<double> bounds, c10::List<bool> softs) {
  const char* op = "level_inverse";
  const long n = batch(op, "z", z), features = z.size(1), blocks = schedules.size();
  check_chain(op, weights, biases, prefixes, tiles, blocks, permutations, bounds, softs);
  return for_dtypes(op, z, weights[0], [&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    std::vector<fastmaf::Layer<T, W>> layers;
    layers.reserve(weights.size());
    std::vector<fastmaf::Block<T, W>> chain;
    std::vector<const int64_t*> orders;
    for (const Tensor& order : permutations) {
      if (order.numel() > 0) check(op, "permutation", order, at::kLong, {features});
      orders.push_back(order.numel() > 0 ? order.const_data_ptr<int64_t>() : nullptr);
      for (long d = 0; orders.back() && d < features; ++d)
        TORCH_CHECK(orders.back()[d] >= 0 && orders.back()[d] < features, op, ": permutation holds ", orders.back()[d],
                    ", outside 0..", features - 1);
    }
    for (long b = 0; b < blocks; ++b) {
      const Tensor& schedule = schedules[b];
      check_cpu(op, "schedule", schedule);
      TORCH_CHECK(schedule.scalar_type() == at::kInt && schedule.dim() == 2 && schedule.size(1) >= 2, op,
                  ": schedule must be int32 [steps, 1 + hidden layers], with at least one hidden layer; found ",
                  schedule.scalar_type(), " ", schedule.sizes());
      const long depth = schedule.size(1);
      TORCH_CHECK(layers.size() + depth <= weights.size(), op, ": block ", b, " has ", depth, " layers, but only ",
                  weights.size() - layers.size(), " weights are left");
      const std::size_t first = layers.size();
      long columns = features;
      for (long k = 0; k < depth; ++k) {
        const std::size_t i = first + k;
        const auto p = packed<const W>(op, weights[i], prefixes[i], tiles[i], columns);
        check(op, "bias", biases[i], z.scalar_type(), {p.rows});
        layers.push_back({p, biases[i].const_data_ptr<T>()});
        columns = p.rows;
      }
      TORCH_CHECK(columns == 2 * features, op, ": the last layer of block ", b, " must have ", 2 * features, " rows; found ",
                  columns);
      // Every step must be computable from what the steps before it finished.
      const auto* table = schedule.const_data_ptr<int32_t>();
      std::vector<long> before(depth, 0);
      for (long s = 0; s < schedule.size(0); ++s) {
        const int32_t* after = table + s * depth;
        for (long k = 0; k < depth; ++k) {
          const long limit = k == 0 ? features : layers[first + k - 1].p.rows;
          TORCH_CHECK(after[k] >= before[k] && after[k] <= limit, op, ": step ", s, " of block ", b, " ends at ", after[k],
                      " in column ", k, ", outside ", before[k], "..", limit);
        }
        TORCH_CHECK(after[0] == 0 || layers[first + depth - 1].p.prefix[2 * after[0] - 1] <= before[depth - 1], op, ": step ", s,
                    " of block ", b, " reads units that are not finished: the schedule belongs to other degrees");
        for (long k = 1; k < depth; ++k)
          TORCH_CHECK(after[k] == 0 || layers[first + k - 1].p.prefix[after[k] - 1] <= after[k - 1], op, ": step ", s,
                      " of block ", b, " finishes units of hidden layer ", k - 1, " before what they read");
        before.assign(after, after + depth);
      }
      TORCH_CHECK(before[0] == features, op, ": the schedule of block ", b, " ends at dimension ", before[0], " of ", features);
      chain.push_back({&layers[first], depth, table, schedule.size(0), relu, Bound{bounds[b], softs.get(b)}, orders[b]});
    }
    TORCH_CHECK(layers.size() == weights.size(), op, ": ", weights.size() - layers.size(), " weights belong to no block");
    Tensor x = at::empty_like(z), ladj = at::empty({n}, z.options());
    fastmaf::level_inverse<T, W>(chain.data(), blocks, orders.back(), z.const_data_ptr<T>(), n, features,
                                 x.mutable_data_ptr<T>(), ladj.mutable_data_ptr<T>(), threads());
    return std::make_tuple(x, ladj);
  });
}

// ---- the library itself

// Asks the system to back a large tensor with huge pages: streaming it then meets fewer page walks.
void prefer_huge_pages(const Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const auto begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge, last = (begin + t.nbytes()) / kHuge * kHuge;
  if (t.device().is_cpu() && last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)t;
#endif
}

std::string missing_cpu_features() {
  std::string missing;
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  for (const char* const* name = fastmaf::required_features(); *name; ++name) {
    const auto is = [&](const char* other) { return std::strcmp(*name, other) == 0; };
    const bool there = is("avx512f")    ? __builtin_cpu_supports("avx512f")
                       : is("avx512vl") ? __builtin_cpu_supports("avx512vl")
                       : is("avx512bw") ? __builtin_cpu_supports("avx512bw")
                       : is("avx512dq") ? __builtin_cpu_supports("avx512dq")
                       : is("avx2")     ? __builtin_cpu_supports("avx2")
                       : is("avx")      ? __builtin_cpu_supports("avx")
                       : is("fma")      ? __builtin_cpu_supports("fma")
                       : is("bmi2")     ? __builtin_cpu_supports("bmi2")
                                        : false;
    if (!there) missing += (missing.empty() ? "" : ", ") + std::string(*name);
  }
#endif
  return missing;
}

std::string build_info() { return FASTMAF_BUILD_INFO; }

}  // namespace

#define FASTMAF_LAYER "Tensor prefix, Tensor tiles"
#define FASTMAF_LINEAR "Tensor grad_y, Tensor x, Tensor y, "
#define FASTMAF_AFFINE "Tensor grad_z, Tensor grad_ladj, Tensor grad_log_scale, Tensor h, "

TORCH_LIBRARY(fastmaf_native, m) {
  m.def("masked_linear(Tensor x, Tensor weight, Tensor bias, " FASTMAF_LAYER ", bool relu) -> Tensor");
  m.def("masked_linear_backward(" FASTMAF_LINEAR "Tensor weight, " FASTMAF_LAYER
        ", bool relu, bool need_grad_x, bool need_grad_weight) -> (Tensor, Tensor, Tensor)");
  m.def("masked_linear_adam_(" FASTMAF_LINEAR "Tensor(a!) weight, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, " FASTMAF_LAYER
        ", bool relu, bool need_grad_x, float scale, float[] adam) -> (Tensor, Tensor)");
  m.def("masked_linear_squared_norm(" FASTMAF_LINEAR "Tensor weight, " FASTMAF_LAYER ", bool relu) -> float");
  m.def("affine_output(Tensor h, Tensor weight, Tensor bias, Tensor x, " FASTMAF_LAYER
        ", float bound, bool soft) -> (Tensor, Tensor, Tensor)");
  m.def("affine_output_backward(" FASTMAF_AFFINE "Tensor weight, Tensor z, Tensor log_scale, " FASTMAF_LAYER
        ", float bound, bool soft, bool need_grad_weight) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("affine_output_adam_(" FASTMAF_AFFINE
        "Tensor(a!) weight, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor z, Tensor log_scale, " FASTMAF_LAYER
        ", float bound, bool soft, bool need_inputs, float scale, float[] adam) -> (Tensor, Tensor, Tensor)");
  m.def("affine_output_squared_norm(" FASTMAF_AFFINE "Tensor weight, Tensor z, Tensor log_scale, " FASTMAF_LAYER
        ", float bound, bool soft) -> float");
  m.def("chain_forward(Tensor x, Tensor[] weights, Tensor[] biases, Tensor[] prefixes, Tensor[] tiles, int[] depths, "
        "Tensor[] permutations, bool relu, float[] bounds, bool[] softs) -> (Tensor, Tensor)");
  m.def("level_inverse(Tensor z, Tensor[] weights, Tensor[] biases, Tensor[] prefixes, Tensor[] tiles, Tensor[] schedules, "
        "Tensor[] permutations, bool relu, float[] bounds, bool[] softs) -> (Tensor, Tensor)");
  m.def("prefer_huge_pages(Tensor t) -> ()", &prefer_huge_pages);
  m.def("missing_cpu_features() -> str", &missing_cpu_features);
  m.def("build_info() -> str", &build_info);
}

TORCH_LIBRARY_IMPL(fastmaf_native, CPU, m) {
  m.impl("masked_linear", &masked_linear);
  m.impl("masked_linear_backward", &masked_linear_backward);
  m.impl("masked_linear_adam_", &masked_linear_adam_);
  m.impl("masked_linear_squared_norm", &masked_linear_squared_norm);
  m.impl("affine_output", &affine_output);
  m.impl("affine_output_backward", &affine_output_backward);
  m.impl("affine_output_adam_", &affine_output_adam_);
  m.impl("affine_output_squared_norm", &affine_output_squared_norm);
  m.impl("chain_forward", &chain_forward);
  m.impl("level_inverse", &level_inverse);
}
