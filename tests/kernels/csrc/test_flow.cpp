// Blocks in a row, both ways: forward with and without what the backward pass needs, and backward into both targets.
#include <thread>

#include "dense.h"

namespace fastmaf_test {
namespace {

using Permutation = std::vector<int64_t>;  // empty: none

void append(Numbers& to, const Numbers& more) { to.insert(to.end(), more.begin(), more.end()); }

bool same(const Numbers& a, const Numbers& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0);
}

// result[k] = values[permutation[k]] in each row, or the other way round.
Numbers permuted(const Numbers& values, const Permutation& permutation, bool back = false) {
  Numbers result = values;
  for (std::size_t i = 0, d = permutation.size(); d > 0 && i < values.size(); ++i) {
    const std::size_t other = i / d * d + static_cast<std::size_t>(permutation[i % d]);
    result[back ? other : i] = values[back ? i : other];
  }
  return result;
}

Permutation draw_permutation(long features, Random& random) {
  Permutation result;
  for (long d = 0, end = random.below(2) * features; d < end; ++d) {
    result.push_back(d);
    std::swap(result.back(), result[static_cast<std::size_t>(random.below(d + 1))]);
  }
  return result;
}

// A layer, and what the dense loops make of it.
template <class T, class W>
struct Unit {
  Unit(long rows, long columns, bool last, Random& random)
      : m(draw_prefix(static_cast<int>(random.below(2) ? random.below(kPrefixKinds) : 1), rows, columns, last ? 2 : 1, random),
          columns, last ? 2 : 1, last ? 0.4 : 1, random),
        padding(static_cast<std::size_t>(m.stored()), true) {
    m.for_visible([&](long, long, long i) { padding[static_cast<std::size_t>(i)] = false; });
  }

  // What is added up to the log-scales of an output layer, squared: where there is but one, it may cancel.
  double log_scale_terms(long n) const {
    double result = 0;
    for (long s = 0; s < n; ++s)
      for (long r = 1; r < m.rows; r += 2) {
        const double b = number(m.bias.data()[r]), *w = m.dense.data() + r * m.columns, *x = in.data() + s * m.columns;
        result += b * b;
        for (long c = 0; c < static_cast<long>(m.sees[static_cast<std::size_t>(r)]); ++c) result += w[c] * w[c] * x[c] * x[c];
      }
    return result;
  }

  // From the gradient of the product, g [n][rows], the one of `in`.
  Numbers backward(const Numbers& g, long n) {
    Numbers grad_in(in.size());
    weight.assign(padding.size(), 0), bias.assign(static_cast<std::size_t>(m.rows), 0);
    weight_terms = bias_terms = 0;
    for (long s = 0; s < n; ++s)
      for (const Tile& t : m.cut)
        for (long r = t.row_start; r < t.row_end; ++r) {
          const double f = g[static_cast<std::size_t>(s * m.rows + r)], *w = m.dense.data() + r * m.columns;
          const double* x = in.data() + s * m.columns;
          double *to = grad_in.data() + s * m.columns, *into = weight.data() + t.offset + (r - t.row_start) * t.width;
          bias[static_cast<std::size_t>(r)] += f;
          bias_terms += f * f;
          for (long c = 0, end = f == 0 ? 0 : static_cast<long>(m.sees[static_cast<std::size_t>(r)]); c < end; ++c) {
            to[c] += f * w[c];
            into[c] += f * x[c];
            weight_terms += f * f * x[c] * x[c];
          }
        }
    return grad_in;
  }

  Matrix<T, W> m;
  std::vector<bool> padding;
  Numbers in, kept_in;  // as the loops have it, and the kernel, which has the say on which side of 0 a number near it fell
  Numbers weight, bias;                     // their gradients
  double weight_terms = 0, bias_terms = 0;  // what was added up to them, squared: samples may cancel each other
};

// A block, the same way.
template <class T, class W>
struct Part {
  std::vector<std::unique_ptr<Unit<T, W>>> units;
  std::vector<fastmaf::Layer<T, W>> given;
  const bool relu;
  const Bound bound;
  const Permutation permutation;
  const Heap<int64_t> permutation_of;
  Numbers a, kept_a, z;  // log-scale, the same as the kernel left it, and what the block gives

