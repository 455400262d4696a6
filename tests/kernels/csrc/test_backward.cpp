// The backward passes: both sources of a gradient into all four targets.
#include "dense.h"

namespace fastmaf_test {
namespace {

// The gradients of one layer, dense and in double, given that of its product, g [n][rows].
struct Gradients {
  Numbers input, weight, bias;  // [n][columns], packed, [rows]
  double input_terms = 0, weight_terms = 0, bias_terms = 0;  // the norms of what was added up
};
template <class T>
Gradients dense_gradients(const Matrix<T, T>& m, const Numbers& g, const Numbers& x, long n) {
  Gradients result{Numbers(x.size()), Numbers(static_cast<std::size_t>(m.stored())), Numbers(static_cast<std::size_t>(m.rows))};
  const auto square = [](double a) { return a * a; };
  for (long s = 0; s < n; ++s) {
    const double *g_of = g.data() + s * m.rows, *x_of = x.data() + s * m.columns;
    double *input = result.input.data() + s * m.columns, *weight = result.weight.data();
    for (long r = 0; r < m.rows; ++r) result.bias[static_cast<std::size_t>(r)] += g_of[r];
    for (const Tile& t : m.cut)
      for (long r = t.row_start; r < t.row_end; ++r) {
        const double* w = m.dense.data() + r * m.columns;
        double* into = weight + t.offset + (r - t.row_start) * t.width;
        const double factor = g_of[r];
        if (factor == 0) continue;
        for (long c = 0, end = m.sees[static_cast<std::size_t>(r)]; c < end; ++c) {
          input[c] += factor * w[c];
          into[c] += factor * x_of[c];
          result.input_terms += square(factor * w[c]);
          result.weight_terms += square(factor * x_of[c]);
        }
      }
  }
  for (const double one : g) result.bias_terms += square(one);
  for (double* terms : {&result.input_terms, &result.weight_terms, &result.bias_terms}) *terms = std::sqrt(*terms);
  return result;
}

// A scalar step of torch.optim.Adam.
struct Adam {
  double lr, beta1, beta2, eps, weight_decay;
  bool decoupled, maximize;
  int step;
  double step_size() const { return lr / (1 - std::pow(beta1, step)); }
  double correction2_sqrt() const { return std::sqrt(1 - std::pow(beta2, step)); }
  void take(double& w, double g, double& m, double& v) const {
    if (maximize) g = -g;
    if (decoupled)
      w -= lr * weight_decay * w;
    else
      g += weight_decay * w;
    m = beta1 * m + (1 - beta1) * g;
    v = beta2 * v + (1 - beta2) * g * g;
    w -= step_size() * m / (std::sqrt(v) / correction2_sqrt() + eps);
  }
};
constexpr Adam kAdams[] = {{1e-3, 0.9, 0.999, 1e-8, 0, false, false, 1},
                           {1e-2, 0.9, 0.99, 0, 0, false, false, 10},  // eps = 0: 0 / 0 in the padding, if one let it
                           {1e-2, 0.8, 0.999, 1e-6, 0.1, false, true, 3},
                           {1e-2, 0.9, 0.95, 0, 0.3, true, false, 7},
                           {1e-3, 0, 0.9, 1e-3, 0.01, true, true, 2}};

// One layer and what it was given; `source` yields `product`, the gradient of the layer's product, when its scale is 1.
template <class T, class Source>
struct Layer {
  std::string name;
  const Case& c;
  Matrix<T, T> m;
  Heap<T> x;
  Source source;
  Numbers in, product, x_gradient;  // the last is AffineGradient's grad_x
  Random& random;
  Numbers written;

