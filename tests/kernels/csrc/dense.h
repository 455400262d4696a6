// What the tests of the native kernels hold them against: dense loops in double, written from the equations, beside the
// packed arrays that the kernels are given. Nothing here knows how a kernel works.
#pragma once

#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"

namespace fastmaf_test {

using fastmaf::bfloat16;
using fastmaf::Bound;
using fastmaf::Packed;
using fastmaf::Tile;
using Numbers = std::vector<double>;

// The tolerances, all relative and norm-wise: |found - expected| / |expected|, or over the norm of the terms that were added
// up, where they cancel. A sum of `length` terms in float may err by kFloat units of rounding times the root of the length.
constexpr double kDouble = 1e-12, kFloat = 3;
template <class T>
double tolerance(double length) {
  return sizeof(T) == 8 ? kDouble : kFloat * FLT_EPSILON * std::sqrt(length + 1);
}

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::fflush(stderr);
  std::_Exit(1);  // from whatever thread
}

inline std::atomic<long> checks{0};  // how many comparisons were made

// The same numbers on every system: splitmix64.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    uint64_t b = state_ += 0x9e3779b97f4a7c15u;
    b = (b ^ (b >> 30)) * 0xbf58476d1ce4e5b9u;
    b = (b ^ (b >> 27)) * 0x94d049bb133111ebu;
    return b ^ (b >> 31);
  }
  long below(long n) { return static_cast<long>(bits() % static_cast<uint64_t>(n)); }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  double normal() {  // about normal, variance 1, never beyond 3.5
    double sum = -2;
    for (int i = 0; i < 4; ++i) sum += uniform();
    return sum * std::sqrt(3.0);
  }

 private:
  uint64_t state_;
};

template <class W>
W rounded(double value) {
  return static_cast<W>(value);
}
template <>
inline bfloat16 rounded<bfloat16>(double value) {
  const float f = static_cast<float>(value);
  uint32_t b;
  std::memcpy(&b, &f, sizeof b);
  return {static_cast<uint16_t>((b + 0x7fff + ((b >> 16) & 1)) >> 16)};
}
template <class W>
double number(W value) {
  return static_cast<double>(value);
}
inline double number(bfloat16 value) {
  const uint32_t b = static_cast<uint32_t>(value.bits) << 16;
  float f;
  std::memcpy(&f, &b, sizeof f);
  return f;
}

// An allocation that ends where its last number does, so that the address sanitizer sees a step beyond; its start is off
// by 0..3 numbers. All bits are set before the kernel writes: NaN, or -1.
template <class T>
class Heap {
 public:
  Heap(long size, Random& random)
      : size(size), offset_(random.below(4)), memory_(new T[static_cast<std::size_t>(size + offset_)]) {
    poison();
  }
  template <class Values>  // given numbers, rounded to T
  Heap(const Values& values, Random& random) : Heap(static_cast<long>(values.size()), random) {
    for (long i = 0; i < size; ++i) data()[i] = rounded<T>(static_cast<double>(values[static_cast<std::size_t>(i)]));
  }
  void poison() { std::memset(static_cast<void*>(memory_.get()), 0xff, static_cast<std::size_t>(size + offset_) * sizeof(T)); }
  T* data() const { return memory_.get() + offset_; }
  Numbers numbers() const {
    Numbers result;
    for (long i = 0; i < size; ++i) result.push_back(number(data()[i]));
    return result;
  }
  const long size;

 private:
  const long offset_;
  std::unique_ptr<T[]> memory_;
};

// `count` numbers that T holds exactly, or NaN.
template <class T>
Numbers draw(Random& random, long count, double scale, bool nan = false) {
  Numbers result(static_cast<std::size_t>(count));
  for (double& v : result) v = nan ? std::nan("") : static_cast<T>(random.normal() * scale);
  return result;
}

