// The exact inverse of affine autoregressive blocks: a blocked triangular solve.
//
// A step finishes the outputs whose hidden units are known, hence their x, then the hidden units that these x make computable (see
// schedule.py). Steps are taken in groups of about 16 units, a panel of the last hidden layer:
//
//     ahead   the group's outputs and hidden units, over all that was finished before the group: large products, shared by the team
//     solve   step by step, what the group's own values add: a small triangle, for one tile of samples by one thread
//
// so that nearly all of the weights stream through all threads, even for a single sample. A step that alone is large has its products
// shared, too. Values are packed as in a forward pass, [unit][samples of a tile].
#pragma once

#include "flow.h"

namespace fastmaf {
namespace FASTMAF_ISA {

inline constexpr long kGroupUnits = 16;   // of the last hidden layer
inline constexpr long kMostUnits = 64;    // of another layer
inline constexpr long kSharedWork = 65536;  // multiply-adds of a step from which on its products are shared
inline constexpr long kSegment = 256;      // columns that are one part of the work ahead, of many samples; of few four times as many
inline constexpr long kPartWork = 262144;  // multiply-adds of a part

template <class T, class W>
class BlockInverse {
 public:
  BlockInverse(const Flow& flow, const Block& block, const Split& tiles, const Team& team)
      : flow_(flow), block_(block), tiles_(tiles), team_(team), hidden_(block.layer_count - 1), samples_(tiles.n) {
    for (long k = 0; k <= hidden_; ++k) layers_.emplace_back(layers_of(flow, block)[k]);
    known_.resize(layers_.size());
  }

  // Numbers of memory that `run` wants.
  static long numel(const Flow& flow, const Block& block, long samples) {
    long total = samples * flow.features;
    for (long k = 0; k < block.layer_count; ++k) {
      const Layer& layer = layers_of(flow, block)[k];
      const long rows = round_up(layer.rows, kPanel) + 2 * kPanel;
      total += samples * (rows * (1 + (layer.columns + kSegment - 1) / kSegment) + layer.rows);
    }
    return total;
  }

  // z and x [samples][features]; adds each sample's sum of log-scales to total.
  void run(const T* z, T* x, T* memory, double* total) {
    x_ = x;
    values_.assign(1, std::exchange(memory, memory + samples_ * flow_.features));
    for (long k = 0; k < hidden_; ++k) values_.push_back(std::exchange(memory, memory + samples_ * layers_[k].rows));
    for (long k = 0; k <= hidden_; ++k) {
      const long rows = round_up(layers_[k].rows, kPanel) + 2 * kPanel;
      sums_.push_back(std::exchange(memory, memory + samples_ * rows));
      shares_.push_back(std::exchange(memory, memory + samples_ * rows * ((layers_[k].columns + kSegment - 1) / kSegment)));
    }
    for (long s0 = 0, s1; s0 < block_.steps; s0 = s1) {
      s1 = group_end(s0);
      if (s1 == s0 + 1 && large(s0)) {
        ahead(hidden_, hidden_ + 1, s0, s0, s1);
        solve(s0, s1, z, total, true);
        for (long k = 0; k < hidden_; ++k) {
          ahead(k, k + 1, s0 + 1, s0, s1);
          team_.each(tiles_.count, [&](long t) {
            join(k, s0 + 1, s0, s1, t);
            finish_units(k, s0, s1, s0, t);
          });
        }
      } else {
        ahead(0, hidden_ + 1, s0, s0, s1);
        solve(s0, s1, z, total, false);
      }
    }
  }

 private:
  // How many dimensions (k = -1) or units of hidden layer k are finished before step s.
  long done(long k, long s) const { return s == 0 ? 0 : block_.schedule[(s - 1) * block_.layer_count + k + 1]; }
  // Of layer k, hidden or output: its rows that are finished before step s.
  long rows(long k, long s) const { return k < hidden_ ? done(k, s) : 2 * done(-1, s); }

  long group_end(long s0) const {
    const long last = hidden_ - 1, next = done(last, s0) / kGroupUnits * kGroupUnits + kGroupUnits;
    long s1 = s0 + 1;
    const auto fits = [&](long s) {
      if (done(last, s) > next) return false;
      for (long k = 0; k < last; ++k)
        if (done(k, s) - done(k, s0) > kMostUnits) return false;
      return true;
    };
    while (s1 < block_.steps && fits(s1 + 1)) ++s1;
    return s1;
  }