  void run() {
    const Gradients all = dense_gradients(m, product, in, c.n);
    const bool small = c.rows * c.columns < 5000;
    for (int k = 0; k < (small ? 2 : 1); ++k) {
      const double scale = (c.seed + static_cast<uint64_t>(k)) % 3 == 0 ? 0.375 : 1;
      Numbers weight = all.weight;
      for (double& g : weight) g *= scale;
      call(fastmaf::NoWeightGradient{}, "no weight gradient", all, 1);
      {
        const Heap<T> grad(m.stored(), random);
        call(fastmaf::WriteGradient<T>{grad.data()}, "written", all, scale);
        check("grad of weight", grad, weight, c.n, scale * all.weight_terms);
        check_padding("grad of weight", grad);
      }
      {
        double total = std::nan(""), expected = 0;
        for (const double g : weight) expected += g * g;
        call(fastmaf::SquaredNorm{&total}, "squared norm", all, scale);
        written.push_back(total);
        if (!c.nan) check_close<T>(name + "squared norm" + c.name(), {total}, {expected}, static_cast<double>(c.n));
      }
      adam(kAdams[(c.seed + static_cast<uint64_t>(2 * k)) % 5], all, weight, scale);
    }
  }

  // One call, with or without what it may leave out; checks everything but the target.
  template <class Target>
  void call(const Target& target, const char* what, const Gradients& all, double scale) {
    long left_out = random.below(2);  // bits: grad_x of the layer, grad_bias, grad_x of the affine source
    left_out *= random.below(8);
    const Heap<T> input(c.n * c.columns, random), bias(m.rows, random), x_grad(static_cast<long>(x_gradient.size()), random);
    Source s = source;
    s.scale = static_cast<T>(scale);
    if constexpr (std::is_same_v<Source, fastmaf::AffineGradient<T>>) s.grad_x = left_out & 4 ? nullptr : x_grad.data();
    fastmaf::linear_backward<T>(m.packed(), s, x.data(), c.n, left_out & 1 ? nullptr : input.data(),
                                left_out & 2 ? nullptr : bias.data(), target, c.threads);
    const std::string of = std::string(" beside ") + what;
    if (scale != 1) return;  // what is scaled beside the weight's gradient is nobody's business: no caller asks for both
    if (!(left_out & 1)) check("grad of input" + of, input, all.input, m.rows, all.input_terms);
    if (!(left_out & 2)) check("grad of bias" + of, bias, all.bias, c.n, all.bias_terms);
    if (!(left_out & 4)) check("grad of x" + of, x_grad, x_gradient, 1);
  }

  void adam(const Adam& adam, const Gradients& all, const Numbers& grad, double scale) {
    const Numbers before = m.weight.numbers();
    Numbers w = before, avg(w.size()), sq(w.size());
    m.for_visible([&](long, long, long i) {  // the padding of the moments is zero too
      const auto at = static_cast<std::size_t>(i);
      avg[at] = static_cast<T>(random.normal());
      sq[at] = static_cast<T>(0.1 + random.uniform());
    });
    const Heap<T> avg_of(avg, random), sq_of(sq, random);
    call(fastmaf::AdamStep<T>{m.weight.data(), avg_of.data(), sq_of.data(), adam.step_size(), adam.beta1, adam.beta2, adam.eps,
                              adam.correction2_sqrt(), adam.weight_decay, adam.lr, adam.decoupled, adam.maximize},
         "Adam", all, scale);
    m.for_visible([&](long, long, long i) {
      const auto at = static_cast<std::size_t>(i);
      adam.take(w[at], grad[at], avg[at], sq[at]);
    });
    check("weight after Adam", m.weight, w, c.n);
    check("exp_avg", avg_of, avg, c.n);
    check("exp_avg_sq", sq_of, sq, c.n);
    check_padding("weight after Adam", m.weight);
    check_padding("exp_avg", avg_of);
    check_padding("exp_avg_sq", sq_of);
    for (std::size_t i = 0; i < before.size(); ++i) m.weight.data()[i] = static_cast<T>(before[i]);
  }

  void check(const std::string& what, const Heap<T>& found, const Numbers& expected, long length, double terms = 0) {
    const Numbers f = found.numbers();
    written.insert(written.end(), f.begin(), f.end());
    if (!c.nan) check_close<T>(name + what + c.name(), f, expected, static_cast<double>(length), terms);
  }

