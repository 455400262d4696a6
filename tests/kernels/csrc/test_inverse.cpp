// The inverse of one block and of chains of them, against the naive one: passes over the whole block until nothing changes.
#include "dense.h"

namespace fastmaf_test {
namespace {

using Degrees = std::vector<long>;  // sorted

long count_up_to(const Degrees& degrees, long limit) {
  return std::upper_bound(degrees.begin(), degrees.end(), limit) - degrees.begin();
}

Degrees draw_degrees(long units, long features, Random& random) {
  Degrees result;
  const long kind = random.below(7), one = random.below(features + 1), few = 1 + random.below(5);
  for (long i = 0; i < units; ++i) {
    const long kinds[] = {1 + i * features / units,                        // spread
                          1 + random.below(features),                      // random
                          random.below(few) * (features / few + 1),        // few, many of each, 0 among them
                          one,                                             // all the same
                          i % std::max(1L, std::min(features - 1, 9L)) + 1,  // cyclic: the last step holds nearly all
                          random.below(2 * features + 1),                  // some see nothing, some are seen by nothing
                          features + i % 2};                               // above every output
    result.push_back(kinds[kind]);
  }
  std::sort(result.begin(), result.end());
  return result;
}

// flow/schedule.py
std::vector<int32_t> level_schedule(const Degrees& in, const std::vector<Degrees>& hidden) {
  std::vector<int32_t> table;
  Degrees thresholds = hidden.back();
  thresholds.erase(std::unique(thresholds.begin(), thresholds.end()), thresholds.end());
  for (const long t : thresholds) {
    if (t >= in.back()) continue;
    table.push_back(static_cast<int32_t>(count_up_to(in, t)));
    for (const Degrees& layer : hidden) table.push_back(static_cast<int32_t>(count_up_to(layer, t)));
  }
  const std::vector<int32_t> last(table.end() - (table.empty() ? 0 : static_cast<long>(hidden.size())), table.end());
  table.push_back(static_cast<int32_t>(in.size()));
  for (std::size_t k = 0; k < hidden.size(); ++k) table.push_back(last.empty() ? 0 : last[k]);
  return table;
}

template <class T, class W>
struct Made {
  std::vector<std::unique_ptr<Matrix<T, W>>> layers;
  std::unique_ptr<Heap<int32_t>> schedule;
  std::unique_ptr<Heap<int64_t>> permutation;
  std::vector<fastmaf::Layer<T, W>> given;
  bool relu;
  Bound bound;
  std::string name;

  Made(long features, long most_units, Random& random)
      : relu(random.below(3) != 0), bound(kBounds[random.below(5)]), permutation_of(draw_permutation(features, random)) {
    Degrees in;
    const bool shared = random.below(4) == 0;  // outputs that share a degree
    for (long d = 0; d < features; ++d) in.push_back(shared ? 1 + random.below(features) : d + 1);
    std::sort(in.begin(), in.end());
    std::vector<Degrees> hidden;
    const long depth = 1 + random.below(3);
    for (long k = 0; k < depth; ++k) {
      hidden.push_back(draw_degrees(1 + random.below(most_units), features, random));
      name += " hidden " + std::to_string(hidden.back().size());
    }
    const Degrees* below = &in;
    for (const Degrees& layer : hidden) {
      std::vector<int64_t> sees;
      for (const long degree : layer) sees.push_back(count_up_to(*below, degree));
      add(sees, *below, 1, 1, random);
      below = &layer;
    }
    std::vector<int64_t> sees;
    for (const long degree : in) sees.insert(sees.end(), 2, count_up_to(*below, degree - 1));
    add(sees, *below, 2, 0.4, random);
    schedule = std::make_unique<Heap<int32_t>>(level_schedule(in, hidden), random);
    if (!permutation_of.empty()) permutation = std::make_unique<Heap<int64_t>>(permutation_of, random);
  }

  void add(const std::vector<int64_t>& sees, const Degrees& below, long group, double gain, Random& random) {
    layers.push_back(std::make_unique<Matrix<T, W>>(sees, static_cast<long>(below.size()), group, gain, random));
    given.push_back({layers.back()->packed(), layers.back()->bias.data()});
  }

  static std::vector<int64_t> draw_permutation(long features, Random& random) {
    std::vector<int64_t> result;
    if (random.below(3) == 0) return result;
    for (long d = 0; d < features; ++d) {
      result.push_back(d);
      std::swap(result.back(), result[static_cast<std::size_t>(random.below(d + 1))]);
    }
    return result;
  }

  fastmaf::Block<T, W> block() const {
    const long depth = static_cast<long>(given.size());
    return {given.data(), depth, schedule->data(), schedule->size / depth, relu, bound, permutation ? permutation->data() : nullptr};
  }

  // Shift and log-scale [n][2D] of x.
  Numbers output(const Numbers& x, long n) const {
    Numbers values = x;
    for (std::size_t k = 0; k < layers.size(); ++k) values = layers[k]->apply(values, n, relu && k + 1 < layers.size());
    for (std::size_t i = 1; i < values.size(); i += 2) values[i] = bounded<T>(values[i], bound);
    return values;
  }