  bool large(long s) const {
    long work = 0;
    for (long k = 0; k < hidden_; ++k) work += (done(k, s + 1) - done(k, s)) * (done(k - 1, s + 1) - done(k - 1, s));
    return work > kSharedWork;
  }

  // Panels of layer k that hold rows of steps s0..s1.
  void panels(long k, long s0, long s1, long& p0, long& p1) const {
    const long begin = rows(k, s0), end = rows(k, s1);
    p0 = begin / kPanel, p1 = end > begin ? (end + kPanel - 1) / kPanel : p0;
  }

  long segment() const { return samples_ > kMostTile ? kSegment : 4 * kSegment; }
  long segments(long k, long columns) const { return k == hidden_ ? 1 : std::max(1L, (columns + segment() - 1) / segment()); }

  // Sums [tile][row - first row of panel p0][...]: of each tile's sample, a row of numbers of all panels p0..p1.
  T* sum(T* memory, long t, long panels) const { return memory + tiles_.begin(t) * panels * kPanel; }

  // sums of layers k0..k1 = the products of the rows of steps s0..s1 with what is finished before step `before`, without bias.
  void ahead(long k0, long k1, long before, long s0, long s1) {
    jobs_.clear();
    if (samples_ <= kMostTile) fetch(s0, s1);  // with more, the cache would lose it again
    for (long k = k0; k < k1; ++k) {
      long p0, p1;
      panels(k, s0, s1, p0, p1);
      const long columns = done(k - 1, before), count = segments(k, columns), wide = columns / count;
      const long step = std::clamp(kPartWork / std::max(1L, kPanel * wide * samples_), 2L, std::max(2L, (p1 - p0) / 8)) / 2 * 2;
      for (long i = 0; i < count; ++i)
        for (long p = p0; p < p1; p += step)
          jobs_.push_back({k, p0, p1, p, std::min(p + step, p1), i * segment(), i + 1 < count ? (i + 1) * segment() : columns, i});
    }
    team_.each(static_cast<long>(jobs_.size()), [&](long i) {
      const Job& job = jobs_[i];
      const long block = block_columns(tiles_.count), count = job.p1 - job.p0;
      T* memory = job.segment == 0 ? sums_[job.layer] : shares_[job.layer] + (job.segment - 1) * samples_ * count * kPanel;
      for (long p = job.first; p < job.end; p += 2) {
        long c0 = job.c0;
        do {
          const long c1 = std::min(c0 + block, job.c1);
          for (long t = 0; t < tiles_.count; ++t)
            pair_product(layers_[job.layer], p, std::min(2L, job.end - p), c0, c1, input(job.layer, t), tiles_.size(t),
                         sum(memory, t, count) + (p - job.p0) * kPanel, count * kPanel, c0 > job.c0, t == 0 ? kAhead : 0);
          c0 = c1;
        } while (c0 < job.c1);
      }
    });
  }

  // Adds up the segments' sums of hidden layer k, of a tile.
  void join(long k, long before, long s0, long s1, long t) {
    long p0, p1;
    panels(k, s0, s1, p0, p1);
    const long stride = (p1 - p0) * kPanel, numel = tiles_.size(t) * stride, count = segments(k, done(k - 1, before));
    T* to = sum(sums_[k], t, p1 - p0);
    for (long i = 1; i < count; ++i) {
      const T* from = sum(shares_[k] + (i - 1) * samples_ * stride, t, p1 - p0);
      for (long j = 0; j < numel; j += kLanes<T>) store(to + j, load(to + j) + load(from + j));
    }
  }

  // The triangle's weights: they are next to what the others stream now, and needed at once then.
  void fetch(long s0, long s1) const {
    for (long k = 0; k <= hidden_; ++k) {
      long p0, p1;
      panels(k, s0, s1, p0, p1);
      for (long p = p0; p < p1; ++p)
        for (long c = done(k - 1, s0); c < std::min<long>(done(k - 1, s1), layers_[k].visible(p)); ++c)
          FASTMAF_PREFETCH(layers_[k].panel(p) + c * kPanel);
    }
  }

  // The values that layer k reads, of a tile.
  const T* input(long k, long t) const { return values_[k] + tiles_.begin(t) * layers_[k].columns; }

