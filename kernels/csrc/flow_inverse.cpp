// The exact inverse of affine autoregressive blocks, level by level (see schedule.py).
//
// Step s computes the outputs whose hidden units are all finished, hence their x, then finishes the hidden units that
// these x make computable. Only what the newest values contribute is on the critical path; a thread sums everything older
// ahead of time, between saying that its x are there and waiting for those of the others:
//
//     x of my outputs     = ahead (units finished before step s - 1) + those of step s - 1
//     arrive
//     ahead, for s + 1:     my outputs over the units finished before step s; my share of the columns of the next units
//     wait
//     units of step s     = the threads' shares, summed in order + the newest columns
//
// Outputs are shared out among the threads; hidden units are few and every thread finishes all of them for itself, which
// costs less than telling the others, unless there are many (then each takes some and they meet once more).
#include <vector>

#include "bound.h"
#include "matmul.h"
#include "thread_team.h"

namespace fastmaf {
namespace {

// Multiply-adds over the newest columns from which on finishing hidden units is shared.
constexpr long kSharedWork = 32768;
// Steps whose hidden units are summed ahead together where there are many samples: the activations of all dimensions are more than
// a cache holds, and one pass over them then serves as many units as fill the registers.
constexpr long kAheadSteps = 24;
// Outputs summed ahead: their partial sums should stay in cache.
constexpr long kAheadRows = 20 * kGroupRows;

template <class T, class W>
class BlockInverse {
 public:
  BlockInverse(const Block<T, W>& block, long features, Shape shape, T* shared, T* own, Team& team)
      : block_(block), shape_(shape), team_(team), features_(features), hidden_(block.layer_count - 1) {
    ld_ = shape.padded;
    long widest = 0;
    for (long k = 0; k < hidden_; ++k) {
      const long units = block.layers[k].p.rows;
      values_.push_back(Activations<T>::over(own, units, shape));
      own += Activations<T>::numel(units, shape);
      widest = std::max(widest, units);
    }
    outputs_ = own;
    newest_ = outputs_ + kAheadRows * ld_;
    for (long k = 0; k < hidden_; ++k) {  // [thread][unit][sample]
      partial_.push_back(shared);
      shared += team.size * block.layers[k].p.rows * partial_ld(shape);
      finished_.push_back(shared);
      shared += block.layers[k].p.rows * ld_;
    }
  }

  static long own_numel(const Block<T, W>& block, Shape shape) {
    long total = kAheadRows * shape.padded, widest = 0;
    for (long k = 0; k + 1 < block.layer_count; ++k) {
      total += Activations<T>::numel(block.layers[k].p.rows, shape);
      widest = std::max(widest, block.layers[k].p.rows);
    }
    return total + widest * shape.padded;
  }
  static long shared_numel(const Block<T, W>& block, Shape shape, long threads) {
    long total = 0;
    for (long k = 0; k + 1 < block.layer_count; ++k) total += block.layers[k].p.rows * (threads * partial_ld(shape) + shape.padded);
    return total;
  }

  // z [features][padded], x as activations: both shared by the team, z complete. Adds sum log_scale to total [samples].
  void run(const T* z, const Activations<T>& x, double* total) {
    for (const auto& h : values_) std::fill(h.data, h.data + Activations<T>::numel(h_units(h), shape_), T(0));
    ahead(0, x);
    for (long s = 0; s < block_.steps; ++s) {
      outputs(s, z, x, total);
      team_.arrive();
      ahead(s + 1, x);
      team_.wait();
      for (long k = 0; k < hidden_; ++k) units(k, s, x);
    }
  }

 private:
  long h_units(const Activations<T>& h) const { return block_.layers[&h - values_.data()].p.rows; }

  // How many dimensions (k = -1) or units of hidden layer k are finished after step s.
  long done(long k, long s) const { return s < 0 ? 0 : block_.schedule[s * block_.layer_count + k + 1]; }

  // My rows of the output layer in step s: whole dimensions.
  void my_rows(long s, long& row0, long& row1) const {
    const long first = done(-1, s - 1);
    team_.share(done(-1, s) - first, 1, row0, row1);
    row0 = 2 * (row0 + first);
    row1 = 2 * (row1 + first);
  }

