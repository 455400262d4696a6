// The ops that take blocks in a row, fastmaf_native::chain_* and level_inverse: checks and outputs; the arithmetic is elsewhere.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <tuple>
#include <vector>

#include "checks.h"

namespace fastmaf_native {
namespace {

// The arguments that describe a chain: one entry per layer, but depths, bounds and softs per block and permutations one more.
struct ChainOf {
  TensorList weights, biases, prefixes, tiles;
  at::IntArrayRef depths;  // layers of each block
  TensorList permutations;
  bool relu;
  at::ArrayRef<double> bounds;
  c10::List<bool> softs;
};

template <class T, class W>
struct Chain {
  std::vector<fastmaf::Layer<T, W>> layers;
  std::vector<fastmaf::Block<T, W>> blocks;
  const int64_t* permutation;  // after the last block
};

// `scattered`: a gradient will be written to these places, of which none may then be met twice.
const int64_t* order_of(const char* op, const Tensor& permutation, long features, bool scattered) {
  if (permutation.numel() == 0) return nullptr;
  check(op, "permutation", permutation, at::kLong, {features});
  const auto* order = permutation.const_data_ptr<int64_t>();
  for (long d = 0; d < features; ++d)
    TORCH_CHECK(order[d] >= 0 && order[d] < features, op, ": permutation holds ", order[d], ", outside 0..", features - 1);
  std::vector<bool> met(scattered ? features : 0);
  for (long d = 0; d < static_cast<long>(met.size()); ++d) {
    TORCH_CHECK(!met[order[d]], op, ": permutation holds ", order[d], " twice");
    met[order[d]] = true;
  }
  return order;
}

template <class T, class W>
Chain<T, W> checked(const char* op, const Tensor& x, const ChainOf& of, bool backward = false) {
  const std::size_t count = of.depths.size();
  TORCH_CHECK(of.weights.size() == of.biases.size() && of.weights.size() == of.prefixes.size() &&
                  of.weights.size() == of.tiles.size(),
              op, ": weights, biases, prefixes and tiles must have one entry per layer; found ", of.weights.size(), ", ",
              of.biases.size(), ", ", of.prefixes.size(), ", ", of.tiles.size());
  TORCH_CHECK(of.bounds.size() == count && of.softs.size() == count && of.permutations.size() == count + 1 && count > 0, op,
              ": bounds and softs must have one entry per block and permutations one more; found ", count, " blocks, ",
              of.bounds.size(), ", ", of.softs.size(), ", ", of.permutations.size());
  const long features = x.size(1);
  Chain<T, W> chain;
  chain.layers.reserve(of.weights.size());
  for (std::size_t b = 0; b < count; ++b) {
    const long depth = of.depths[b];
    const std::size_t first = chain.layers.size();
    TORCH_CHECK(depth >= 2, op, ": a block has hidden layers and an output layer; block ", b, " has ", depth, " layers");
    TORCH_CHECK(first + depth <= of.weights.size(), op, ": block ", b, " has ", depth, " layers, but only ",
                of.weights.size() - first, " weights are left");
    long columns = features;
    for (std::size_t i = first; i < first + depth; ++i) {
      const auto p = packed<const W>(op, of.weights[i], of.prefixes[i], of.tiles[i], columns);
      check(op, "bias", of.biases[i], x.scalar_type(), {p.rows});
      chain.layers.push_back({p, of.biases[i].const_data_ptr<T>()});
      columns = p.rows;
    }
    TORCH_CHECK(columns == 2 * features, op, ": the last layer of block ", b, " must have ", 2 * features, " rows; found ",
                columns);
    chain.blocks.push_back({&chain.layers[first], depth, nullptr, 0, of.relu, Bound{of.bounds[b], of.softs.get(b)},
                            order_of(op, of.permutations[b], features, backward)});
  }
  TORCH_CHECK(chain.layers.size() == of.weights.size(), op, ": ", of.weights.size() - chain.layers.size(),
              " weights belong to no block");
  chain.permutation = order_of(op, of.permutations[count], features, backward);
  return chain;
}

#define FASTMAF_CHAIN_ARGUMENTS                                                                                              \
  TensorList weights, TensorList biases, TensorList prefixes, TensorList tiles, at::IntArrayRef depths, TensorList permutations, \
      bool relu, at::ArrayRef<double> bounds, c10::List<bool> softs

std::tuple<Tensor, Tensor, Tensor> chain_forward(const Tensor& x, FASTMAF_CHAIN_ARGUMENTS, bool keep) {
  const char* op = "chain_forward";
  const long n = batch(op, "x", x), features = x.size(1);
  TORCH_CHECK(!weights.empty(), op, ": there is no layer");
  return for_dtypes(op, x, weights[0], [&](auto t, auto w) {
    using T = decltype(t);
    const auto chain =
        checked<T, decltype(w)>(op, x, {weights, biases, prefixes, tiles, depths, permutations, relu, bounds, softs});
    const auto *blocks = chain.blocks.data();
    const long count = chain.blocks.size();
    Tensor z = at::empty_like(x), ladj = at::empty({n}, x.options());
    Tensor kept = at::empty({keep ? fastmaf::kept_numel(blocks, count, n, features) : 0}, x.options());
    fastmaf::chain_forward(blocks, count, chain.permutation, x.const_data_ptr<T>(), n, features, z.mutable_data_ptr<T>(),
                           ladj.mutable_data_ptr<T>(), keep ? kept.mutable_data_ptr<T>() : nullptr, threads());
    return std::make_tuple(z, ladj, kept);
  });
}

// Calls body(T{}, run), run(targets) being the backward pass, which returns the gradients of x and of the biases.
template <class Body>
auto with_backward(const char* op, const Tensor& grad_z, const Tensor& grad_ladj, const Tensor& kept, const ChainOf& of,
                   bool need_grad_x, Body&& body) {
  const long n = batch(op, "grad_z", grad_z), features = grad_z.size(1);
  return for_dtype(op, grad_z, [&](auto t) {
    using T = decltype(t);
    const auto chain = checked<T, T>(op, grad_z, of, true);
    const auto *blocks = chain.blocks.data();
    const long count = chain.blocks.size();
    check(op, "grad_ladj", grad_ladj, grad_z.scalar_type(), {n});
    check(op, "kept", kept, grad_z.scalar_type(), {fastmaf::kept_numel(blocks, count, n, features)});
    return body(t, [&](const auto& targets) {
      Tensor grad_x = at::empty({need_grad_x ? n : 0, features}, grad_z.options());
      std::vector<Tensor> grad_biases;
      std::vector<T*> into;
      for (const Tensor& bias : of.biases) {
        grad_biases.push_back(at::empty_like(bias));
        into.push_back(grad_biases.back().mutable_data_ptr<T>());
      }
      fastmaf::chain_backward(blocks, count, chain.permutation, grad_z.const_data_ptr<T>(), grad_ladj.const_data_ptr<T>(),
                              kept.const_data_ptr<T>(), n, features, need_grad_x ? grad_x.mutable_data_ptr<T>() : nullptr,
                              into.data(), targets.data(), threads());
      return std::make_tuple(grad_x, grad_biases);
    });
  });
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> chain_backward(const Tensor& grad_z, const Tensor& grad_ladj,
                                                                            const Tensor& kept, FASTMAF_CHAIN_ARGUMENTS,
                                                                            bool need_grad_x) {
  const ChainOf of{weights, biases, prefixes, tiles, depths, permutations, relu, bounds, softs};
  return with_backward("chain_backward", grad_z, grad_ladj, kept, of, need_grad_x, [&](auto t, const auto& run) {
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

std::tuple<Tensor, std::vector<Tensor>> chain_adam_(const Tensor& grad_z, const Tensor& grad_ladj, const Tensor& kept,
                                                    FASTMAF_CHAIN_ARGUMENTS, bool need_grad_x, TensorList exp_avgs,
                                                    TensorList exp_avg_sqs, at::ArrayRef<double> adam) {
  const char* op = "chain_adam_";
  const ChainOf of{weights, biases, prefixes, tiles, depths, permutations, relu, bounds, softs};
  return with_backward(op, grad_z, grad_ladj, kept, of, need_grad_x, [&](auto t, const auto& run) {
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

std::tuple<Tensor, Tensor> level_inverse(const Tensor& z, TensorList weights, TensorList biases, TensorList prefixes,
                                         TensorList tiles, TensorList schedules, TensorList permutations, bool relu,
                                         at::ArrayRef<double> bounds, c10::List<bool> softs) {
  const char* op = "level_inverse";
  const long n = batch(op, "z", z), features = z.size(1);
  TORCH_CHECK(!weights.empty(), op, ": there is no layer");
  std::vector<int64_t> depths;
  for (const Tensor& schedule : schedules) {
    check_cpu(op, "schedule", schedule);
    TORCH_CHECK(schedule.scalar_type() == at::kInt && schedule.dim() == 2 && schedule.size(1) >= 2, op,
                ": schedule must be int32 [steps, 1 + hidden layers], with at least one hidden layer; found ",
                schedule.scalar_type(), " ", schedule.sizes());
    depths.push_back(schedule.size(1));
  }
  return for_dtypes(op, z, weights[0], [&](auto t, auto w) {
    using T = decltype(t);
    auto chain = checked<T, decltype(w)>(op, z, {weights, biases, prefixes, tiles, depths, permutations, relu, bounds, softs});
    for (std::size_t b = 0; b < schedules.size(); ++b) {
      check_schedule(op, schedules[b], chain.blocks[b], b, features);
      chain.blocks[b].schedule = schedules[b].const_data_ptr<int32_t>();
      chain.blocks[b].steps = schedules[b].size(0);
    }
    Tensor x = at::empty_like(z), ladj = at::empty({n}, z.options());
    fastmaf::level_inverse(chain.blocks.data(), static_cast<long>(chain.blocks.size()), chain.permutation, z.const_data_ptr<T>(), n,
                           features, x.mutable_data_ptr<T>(), ladj.mutable_data_ptr<T>(), threads());
    return std::make_tuple(x, ladj);
  });
}

#define FASTMAF_CHAIN_SCHEMA(weights)                                                                                    \
  "Tensor" weights "[] weights, Tensor[] biases, Tensor[] prefixes, Tensor[] tiles, int[] depths, Tensor[] permutations, " \
  "bool relu, float[] bounds, bool[] softs"

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastmaf_native, m) {
  m.def("chain_forward(Tensor x, " FASTMAF_CHAIN_SCHEMA("") ", bool keep) -> (Tensor, Tensor, Tensor)");
  m.def("chain_backward(Tensor grad_z, Tensor grad_ladj, Tensor kept, " FASTMAF_CHAIN_SCHEMA(
      "") ", bool need_grad_x) -> (Tensor, Tensor[], Tensor[])");
  m.def("chain_adam_(Tensor grad_z, Tensor grad_ladj, Tensor kept, " FASTMAF_CHAIN_SCHEMA(
      "(a!)") ", bool need_grad_x, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, float[] adam) -> (Tensor, Tensor[])");
  m.def("level_inverse(Tensor z, Tensor[] weights, Tensor[] biases, Tensor[] prefixes, Tensor[] tiles, Tensor[] schedules, "
        "Tensor[] permutations, bool relu, float[] bounds, bool[] softs) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(fastmaf_native, CPU, m) {
  m.impl("chain_forward", &chain_forward);
  m.impl("chain_backward", &chain_backward);
  m.impl("chain_adam_", &chain_adam_);
  m.impl("level_inverse", &level_inverse);
}

}  // namespace fastmaf_native