  void solve(long s0, long s1, const T* z, double* total, bool outputs_only) {
    for (long k = 0; k <= hidden_; ++k) {
      long p0, p1;
      panels(k, s0, s1, p0, p1);
      known_[k].assign(tiles_.count * (p1 - p0), done(k - 1, s0));
    }
    team_.each(tiles_.count, [&](long t) {
      for (long k = 0; k < hidden_ && !outputs_only; ++k) join(k, s0, s0, s1, t);
      if (samples_ > kMostTile && !outputs_only) fetch(s0, s1);
      for (long s = s0; s < s1; ++s) {
        complete(hidden_, s0, s1, s, done(hidden_ - 1, s), t);
        finish_outputs(s0, s1, s, z, t, total);
        if (outputs_only) return;
        for (long k = 0; k < hidden_; ++k) {
          complete(k, s0, s1, s, done(k - 1, s + 1), t);
          finish_units(k, s0, s1, s, t);
        }
      }
    });
  }

  // Adds the first `columns` values below layer k to the sums of the panels that hold rows of step s, as far as they lack them.
  void complete(long k, long s0, long s1, long s, long columns, long t) {
    long p0, p1, first, end;
    panels(k, s0, s1, p0, p1);
    panels(k, s, s + 1, first, end);
    const long stride = (p1 - p0) * kPanel;
    T* c = sum(sums_[k], t, p1 - p0);
    for (long p = first; p < end; ++p) {
      long& known = known_[k][t * (p1 - p0) + p - p0];
      panel_product(layers_[k], p, known, columns, input(k, t), tiles_.size(t), c + (p - p0) * kPanel, stride, true, 0);
      known = columns;
    }
  }

  // x of the dimensions of step s.
  void finish_outputs(long s0, long s1, long s, const T* z, long t, double* total) {
    constexpr int L = kLanes<T>;
    long p0, p1;
    panels(hidden_, s0, s1, p0, p1);
    const long d0 = done(-1, s), d1 = done(-1, s + 1), size = tiles_.size(t), first = p0 * kPanel;
    const T *c = sum(sums_[hidden_], t, p1 - p0), *bias = static_cast<const T*>(layers_of(flow_, block_)[hidden_].bias);
    T* packed = values_[0] + tiles_.begin(t) * flow_.features;
    if (2 * (d1 - d0) <= L && size > 1) return finish_few(c - first, (p1 - p0) * kPanel, bias, z, d0, d1, t, packed, total);
    for (long n = 0; n < size; ++n, c += (p1 - p0) * kPanel) {
      const long at = (tiles_.begin(t) + n) * flow_.features;
      double sum_a = 0;
      for (long d = d0; d < d1; d += L) {
        // Whole vectors where there is memory for them: what lies behind the step's dimensions is written again later.
        const bool whole = d + L <= flow_.features;
        FASTMAF_PREFETCH(z + at + d + 2 * L), FASTMAF_PREFETCH(x_ + at + d + 2 * L);
        const long count = std::min<long>(L, d1 - d), room = std::min<long>(L, flow_.features - d);
        const auto rows = [&](long row) {  // behind a sample's sums lie those of another thread's
          const long left = std::clamp<long>(2 * flow_.features - row, 0, L), stored = p1 * kPanel - row;
          const Vec<T> sums = stored >= L ? load(c + (row - first)) : load_part<T>(c + (row - first), stored);
          return sums + (left == L ? load(bias + row) : load_part<T>(bias + row, left));
        };
        Vec<T> shift, raw;
        unzip<T>(rows(2 * d), rows(2 * d + L), shift, raw);
        const Vec<T> a = log_scale_of<T>(raw, block_.map), zv = whole ? load(z + at + d) : load_part<T>(z + at + d, room);
        const Vec<T> xv = block_.map.form == kShiftFirst ? zv * exponential(a) + shift : (zv - shift) * exponential(-a);
        T values[L];
        store(values, xv);
        whole ? store(x_ + at + d, xv) : store_part(x_ + at + d, xv, count);
        for (long i = 0; i < count; ++i) packed[(d + i) * size + n] = values[i];
        sum_a += lane_sum<T>(a, count);
      }
      total[tiles_.begin(t) + n] += sum_a;
    }
  }