  // What the values that are there when step s - 2 has ended contribute to step s. Runs while step s - 1 may be unfinished.
  void ahead(long s, const Activations<T>& x) {
    if (s >= block_.steps) return;
    const auto& out = block_.layers[hidden_];
    long row0, row1;
    my_rows(s, row0, row1);
    row1 = std::min(row1, row0 + kAheadRows);
    start(out.bias, row0, row1, outputs_);
    // Units beyond the finished ones are zero in this thread's own memory, so whole cache lines may be read.
    multiply(out.p, row0, row1, 0, round_up(done(hidden_ - 1, s - 2), kLineNumbers<T>), values_[hidden_ - 1], product(outputs_));
    const long group = shape_.dot ? 1 : kAheadSteps, begin = s / group * group;
    for (long k = 0; k < hidden_; ++k) {
      // At the group's first step for all its units; at the others for their own, over what has been finished since.
      const bool all = s == begin;
      const long first = done(k, s - 1), last = done(k, all ? std::min(s + group, block_.steps) - 1 : s);
      if (last == first) continue;
      const long ld = partial_ld(shape_);
      T* c = partial(k, team_.rank, first);
      if (all) std::fill(c, c + (last - first) * ld, T(0));
      const long from = all ? 0 : done(k - 1, begin - 2);
      long c0, c1;
      team_.share(done(k - 1, s - 2) - from, 64, c0, c1);
      multiply(block_.layers[k].p, first, last, from + c0, from + c1, input(k, x), {c, ld, 1});
    }
  }

  void outputs(long s, const T* z, const Activations<T>& x, double* total) {
    const auto& out = block_.layers[hidden_];
    long row0, row1;
    my_rows(s, row0, row1);
    const Activations<T>& h = values_[hidden_ - 1];
    const long end = done(hidden_ - 1, s - 1);
    for (long r = row0; r < row1; r += kAheadRows) {
      const long r1 = std::min(r + kAheadRows, row1);
      long begin = done(hidden_ - 1, s - 2);
      if (r > row0) {  // more than were summed ahead
        start(out.bias, r, r1, outputs_);
        begin = 0;
      }
      multiply(out.p, r, r1, begin, end, h, product(outputs_));
      finish_outputs(r / 2, r1 / 2, z, x, total);
    }
  }

  void finish_outputs(long d0, long d1, const T* z, const Activations<T>& x, double* total) {
    constexpr int L = kLanes<T>;
    for (long n = 0; n < shape_.padded; n += L) {
      Vec<T> sum_a = {};
      for (long d = d0; d < d1; ++d) {
        const T* c = outputs_ + 2 * (d - d0) * ld_ + n;
        const Vec<T> a = bound_log_scale<T>(load(c + ld_), block_.bound);
        const Vec<T> value = load(z + d * ld_ + n) * exponential(a) + load(c);
        sum_a += a;
        put(x, d, n, value);
      }
      T buffer[L];
      store(buffer, sum_a);
      for (long i = 0; i < L && n + i < shape_.samples; ++i) total[n + i] += buffer[i];
    }
  }

  // Finishes the units of hidden layer k that step s has made computable.
  void units(long k, long s, const Activations<T>& x) {
    const long first = done(k, s - 1), last = done(k, s);
    if (last == first) return;
    const auto& layer = block_.layers[k];
    const long c0 = done(k - 1, s - 2), c1 = done(k - 1, s);
    const bool shared = team_.size > 1 && (last - first) * (c1 - c0) * shape_.samples > kSharedWork;
    long r0 = 0, r1 = last - first;
    if (shared) team_.share(last - first, 1, r0, r1);
    T* c = (shared ? finished_[k] : newest_) + r0 * ld_;
    start(layer.bias, first + r0, first + r1, c);
    for (long t = 0; t < team_.size; ++t) {
      const T* from = partial(k, t, first + r0);
      for (long r = 0; r < r1 - r0; ++r, from += partial_ld(shape_))
        for (long n = 0; n < ld_; ++n) c[r * ld_ + n] += from[n];
    }
    multiply(layer.p, first + r0, first + r1, c0, c1, input(k, x), product(c));
    if (shared) {
      team_.sync();
      c = finished_[k];
    } else {
      c = newest_;
    }
    for (long r = first; r < last; ++r, c += ld_)
      for (long n = 0; n < shape_.padded; n += kLanes<T>) {
        const Vec<T> v = load(c + n), zero = {};
        put(values_[k], r, n, block_.relu ? ((v < zero) ? zero : v) : v);
      }
  }

  Product<T> product(T* c) const { return {c, ld_, 1}; }

  const Activations<T>& input(long k, const Activations<T>& x) const { return k == 0 ? x : values_[k - 1]; }

  T* partial(long k, long thread, long unit) const {
    return partial_[k] + (thread * block_.layers[k].p.rows + unit) * partial_ld(shape_);
  }
  // Each unit in lines of its own: one thread reads a unit of this step while another writes one of the next.
  static long partial_ld(Shape shape) { return round_up(shape.padded, 2 * kLineNumbers<T>); }

  void start(const T* bias, long row0, long row1, T* c) const {
    for (long r = row0; r < row1; ++r)
      for (long n = 0; n < ld_; n += kLanes<T>) store(c + (r - row0) * ld_ + n, broadcast(bias[r]));
  }

