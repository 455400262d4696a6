// The exact inverse of affine autoregressive blocks: a blocked triangular solve.
//
// A step finishes the outputs whose hidden units are known, hence their x, then the hidden units that these x make computable (see
// schedule.py). Steps are taken in groups of about 16 units, a panel of the last hidden layer:
//
//     ahead   the group's outputs and hidden units, over all that was finished before the group: large products, shared by the team
//     solve   step by step, what the group's own values add: a small triangle, for one tile of samples by one thread
//
// so that nearly all of the weights stream through all threads, even for a single sample. A step that alone is large has its products
// shared, too. Values lie in tiles, as in a forward pass.
#pragma once

#include "flow.h"

namespace fastmaf {
namespace FASTMAF_ISA {

inline constexpr int64_t kGroupUnits = 16;   // of the last hidden layer
inline constexpr int64_t kMostUnits = 64;    // of another layer
inline constexpr int64_t kSharedWork = 65536;  // multiply-adds of a step from which on its products are shared
inline constexpr int64_t kSegment = 256;      // columns that are one part of the work ahead, of many samples; of few four times as many
inline constexpr int64_t kPartWork = 262144;  // multiply-adds of a part

template <class T, class W>
class BlockInverse {
 public:
  // Of samples from `first` on.
  BlockInverse(const Flow& flow, const Block& block, const void* const* terms, const Tiles& tiles, int64_t first, const Team& team)
      : flow_(flow), block_(block), tiles_(tiles), team_(team), hidden_(block.layer_count - 1) {
    for (int64_t k = 0; k <= hidden_; ++k) {
      layers_.emplace_back(layers_of(flow, block)[k]);
      terms_.push_back(terms_of<T>(flow, terms, layers_of(flow, block)[k], first));
    }
    known_.resize(layers_.size());
  }

  // Numbers of memory that `run` wants.
  static int64_t numel(const Flow& flow, const Block& block, const Tiles& tiles) {
    int64_t total = 0;
    for (int64_t k = 0; k < block.layer_count; ++k) {
      const Layer& layer = layers_of(flow, block)[k];
      total += tiles.numel(stored_rows(layer.rows) * (1 + most_segments(layer.columns)) + layer.rows) + 2 * kSlack;
    }
    return total;
  }

  // z and x [features] in tiles, z of dimension d at place order[d]; adds each sample's sum of log-scales to total.
  void run(const T* z, T* x, T* memory, double* total) {
    z_ = z;
    values_.assign(1, x);
    const auto take = [&](int64_t units) { return std::exchange(memory, memory + tiles_.numel(units) + kSlack); };
    for (int64_t k = 0; k < hidden_; ++k) values_.push_back(take(layers_[k].rows));
    for (const Panels<W>& layer : layers_) sums_.push_back(take(stored_rows(layer.rows) * (1 + most_segments(layer.columns))));
    for (int64_t s0 = 0, s1; s0 < block_.steps; s0 = s1) {
      s1 = group_end(s0);
      if (s1 == s0 + 1 && large(s0)) {
        ahead(hidden_, hidden_ + 1, s0, s0, s1);
        solve(s0, s1, total, true);
        for (int64_t k = 0; k < hidden_; ++k) {
          ahead(k, k + 1, s0 + 1, s0, s1);
          team_.each(tiles_.count, [&](int64_t t) {
            join(k, s0 + 1, s0, s1, t);
            finish_units(k, s0, s1, s0, t);
          });
        }
      } else {
        ahead(0, hidden_ + 1, s0, s0, s1);
        solve(s0, s1, total, false);
      }
    }
  }

 private:
  // How many dimensions (k = -1) or units of hidden layer k are finished before step s.
  int64_t done(int64_t k, int64_t s) const { return s == 0 ? 0 : block_.schedule[(s - 1) * block_.layer_count + k + 1]; }
  // Of layer k, hidden or output: its rows that are finished before step s.
  int64_t rows(int64_t k, int64_t s) const { return k < hidden_ ? done(k, s) : 2 * done(-1, s); }

