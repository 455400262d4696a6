// Small flows with random weights, in memory of exactly the size that a kernel may touch, and what the tests of them share.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "api.h"

namespace {

using namespace fastmaf;

constexpr int64_t kPanel = 16;

void check(bool holds, const std::string& what) {
  if (holds) return;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::exit(1);
}

struct Half {
  uint16_t bits;
};
template <class W>
W stored(double value) {
  return static_cast<W>(value);
}
template <>
Half stored<Half>(double value) {
  const float f = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  return {static_cast<uint16_t>(bits >> 16)};
}
inline double number(double value) { return value; }
inline double number(Half value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

template <class T>
std::vector<T> nans(int64_t n) {
  return std::vector<T>(n, std::numeric_limits<T>::quiet_NaN());
}

template <class T>
bool close(const std::vector<T>& a, const std::vector<T>& b, double tolerance) {
  double distance = 0, norm = 0;
  for (std::size_t i = 0; i < a.size(); ++i) distance += (a[i] - b[i]) * (a[i] - b[i]), norm += b[i] * b[i];
  return a.size() == b.size() && distance <= tolerance * tolerance * (norm + 1e-300);  // false for NaN
}
template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

struct Shape {
  int64_t n, features;
  std::vector<int64_t> hidden;
  int kind;  // of degrees: 0 random, 1 few levels, 2 all see nothing, 3 all see as much as they may
  int64_t share;  // panels of one width
};

// A flow of two blocks, the second with a permutation.
template <class T, class W>
struct Model {
  std::mt19937 random;
  Shape shape;
  std::vector<std::vector<W>> weights;
  std::vector<std::vector<T>> biases;
  std::vector<std::vector<int64_t>> prefixes, panels;
  std::vector<std::vector<int32_t>> schedules;
  std::vector<int64_t> permutation;
  std::vector<int32_t> places;  // of each block, where the permutation takes a dimension
  std::vector<Layer> layers;
  std::vector<Block> blocks;
  Flow flow{};
  int64_t saved = 0;

  double draw() { return std::normal_distribution<double>()(random); }
  std::vector<T> draws(int64_t n) {
    std::vector<T> result(n);
    for (T& x : result) x = static_cast<T>(draw());
    return result;
  }

  Model(const Shape& s, const AffineMap& map, unsigned seed) : random(seed), shape(s) {
    for (int b = 0; b < 2; ++b) add_block(map);
    for (std::size_t i = 0; i < weights.size(); ++i)
      layers.push_back({weights[i].data(), biases[i].data(), prefixes[i].data(), panels[i].data(),
                        static_cast<int64_t>(prefixes[i].size()), columns[i]});
    for (int64_t d = 0; d < s.features; ++d) permutation.push_back(d);
    std::shuffle(permutation.begin(), permutation.end(), random);
    blocks[1].permutation = permutation.data();
    places.resize(2 * s.features);
    for (int64_t d = 0; d < s.features; ++d) places[s.features + permutation[d]] = static_cast<int32_t>(d);
    const int64_t dtype = sizeof(T) == 8 ? kFloat64 : kFloat32;
    flow = {sizeof(Flow), 2, dtype, std::is_same_v<W, Half> ? kBfloat16 : dtype, s.features, 1, static_cast<int64_t>(layers.size()), 2,
            layers.data(), blocks.data(), nullptr};
    saved = 6 * s.features;
    for (const int64_t units : s.hidden) saved += 2 * units;
  }

  std::vector<int64_t> columns;

  void add_block(const AffineMap& map) {
    const int64_t d = shape.features;
    const auto first = static_cast<int64_t>(weights.size());
    std::vector<std::vector<int64_t>> degrees(1);
    for (int64_t i = 1; i <= d; ++i) degrees[0].push_back(i);
    for (const int64_t units : shape.hidden) {
      std::vector<int64_t> drawn(units);
      for (int64_t& degree : drawn)
        degree = shape.kind == 2 ? 0 : shape.kind == 3 ? d : shape.kind == 1 ? d / 3 * static_cast<int64_t>(random() % 3) : random() % (d + 1);
      std::sort(drawn.begin(), drawn.end());
      degrees.push_back(drawn);
    }
    const auto below = [&](std::size_t k, int64_t degree) {
      return std::upper_bound(degrees[k].begin(), degrees[k].end(), degree) - degrees[k].begin();
    };
    for (std::size_t k = 1; k < degrees.size(); ++k) {
      std::vector<int64_t> prefix;
      for (const int64_t degree : degrees[k]) prefix.push_back(below(k - 1, degree));
      add_layer(prefix, static_cast<int64_t>(degrees[k - 1].size()));
    }
    std::vector<int64_t> prefix;
    for (int64_t i = 1; i <= d; ++i) prefix.insert(prefix.end(), 2, below(degrees.size() - 1, i - 1));
    add_layer(prefix, shape.hidden.back());
    std::vector<int32_t> table;
    std::vector<int64_t> thresholds = degrees.back();
    thresholds.erase(std::unique(thresholds.begin(), thresholds.end()), thresholds.end());
    for (const int64_t threshold : thresholds)
      if (threshold < d)
        for (std::size_t k = 0; k < degrees.size(); ++k) table.push_back(static_cast<int32_t>(below(k, threshold)));
    const auto width = static_cast<int64_t>(degrees.size());
    std::vector<int32_t> last(table.empty() ? std::vector<int32_t>(width, 0) : std::vector<int32_t>(table.end() - width, table.end()));
    last[0] = static_cast<int32_t>(d);
    table.insert(table.end(), last.begin(), last.end());
    schedules.push_back(table);
    blocks.push_back({first, static_cast<int64_t>(weights.size()) - first, schedules.back().data(),
                      static_cast<int64_t>(table.size()) / width, nullptr, map});
  }

  void add_layer(const std::vector<int64_t>& prefix, int64_t of_columns) {
    const auto rows = static_cast<int64_t>(prefix.size()), count = (rows + kPanel - 1) / kPanel;
    std::vector<int64_t> starts{0};
    for (int64_t p = 0; p < count; ++p)
      starts.push_back(starts.back() + prefix[std::min((p / shape.share + 1) * shape.share * kPanel, rows) - 1]);
    std::vector<W> weight(starts.back() * kPanel, stored<W>(0));
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t k = 0; k < prefix[row]; ++k)
        weight[(starts[row / kPanel] + k) * kPanel + row % kPanel] = stored<W>(draw() / std::sqrt(prefix[row] + 1.0));
    weights.push_back(weight), prefixes.push_back(prefix), panels.push_back(starts), columns.push_back(of_columns);
    biases.push_back(draws(rows));
  }
};

// What a target does with the gradients of all weights.
template <class T>
struct Gradients {
  std::vector<T> x;
  std::vector<std::vector<T>> biases, weights;

  template <class Run>
  Gradients(const std::vector<Layer>& layers, int64_t numel_x, const Run& run) : x(nans<T>(numel_x)) {
    std::vector<void*> of_biases;
    std::vector<Target> targets;
    for (const Layer& layer : layers) {
      biases.push_back(nans<T>(layer.rows));
      weights.push_back(nans<T>(layer.panels[(layer.rows + kPanel - 1) / kPanel] * kPanel));
    }
    for (std::size_t i = 0; i < layers.size(); ++i) {
      of_biases.push_back(biases[i].data());
      targets.push_back({kWrite, weights[i].data(), nullptr, nullptr, nullptr, nullptr});
    }
    run(x.data(), of_biases.data(), targets.data());
  }
};

}  // namespace