template <class T>
void check_close(const std::string& what, const Numbers& found, const Numbers& expected, double length, double terms = 0) {
  if (found.size() != expected.size()) fail(what + ": a wrong number of numbers");
  double norm = 0, distance = 0, worst = -1;
  std::size_t at = 0;
  for (std::size_t i = 0; i < found.size(); ++i) {
    if (!std::isfinite(found[i])) fail(what + ": not finite at " + std::to_string(i));
    const double off = found[i] - expected[i];
    norm += expected[i] * expected[i];
    distance += off * off;
    if (std::fabs(off) > worst) worst = std::fabs(off), at = i;
  }
  norm = std::max(std::sqrt(norm), terms);
  const double error = norm > 0 ? std::sqrt(distance) / norm : std::sqrt(distance), limit = tolerance<T>(length);
  ++checks;
  if (std::getenv("FASTMAF_TEST_ERRORS")) std::printf("%.3f %s\n", error / limit, what.c_str());
  if (error <= limit) return;
  char text[200];
  std::snprintf(text, sizeof text, ": relative error %.3e exceeds %.1e; worst at %zu of %zu: found %.17g, expected %.17g", error,
                limit, at, found.size(), found[at], expected[at]);
  fail(what + text);
}

// A masked layer: its dense weight in double, and the same packed.
template <class T, class W>
struct Matrix {
  // `prefix` must not decrease; tiles are cut at random, at multiples of `group` rows. `gain`: about the size of W x.
  Matrix(const std::vector<int64_t>& sees, long columns, long group, double gain, Random& random)
      : rows(static_cast<long>(sees.size())),
        columns(columns),
        sees(sees),
        dense(static_cast<std::size_t>(rows * columns)),
        bias_of(draw<T>(random, rows, 0.5 * gain)),
        cut(tile(group, random)),
        weight(stored(), random),
        tiles(static_cast<long>(cut.size()), random),
        prefix(static_cast<long>(sees.size()), random),
        bias(bias_of, random) {
    std::memset(static_cast<void*>(weight.data()), 0, static_cast<std::size_t>(weight.size) * sizeof(W));
    std::copy(cut.begin(), cut.end(), tiles.data());
    std::copy(sees.begin(), sees.end(), prefix.data());
    for_visible([&](long r, long c, long i) {
      const W w = rounded<W>(random.normal() * gain / std::sqrt(1.0 + static_cast<double>(sees[static_cast<std::size_t>(r)])));
      weight.data()[i] = w;
      dense[static_cast<std::size_t>(r * columns + c)] = number(w);
    });
  }

  // Calls body(row, column, index in the storage) for every weight that the mask lets through.
  template <class Body>
  void for_visible(Body&& body) const {
    for (const Tile& t : cut)
      for (long r = t.row_start; r < t.row_end; ++r)
        for (long c = 0; c < sees[static_cast<std::size_t>(r)]; ++c) body(r, c, t.offset + (r - t.row_start) * t.width + c);
  }
  long stored() const {
    const Tile& last = cut.back();
    return last.offset + static_cast<long>(last.row_end - last.row_start) * last.width;
  }
  Packed<const W> packed() const { return {weight.data(), tiles.data(), tiles.size, prefix.data(), rows, columns}; }

  // act(W x + b) [n][rows]
  Numbers apply(const Numbers& x, long n, bool relu) const {
    Numbers y(static_cast<std::size_t>(n * rows));
    for (long s = 0; s < n; ++s)
      for (long r = 0; r < rows; ++r) {
        double sum = bias_of[static_cast<std::size_t>(r)];
        const double *w = dense.data() + r * columns, *in = x.data() + s * columns;
        for (long c = 0, end = sees[static_cast<std::size_t>(r)]; c < end; ++c) sum += w[c] * in[c];
        y[static_cast<std::size_t>(s * rows + r)] = relu && sum < 0 ? 0 : sum;
      }
    return y;
  }