  Part(long features, long most_units, Random& random)
      : relu(random.below(3) != 0), bound(kBounds[random.below(5)]), permutation(draw_permutation(features, random)),
        permutation_of(permutation, random) {
    for (long k = 0, hidden = 1 + random.below(3), below = features; k <= hidden; ++k) {
      const long rows = k < hidden ? 1 + random.below(most_units) : 2 * features;
      units.push_back(std::make_unique<Unit<T, W>>(rows, below, k == hidden, random));
      given.push_back({units.back()->m.packed(), units.back()->m.bias.data()});
      below = rows;
    }
  }
  fastmaf::Block<T, W> block() const {
    const int64_t* order = permutation.empty() ? nullptr : permutation_of.data();
    return {given.data(), static_cast<long>(given.size()), nullptr, 0, relu, bound, order};
  }

  Numbers forward(const Numbers& x, long n, long features, Numbers& ladj) {  // z; adds to ladj
    Numbers out = permuted(x, permutation);
    for (std::size_t k = 0; k < units.size(); ++k) {
      units[k]->in = out;
      out = units[k]->m.apply(out, n, relu && k + 1 < units.size());
    }
    a.resize(x.size()), z.resize(x.size());
    for (std::size_t i = 0; i < x.size(); ++i) {
      a[i] = bounded<T>(out[2 * i + 1], bound);
      z[i] = (units[0]->in[i] - out[2 * i]) * std::exp(-a[i]);
      ladj[i / static_cast<std::size_t>(features)] -= a[i];
    }
    return z;
  }

  // The gradient of x from those of z and ladj.
  Numbers backward(const Numbers& gz, const Numbers& gl, long n, long features) {
    const double limit = static_cast<T>(bound.bound);
    Numbers g(2 * gz.size()), result(gz.size());
    for (std::size_t i = 0; i < gz.size(); ++i) {
      const double part = a[i] / limit, inside = bound.soft ? 1 - part * part : std::fabs(kept_a[i]) < limit;
      result[i] = gz[i] * std::exp(-a[i]);
      g[2 * i] = -result[i];
      g[2 * i + 1] = (-gz[i] * z[i] - gl[i / static_cast<std::size_t>(features)]) * (std::isinf(limit) ? 1 : inside);
    }
    for (std::size_t k = units.size(); k-- > 0;) {
      g = units[k]->backward(g, n);
      for (std::size_t i = 0; k > 0 && relu && i < g.size(); ++i)
        if (!(units[k]->kept_in[i] > 0)) g[i] = 0;
    }
    for (std::size_t i = 0; i < g.size(); ++i) result[i] += g[i];
    return permuted(result, permutation, true);
  }
};

// A scalar step of torch.optim.Adam.
template <class T>
void take(const fastmaf::AdamStep<T>& a, double& w, double g, double& m, double& v) {
  if (a.maximize) g = -g;
  a.decoupled ? w -= a.lr * a.weight_decay * w : g += a.weight_decay * w;
  m = a.beta1 * m + (1 - a.beta1) * g;
  v = a.beta2 * v + (1 - a.beta2) * g * g;
  w -= a.step_size * m / (std::sqrt(v) / a.correction2_sqrt + a.eps);
}
template <class T>
const fastmaf::AdamStep<T> kAdams[] = {
    {nullptr, nullptr, nullptr, 1e-2, 0.9, 0.999, 1e-8, 0.03, 0, 1e-3, false, false},
    {nullptr, nullptr, nullptr, 2e-2, 0.9, 0.99, 0, 0.3, 0, 1e-2, false, false},  // eps = 0: 0 / 0 in the padding?
    {nullptr, nullptr, nullptr, 2e-2, 0.8, 0.999, 1e-6, 0.05, 0.1, 1e-2, false, true},
    {nullptr, nullptr, nullptr, 2e-2, 0.9, 0.95, 0, 0.5, 0.3, 1e-2, true, false}};

struct Shape {
  long n, features, blocks, most_units, threads;
  uint64_t seed;
};

// One chain and its calls. With `nan` its inputs are NaN, and nothing is checked but that calls agree.
template <class T, class W>
struct Chain {
  const Shape c;
  const bool nan;
  Random random{c.seed};
  const Permutation last{draw_permutation(c.features, random)};
  const Heap<int64_t> last_of{last, random};
  const int64_t* const order = last.empty() ? nullptr : last_of.data();
  std::vector<std::unique_ptr<Part<T, W>>> parts;
  std::vector<fastmaf::Block<T, W>> blocks;
  std::vector<Unit<T, W>*> units;            // of all blocks
  double length = static_cast<double>(c.n);  // of all sums
  std::unique_ptr<Heap<T>> kept;
  Numbers written;