  void check_padding(const char* what, const Heap<T>& packed) {
    if (c.nan) return;
    std::vector<bool> visible(static_cast<std::size_t>(m.stored()), false);
    m.for_visible([&](long, long, long i) { visible[static_cast<std::size_t>(i)] = true; });
    for (std::size_t i = 0; i < visible.size(); ++i)
      if (!visible[i] && !(packed.data()[i] == 0)) fail(name + what + c.name() + ": padding is not zero at " + std::to_string(i));
    ++checks;
  }
};

template <class T>
Numbers linear_case(const Case& c, Random& random) {
  Matrix<T, T> m(draw_prefix(c.kind, c.rows, c.columns, 1, random), c.columns, 1, 1, random);
  const Numbers in = draw<T>(random, c.n * c.columns, 1, c.nan), grad = draw<T>(random, c.n * c.rows, 1, c.nan);
  const bool relu = random.below(2) != 0;
  Numbers y = draw<T>(random, c.n * c.rows, 1), product = grad;
  for (std::size_t i = 0; i < y.size(); ++i) {
    y[i] = std::max(y[i], 0.0);
    if (relu && !(y[i] > 0)) product[i] = 0;
  }
  const Heap<T> grad_y(grad, random), y_of(y, random);
  Heap<T> x(in, random);
  Layer<T, fastmaf::LinearGradient<T>> layer{std::string("linear ") + type_name<T>() + (relu ? " relu: " : ": "), c, std::move(m),
                                             std::move(x), {grad_y.data(), relu ? y_of.data() : nullptr}, in, product, {},
                                             random, {}};
  layer.run();
  return layer.written;
}

template <class T>
Numbers affine_case(const Case& c, Random& random) {
  const Bound bound = kBounds[c.seed % 5];
  Matrix<T, T> m(draw_prefix(c.kind, 2 * c.rows, c.columns, 2, random), c.columns, 2, 1, random);
  const long count = c.n * c.rows;
  const Numbers in = draw<T>(random, c.n * c.columns, 1, c.nan), gz = draw<T>(random, count, 1, c.nan),
                gl = draw<T>(random, c.n, 1, c.nan), ga = draw<T>(random, count, 1, c.nan), z = draw<T>(random, count, 1, c.nan);
  Numbers a = draw<T>(random, count, 0.8, c.nan), product(static_cast<std::size_t>(2 * count)), x_gradient(a.size());
  const double limit = static_cast<T>(bound.bound);
  for (std::size_t i = 0; i < a.size(); ++i) {
    a[i] = static_cast<T>(bounded<T>(a[i], bound));  // as the forward pass leaves it: some lie on a hard bound exactly
    const double slope = std::isinf(limit) ? 1 : bound.soft ? 1 - a[i] / limit * (a[i] / limit) : std::fabs(a[i]) < limit;
    x_gradient[i] = gz[i] * std::exp(-a[i]);
    product[2 * i] = -x_gradient[i];
    product[2 * i + 1] = (ga[i] - gz[i] * z[i] - gl[i / static_cast<std::size_t>(c.rows)]) * slope;
  }
  const Heap<T> gz_of(gz, random), gl_of(gl, random), ga_of(ga, random), z_of(z, random), a_of(a, random);
  Heap<T> x(in, random);
  Layer<T, fastmaf::AffineGradient<T>> layer{std::string("affine ") + type_name<T>() + " bound kind " +
                                                 std::to_string(c.seed % 5) + ": ",
                                             c, std::move(m), std::move(x),
                                             {gz_of.data(), gl_of.data(), ga_of.data(), z_of.data(), a_of.data(), bound, nullptr},
                                             in, product, x_gradient, random, {}};
  layer.run();
  return layer.written;
}

}  // namespace

template <class T>
Numbers backward_case(const Case& c) {
  Random random(c.seed + 77);
  Numbers written = linear_case<T>(c, random);
  const Numbers more = affine_case<T>(c, random);
  written.insert(written.end(), more.begin(), more.end());
  return written;
}
template Numbers backward_case<float>(const Case&);
template Numbers backward_case<double>(const Case&);

void test_backward() {
  for (const Case& c : cases(3004)) backward_case<float>(c);
  for (const Case& c : cases(4005)) backward_case<double>(c);
}

}  // namespace fastmaf_test
