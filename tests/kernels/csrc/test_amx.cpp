// The products of the matrix unit (kernels/csrc/amx.h) against float64, on arrays of exactly the size that they may touch.
#include "amx.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

bool test_amx();  // returns whether this processor has the unit, and this build the code for it

#if !defined(FASTMAF_HAS_AMX)
bool test_amx() { return false; }
#else
using namespace fastmaf;
using namespace fastmaf::FASTMAF_ISA;

namespace {

void check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "FAILED: matrix unit: %s\n", what);
  std::exit(1);
}

constexpr int64_t kTile = kPanel * kTileSamples;
const float kNaN = std::numeric_limits<float>::quiet_NaN();
std::mt19937 random_bits(7);

float draw() { return std::normal_distribution<float>()(random_bits); }
bfloat16 rounded(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return {static_cast<uint16_t>(bits >> 16)};
}

// A layer whose row j sees prefix[j] columns, in panels of their own widths, or all of the widest.
struct Weights {
  std::vector<int64_t> prefix, starts{0};
  std::vector<bfloat16> packed;
  int64_t columns;

  Weights(std::vector<int64_t> sees, int64_t columns, bool wide) : prefix(std::move(sees)), columns(columns) {
    const int64_t rows = static_cast<int64_t>(prefix.size());
    for (int64_t row = 0; row < rows; row += kPanel)
      starts.push_back(starts.back() + (wide ? columns : prefix[std::min(row + kPanel, rows) - 1]));
    packed.resize(starts.back() * kPanel);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t k = 0; k < prefix[row]; ++k) packed[(starts[row / kPanel] + k) * kPanel + row % kPanel] = rounded(draw());
  }
  Panels<bfloat16> panels() const {
    Layer layer{};
    layer.weight = packed.data(), layer.prefix = prefix.data(), layer.panels = starts.data();
    layer.rows = static_cast<int64_t>(prefix.size()), layer.columns = columns;
    return Panels<bfloat16>(layer);
  }
};

// Tiles of 16 samples, [tile][column][sample]; samples from `n` on are zero.
std::vector<float> draw_tiles(int64_t n, int64_t columns) {
  std::vector<float> x((n + kTileSamples - 1) / kTileSamples * columns * kTileSamples);
  for (int64_t s = 0; s < n; ++s)
    for (int64_t k = 0; k < columns; ++k) x[(s / kTileSamples * columns + k) * kTileSamples + s % kTileSamples] = draw();
  return x;
}

// [tile][panel][row][sample], by `together` panels and all tiles at a time, in strips of columns.
std::vector<float> multiply(const Panels<bfloat16>& w, const std::vector<float>& x, int64_t tiles, int64_t together, int64_t strip) {
  const int64_t count = w.count();
  std::vector<float> c(tiles * count * kTile, kNaN);
  for (int64_t k0 = 0; k0 < std::max<int64_t>(w.columns, 1); k0 += strip) {
    const int64_t k1 = std::min(k0 + strip, w.columns), stride = split_numbers(k1 - k0);
    std::vector<bfloat16> split(tiles * stride, rounded(kNaN));
    for (int64_t t = 0; t < tiles; ++t)
      check(split_activations(x.data() + (t * w.columns + k0) * kTileSamples, k1 - k0, split.data() + t * stride), "finite numbers are");
    const TileRegisters registers;
    for (int64_t p = 0; p < count; p += together)
      multiply_tiles(w, p, std::min(together, count - p), k0, k1, split.data(), stride, tiles, c.data() + p * kTile, count * kTile, k0 > 0);
  }
  return c;
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

void test_products(int64_t rows, int64_t columns, int64_t n, int kind) {
  std::vector<int64_t> prefix(rows);
  for (int64_t& sees : prefix) sees = kind == 0 ? 0 : kind == 1 ? columns : std::uniform_int_distribution<int64_t>(0, columns)(random_bits);
  std::sort(prefix.begin(), prefix.end());
  const Weights weights(prefix, columns, kind == 3);
  const Panels<bfloat16> w = weights.panels();
  const int64_t tiles = (n + kTileSamples - 1) / kTileSamples;
  const std::vector<float> x = draw_tiles(n, columns), c = multiply(w, x, tiles, 2, std::max<int64_t>(columns, 1));
  for (int64_t t = 0; t < tiles; ++t)
    for (int64_t row = 0; row < w.count() * kPanel; ++row)
      for (int64_t s = 0; s < kTileSamples; ++s) {
        double exact = 0, size = 0;
        for (int64_t k = 0; row < rows && k < prefix[row]; ++k) {
          const double term =
              static_cast<double>(widen(w.panel(row / kPanel)[k * kPanel + row % kPanel])) * x[(t * columns + k) * kTileSamples + s];
          exact += term, size += std::abs(term);
        }
        // The longest chain of roundings: 16 in a block, the two chains of a block, and three parts of all blocks.
        const double bound = (17 + 3.0 * (columns + 31) / 32) * std::ldexp(1, -24) * size;
        check(std::abs(c[(t * w.count() * kPanel + row) * kTileSamples + s] - exact) <= bound, "a product differs from float64");
      }
  check(same(c, multiply(w, x, tiles, 1, std::max<int64_t>(columns, 1))), "panels one by one give other bits");
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t of_x = columns * kTileSamples, of_c = w.count() * kTile;
    const std::vector<float> alone(x.begin() + t * of_x, x.begin() + (t + 1) * of_x);
    check(same(multiply(w, alone, 1, 2, std::max<int64_t>(columns, 1)), {c.begin() + t * of_c, c.begin() + (t + 1) * of_c}),
          "tiles alone give other bits");
  }
  check(same(c, multiply(w, x, tiles, 2, 64)), "strips of whole blocks give other bits");
}

// A weight of one leaves a number as it is: its three parts are all of it.
void test_parts() {
  Weights weights(std::vector<int64_t>(1, 1), 1, false);
  weights.packed[0] = rounded(1);
  std::vector<float> x(kTileSamples);
  for (int exponent = -102; exponent < 128; ++exponent) {
    for (float& number : x)
      number = std::ldexp(1 + std::generate_canonical<float, 24>(random_bits) / 2, exponent) * (random_bits() % 2 ? 1 : -1);
    x[0] = std::ldexp(2 - std::ldexp(1.0f, -23), exponent);  // all 24 bits are ones
    const std::vector<float> c = multiply(weights.panels(), x, 1, 1, 1);
    check(std::memcmp(c.data(), x.data(), sizeof(float) * kTileSamples) == 0, "a number is not the sum of its parts");
  }
  std::vector<bfloat16> split(split_numbers(1));
  for (const float broken : {kNaN, std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity()}) {
    x.assign(kTileSamples, 1);
    x[5] = broken;
    check(!split_activations(x.data(), 1, split.data()), "a number that is not finite goes unnoticed");
  }
}

}  // namespace

bool test_amx() {
  if (!amx_ready()) return false;
  test_parts();
  for (const int64_t rows : {1, 16, 31, 100})
    for (const int64_t columns : {0, 1, 31, 32, 33, 100, 545, 1100})
      for (const int64_t n : {1, 16, 40, 80})
        for (int kind = 0; kind < 4; ++kind) test_products(rows, columns, n, kind);
  return true;
}
#endif