  // The same where a step has few dimensions: vectors of numbers of several samples. Row r of sample n is c[n c_stride + r].
  void finish_few(const T* c, long c_stride, const T* bias, const T* z, long d0, long d1, long t, T* packed, double* total) {
    constexpr long L = kLanes<T>;
    const long size = tiles_.size(t), first = tiles_.begin(t), features = flow_.features;
    for (long d = d0; d < d1; ++d)
      for (long n0 = 0; n0 < size; n0 += L) {
        const long count = std::min(L, size - n0);
        T shifts[L] = {}, raws[L] = {}, from[L] = {}, to[L], as[L];
        for (long i = 0; i < count; ++i) {
          const T* row = c + (n0 + i) * c_stride + 2 * d;
          shifts[i] = row[0], raws[i] = row[1], from[i] = z[(first + n0 + i) * features + d];
        }
        const Vec<T> shift = load(shifts) + bias[2 * d], a = log_scale_of<T>(load(raws) + bias[2 * d + 1], block_.map), zv = load(from);
        store(to, block_.map.form == kShiftFirst ? zv * exponential(a) + shift : (zv - shift) * exponential(-a));
        store(as, a);
        for (long i = 0; i < count; ++i) {
          x_[(first + n0 + i) * features + d] = packed[d * size + n0 + i] = to[i];
          total[first + n0 + i] += as[i];
        }
      }
  }

  // The units of hidden layer k that step s finishes; their sums are complete.
  void finish_units(long k, long s0, long s1, long s, long t) {
    long p0, p1;
    panels(k, s0, s1, p0, p1);
    const long u0 = done(k, s), u1 = done(k, s + 1), size = tiles_.size(t);
    const T *c = sum(sums_[k], t, p1 - p0), *bias = static_cast<const T*>(layers_of(flow_, block_)[k].bias);
    T* h = values_[k + 1] + tiles_.begin(t) * layers_[k].rows;
    for (long n = 0; n < size; ++n, c += (p1 - p0) * kPanel)
      for (long u = u0; u < u1; ++u) {
        const T v = c[u - p0 * kPanel] + bias[u];
        h[u * size + n] = flow_.relu && v < 0 ? T(0) : v;  // NaN stays NaN
      }
  }

  // Panels first..end of p0..p1 of a layer, columns c0..c1; the sums of other segments than the first are shares.
  struct Job {
    long layer, p0, p1, first, end, c0, c1, segment;
  };

  const Flow& flow_;
  const Block& block_;
  const Split& tiles_;
  const Team& team_;
  const long hidden_, samples_;
  std::vector<Panels<W>> layers_;
  T* x_ = nullptr;
  std::vector<Job> jobs_;
  std::vector<std::vector<long>> known_;  // of each layer, tile and panel of the group: how many values below are in its sums
  std::vector<T*> values_, sums_, shares_;  // x, then each hidden layer's units; each layer's sums, and those of further segments
};

// x [n][features] and ladj [n] of a sequence of inverses.
template <class T, class W>
void flow_inverse(const Flow& flow, const T* z, long n, T* x, T* ladj, long threads) {
  if (n == 0) return;
  const long features = flow.features;
  const Split chunks(n, kChunk);
  const Team team(most_threads<W>(flow, std::min(n, kChunk), threads));
  long numel = 0;
  for (long b = 0; b < flow.block_count; ++b) numel = std::max(numel, BlockInverse<T, W>::numel(flow, flow.blocks[b], chunks.size(0)));
  const long plane = features * chunks.size(0);
  T* buffers = Scratch::get<T>(Scratch::kState, 2 * plane + numel);
  T* memory = buffers + 2 * plane;
  const auto other = [&](const T* used) { return used == buffers ? buffers + plane : buffers; };
  for (long i = 0; i < chunks.count; ++i) {
    const long samples = chunks.size(i), first = chunks.begin(i) * features;
    const Split tiles(samples, kMostTile);
    std::vector<double> total(samples);
    const T* below = z + first;
    for (long b = 0; b < flow.block_count; ++b) {
      const Block& block = flow.blocks[b];
      if (block.permutation) {
        T* gathered = other(below);
        gather(team, below, block.permutation, samples, features, gathered);
        below = gathered;
      }
      std::vector<double> sums(samples);
      // The last block's x goes to its place at once where no permutation follows.
      T* above = b + 1 == flow.block_count && !flow.permutation ? x + first : other(below);
      BlockInverse<T, W>(flow, block, tiles, team).run(below, above, memory, sums.data());
      for (long s = 0; s < samples; ++s) total[s] -= block.map.sign() * sums[s];
      below = above;
    }
    if (flow.permutation) gather(team, below, flow.permutation, samples, features, x + first);
    for (long s = 0; s < samples; ++s) ladj[chunks.begin(i) + s] = static_cast<T>(total[s]);
  }
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
