// Blocks in a row, forward and backward, by one team from end to end.
#pragma once

#include "backward.h"

namespace fastmaf {
namespace FASTMAF_ISA {

inline const Layer* layers_of(const Flow& flow, const Block& block) { return flow.layers + block.first_layer; }

// What the samples from `first` on have of their own of a layer; null: nothing.
template <class T>
const T* terms_of(const Flow& flow, const void* const* terms, const Layer& layer, int64_t first) {
  const T* of_layer = terms ? static_cast<const T*>(terms[&layer - flow.layers]) : nullptr;
  return of_layer ? of_layer + first * layer.rows : nullptr;
}

template <class W>
int64_t most_threads(const Flow& flow, int64_t n, int64_t threads) {
  int64_t most = 1;
  for (int64_t i = 0; i < flow.layer_count; ++i) most = std::max(most, useful_threads(Panels<W>(flow.layers[i]), n, threads));
  return most;
}

// Where the activations of one block lie.
template <class T>
struct Saved {
  T* x;
  std::vector<T*> hidden;
  T *log_scale, *z;
};

// Of all blocks, in the order of kernels/flow/saved.py, each [units] in wide tiles. A number behind them says that they are.
template <class T>
std::vector<Saved<T>> lay_out(const Flow& flow, int64_t n, T*& memory) {
  const auto take = [&](int64_t units) { return std::exchange(memory, memory + round_up(n, kWide) * units); };
  std::vector<Saved<T>> result;
  for (int64_t b = 0; b < flow.block_count; ++b) {
    const Block& block = flow.blocks[b];
    Saved<T> saved;
    saved.x = b > 0 && !block.permutation ? result.back().z : take(flow.features);
    for (int64_t k = 0; k + 1 < block.layer_count; ++k) saved.hidden.push_back(take(layers_of(flow, block)[k].rows));
    saved.log_scale = take(flow.features);
    saved.z = take(flow.features);
    result.push_back(std::move(saved));
  }
  return result;
}

// Calls body(slice, tile, first unit, end) over slices of the units of all tiles, each a multiple of a vector but for the last.
template <class Body>
void each_slice(const Team& team, const Tiles& tiles, int64_t units, const Body& body) {
  const int64_t step = round_up(std::max<int64_t>(64, 8192 / std::max<int64_t>(tiles.n, 1)), 64), count = (units + step - 1) / step;
  team.each(count, [&](int64_t i) {
    for (int64_t t = 0; t < tiles.count; ++t) body(i, t, i * step, std::min((i + 1) * step, units));
  });
}

// Tiles of units from rows of samples, x [n][units]; see fill_tile.
template <class T, class Order>
void fill_tiles(const Team& team, const Tiles& tiles, const T* x, int64_t units, const Order& order, T* to) {
  each_slice(team, tiles, units, [&](int64_t, int64_t t, int64_t k0, int64_t k1) {
    fill_tile(x + tiles.begin(t) * units, units, tiles.used(t), tiles.size(t), k0, k1, order, to + tiles.offset(t, units));
  });
}

// The way back.
template <class T, class Order>
void give_tiles(const Team& team, const Tiles& tiles, const T* from, int64_t units, const Order& order, T* x) {
  each_slice(team, tiles, units, [&](int64_t, int64_t t, int64_t k0, int64_t k1) {
    give_tile(from + tiles.offset(t, units), tiles.used(t), tiles.size(t), k0, k1, order, x + tiles.begin(t) * units, units);
  });
}

// squares [n] = the sums of the squares of tiles [units].
template <class T>
void add_squares(const Team& team, const Tiles& tiles, const T* z, int64_t units, T* squares) {
  std::vector<double> sums((units / 64 + 1) * tiles.n);
  each_slice(team, tiles, units, [&](int64_t part, int64_t t, int64_t k0, int64_t k1) {
    const T* from = z + tiles.offset(t, units) + k0 * tiles.size(t);
    double of_lanes[std::max(kWide, kMostNarrow)] = {};
    add_rows<T>([&](int64_t i) { return load(from + i) * load(from + i); }, k1 - k0, tiles.size(t), of_lanes);
    for (int64_t s = 0; s < tiles.used(t); ++s) sums[part * tiles.n + tiles.begin(t) + s] += of_lanes[s];
  });
  std::vector<double> totals(tiles.n);
  add_totals(sums, 1, tiles.n, totals.data());
  std::copy(totals.begin(), totals.end(), squares);
}

inline constexpr int64_t kSlack = 64;  // numbers behind tiles, which are read in whole vectors
inline constexpr const int64_t* kInOrder = nullptr;

// Wide tiles `to` of the same units as tiles of any kind, unit k at place order[k] (null: k) of these.
template <class T, class Order>
void widen(const Team& team, const Tiles& tiles, const T* from, int64_t units, const Order& order, T* to) {
  each_slice(team, tiles, units, [&](int64_t, int64_t t, int64_t k0, int64_t k1) {
    const int64_t size = tiles.size(t), first = tiles.begin(t), last = t + 1 == tiles.count ? round_up(tiles.n, kWide) : first + size;
    for (int64_t k = k0; k < k1; ++k) {
      const T* row = from + tiles.offset(t, units) + (order ? order[k] : k) * size;
      if (tiles.count == 1)  // which is at most one wide tile
        for (int64_t v = 0; v < kWide; v += kLanes<T>)
          store(to + k * kWide + v, load_part<T>(row + v, std::clamp<int64_t>(size - v, 0, kLanes<T>)));
      else
        for (int64_t i = first; i < last; ++i) *in_tile(to, i, k, units) = i < first + size ? row[i - first] : T(0);
    }
  });
}

// Where a block's activations go, in turns. Where they are saved as they are computed, the last block's z alone.
template <class T>
struct Buffers {
  T *x[2], *hidden[2], *log_scale;
  Buffers(const Flow& flow, const Tiles& tiles, bool saves, bool direct) {
    int64_t units = 0;
    for (int64_t b = 0; b < flow.block_count; ++b)
      for (int64_t k = 0; k + 1 < flow.blocks[b].layer_count; ++k)
        units = std::max<int64_t>(units, layers_of(flow, flow.blocks[b])[k].rows);
    const int64_t plane = tiles.numel(flow.features) + kSlack, of_hidden = tiles.numel(units) + kSlack;
    T* memory = Scratch::get<T>(Scratch::kState, direct ? plane : (saves ? 3 : 2) * plane + 2 * of_hidden);
    x[0] = x[1] = memory;
    log_scale = nullptr;
    if (direct) return;
    const auto take = [&](int64_t count) { return std::exchange(memory, memory + count); };
    for (T*& buffer : x) buffer = take(plane);
    for (T*& buffer : hidden) buffer = take(of_hidden);
    log_scale = saves ? memory : nullptr;
  }
};

// Samples from `first` on, as many as the tiles have.
template <class T, class W>
void chunk_forward(const Flow& flow, const int32_t* places, const void* const* terms, const Team& team, const Tiles& tiles, const T* x,
                   T* z, double* ladj, T* squares, const std::vector<Saved<T>>& saved, int64_t first) {
  const int64_t features = flow.features;
  const bool direct = !saved.empty() && tiles.wide;  // what is saved is computed in its place
  const Buffers<T> buffers(flow, tiles, !saved.empty(), direct);
  const auto places_of = [&](int64_t b) { return b < flow.block_count && flow.blocks[b].permutation ? places + b * features : nullptr; };
  const auto x_of = [&](int64_t b) { return direct && b < flow.block_count ? saved[b].x + first * features : buffers.x[b % 2]; };
  const auto keep = [&](const T* from, int64_t units, const int32_t* order, T* to) {
    if (!saved.empty() && !direct) widen(team, tiles, from, units, order, to + first * units);
  };
  fill_tiles(team, tiles, x, features, places_of(0), x_of(0));
  std::vector<double> totals;
  for (int64_t b = 0; b < flow.block_count; ++b) {
    const Block& block = flow.blocks[b];
    if (b == 0 || block.permutation) keep(x_of(b), features, nullptr, saved.empty() ? nullptr : saved[b].x);
    const T* h = x_of(b);
    const Layer* layer = layers_of(flow, block);
    for (int64_t k = 0; k + 1 < block.layer_count; ++k, ++layer) {
      T* y = direct ? saved[b].hidden[k] + first * layer->rows : buffers.hidden[k % 2];
      linear_forward<T>(team, Panels<W>(*layer), static_cast<const T*>(layer->bias), terms_of<T>(flow, terms, *layer, first), tiles, h,
                        flow.relu, y);
      keep(y, layer->rows, nullptr, saved.empty() ? nullptr : saved[b].hidden[k]);
      h = y;
    }
    const Panels<W> output(*layer);
    totals.resize(forward_parts(output, tiles) * tiles.n);
    const int32_t* next = places_of(b + 1);
    AffineTiles<T> at{x_of(b), x_of(b + 1), next, nullptr, buffers.log_scale};
    if (direct) at.own = saved[b].z + first * features, at.log_scale = saved[b].log_scale + first * features;
    affine_forward<T>(team, output, block.map, static_cast<const T*>(layer->bias), terms_of<T>(flow, terms, *layer, first), tiles, h, at,
                      totals.data());
    add_totals(totals, block.map.sign(), tiles.n, ladj);
    if (saved.empty() || direct) continue;
    keep(buffers.log_scale, features, nullptr, saved[b].log_scale);
    keep(x_of(b + 1), features, next, saved[b].z);
  }
  const T* last = x_of(flow.block_count);
  if (z) give_tiles(team, tiles, last, features, flow.permutation, z);
  if (squares) add_squares(team, tiles, last, features, squares);
}

// n samples in parts that go through the weights together, whole wide tiles each but for the last.
template <class Body>
void each_chunk(int64_t n, const Body& body) {
  const int64_t count = (n + kChunk - 1) / kChunk, step = count > 0 ? round_up((n + count - 1) / count, kWide) : 0;
  for (int64_t first = 0; first < n; first += step) body(Tiles(std::min(step, n - first)), first);
}

// z [n][features] and squares [n], the sums of its squares, may be null: not wanted. `places` [blocks][features]: where the permutation
// before a block takes each number of what the block is given.
template <class T, class W>
void flow_forward(const Flow& flow, const int32_t* places, const void* const* terms, const T* x, int64_t n, T* z, T* ladj, T* saved,
                  T* squares, int64_t threads) {
  const Team team(most_threads<W>(flow, n, threads));
  const std::vector<Saved<T>> all = saved ? lay_out(flow, n, saved) : std::vector<Saved<T>>();
  if (saved) *saved = 1;
  each_chunk(n, [&](const Tiles& tiles, int64_t first) {
    std::vector<double> sums(tiles.n);
    chunk_forward<T, W>(flow, places, terms, team, tiles, x + first * flow.features, z ? z + first * flow.features : nullptr, sums.data(),
                        squares ? squares + first : nullptr, all, first);
    std::copy(sums.begin(), sums.end(), ladj + first);
  });
}

// to[order[k]] = from[k] + more[k] (null: nothing more) for the units k of wide tiles: a gradient's way back through a permutation.
template <class T>
void scatter(const Team& team, const Tiles& tiles, const T* from, const T* more, const int64_t* order, int64_t units, T* to) {
  each_slice(team, tiles, units, [&](int64_t, int64_t t, int64_t k0, int64_t k1) {
    const int64_t tile = tiles.offset(t, units);
    for (int64_t k = k0; k < k1; ++k)
      for (int64_t v = 0; v < kWide; v += kLanes<T>) {
        const int64_t at = tile + k * kWide + v;
        store(to + tile + (order ? order[k] : k) * kWide + v, more ? load(from + at) + load(more + at) : load(from + at));
      }
  });
}

template <class T>
void flow_backward(const Flow& flow, const T* grad_z, const T* grad_ladj, const T* saved, int64_t n, T* grad_x, void* const* grad_biases,
                   const Target* targets, int64_t threads) {
  const int64_t features = flow.features;
  const Team team(most_threads<T>(flow, n, threads));
  const Tiles tiles(n, true);
  const std::vector<Saved<const T>> all = lay_out(flow, n, saved);
  int64_t widest = 0;
  for (int64_t b = 0; b < flow.block_count; ++b)
    for (int64_t k = 1; k < flow.blocks[b].layer_count; ++k) widest = std::max<int64_t>(widest, layers_of(flow, flow.blocks[b])[k].columns);
  const int64_t plane = tiles.numel(features), of_units = tiles.numel(widest);
  T* of_z = Scratch::get<T>(Scratch::kState, 3 * plane + 2 * of_units);
  T *direct = of_z + plane, *through = direct + plane;  // the two ways to a block's x
  T* const of_hidden[2] = {through + plane, through + plane + of_units};
  fill_tiles(team, tiles, grad_z, features, flow.permutation, of_z);
  for (int64_t b = flow.block_count - 1, i = flow.layer_count - 1; b >= 0; --b) {
    const Block& block = flow.blocks[b];
    const Saved<const T>& from = all[b];
    const int64_t depth = block.layer_count;
    const bool wanted = b > 0 || grad_x;
    Source source{};
    source.grad_z = of_z, source.grad_ladj = grad_ladj, source.x = from.x, source.z = from.z, source.log_scale = from.log_scale;
    source.grad_x = wanted ? direct : nullptr;
    source.map = block.map, source.scale = 1;
    layer_backward<T>(team, Panels<T>(flow.layers[i]), source, from.hidden.back(), n, of_hidden[depth % 2],
                      static_cast<T*>(grad_biases[i]), targets[i]);
    --i;
    for (int64_t k = depth - 2; k >= 0; --k, --i) {
      Source above{};
      above.grad_y = of_hidden[k % 2], above.relu_of = flow.relu ? from.hidden[k] : nullptr, above.scale = 1;
      T* below = k > 0 ? of_hidden[(k + 1) % 2] : wanted ? through : nullptr;
      layer_backward<T>(team, Panels<T>(flow.layers[i]), above, k > 0 ? from.hidden[k - 1] : from.x, n, below,
                        static_cast<T*>(grad_biases[i]), targets[i]);
    }
    if (wanted) scatter<T>(team, tiles, direct, through, block.permutation, features, of_z);
  }
  if (grad_x) give_tiles(team, tiles, of_z, features, kInOrder, grad_x);
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