  int64_t group_end(int64_t s0) const {
    const int64_t last = hidden_ - 1, next = done(last, s0) / kGroupUnits * kGroupUnits + kGroupUnits;
    int64_t s1 = s0 + 1;
    const auto fits = [&](int64_t s) {
      if (done(last, s) > next) return false;
      for (int64_t k = 0; k < last; ++k)
        if (done(k, s) - done(k, s0) > kMostUnits) return false;
      return true;
    };
    while (s1 < block_.steps && fits(s1 + 1)) ++s1;
    return s1;
  }

  bool large(int64_t s) const {
    int64_t work = 0;
    for (int64_t k = 0; k < hidden_; ++k) work += (done(k, s + 1) - done(k, s)) * (done(k - 1, s + 1) - done(k - 1, s));
    return work > kSharedWork;
  }

  // Panels of layer k that hold rows of steps s0..s1.
  void panels(int64_t k, int64_t s0, int64_t s1, int64_t& p0, int64_t& p1) const {
    const int64_t begin = rows(k, s0), end = rows(k, s1);
    p0 = begin / kPanel, p1 = end > begin ? (end + kPanel - 1) / kPanel : p0;
  }

  int64_t segment() const { return tiles_.count > 1 ? kSegment : 4 * kSegment; }
  int64_t segments(int64_t k, int64_t columns) const {
    return k == hidden_ ? 1 : std::max<int64_t>(1, (columns + segment() - 1) / segment());
  }
  static int64_t most_segments(int64_t columns) { return (columns + kSegment - 1) / kSegment; }
  static int64_t stored_rows(int64_t rows) { return round_up(rows, kPanel) + 2 * kPanel; }

  // The sums of a group's panels of layer k, `rows` of them in each tile, that segment i of the columns adds.
  T* share(int64_t k, int64_t i, int64_t rows) const { return sums_[k] + i * tiles_.numel(rows); }
  T* sum(int64_t k, int64_t t, int64_t rows) const { return sums_[k] + tiles_.offset(t, rows); }

  // sums of layers k0..k1 = the biases and the products of the rows of steps s0..s1 with what is finished before step `before`.
  void ahead(int64_t k0, int64_t k1, int64_t before, int64_t s0, int64_t s1) {
    jobs_.clear();
    if (tiles_.count == 1) fetch(s0, s1);  // with more, the cache would lose it again
    for (int64_t k = k0; k < k1; ++k) {
      int64_t p0, p1;
      panels(k, s0, s1, p0, p1);
      const int64_t columns = done(k - 1, before), count = segments(k, columns), wide = columns / count;
      const int64_t step =
          std::clamp<int64_t>(kPartWork / std::max<int64_t>(1, kPanel * wide * tiles_.n), 2, std::max<int64_t>(2, (p1 - p0) / 8)) / 2 * 2;
      for (int64_t i = 0; i < count; ++i)
        for (int64_t p = p0; p < p1; p += step)
          jobs_.push_back({k, p0, p1, p, std::min(p + step, p1), i * segment(), i + 1 < count ? (i + 1) * segment() : columns, i});
    }
    team_.each(static_cast<int64_t>(jobs_.size()), [&](int64_t i) {
      const Job& job = jobs_[i];
      const Bias<T> bias(job.segment == 0 ? static_cast<const T*>(layers_of(flow_, block_)[job.layer].bias) : nullptr,
                         layers_[job.layer].rows);
      const int64_t rows = (job.p1 - job.p0) * kPanel;
      T* c = share(job.layer, job.segment, rows);
      for (int64_t p = job.first; p < job.end; p += 2) {
        const int64_t both = std::min<int64_t>(2, job.end - p);
        T start[kPairRows];
        for (int64_t j = 0; j < both; ++j) std::copy(bias.of(p + j), bias.of(p + j) + kPanel, start + j * kPanel);
        products(layers_[job.layer], tiles_, p, both, job.c0, job.c1, Operand<T>{values_[job.layer]},
                 c + row_at(tiles_, (p - job.p0) * kPanel), rows, start);
      }
    });
  }