  Chain(const Shape& shape, bool nan) : c(shape), nan(nan) {
    for (long b = 0; b < c.blocks; ++b) {
      parts.push_back(std::make_unique<Part<T, W>>(c.features, c.most_units, random));
      blocks.push_back(parts.back()->block());
      for (const auto& unit : parts.back()->units) {
        units.push_back(unit.get());
        length += static_cast<double>(unit->m.columns + unit->m.rows);
      }
    }
  }
  std::string name() const {
    return std::string("chain ") + type_name<W>() + " n=" + std::to_string(c.n) + " D=" + std::to_string(c.features) +
           " blocks=" + std::to_string(c.blocks) + " threads=" + std::to_string(c.threads) + " seed=" + std::to_string(c.seed) +
           ": ";
  }
  void check(const std::string& what, const Numbers& found, const Numbers& expected, double terms = 0) const {
    if (!nan) check_close<T>(name() + what, found, expected, length, std::sqrt(terms));
  }
  void check_same(const std::string& what, const Numbers& found, const Numbers& before) const {
    if (++checks; !same(found, before)) fail(name() + what + " differs from before");
  }

  void forward() {
    const Numbers in = draw<T>(random, c.n * c.features, 1, nan);
    const Heap<T> x(in, random);
    kept = std::make_unique<Heap<T>>(fastmaf::saved_numel<T, W>(blocks.data(), c.blocks, c.n, c.features), random);
    Numbers found_z, found_ladj, all_kept;
    for (int call = 0; call < 4; ++call) {  // the threads take their work in whatever order; every other call keeps nothing
      const Heap<T> z(c.n * c.features, random), ladj(c.n, random);
      if (call % 2 == 0) kept->poison();
      fastmaf::flow_forward<T, W>(blocks.data(), c.blocks, order, x.data(), c.n, c.features, z.data(), ladj.data(),
                                   call % 2 == 0 ? kept->data() : nullptr, c.threads);
      if (call == 0) found_z = z.numbers(), found_ladj = ladj.numbers(), all_kept = kept->numbers();
      check_same("z", z.numbers(), found_z);
      check_same("ladj", ladj.numbers(), found_ladj);
      check_same("kept", kept->numbers(), all_kept);
      if (!nan) check_same("x", x.numbers(), in);
    }
    for (const Numbers* numbers : {&found_z, &found_ladj, &all_kept}) append(written, *numbers);

    Numbers values = in, ladj(static_cast<std::size_t>(c.n));
    long at = 0;
    const auto next = [&](const char* what, const Numbers& expected, double terms = 0) {
      const long end = at + static_cast<long>(expected.size());
      if (end > kept->size) fail(name() + "kept is too short");
      const Numbers found(all_kept.begin() + std::exchange(at, end), all_kept.begin() + end);
      check(what, found, expected, terms);
      return found;
    };
    for (const auto& part : parts) {
      values = part->forward(values, c.n, c.features, ladj);
      for (std::size_t k = 0; k < part->units.size(); ++k)
        if (k > 0 || part == parts[0] || !part->permutation.empty())
          part->units[k]->kept_in = next(k == 0 ? "kept x" : "kept hidden layer", part->units[k]->in);
      part->kept_a = next("kept log_scale", part->a, part->units.back()->log_scale_terms(c.n));
      next("kept z", part->z);
    }
    if (at != kept->size) fail(name() + "kept is too long");
    check("z", found_z, permuted(values, last));
    check("ladj", found_ladj, ladj);
  }

  void backward() {
    const Numbers gz = draw<T>(random, c.n * c.features, 1, nan), gl = draw<T>(random, c.n, 1, nan);
    const Heap<T> gz_of(gz, random), gl_of(gl, random);
    Numbers expected = permuted(gz, last, true), first[2];
    for (std::size_t b = parts.size(); b-- > 0;) expected = parts[b]->backward(expected, gl, c.n, c.features);
    for (int call = 0; call < 6; ++call) {  // both targets in turn; the third time grad_x is left out
      const bool adam = call % 2 == 1, with_x = call < 4;
      const Heap<T> x(with_x ? c.n * c.features : 0, random);
      Numbers found = step(adam, [&](T* const* biases, const auto* targets) {
        fastmaf::flow_backward<T>(blocks.data(), c.blocks, order, gz_of.data(), gl_of.data(), kept->data(), c.n, c.features,
                                   with_x ? x.data() : nullptr, biases, targets, c.threads);
      });
      if (with_x) check("grad of x", x.numbers(), expected);
      if (!with_x) first[adam].resize(found.size());
      append(found, x.numbers());
      if (call < 2) append(written, first[adam] = found);
      check_same(adam ? "what Adam left" : "what was written", found, first[adam]);
    }
  }

