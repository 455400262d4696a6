// Blocks in a row by one team of threads from end to end: what a call of its own costs each layer, and a wait for threads to wake,
// is a tenth of the time of one image.
#include <utility>
#include <vector>

#include "backward.h"

namespace fastmaf {
namespace {

// Where the activations of one block lie.
template <class P>
struct Saved {
  P x;
  std::vector<P> hidden;
  P log_scale, z;
};

template <class T, class W>
long hidden_units(const Block<T, W>& block) {
  long total = 0;
  for (long k = 0; k + 1 < block.layer_count; ++k) total += block.layers[k].p.rows;
  return total;
}

// All blocks' activations, one after another in saved_numel numbers.
template <class T, class W, class P>
std::vector<Saved<P>> lay_out(const Block<T, W>* blocks, long count, long n, long features, P memory) {
  const auto take = [&](long units) { return std::exchange(memory, memory + n * units); };
  std::vector<Saved<P>> result;
  for (long b = 0; b < count; ++b) {
    Saved<P> saved;
    saved.x = b > 0 && !blocks[b].permutation ? result.back().z : take(features);
    for (long k = 0; k + 1 < blocks[b].layer_count; ++k) saved.hidden.push_back(take(blocks[b].layers[k].p.rows));
    saved.log_scale = take(features);
    saved.z = take(features);
    result.push_back(saved);
  }
  return result;
}

// The same where nothing is saved, in thread-local memory: two buffers take turns, and z takes the place of x.
template <class T, class W>
std::vector<Saved<T*>> lay_over(const Block<T, W>* blocks, long count, long n, long features) {
  long units = 0;
  for (long b = 0; b < count; ++b) units = std::max(units, hidden_units(blocks[b]));
  T* memory = Scratch::get<T>(Scratch::kState, n * (2 * features + units));
  T* buffers[2] = {memory, memory + n * features};
  std::vector<Saved<T*>> result;
  for (long b = 0; b < count; ++b) {
    if (b > 0 && blocks[b].permutation) std::swap(buffers[0], buffers[1]);
    Saved<T*> saved{buffers[0], {}, nullptr, buffers[0]};
    T* hidden = memory + 2 * n * features;
    for (long k = 0; k + 1 < blocks[b].layer_count; ++k)
      saved.hidden.push_back(std::exchange(hidden, hidden + n * blocks[b].layers[k].p.rows));
    result.push_back(saved);
  }
  return result;
}

template <class T, class W>
long most_threads(const Block<T, W>* blocks, long count, long n, long threads) {
  long most = 1;
  for (long b = 0; b < count; ++b)
    for (long k = 0; k < blocks[b].layer_count; ++k) most = std::max(most, useful_threads(blocks[b].layers[k].p, n, threads));
  return most;
}

// to[s][k] = from[s][permutation[k]] for this thread's k.
template <class T>
void gather(Team& team, const T* from, const int64_t* permutation, long n, long features, T* to) {
  long begin, end;
  team.share(features, 16, begin, end);
  for (long s = 0; s < n; ++s, from += features, to += features)
    if (permutation)
      for (long k = begin; k < end; ++k) to[k] = from[permutation[k]];
    else
      std::copy(from + begin, from + end, to + begin);
  team.sync();
}

// to[s][permutation[k]] = from[s][k] + more[s][k] (null: nothing more): a gradient's way back through `gather`.
template <class T>
void scatter(Team& team, const T* from, const T* more, const int64_t* permutation, long n, long features, T* to) {
  long begin, end;
  team.share(features, 16, begin, end);
  for (long s = 0; s < n; ++s, from += features, to += features) {
    for (long k = begin; k < end; ++k) to[permutation ? permutation[k] : k] = more ? from[k] + more[k] : from[k];
    if (more) more += features;
  }
  team.sync();
}

}  // namespace

template <class T, class W>
long saved_numel(const Block<T, W>* blocks, long count, long n, long features) {
  long units = 0;
  for (long b = 0; b < count; ++b)
    units += (b > 0 && !blocks[b].permutation ? 2 : 3) * features + hidden_units(blocks[b]);
  return n * units;
}

template <class T, class W>
void flow_forward(const Block<T, W>* blocks, long count, const int64_t* permutation, const T* x, long n, long features, T* z,
                   T* ladj, T* saved, long threads) {
  threads = most_threads(blocks, count, n, threads);
  long pack = 0;
  for (long b = 0; b < count; ++b)
    for (long k = 0; k < blocks[b].layer_count; ++k) pack = std::max(pack, pack_numel<T>(blocks[b].layers[k].p.columns, n));
  T* packed = Scratch::get<T>(Scratch::kPack, pack);
  const std::vector<Saved<T*>> all = saved ? lay_out(blocks, count, n, features, saved) : lay_over(blocks, count, n, features);
  std::vector<double> totals(most_parts(threads) * n, 0.0);
  run_team(threads, [&](Team& team) {
    const T* from = x;
    for (long b = 0; b < count; ++b) {
      const Block<T, W>& block = blocks[b];
      const Saved<T*>& to = all[b];
      if (b == 0 || block.permutation) gather(team, from, block.permutation, n, features, to.x);
      const T* h = to.x;
      for (long k = 0; k + 1 < block.layer_count; h = to.hidden[k++])
        linear_forward<T, W>(team, block.layers[k].p, block.layers[k].bias, h, n, block.relu, to.hidden[k], packed);
      const Layer<T, W>& output = block.layers[block.layer_count - 1];
      affine_forward<T, W>(team, output.p, output.bias, h, to.x, n, block.bound, to.z, to.log_scale, totals.data(), packed);
      from = to.z;
    }
    gather(team, from, permutation, n, features, z);
  });
  sum_totals(totals, n, ladj);
}

template <class T, class Target>
void flow_backward(const Block<T, T>* blocks, long count, const int64_t* permutation, const T* grad_z, const T* grad_ladj, const T* saved,
                    long n, long features, T* grad_x, T* const* grad_biases, const Target* targets, long threads) {
  threads = most_threads(blocks, count, n, threads);
  const std::vector<Saved<const T*>> all = lay_out(blocks, count, n, features, saved);
  long shared = 0, widest = 0, layers = 0;
  for (long b = 0; b < count; ++b)
    for (long k = 0; k < blocks[b].layer_count; ++k, ++layers) {
      shared = std::max(shared, shared_numel(blocks[b].layers[k].p, n, threads));
      widest = std::max(widest, k > 0 ? blocks[b].layers[k].p.columns : 0);
    }
  T* memory = Scratch::get<T>(Scratch::kGradient, shared);
  T* of_z = Scratch::get<T>(Scratch::kState, n * (3 * features + 2 * widest));
  T *direct = of_z + n * features, *through = direct + n * features;  // the two ways to a block's x
  T* const of_hidden[2] = {through + n * features, through + n * features + n * widest};
  run_team(threads, [&](Team& team) {
    scatter<T>(team, grad_z, nullptr, permutation, n, features, of_z);
    for (long b = count - 1, layer = layers - 1; b >= 0; --b) {
      const Block<T, T>& block = blocks[b];
      const Saved<const T*>& from = all[b];
      const long depth = block.layer_count;
      const bool wanted = b > 0 || grad_x;
      const AffineGradient<T> source{of_z, grad_ladj, nullptr, from.z, from.log_scale, block.bound, wanted ? direct : nullptr};
      layer_backward(team, block.layers[depth - 1].p, source, from.hidden.back(), n, of_hidden[depth % 2], grad_biases[layer],
                     targets[layer], memory);
      --layer;
      for (long k = depth - 2; k >= 0; --k, --layer) {
        const LinearGradient<T> above{of_hidden[k % 2], block.relu ? from.hidden[k] : nullptr};
        T* below = k > 0 ? of_hidden[(k + 1) % 2] : wanted ? through : nullptr;
        layer_backward(team, block.layers[k].p, above, k > 0 ? from.hidden[k - 1] : from.x, n, below, grad_biases[layer],
                       targets[layer], memory);
      }
      if (wanted) scatter<T>(team, direct, through, block.permutation, n, features, b > 0 ? of_z : grad_x);
    }
  });
}

#define FASTMAF_CHAIN(T, W)                                                                                                 \
  template long saved_numel(const Block<T, W>*, long, long, long);                                                          \
  template void flow_forward(const Block<T, W>*, long, const int64_t*, const T*, long, long, T*, T*, T*, long);
FASTMAF_CHAIN(float, float)
FASTMAF_CHAIN(float, bfloat16)
FASTMAF_CHAIN(double, double)

#define FASTMAF_CHAIN_BACKWARD(T, Target)                                                                                    \
  template void flow_backward(const Block<T, T>*, long, const int64_t*, const T*, const T*, const T*, long, long, T*, T* const*, \
                               const Target*, long);
FASTMAF_CHAIN_BACKWARD(float, WriteGradient<float>)
FASTMAF_CHAIN_BACKWARD(float, AdamStep<float>)
FASTMAF_CHAIN_BACKWARD(double, WriteGradient<double>)
FASTMAF_CHAIN_BACKWARD(double, AdamStep<double>)

}  // namespace fastmaf