  const long rows, columns;
  const std::vector<int64_t> sees;
  Numbers dense;  // [rows][columns], zero where the mask hides
  const Numbers bias_of;
  const std::vector<Tile> cut;
  Heap<W> weight;
  Heap<Tile> tiles;
  Heap<int64_t> prefix;
  Heap<T> bias;

 private:
  std::vector<Tile> tile(long group, Random& random) const {
    const long alignments[] = {1, 4, 16}, alignment = alignments[random.below(3)];
    const long heights[] = {rows, group, group * (1 + random.below(8)), group * (1 + random.below(64))};
    const long height = heights[random.below(4)];
    std::vector<Tile> result;
    for (long row = 0, offset = 0; row < rows;) {
      const bool nothing = sees[static_cast<std::size_t>(row + group - 1)] == 0;
      long end = row + group;  // rows that see nothing have tiles of their own, of width 0, but where one tile holds all
      while (end < rows && end - row < height &&
             (height == rows || (sees[static_cast<std::size_t>(end + group - 1)] == 0) == nothing))
        end += group;
      const long last = static_cast<long>(sees[static_cast<std::size_t>(end - 1)]);
      const long width = std::min(columns, (last + alignment - 1) / alignment * alignment);
      result.push_back({static_cast<int32_t>(row), static_cast<int32_t>(end), static_cast<int32_t>(width),
                        static_cast<int32_t>(offset)});
      offset += (end - row) * width;
      row = end;
    }
    return result;
  }
};

// A non-decreasing prefix of some kind, in groups of equal rows.
constexpr int kPrefixKinds = 6;
inline std::vector<int64_t> draw_prefix(int kind, long rows, long columns, long group, Random& random) {
  std::vector<int64_t> result;
  for (long r = 0; r < rows; r += group) {
    const int64_t kinds[kPrefixKinds] = {random.below(columns + 1),     // anything
                                         (r + group) * columns / rows,  // an even staircase
                                         columns,                       // no mask
                                         2 * r < rows ? 0 : columns,    // nothing or all
                                         0,                             // nothing
                                         columns - (r == 0)};           // nearly all
    result.insert(result.end(), static_cast<std::size_t>(group), kinds[kind]);
  }
  std::sort(result.begin(), result.end());
  return result;
}

// One case of a layer's kernels. With `nan` its inputs are NaN and nothing is checked: what a call leaves behind in memory
// that is used again.
struct Case {
  long n, rows, columns;
  int kind;
  long threads;
  uint64_t seed;
  bool nan = false;
  std::string name() const {
    return " n=" + std::to_string(n) + " rows=" + std::to_string(rows) + " columns=" + std::to_string(columns) +
           " prefix kind " + std::to_string(kind) + " threads=" + std::to_string(threads) + " seed=" + std::to_string(seed);
  }
};
// Every batch size with small shapes, some with large ones, and the other properties in turn.
std::vector<Case> cases(uint64_t seed);

constexpr Bound kBounds[] = {{HUGE_VAL, false}, {0.5, false}, {0.7, false}, {0.5, true}, {3, true}};
template <class T>
double bounded(double u, Bound b) {
  const double limit = static_cast<T>(b.bound);
  if (std::isinf(limit)) return u;
  return b.soft ? limit * std::tanh(u / limit) : std::min(std::max(u, -limit), limit);
}

// Each runs one case, checks it, and returns all that the kernels wrote.
template <class T, class W>
Numbers forward_case(const Case& c);
template <class T>
Numbers backward_case(const Case& c);
template <class T, class W>
Numbers inverse_case(long n, long features, long threads, uint64_t seed, bool nan = false);
void test_forward();
void test_backward();
void test_inverse();
void test_flow();

template <class T>
const char* type_name() {
  return sizeof(T) == 8 ? "double" : sizeof(T) == 4 ? "float" : "bfloat16";
}

}  // namespace fastmaf_test
