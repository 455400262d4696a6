// Runs the tests of the native kernels (`make sanitize`): the forward passes of the layers are here, the backward passes and
// the inverse beside. A failure names the case and ends the program with 1.
#include <thread>

#include "dense.h"

namespace fastmaf_test {

std::vector<Case> cases(uint64_t seed) {
  const long sizes[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 24, 33, 63, 64, 65, 130}, threads[] = {1, 2, 3, 7};
  const std::pair<long, long> small[] = {{1, 1}, {1, 2}, {2, 1}, {7, 13}, {13, 7}, {40, 40}};
  const std::pair<long, long> large[] = {{40, 300}, {300, 40}, {97, 101},   {1100, 40},
                                         {40, 1100}, {2, 1100}, {300, 1100}, {1100, 300}};
  std::vector<Case> result;
  const auto add = [&](long n, std::pair<long, long> shape) {
    const auto i = static_cast<long>(result.size());
    result.push_back({n, shape.first, shape.second, static_cast<int>((i + i / 6) % kPrefixKinds),
                      threads[(i + i / 4) % 4], seed + static_cast<uint64_t>(i)});
  };
  for (const auto& shape : small)
    for (const long n : sizes) add(n, shape);
  long i = static_cast<long>(seed);
  for (const auto& shape : large)
    for (int k = 0; k < (shape.first * shape.second > 100000 ? 4 : 6); ++k, i += 5)
      add(std::min(sizes[i % 18], 4000000 / (shape.first * shape.second)), shape);
  return result;
}

template <class T, class W>
Numbers forward_case(const Case& c) {
  Random random(c.seed);
  Numbers written;
  {
    const Matrix<T, W> m(draw_prefix(c.kind, c.rows, c.columns, 1, random), c.columns, 1, 1, random);
    const Numbers in = draw<T>(random, c.n * c.columns, 1, c.nan);
    const Heap<T> x(in, random), y(c.n * c.rows, random);
    const bool relu = random.below(2) != 0;
    fastmaf::masked_linear<T, W>(m.packed(), m.bias.data(), x.data(), c.n, relu, y.data(), c.threads);
    written = y.numbers();
    if (!c.nan)
      check_close<T>(std::string("masked_linear ") + type_name<W>() + c.name(), written, m.apply(in, c.n, relu),
                     static_cast<double>(c.columns));
  }
  const long d = c.rows, rows = 2 * d;
  const Matrix<T, W> m(draw_prefix(c.kind, rows, c.columns, 2, random), c.columns, 2, 0.7, random);
  const Numbers h_in = draw<T>(random, c.n * c.columns, 1, c.nan), x_in = draw<T>(random, c.n * d, 1, c.nan);
  const Heap<T> h(h_in, random), x(x_in, random), z(c.n * d, random), ladj(c.n, random), a(c.n * d, random);
  const Bound bound = kBounds[c.seed % 5];
  fastmaf::affine_output<T, W>(m.packed(), m.bias.data(), h.data(), x.data(), c.n, bound, z.data(), ladj.data(), a.data(),
                               c.threads);
  Numbers z_of(static_cast<std::size_t>(c.n * d)), a_of(z_of), ladj_of(static_cast<std::size_t>(c.n));
  const Numbers out = m.apply(h_in, c.n, false);
  double terms[3] = {};  // of z, ladj and log_scale, squared
  for (std::size_t i = 0; i < z_of.size(); ++i) {
    a_of[i] = bounded<T>(out[2 * i + 1], bound);
    z_of[i] = (x_in[i] - out[2 * i]) * std::exp(-a_of[i]);
    ladj_of[i / static_cast<std::size_t>(d)] -= a_of[i];
    terms[0] += (x_in[i] * x_in[i] + out[2 * i] * out[2 * i]) * std::exp(-2 * a_of[i]);
    terms[1] += a_of[i] * a_of[i];
  }
  const std::pair<const Heap<T>*, const Numbers*> pairs[] = {{&z, &z_of}, {&ladj, &ladj_of}, {&a, &a_of}};
  const char* names[] = {" z", " ladj", " log_scale"};
  for (int k = 0; k < 3; ++k) {
    const Numbers found = pairs[k].first->numbers();
    written.insert(written.end(), found.begin(), found.end());
    if (!c.nan)
      check_close<T>(std::string("affine_output ") + type_name<W>() + names[k] + c.name(), found, *pairs[k].second,
                     static_cast<double>(k == 1 ? c.columns + d : c.columns), std::sqrt(terms[k]));
  }
  return written;
}

void test_forward() {
  for (const Case& c : cases(1)) forward_case<float, float>(c);
  for (const Case& c : cases(1002)) forward_case<double, double>(c);
  for (const Case& c : cases(2003)) forward_case<float, bfloat16>(c);
}

namespace {

bool same(const Numbers& a, const Numbers& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0);
}

// All kernels, on shapes that follow each other as large and small.
template <class T, class W>
std::vector<Numbers> everything(bool nan) {
  std::vector<Numbers> result;
  const long shapes[][3] = {{5, 40, 300}, {65, 7, 13}, {1, 300, 40}, {17, 97, 101}, {3, 40, 40}};
  uint64_t seed = 9000;
  for (const auto& s : shapes)
    for (const long threads : {1, 2, 3}) {
      const Case c{s[0], s[1], s[2], static_cast<int>(seed % 2), threads, seed, nan};
      result.push_back(forward_case<T, W>(c));
      result.push_back(backward_case<T>(c));
      result.push_back(inverse_case<T, W>(s[0], s[1], threads, seed, nan));
      ++seed;
    }
  return result;
}

// A call's result depends on nothing but its arguments: not on earlier calls, nor on calls at the same time.
template <class T, class W>
void test_again() {
  const std::vector<Numbers> first = everything<T, W>(false);
  everything<T, W>(true);
  const auto compare = [&](const std::vector<Numbers>& other, const char* when) {
    for (std::size_t i = 0; i < first.size(); ++i, ++checks)
      if (!same(first[i], other[i]))
        fail(std::string(type_name<W>()) + ": result " + std::to_string(i) + " of everything() differs " + when);
  };
  compare(everything<T, W>(false), "after calls with NaN");
  std::vector<Numbers> here, there;
  std::thread one([&] { here = everything<T, W>(false); }), two([&] { there = everything<T, W>(false); });
  one.join();
  two.join();
  compare(here, "in the first of two threads");
  compare(there, "in the second of two threads");
}

}  // namespace
}  // namespace fastmaf_test

int main() {
  using namespace fastmaf_test;
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  test_forward();
  std::printf("forward passes: %ld comparisons so far\n", checks.load());
  test_backward();
  std::printf("backward passes: %ld\n", checks.load());
  test_inverse();
  std::printf("inverse: %ld\n", checks.load());
  test_flow();
  std::printf("chains: %ld\n", checks.load());
  test_again<float, float>();
  test_again<double, double>();
  test_again<float, bfloat16>();
  std::printf("called again and from two threads: %ld; vectors of %d float32\n", checks.load(), fastmaf::float_lanes());
}