  void put(const Activations<T>& a, long unit, long n, Vec<T> v) const {
    if (!shape_.dot) {
      store(&a.at(n, unit), v);
      return;
    }
    T buffer[kLanes<T>];
    store(buffer, v);
    for (long i = 0; i < kLanes<T> && n + i < shape_.samples; ++i) a.at(n + i, unit) = buffer[i];
  }

  const Block<T, W>& block_;
  const Shape shape_;
  Team& team_;
  const long features_, hidden_;
  long ld_;
  std::vector<Activations<T>> values_;  // this thread's own hidden units
  T *outputs_, *newest_;
  std::vector<T*> partial_, finished_;
};

// to [place][padded] = from (sample, permutation[place]), places begin..end.
template <class T, class From>
void take(const From& from, const int64_t* permutation, Shape shape, long begin, long end, T* to) {
  for (long d = begin; d < end; ++d) {
    const long source = permutation ? permutation[d] : d;
    T* row = to + d * shape.padded;
    for (long n = 0; n < shape.samples; ++n) row[n] = from(n, source);
    for (long n = shape.samples; n < shape.padded; ++n) row[n] = 0;
  }
}

}  // namespace

template <class T, class W>
void flow_inverse(const Block<T, W>* blocks, long block_count, const int64_t* permutation, const T* z, long n, long features,
                   T* x, T* ladj, long threads) {
  const Shape largest = Shape::of<T>(std::min(n, kTileSamples)), last = Shape::of<T>(n % kTileSamples);
  double work = 0;
  long own = 0, partials = 0;
  for (long b = 0; b < block_count; ++b) {
    for (long k = 0; k < blocks[b].layer_count; ++k) {
      const auto& p = blocks[b].layers[k].p;
      work = std::max(work, p.area_before(p.rows) / blocks[b].steps);
    }
    for (const Shape& shape : {largest, last}) {
      own = std::max(own, BlockInverse<T, W>::own_numel(blocks[b], shape));
      partials = std::max(partials, BlockInverse<T, W>::shared_numel(blocks[b], shape, threads));
    }
  }
  // Two threads meet in a fraction of a microsecond: a level must be worth that.
  if (work * std::min(n, kTileSamples) < 1024) threads = 1;
  threads = std::min(threads, available_cores());  // a level waits for its last thread: none may wait for a core
  const long numel = std::max(Activations<T>::numel(features, largest), Activations<T>::numel(features, last));
  T* z_tile = Scratch::get<T>(Scratch::kLevelShared, features * kTileSamples + numel + partials);
  T* x_tile = z_tile + features * kTileSamples;
  std::vector<double> totals(threads * kTileSamples);
  run_team(threads, [&](Team& team) {
    T* mine = Scratch::get<T>(Scratch::kLevel, own);
    double* total = totals.data() + team.rank * kTileSamples;
    long begin, end;
    team.share(features, 16, begin, end);
    for (long n0 = 0; n0 < n; n0 += kTileSamples) {
      const Shape shape = Shape::of<T>(std::min(n - n0, kTileSamples));
      const Activations<T> xs = Activations<T>::over(x_tile, features, shape);
      std::fill(total, total + kTileSamples, 0.0);
      const T* z_of_tile = z + n0 * features;
      take([&](long s, long d) { return z_of_tile[s * features + d]; }, block_count ? blocks[0].permutation : permutation, shape,
           begin, end, z_tile);
      team.sync();
      for (long b = 0; b < block_count; ++b) {
        BlockInverse<T, W>(blocks[b], features, shape, x_tile + numel, mine, team).run(z_tile, xs, total);
        take([&](long s, long d) { return xs.at(s, d); }, b + 1 < block_count ? blocks[b + 1].permutation : permutation, shape,
             begin, end, z_tile);
        team.sync();
      }
      for (long s = 0; s < shape.samples; ++s)
        for (long d = begin; d < end; ++d) x[(n0 + s) * features + d] = z_tile[d * shape.padded + s];
      if (team.rank == 0)
        for (long s = 0; s < shape.samples; ++s) {
          double sum = 0;
          for (long t = 0; t < team.size; ++t) sum += totals[t * kTileSamples + s];
          ladj[n0 + s] = static_cast<T>(sum);
        }
      team.sync();
    }
  });
}

template void flow_inverse(const Block<float, float>*, long, const int64_t*, const float*, long, long, float*, float*, long);
template void flow_inverse(const Block<float, bfloat16>*, long, const int64_t*, const float*, long, long, float*, float*,
                            long);
template void flow_inverse(const Block<double, double>*, long, const int64_t*, const double*, long, long, double*, double*,
                            long);

}  // namespace fastmaf
