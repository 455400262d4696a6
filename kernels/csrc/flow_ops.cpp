// The ops of a whole flow, fastmaf_native::flow_*: checks and outputs; the arithmetic is elsewhere.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <mutex>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "checks.h"

namespace fastmaf_native {
namespace {

// The fields of FlowArgs (see kernels/flow/args.py): one entry per layer, then per block; permutations are one more.
struct FlowArgs {
  TensorList weights, biases, prefixes, tiles, schedules, permutations;
  bool relu;
  at::ArrayRef<double> bounds;
  c10::List<bool> softs;
};

template <class T, class W>
struct Flow {
  std::vector<fastmaf::Layer<T, W>> layers;
  std::vector<fastmaf::Block<T, W>> blocks;
  const int64_t* permutation;  // after the last block
};

// Checked on every call: a write through `.data` or NumPy shows in nothing but the values, and one that is out of range
// would read foreign memory.
const int64_t* order_of(const char* op, const Tensor& permutation, long features) {
  if (permutation.numel() == 0) return nullptr;
  check(op, "permutation", permutation, at::kLong, {features});
  const auto* order = permutation.const_data_ptr<int64_t>();
  std::vector<char> seen(features);
  for (long d = 0; d < features; ++d) {
    TORCH_CHECK(order[d] >= 0 && order[d] < features, op, ": permutation holds ", order[d], ", outside 0..", features - 1);
    TORCH_CHECK(!seen[order[d]], op, ": permutation holds ", order[d], " twice");
    seen[order[d]] = 1;
  }
  return order;
}

template <class T, class W>
Flow<T, W> checked(const char* op, const Tensor& x, const FlowArgs& of) {
  const std::size_t count = of.schedules.size();
  TORCH_CHECK(of.weights.size() == of.biases.size() && of.weights.size() == of.prefixes.size() &&
                  of.weights.size() == of.tiles.size(),
              op, ": weights, biases, prefixes and tiles must have one entry per layer; found ", of.weights.size(), ", ",
              of.biases.size(), ", ", of.prefixes.size(), ", ", of.tiles.size());
  TORCH_CHECK(of.bounds.size() == count && of.softs.size() == count && of.permutations.size() == count + 1 && count > 0, op,
              ": bounds and softs must have one entry per block and permutations one more; found ", count, " blocks, ",
              of.bounds.size(), ", ", of.softs.size(), ", ", of.permutations.size());
  const long features = x.size(1);
  Flow<T, W> flow;
  flow.layers.reserve(of.weights.size());
  for (std::size_t b = 0; b < count; ++b) {
    const Tensor& schedule = of.schedules[b];
    check_cpu(op, "schedule", schedule);
    TORCH_CHECK(schedule.scalar_type() == at::kInt && schedule.dim() == 2 && schedule.size(1) >= 2, op,
                ": schedule must be int32 [steps, 1 + hidden layers], with at least one hidden layer; found ",
                schedule.scalar_type(), " ", schedule.sizes());
    const long depth = schedule.size(1);
    const std::size_t first = flow.layers.size();
    TORCH_CHECK(first + depth <= of.weights.size(), op, ": block ", b, " has ", depth, " layers, but only ",
                of.weights.size() - first, " weights are left");
    long columns = features;
    for (std::size_t i = first; i < first + depth; ++i) {
      const auto p = packed<const W>(op, of.weights[i], of.prefixes[i], of.tiles[i], columns);
      check(op, "bias", of.biases[i], x.scalar_type(), {p.rows});
      flow.layers.push_back({p, of.biases[i].const_data_ptr<T>()});
      columns = p.rows;
    }
    TORCH_CHECK(columns == 2 * features, op, ": the last layer of block ", b, " must have ", 2 * features, " rows; found ",
                columns);
    flow.blocks.push_back({&flow.layers[first], depth, schedule.const_data_ptr<int32_t>(), schedule.size(0), of.relu, Bound{of.bounds[b], of.softs.get(b)},
                            order_of(op, of.permutations[b], features)});
  }
  TORCH_CHECK(flow.layers.size() == of.weights.size(), op, ": ", of.weights.size() - flow.layers.size(),
              " weights belong to no block");
  flow.permutation = order_of(op, of.permutations[count], features);
  return flow;
}

#define FASTMAF_FLOW_ARGUMENTS                                                                                               \
  TensorList weights, TensorList biases, TensorList prefixes, TensorList tiles, TensorList schedules, TensorList permutations, \
      c10::string_view activation, at::ArrayRef<double> bounds, c10::List<bool> softs
#define FASTMAF_FLOW_ARGS \
  { weights, biases, prefixes, tiles, schedules, permutations, is_relu(op, activation), bounds, softs }

std::tuple<Tensor, Tensor, Tensor> flow_forward(const Tensor& x, FASTMAF_FLOW_ARGUMENTS, bool save) {
  const char* op = "flow_forward";
  const long n = batch(op, "x", x), features = x.size(1);
  TORCH_CHECK(!weights.empty(), op, ": there is no layer");
  return for_dtypes(op, x, weights[0], [&](auto t, auto w) {
    using T = decltype(t);
    const auto flow = checked<T, decltype(w)>(op, x, FASTMAF_FLOW_ARGS);
    const auto *blocks = flow.blocks.data();
    const long count = flow.blocks.size();
    Tensor z = at::empty_like(x), ladj = at::empty({n}, x.options());
    Tensor saved = at::empty({save ? fastmaf::saved_numel(blocks, count, n, features) : 0}, x.options());
    fastmaf::flow_forward(blocks, count, flow.permutation, x.const_data_ptr<T>(), n, features, z.mutable_data_ptr<T>(),
                           ladj.mutable_data_ptr<T>(), save ? saved.mutable_data_ptr<T>() : nullptr, threads());
    return std::make_tuple(z, ladj, saved);
  });
}

// Calls body(T{}, run), run(targets) being the backward pass, which returns the gradients of x and of the biases.
template <class Body>
auto with_backward(const char* op, const Tensor& grad_z, const Tensor& grad_ladj, const Tensor& saved, const FlowArgs& of,
                   bool need_grad_x, Body&& body) {
  const long n = batch(op, "grad_z", grad_z), features = grad_z.size(1);
  return for_dtype(op, grad_z, [&](auto t) {
    using T = decltype(t);
    const auto flow = checked<T, T>(op, grad_z, of);
    const auto *blocks = flow.blocks.data();
    const long count = flow.blocks.size();
    check(op, "grad_ladj", grad_ladj, grad_z.scalar_type(), {n});
    check(op, "saved", saved, grad_z.scalar_type(), {fastmaf::saved_numel(blocks, count, n, features)});
    return body(t, [&](const auto& targets) {
      Tensor grad_x = at::empty({need_grad_x ? n : 0, features}, grad_z.options());
      std::vector<Tensor> grad_biases;
      std::vector<T*> into;
      for (const Tensor& bias : of.biases) {
        grad_biases.push_back(at::empty_like(bias));
        into.push_back(grad_biases.back().mutable_data_ptr<T>());
      }
      fastmaf::flow_backward(blocks, count, flow.permutation, grad_z.const_data_ptr<T>(), grad_ladj.const_data_ptr<T>(),
                              saved.const_data_ptr<T>(), n, features, need_grad_x ? grad_x.mutable_data_ptr<T>() : nullptr,
                              into.data(), targets.data(), threads());
      return std::make_tuple(grad_x, grad_biases);
    });
  });
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> flow_backward(const Tensor& grad_z, const Tensor& grad_ladj,
                                                                            const Tensor& saved, FASTMAF_FLOW_ARGUMENTS,
                                                                            bool need_grad_x) {
  const char* op = "flow_backward";
  const FlowArgs of FASTMAF_FLOW_ARGS;
  return with_backward(op, grad_z, grad_ladj, saved, of, need_grad_x, [&](auto t, const auto& run) {
    using T = decltype(t);
    std::vector<Tensor> grad_weights;
    std::vector<fastmaf::WriteGradient<T>> targets;
    for (const Tensor& weight : weights) {
      grad_weights.push_back(gradient_of(weight));
      targets.push_back({grad_weights.back().mutable_data_ptr<T>()});
    }
    auto [grad_x, grad_biases] = run(targets);
    return std::make_tuple(grad_x, grad_weights, grad_biases);
  });
}

std::tuple<Tensor, std::vector<Tensor>> flow_adam_(const Tensor& grad_z, const Tensor& grad_ladj, const Tensor& saved,
                                                    FASTMAF_FLOW_ARGUMENTS, bool need_grad_x, TensorList exp_avgs,
                                                    TensorList exp_avg_sqs, at::ArrayRef<double> adam) {
  const char* op = "flow_adam_";
  const FlowArgs of FASTMAF_FLOW_ARGS;
  return with_backward(op, grad_z, grad_ladj, saved, of, need_grad_x, [&](auto t, const auto& run) {
    using T = decltype(t);
    TORCH_CHECK(exp_avgs.size() == weights.size() && exp_avg_sqs.size() == weights.size() &&
                    adam.size() == kAdamNumbers * weights.size(),
                op, ": expected two moments and ", kAdamNumbers, " numbers for each of ", weights.size(), " weights; found ",
                exp_avgs.size(), ", ", exp_avg_sqs.size(), ", ", adam.size());
    std::vector<fastmaf::AdamStep<T>> targets;
    for (std::size_t i = 0; i < weights.size(); ++i) {
      for (std::size_t j = 0; j < i; ++j)
        TORCH_CHECK(weights[i].numel() == 0 || weights[i].const_data_ptr() != weights[j].const_data_ptr(), op, ": layers ", j,
                    " and ", i, " share a weight, which takes one step and not two");
      targets.push_back(adam_step<T>(op, weights[i], exp_avgs[i], exp_avg_sqs[i], adam.slice(kAdamNumbers * i, kAdamNumbers)));
    }
    return run(targets);
  });
}

// Every step of an inverse must be computable from what the steps before it finished.
template <class T, class W>
void check_schedule(const char* op, const Tensor& schedule, const fastmaf::Block<T, W>& block, std::size_t b, long features) {
  const long depth = block.layer_count;
  const auto* table = schedule.const_data_ptr<int32_t>();
  std::vector<long> before(depth, 0);
  for (long s = 0; s < schedule.size(0); ++s) {
    const int32_t* after = table + s * depth;
    for (long k = 0; k < depth; ++k) {
      const long limit = k == 0 ? features : block.layers[k - 1].p.rows;
      TORCH_CHECK(after[k] >= before[k] && after[k] <= limit, op, ": step ", s, " of block ", b, " ends at ", after[k],
                  " in column ", k, ", outside ", before[k], "..", limit);
    }
    TORCH_CHECK(after[0] == 0 || block.layers[depth - 1].p.prefix[2 * after[0] - 1] <= before[depth - 1], op, ": step ", s,
                " of block ", b, " reads units that are not finished: the schedule belongs to other degrees");
    for (long k = 1; k < depth; ++k)
      TORCH_CHECK(after[k] == 0 || block.layers[k - 1].p.prefix[after[k] - 1] <= after[k - 1], op, ": step ", s, " of block ", b,
                  " finishes units of hidden layer ", k - 1, " before what they read");
    before.assign(after, after + depth);
  }
  TORCH_CHECK(before[0] == features, op, ": the schedule of block ", b, " ends at dimension ", before[0], " of ", features);
}

std::tuple<Tensor, Tensor> flow_inverse(const Tensor& z, FASTMAF_FLOW_ARGUMENTS) {
  const char* op = "flow_inverse";
  const long n = batch(op, "z", z), features = z.size(1);
  TORCH_CHECK(!weights.empty(), op, ": there is no layer");
  return for_dtypes(op, z, weights[0], [&](auto t, auto w) {
    using T = decltype(t);
    const auto flow = checked<T, decltype(w)>(op, z, FASTMAF_FLOW_ARGS);
    for (std::size_t b = 0; b < schedules.size(); ++b) check_schedule(op, schedules[b], flow.blocks[b], b, features);
    Tensor x = at::empty_like(z), ladj = at::empty({n}, z.options());
    fastmaf::flow_inverse(flow.blocks.data(), static_cast<long>(flow.blocks.size()), flow.permutation, z.const_data_ptr<T>(), n,
                          features, x.mutable_data_ptr<T>(), ladj.mutable_data_ptr<T>(), threads());
    return std::make_tuple(x, ladj);
  });
}

#define FASTMAF_FLOW_SCHEMA(weights)                                                                                          \
  "Tensor" weights "[] weights, Tensor[] biases, Tensor[] prefixes, Tensor[] tiles, Tensor[] schedules, Tensor[] permutations, " \
  "str activation, float[] bounds, bool[] softs"

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastmaf_native, m) {
  m.def("flow_forward(Tensor x, " FASTMAF_FLOW_SCHEMA("") ", bool save) -> (Tensor, Tensor, Tensor)");
  m.def("flow_backward(Tensor grad_z, Tensor grad_ladj, Tensor saved, " FASTMAF_FLOW_SCHEMA(
      "") ", bool need_grad_x) -> (Tensor, Tensor[], Tensor[])");
  m.def("flow_adam_(Tensor grad_z, Tensor grad_ladj, Tensor saved, " FASTMAF_FLOW_SCHEMA(
      "(a!)") ", bool need_grad_x, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, float[] adam) -> (Tensor, Tensor[])");
  m.def("flow_inverse(Tensor z, " FASTMAF_FLOW_SCHEMA("") ") -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(fastmaf_native, CPU, m) {
  m.impl("flow_forward", &flow_forward);
  m.impl("flow_backward", &flow_backward);
  m.impl("flow_adam_", &flow_adam_);
  m.impl("flow_inverse", &flow_inverse);
}

}  // namespace fastmaf_native