  // Adds up the segments' sums of layer k, of a tile, and the samples' own terms.
  void join(int64_t k, int64_t before, int64_t s0, int64_t s1, int64_t t) {
    int64_t p0, p1;
    panels(k, s0, s1, p0, p1);
    const int64_t rows = (p1 - p0) * kPanel, numel = tiles_.size(t) * rows, count = segments(k, done(k - 1, before));
    T* to = sum(k, t, rows);
    for (int64_t i = 1; i < count; ++i) {
      const T* from = share(k, i, rows) + tiles_.offset(t, rows);
      for (int64_t j = 0; j < numel; j += kLanes<T>) store(to + j, load(to + j) + load(from + j));
    }
    add_terms(tiles_, t, terms_[k], layers_[k].rows, p0 * kPanel, rows, to, rows);
  }

  // The triangle's weights: they are next to what the others stream now, and needed at once then.
  void fetch(int64_t s0, int64_t s1) const {
    for (int64_t k = 0; k <= hidden_; ++k) {
      int64_t p0, p1;
      panels(k, s0, s1, p0, p1);
      for (int64_t p = p0; p < p1; ++p)
        for (int64_t c = done(k - 1, s0); c < std::min<int64_t>(done(k - 1, s1), layers_[k].visible(p)); ++c)
          FASTMAF_PREFETCH(layers_[k].panel(p) + c * kPanel);
    }
  }

  void solve(int64_t s0, int64_t s1, double* total, bool outputs_only) {
    for (int64_t k = 0; k <= hidden_; ++k) {
      int64_t p0, p1;
      panels(k, s0, s1, p0, p1);
      known_[k].assign(tiles_.count * (p1 - p0), done(k - 1, s0));
    }
    team_.each(tiles_.count, [&](int64_t t) {
      for (int64_t k = outputs_only ? hidden_ : 0; k <= hidden_; ++k) join(k, s0, s0, s1, t);
      if (tiles_.count > 1 && !outputs_only) fetch(s0, s1);
      for (int64_t s = s0; s < s1; ++s) {
        complete(hidden_, s0, s1, s, done(hidden_ - 1, s), t);
        finish_outputs(s0, s1, s, t, total);
        if (outputs_only) return;
        for (int64_t k = 0; k < hidden_; ++k) {
          complete(k, s0, s1, s, done(k - 1, s + 1), t);
          finish_units(k, s0, s1, s, t);
        }
      }
    });
  }

  // Adds the first `columns` values below layer k to the sums of the panels that hold rows of step s, as far as they lack them.
  void complete(int64_t k, int64_t s0, int64_t s1, int64_t s, int64_t columns, int64_t t) {
    int64_t p0, p1, first, end;
    panels(k, s0, s1, p0, p1);
    panels(k, s, s + 1, first, end);
    const int64_t rows = (p1 - p0) * kPanel;
    T* c = sum(k, t, rows);
    const T* values = values_[k] + tiles_.offset(t, layers_[k].columns);
    for (int64_t p = first; p < end; ++p) {
      int64_t& known = known_[k][t * (p1 - p0) + p - p0];
      T* to = c + row_at(tiles_, (p - p0) * kPanel);
      if (tiles_.wide)
        wide_product(layers_[k], p, known, columns, values, 1, to, rows, true, kZeros<T>, layers_[k].panel(p) + columns * kPanel);
      else
        narrow_product(layers_[k], p, known, columns, values, tiles_.size(t), to, rows, true, kZeros<T>, 0);
      known = columns;
    }
  }

