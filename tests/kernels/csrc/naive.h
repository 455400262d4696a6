// The forward pass of a model in float64, one number at a time, from the equations in kernels/affine_output/affine_map.py.
#pragma once

#include "model.h"

namespace {

inline double naive_log_scale(double u, const AffineMap& map) {
  switch (map.scale) {
    case kClamp: return std::min(std::max(u, -map.limit), map.limit);
    case kTanh: return map.limit * std::tanh(u / map.limit);
    case kSoftplus: return std::log((u > 20 ? u : std::log1p(std::exp(u))) + map.epsilon);  // of torch
    case kSigmoid: return std::log(1 / (1 + std::exp(-(u + map.limit))) + map.epsilon);
    default: return u / (1 + std::abs(u) / map.limit);
  }
}

// The outputs of one layer for one sample.
template <class T, class W>
std::vector<double> naive_layer(const Model<T, W>& model, std::size_t l, const std::vector<double>& x, bool relu) {
  std::vector<double> y;
  for (std::size_t row = 0; row < model.prefixes[l].size(); ++row) {
    double sum = model.biases[l][row];
    const W* weight = model.weights[l].data() + model.panels[l][row / kPanel] * kPanel + row % kPanel;
    for (int64_t k = 0; k < model.prefixes[l][row]; ++k) sum += number(weight[k * kPanel]) * x[k];
    y.push_back(relu ? std::max(sum, 0.0) : sum);
  }
  return y;
}

// z and ladj of samples x.
template <class T, class W>
void naive_forward(const Model<T, W>& model, const std::vector<T>& x, std::vector<T>* z, std::vector<T>* ladj) {
  const auto d = static_cast<std::size_t>(model.shape.features);
  for (int64_t s = 0; s < model.shape.n; ++s) {
    std::vector<double> state(x.begin() + s * d, x.begin() + (s + 1) * d);
    double total = 0;
    for (const Block& block : model.blocks) {
      const std::vector<double> before = state;
      for (std::size_t i = 0; block.permutation && i < d; ++i) state[i] = before[block.permutation[i]];
      std::vector<double> h = state;
      for (int64_t l = 0; l < block.layer_count; ++l) h = naive_layer(model, block.first_layer + l, h, l + 1 < block.layer_count);
      for (std::size_t i = 0; i < d; ++i) {
        const double shift = h[2 * i], a = naive_log_scale(h[2 * i + 1], block.map);
        state[i] = block.map.form == kShiftFirst ? (state[i] - shift) * std::exp(-a) : state[i] * std::exp(a) + shift;
        total += block.map.sign() * a;
      }
    }
    for (const double value : state) z->push_back(static_cast<T>(value));
    ladj->push_back(static_cast<T>(total));
  }
}

}  // namespace
