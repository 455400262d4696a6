// Blocks in a row, forward and backward, by one team from end to end.
#pragma once

#include "backward.h"

namespace fastmaf {
namespace FASTMAF_ISA {

inline const Layer* layers_of(const Flow& flow, const Block& block) { return flow.layers + block.first_layer; }

inline long hidden_units(const Flow& flow, const Block& block) {
  long total = 0;
  for (long k = 0; k + 1 < block.layer_count; ++k) total += layers_of(flow, block)[k].rows;
  return total;
}

template <class W>
long most_threads(const Flow& flow, long n, long threads) {
  long most = 1;
  for (long i = 0; i < flow.layer_count; ++i) most = std::max(most, useful_threads(Panels<W>(flow.layers[i]), n, threads));
  return most;
}

// Where the activations of one block lie.
template <class T>
struct Saved {
  T* x;
  std::vector<T*> hidden;
  T *log_scale, *z;
};

// Of all blocks, in the order of kernels/flow/saved.py.
template <class T>
std::vector<Saved<T>> lay_out(const Flow& flow, long n, T* memory) {
  const auto take = [&](long units) { return std::exchange(memory, memory + n * units); };
  std::vector<Saved<T>> result;
  for (long b = 0; b < flow.block_count; ++b) {
    const Block& block = flow.blocks[b];
    Saved<T> saved;
    saved.x = b > 0 && !block.permutation ? result.back().z : take(flow.features);
    for (long k = 0; k + 1 < block.layer_count; ++k) saved.hidden.push_back(take(layers_of(flow, block)[k].rows));
    saved.log_scale = take(flow.features);
    saved.z = take(flow.features);
    result.push_back(std::move(saved));
  }
  return result;
}

// The same where nothing is saved: two buffers take turns, and z takes the place of x.
template <class T>
std::vector<Saved<T>> lay_over(const Flow& flow, long n) {
  long units = 0;
  for (long b = 0; b < flow.block_count; ++b) units = std::max(units, hidden_units(flow, flow.blocks[b]));
  T* memory = Scratch::get<T>(Scratch::kState, n * (2 * flow.features + units));
  T* buffers[2] = {memory, memory + n * flow.features};
  std::vector<Saved<T>> result;
  for (long b = 0; b < flow.block_count; ++b) {
    const Block& block = flow.blocks[b];
    if (b > 0 && block.permutation) std::swap(buffers[0], buffers[1]);
    Saved<T> saved{buffers[0], {}, nullptr, buffers[0]};
    T* hidden = memory + 2 * n * flow.features;
    for (long k = 0; k + 1 < block.layer_count; ++k)
      saved.hidden.push_back(std::exchange(hidden, hidden + n * layers_of(flow, block)[k].rows));
    result.push_back(std::move(saved));
  }
  return result;
}

// Calls body(sample, first, end) over parts of n rows of `features` numbers.
template <class Body>
void each_piece(const Team& team, long n, long features, const Body& body) {
  const Split pieces(features, std::max(64L, 16384 / std::max(n, 1L)));
  team.each(pieces.count, [&](long i) {
    for (long s = 0; s < n; ++s) body(s, pieces.begin(i), pieces.begin(i) + pieces.size(i));
  });
}

// to[s][k] = from[s][permutation[k]]
template <class T>
void gather(const Team& team, const T* from, const int64_t* permutation, long n, long features, T* to) {
  each_piece(team, n, features, [&](long s, long begin, long end) {
    const T* x = from + s * features;
    T* y = to + s * features;
    if (permutation)
      for (long k = begin; k < end; ++k) y[k] = x[permutation[k]];
    else
      std::copy(x + begin, x + end, y + begin);
  });
}

// to[s][permutation[k]] = from[s][k] + more[s][k] (null: nothing more): a gradient's way back through `gather`.
template <class T>
void scatter(const Team& team, const T* from, const T* more, const int64_t* permutation, long n, long features, T* to) {
  each_piece(team, n, features, [&](long s, long begin, long end) {
    const T *x = from + s * features, *y = more + s * features;
    T* z = to + s * features;
    for (long k = begin; k < end; ++k) z[permutation ? permutation[k] : k] = more ? x[k] + y[k] : x[k];
  });
}

template <class T, class W>
void flow_forward(const Flow& flow, const T* x, long n, T* z, T* ladj, T* saved, long threads) {
  const Team team(most_threads<W>(flow, n, threads));
  const std::vector<Saved<T>> all = saved ? lay_out(flow, n, saved) : lay_over<T>(flow, n);
  std::vector<double> sums(n), totals;
  const T* from = x;
  for (long b = 0; b < flow.block_count; ++b) {
    const Block& block = flow.blocks[b];
    const Saved<T>& to = all[b];
    if (b == 0 || block.permutation) gather(team, from, block.permutation, n, flow.features, to.x);
    const T* h = to.x;
    const Layer* layer = layers_of(flow, block);
    for (long k = 0; k + 1 < block.layer_count; h = to.hidden[k++], ++layer)
      linear_forward<T>(team, Panels<W>(*layer), static_cast<const T*>(layer->bias), h, n, flow.relu, to.hidden[k]);
    const Panels<W> output(*layer);
    totals.resize(forward_parts(output, n) * n);
    affine_forward<T>(team, output, block.map, static_cast<const T*>(layer->bias), h, to.x, n, to.z, to.log_scale, totals.data());
    add_totals(totals, block.map.sign(), n, sums);
    from = to.z;
  }
  gather(team, from, flow.permutation, n, flow.features, z);
  for (long s = 0; s < n; ++s) ladj[s] = static_cast<T>(sums[s]);
}

template <class T>
void flow_backward(const Flow& flow, const T* grad_z, const T* grad_ladj, const T* saved, long n, T* grad_x, void* const* grad_biases,
                   const Target* targets, long threads) {
  const long features = flow.features;
  const Team team(most_threads<T>(flow, n, threads));
  const std::vector<Saved<const T>> all = lay_out(flow, n, saved);
  long widest = 0;
  for (long b = 0; b < flow.block_count; ++b)
    for (long k = 1; k < flow.blocks[b].layer_count; ++k) widest = std::max<long>(widest, layers_of(flow, flow.blocks[b])[k].columns);
  T* of_z = Scratch::get<T>(Scratch::kState, n * (3 * features + 2 * widest));
  T *direct = of_z + n * features, *through = direct + n * features;  // the two ways to a block's x
  T* const of_hidden[2] = {through + n * features, through + n * features + n * widest};
  scatter<T>(team, grad_z, nullptr, flow.permutation, n, features, of_z);
  for (long b = flow.block_count - 1, i = flow.layer_count - 1; b >= 0; --b) {
    const Block& block = flow.blocks[b];
    const Saved<const T>& from = all[b];
    const long depth = block.layer_count;
    const bool wanted = b > 0 || grad_x;
    Source source{};
    source.grad_z = of_z, source.grad_ladj = grad_ladj, source.x = from.x, source.z = from.z, source.log_scale = from.log_scale;
    source.grad_x = wanted ? direct : nullptr;
    source.map = block.map, source.scale = 1;
    layer_backward<T>(team, Panels<T>(flow.layers[i]), source, from.hidden.back(), n, of_hidden[depth % 2],
                      static_cast<T*>(grad_biases[i]), targets[i]);
    --i;
    for (long k = depth - 2; k >= 0; --k, --i) {
      Source above{};
      above.grad_y = of_hidden[k % 2], above.relu_of = flow.relu ? from.hidden[k] : nullptr, above.scale = 1;
      T* below = k > 0 ? of_hidden[(k + 1) % 2] : wanted ? through : nullptr;
      layer_backward<T>(team, Panels<T>(flow.layers[i]), above, k > 0 ? from.hidden[k - 1] : from.x, n, below,
                        static_cast<T*>(grad_biases[i]), targets[i]);
    }
    if (wanted) scatter<T>(team, direct, through, block.permutation, n, features, b > 0 ? of_z : grad_x);
  }
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