  // x of the dimensions of step s.
  void finish_outputs(int64_t s0, int64_t s1, int64_t s, int64_t t, double* total) {
    int64_t p0, p1;
    panels(hidden_, s0, s1, p0, p1);
    const int64_t d0 = done(-1, s), d1 = done(-1, s + 1), first = p0 * kPanel / 2, rows = (p1 - p0) * kPanel;
    const T* c = sum(hidden_, t, rows);
    for (int64_t d = d0; d < d1; d += kGroupRows / 2)
      inverse_rows(block_.map, tiles_, t, c + row_at(tiles_, 2 * (d - first)), rows, d, std::min(kGroupRows / 2, d1 - d), flow_.features,
                   {z_, values_[0], block_.permutation}, total + tiles_.begin(t));
  }

  // The units of hidden layer k that step s finishes; their sums are complete.
  void finish_units(int64_t k, int64_t s0, int64_t s1, int64_t s, int64_t t) {
    constexpr int64_t L = kLanes<T>;
    int64_t p0, p1;
    panels(k, s0, s1, p0, p1);
    const int64_t u0 = done(k, s), u1 = done(k, s + 1), size = tiles_.size(t), rows = (p1 - p0) * kPanel;
    const T* c = sum(k, t, rows) + row_at(tiles_, u0 - p0 * kPanel);
    T* h = values_[k + 1] + tiles_.offset(t, layers_[k].rows) + u0 * size;
    if (tiles_.wide) {
      for (int64_t i = 0; i < (u1 - u0) * kWide; i += L) store(h + i, activated<T>(load(c + i), flow_.relu));
      return;
    }
    for (int64_t n = 0; n < size; ++n)
      for (int64_t u = 0; u < u1 - u0; ++u) {
        const T v = c[n * rows + u];
        h[u * size + n] = flow_.relu && v < 0 ? T(0) : v;  // NaN stays NaN
      }
  }

  // Panels first..end of p0..p1 of a layer, columns c0..c1; the sums of other segments than the first are shares.
  struct Job {
    int64_t layer, p0, p1, first, end, c0, c1, segment;
  };

  const Flow& flow_;
  const Block& block_;
  const Tiles& tiles_;
  const Team& team_;
  const int64_t hidden_;
  std::vector<Panels<W>> layers_;
  std::vector<const T*> terms_;  // of each layer
  const T* z_ = nullptr;
  std::vector<Job> jobs_;
  std::vector<std::vector<int64_t>> known_;  // of each layer, tile and panel of the group: how many values below are in its sums
  std::vector<T*> values_, sums_;         // x, then each hidden layer's units; each layer's sums, of one segment after the other
};

// x [n][features] and ladj [n] of a sequence of inverses.
template <class T, class W>
void flow_inverse(const Flow& flow, const void* const* terms, const T* z, int64_t n, T* x, T* ladj, int64_t threads) {
  const int64_t features = flow.features;
  const Team team(most_threads<W>(flow, std::min(n, kChunk), threads));
  each_chunk(n, [&](const Tiles& tiles, int64_t begin) {
    const int64_t first = begin * features, plane = tiles.numel(features) + kSlack;
    int64_t numel = 0;
    for (int64_t b = 0; b < flow.block_count; ++b) numel = std::max(numel, BlockInverse<T, W>::numel(flow, flow.blocks[b], tiles));
    T *from = Scratch::get<T>(Scratch::kState, 2 * plane + numel), *to = from + plane, *memory = to + plane;
    fill_tiles(team, tiles, z + first, features, kInOrder, from);
    std::vector<double> total(tiles.n);
    for (int64_t b = 0; b < flow.block_count; ++b, std::swap(from, to)) {
      const Block& block = flow.blocks[b];
      std::vector<double> sums(tiles.n);
      BlockInverse<T, W>(flow, block, terms, tiles, begin, team).run(from, to, memory, sums.data());
      for (int64_t s = 0; s < tiles.n; ++s) total[s] -= block.map.sign() * sums[s];
    }
    give_tiles(team, tiles, from, features, flow.permutation, x + first);
    std::copy(total.begin(), total.end(), ladj + begin);
  });
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