  // The naive inverse: pass d makes dimension d right, and no pass changes anything once all are.
  Numbers inverse(const Numbers& z, long n, Numbers& ladj, double& terms) const {
    Numbers x(z.size(), 0), before;
    for (std::size_t pass = 0; before != x; ++pass) {
      if (pass > x.size() + 1) fail("the test's own naive inverse does not settle:" + name);
      before = x;
      const Numbers out = output(x, n);
      for (std::size_t i = 0; i < x.size(); ++i) x[i] = z[i] * std::exp(out[2 * i + 1]) + out[2 * i];
    }
    const Numbers out = output(x, n);
    for (std::size_t i = 0; i < x.size(); ++i) {
      ladj[i / (x.size() / static_cast<std::size_t>(n))] += out[2 * i + 1];
      terms += out[2 * i + 1] * out[2 * i + 1];
    }
    return x;
  }

  std::vector<int64_t> permutation_of;
};

Numbers permuted(const Numbers& values, const std::vector<int64_t>& permutation) {
  Numbers result = values;
  for (std::size_t i = 0, d = permutation.size(); d > 0 && i < values.size(); ++i)
    result[i] = values[i / d * d + static_cast<std::size_t>(permutation[i % d])];
  return result;
}

template <class T, class W>
Numbers chain_case(const std::vector<std::unique_ptr<Made<T, W>>>& chain, long n, long features, long threads, Random& random,
                   bool nan, const std::string& name) {
  const std::vector<int64_t> last = chain.size() == 1 ? std::vector<int64_t>() : Made<T, W>::draw_permutation(features, random);
  const Heap<int64_t> last_of(last, random);
  const Numbers z = draw<T>(random, n * features, 1, nan);
  const Heap<T> z_of(z, random), x_of(n * features, random), ladj_of(n, random);
  std::vector<fastmaf::Block<T, W>> blocks;
  double length = 0;
  for (const auto& made : chain) {
    blocks.push_back(made->block());
    for (const auto& layer : made->layers) length += static_cast<double>(layer->columns);
  }
  fastmaf::flow_inverse<T, W>(blocks.data(), static_cast<long>(blocks.size()), last.empty() ? nullptr : last_of.data(),
                               z_of.data(), n, features, x_of.data(), ladj_of.data(), threads);
  Numbers written = x_of.numbers();
  const Numbers found = written, found_ladj = ladj_of.numbers();
  written.insert(written.end(), found_ladj.begin(), found_ladj.end());
  if (nan) return written;
  Numbers x = z, ladj(static_cast<std::size_t>(n));
  double terms = 0;  // of ladj, squared
  for (const auto& made : chain) x = made->inverse(permuted(x, made->permutation_of), n, ladj, terms);
  check_close<T>(name + " x", found, permuted(x, last), length);
  check_close<T>(name + " ladj", found_ladj, ladj, length, std::sqrt(terms));
  if (chain.size() > 1) return written;
  // One block: forward of what was found gives z back.
  const Numbers out = chain[0]->output(found, n);
  Numbers back(found.size());
  for (std::size_t i = 0; i < back.size(); ++i) back[i] = (found[i] - out[2 * i]) * std::exp(-out[2 * i + 1]);
  check_close<T>(name + " z back", back, permuted(z, chain[0]->permutation_of), length);
  return written;
}

template <class T, class W>
void test_type(uint64_t seed) {
  const long sizes[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 24, 33, 63, 64, 65, 130};
  const long threads[] = {1, 2, 3, 7};
  for (const long features : {1, 2, 13, 97, 300, 1100})
    for (const long n : sizes)
      if (n * features <= 8000 && (features < 1100 || n == 1 || n == 5)) {
        inverse_case<T, W>(n, features, threads[seed % 4], seed);
        ++seed;
      }
}

}  // namespace

// Three models of these sizes: a block, a chain, and a block with so many units that a step is wide.
template <class T, class W>
Numbers inverse_case(long n, long features, long threads, uint64_t seed, bool nan) {
  Random random(seed + 999);
  Numbers written;
  const long models[][2] = {{1, 40}, {2 + random.below(3), 12}, {1, features > 90 && n < 4 ? 700 : 20}};
  for (const auto& [blocks, most_units] : models) {
    std::vector<std::unique_ptr<Made<T, W>>> chain;
    std::string name = std::string("flow_inverse ") + type_name<W>() + " n=" + std::to_string(n) + " D=" +
                       std::to_string(features) + " threads=" + std::to_string(threads) + " seed=" + std::to_string(seed);
    for (long b = 0; b < blocks; ++b) {
      chain.push_back(std::make_unique<Made<T, W>>(features, most_units, random));
      name += " block" + chain.back()->name;
    }
    const Numbers more = chain_case<T, W>(chain, n, features, threads, random, nan, name);
    written.insert(written.end(), more.begin(), more.end());
  }
  return written;
}
template Numbers inverse_case<float, float>(long, long, long, uint64_t, bool);
template Numbers inverse_case<double, double>(long, long, long, uint64_t, bool);
template Numbers inverse_case<float, bfloat16>(long, long, long, uint64_t, bool);

void test_inverse() {
  test_type<float, float>(5006);
  test_type<double, double>(6007);
  test_type<float, bfloat16>(7008);
}

}  // namespace fastmaf_test
