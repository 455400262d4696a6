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

// Calls body(tile, first unit, end) over parts of tiles of so many units, each a multiple of a vector but for the last.
template <class Body>
void each_part(const Team& team, const Tiles& tiles, long units, const Body& body) {
  const long step = round_up(std::max(64L, 8192 / tiles.n), 64L), count = (units + step - 1) / step;
  team.each(count, [&](long i) {
    for (long t = 0; t < tiles.count; ++t) body(i, t, i * step, std::min((i + 1) * step, units));
  });
}

// Tiles of units from rows of samples, x [n][units]; see fill_tile.
template <class T, class Order>
void fill_tiles(const Team& team, const Tiles& tiles, const T* x, long units, const Order& order, T* to) {
  each_part(team, tiles, units, [&](long, long t, long k0, long k1) {
    fill_tile(x + tiles.begin(t) * units, units, tiles.used(t), tiles.size(t), k0, k1, order, to + tiles.offset(t, units));
  });
}

// The way back.
template <class T, class Order>
void give_tiles(const Team& team, const Tiles& tiles, const T* from, long units, const Order& order, T* x) {
  each_part(team, tiles, units, [&](long, long t, long k0, long k1) {
    give_tile(from + tiles.offset(t, units), tiles.used(t), tiles.size(t), k0, k1, order, x + tiles.begin(t) * units, units);
  });
}

// squares [n] = the sums of the squares of tiles [units].
template <class T>
void add_squares(const Team& team, const Tiles& tiles, const T* z, long units, T* squares) {
  std::vector<double> sums((units / 64 + 1) * tiles.n);
  each_part(team, tiles, units, [&](long part, long t, long k0, long k1) {
    const T* from = z + tiles.offset(t, units) + k0 * tiles.size(t);
    double of_lanes[std::max(kWide, kMostNarrow)] = {};
    add_rows<T>([&](long i) { return load(from + i) * load(from + i); }, k1 - k0, tiles.size(t), of_lanes);
    for (long s = 0; s < tiles.used(t); ++s) sums[part * tiles.n + tiles.begin(t) + s] += of_lanes[s];
  });
  std::vector<double> totals(tiles.n);
  add_totals(sums, 1, tiles.n, totals.data());
  std::copy(totals.begin(), totals.end(), squares);
}

inline constexpr long kSlack = 64;  // numbers behind tiles, which are read in whole vectors
inline constexpr const int64_t* kInOrder = nullptr;

template <class T, class W>
void chunk_forward(const Flow& flow, const int32_t* places, const Team& team, const Tiles& tiles, const T* x, T* z, double* ladj, T* squares,
                   const std::vector<Saved<T>>& saved, long first) {
  const long features = flow.features, plane = tiles.numel(features) + kSlack;
  long units = 0;
  for (long i = 0; i < flow.layer_count; ++i) units = std::max<long>(units, flow.layers[i].columns);
  T* memory = Scratch::get<T>(Scratch::kState, (saved.empty() ? 2 : 3) * plane + 2 * (tiles.numel(units) + kSlack));
  T *from = memory, *to = from + plane, *hidden[2] = {to + plane, to + plane + tiles.numel(units) + kSlack};
  T* log_scale = saved.empty() ? nullptr : hidden[1] + tiles.numel(units) + kSlack;
  const auto places_of = [&](long b) { return b < flow.block_count && flow.blocks[b].permutation ? places + b * features : nullptr; };
  fill_tiles(team, tiles, x, features, places_of(0), from);
  std::vector<double> totals;
  for (long b = 0; b < flow.block_count; ++b, std::swap(from, to)) {
    const Block& block = flow.blocks[b];
    if (!saved.empty() && (b == 0 || block.permutation)) give_tiles(team, tiles, from, features, kInOrder, saved[b].x + first * features);
    const T* h = from;
    const Layer* layer = layers_of(flow, block);
    for (long k = 0; k + 1 < block.layer_count; h = hidden[k++ % 2], ++layer) {
      linear_forward<T>(team, Panels<W>(*layer), static_cast<const T*>(layer->bias), tiles, h, flow.relu, hidden[k % 2]);
      if (!saved.empty()) give_tiles(team, tiles, hidden[k % 2], layer->rows, kInOrder, saved[b].hidden[k] + first * layer->rows);
    }
    const Panels<W> output(*layer);
    totals.resize(forward_parts(output, tiles) * tiles.n);
    const int32_t* next = places_of(b + 1);
    affine_forward<T>(team, output, block.map, static_cast<const T*>(layer->bias), tiles, h, {from, to, next, log_scale}, totals.data());
    add_totals(totals, block.map.sign(), tiles.n, ladj);
    if (saved.empty()) continue;
    give_tiles(team, tiles, log_scale, features, kInOrder, saved[b].log_scale + first * features);
    give_tiles(team, tiles, to, features, next, saved[b].z + first * features);
  }
  if (z) give_tiles(team, tiles, from, features, flow.permutation, z);
  if (squares) add_squares(team, tiles, from, features, squares);
}

// z [n][features] and squares [n], the sums of its squares, may be null: not wanted. `places` [blocks][features]: where the permutation
// before a block takes each number of what the block is given.
template <class T, class W>
void flow_forward(const Flow& flow, const int32_t* places, const T* x, long n, T* z, T* ladj, T* saved, T* squares, long threads) {
  if (n == 0) return;
  const Team team(most_threads<W>(flow, n, threads));
  const std::vector<Saved<T>> all = saved ? lay_out(flow, n, saved) : std::vector<Saved<T>>();
  const Split chunks(n, kChunk);
  for (long i = 0; i < chunks.count; ++i) {
    const long first = chunks.begin(i);
    std::vector<double> sums(chunks.size(i));
    chunk_forward<T, W>(flow, places, team, Tiles(chunks.size(i)), x + first * flow.features, z ? z + first * flow.features : nullptr,
                        sums.data(), squares ? squares + first : nullptr, all, first);
    std::copy(sums.begin(), sums.end(), ladj + first);
  }
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