  // One call with either target. Checks and returns everything but grad_x, and takes Adam's step back.
  template <class Call>
  Numbers step(bool adam, const Call& call) {
    std::vector<std::unique_ptr<Heap<T>>> biases, avgs, sqs;  // a gradient that is written goes where its first moment would
    std::vector<T*> grad_biases;
    std::vector<fastmaf::WriteGradient<T>> writes;
    std::vector<fastmaf::AdamStep<T>> steps(units.size(), kAdams<T>[c.seed % 4]);
    std::vector<Numbers> w, avg(units.size()), sq(units.size());
    Random moments(c.seed);
    for (std::size_t i = 0; i < units.size(); ++i) {
      for (const bool padding : units[i]->padding) {  // the padding of the moments is zero too
        avg[i].push_back(padding ? 0 : static_cast<T>(moments.normal()));
        sq[i].push_back(padding ? 0 : static_cast<T>(0.1 + moments.uniform()));
      }
      w.push_back(units[i]->m.weight.numbers());
      biases.push_back(std::make_unique<Heap<T>>(units[i]->m.rows, random));
      avgs.push_back(std::make_unique<Heap<T>>(avg[i], random));
      sqs.push_back(std::make_unique<Heap<T>>(sq[i], random));
      if (!adam) avgs[i]->poison();
      grad_biases.push_back(biases[i]->data());
      writes.push_back({avgs[i]->data()});
      steps[i].weight = units[i]->m.weight.data(), steps[i].exp_avg = avgs[i]->data(), steps[i].exp_avg_sq = sqs[i]->data();
    }
    adam ? call(grad_biases.data(), steps.data()) : call(grad_biases.data(), writes.data());
    Numbers all;
    for (std::size_t i = 0; i < units.size(); ++i) {
      const Unit<T, W>& unit = *units[i];
      const auto look = [&](const char* what, const Heap<T>& heap, const Numbers& expected, double terms = 0) {
        const Numbers found = heap.numbers();
        append(all, found);
        check(what, found, expected, terms);
        for (std::size_t k = 0; &heap != biases[i].get() && !nan && k < found.size(); ++k)
          if (unit.padding[k] && !(found[k] == 0)) fail(name() + what + ": padding is not zero at " + std::to_string(k));
      };
      look("grad of bias", *biases[i], unit.bias, unit.bias_terms);
      if (!adam) look("grad of weight", *avgs[i], unit.weight, unit.weight_terms);
      const Numbers before = w[i];
      for (std::size_t k = 0; k < before.size(); ++k)
        if (adam && !unit.padding[k]) take(steps[i], w[i][k], unit.weight[k], avg[i][k], sq[i][k]);
      look("weight", unit.m.weight, w[i]);
      if (adam) look("exp_avg", *avgs[i], avg[i]);
      if (adam) look("exp_avg_sq", *sqs[i], sq[i]);
      for (std::size_t k = 0; k < before.size(); ++k) unit.m.weight.data()[k] = static_cast<W>(before[k]);
    }
    return all;
  }
};

template <class T, class W>
Numbers run_case(const Shape& c, bool nan = false) {
  Chain<T, W> chain(c, nan);
  chain.forward();
  if constexpr (std::is_same_v<T, W>) chain.backward();
  return chain.written;
}

template <class T, class W>
void test_type(uint64_t seed) {
  const long sizes[] = {0, 1, 2, 5, 8, 9, 33, 65, 130}, threads[] = {1, 2, 3, 7};
  std::vector<Shape> shapes;
  for (const long features : {1, 2, 3, 7, 8, 17, 31, 40})
    for (const long n : sizes) {
      const auto i = static_cast<long>(shapes.size());
      shapes.push_back({n, features, 1 + (i + i / 4) % 4, 5 + i * 7 % 60, threads[i % 4], seed + static_cast<uint64_t>(i)});
    }
  shapes.push_back({5, 1103, 2, 301, 2, seed});
  shapes.push_back({33, 1100, 1, 130, 3, seed + 1});
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    const Numbers first = run_case<T, W>(shapes[i]);
    if (i % 11 != 4) continue;
    // A call's result depends on nothing but its arguments: not on earlier calls, nor on calls at the same time.
    run_case<T, W>(shapes[i], true);
    Numbers others[3] = {run_case<T, W>(shapes[i]), {}, {}};
    std::thread one([&] { others[1] = run_case<T, W>(shapes[i]); }), two([&] { others[2] = run_case<T, W>(shapes[i]); });
    one.join();
    two.join();
    for (const Numbers& other : others)
      if (!same(first, other)) fail(std::string("chain ") + type_name<W>() + " " + std::to_string(i) + ": depends on others");
  }
}

}  // namespace

void test_flow() {
  test_type<float, float>(8009);
  test_type<double, double>(9010);
  test_type<float, bfloat16>(10011);
}

}  // namespace fastmaf_test
