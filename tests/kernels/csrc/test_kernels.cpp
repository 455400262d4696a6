// Runs the native kernels on arrays of exactly the size that a kernel may touch, in blocks of memory of their own: linked into this
// program (`make sanitize`, under the sanitizers), or those of a library of a wheel (`make test-windows`, `make test-arm64`). The forward
// pass is held against float64; all else must agree: the inverse undoes the forward pass, layers one by one give what a flow gives, each
// target of a gradient does the same with it, instruction sets agree with one another, and neither threads nor calls at the same time
// change a bit. Arguments: a number of threads for each round.
#include <thread>

#include "naive.h"

namespace fastmaf {
namespace FASTMAF_ISA {
extern const Kernels kernels[3];
}
}  // namespace fastmaf

bool test_amx();
void test_storage(int64_t threads);
const char* use_isa(int64_t number);  // the instruction set of all later calls; null: there are no more

using namespace fastmaf;

namespace {

template <class T, class W>
std::vector<T> everything(const Shape& shape, const AffineMap& map, int64_t threads, unsigned seed) {
  Model<T, W> model(shape, map, seed);
  const Kernels& kernels = FASTMAF_ISA::kernels[model.flow.weight_dtype];
  const int64_t n = shape.n, d = shape.features;
  const std::string name = "n=" + std::to_string(n) + " D=" + std::to_string(d) + " seed=" + std::to_string(seed) + ": ";
  const double tolerance = sizeof(T) == 8 ? 1e-9 : 1e-3;
  const std::vector<T> x = model.draws(n * d);
  std::vector<T> z = nans<T>(n * d), ladj = nans<T>(n), saved = nans<T>((n + 15) / 16 * 16 * model.saved + 1), z2 = z, ladj2 = ladj;
  std::vector<T> squares_of_z = ladj, sums(n);
  kernels.flow_forward(model.flow, model.places.data(), nullptr, x.data(), n, z.data(), ladj.data(), saved.data(), nullptr, threads);
  kernels.flow_forward(model.flow, model.places.data(), nullptr, x.data(), n, z2.data(), ladj2.data(), nullptr, squares_of_z.data(), threads);
  check(same(z, z2) && same(ladj, ladj2), name + "a forward pass that saves nothing");
  std::vector<T> naive_z, naive_ladj;
  naive_forward(model, x, &naive_z, &naive_ladj);
  check(close(z, naive_z, tolerance) && close(ladj, naive_ladj, tolerance), name + "z and ladj differ from float64");
  for (int64_t s = 0; s < n; ++s) {
    double sum = 0;
    for (int64_t i = 0; i < d; ++i) sum += static_cast<double>(z[s * d + i]) * z[s * d + i];
    sums[s] = static_cast<T>(sum);
  }
  check(close(squares_of_z, sums, sizeof(T) == 8 ? 1e-12 : 1e-6), name + "the squares of z");
  std::vector<T> squares_alone = nans<T>(n);
  kernels.flow_forward(model.flow, model.places.data(), nullptr, x.data(), n, nullptr, ladj2.data(), nullptr, squares_alone.data(), threads);
  check(same(squares_alone, squares_of_z) && same(ladj, ladj2), name + "a forward pass without z");

  // The inverse of the blocks in turn, with the permutation's on the way.
  std::vector<int64_t> back(d);
  for (int64_t i = 0; i < d; ++i) back[model.permutation[i]] = i;
  std::vector<Block> blocks{model.blocks[1], model.blocks[0]};
  blocks[0].permutation = nullptr, blocks[1].permutation = back.data();
  Flow inverse = model.flow;
  inverse.blocks = blocks.data();
  std::vector<T> x2 = nans<T>(n * d), minus = nans<T>(n);
  kernels.flow_inverse(inverse, nullptr, z.data(), n, x2.data(), minus.data(), threads);
  check(close(x2, x, tolerance), name + "x of the inverse");
  for (T& value : minus) value = -value;
  if (n > 0) check(close(minus, ladj, tolerance), name + "ladj of the inverse");

  // Terms of each sample: the same for all samples are a part of the biases; others are inverted, too.
  std::vector<std::vector<T>> terms, biases;
  std::vector<Layer> layers(model.flow.layers, model.flow.layers + model.flow.layer_count);
  std::vector<const void*> own, equal;
  std::vector<std::vector<T>> repeated;
  for (Layer& layer : layers) {
    terms.push_back(model.draws(n * layer.rows));
    for (T& value : terms.back()) value /= 8;  // log-scales stay small
    const std::vector<T> one = model.draws(layer.rows);
    biases.push_back(one), repeated.emplace_back();
    for (int64_t r = 0; r < layer.rows; ++r) biases.back()[r] += static_cast<const T*>(layer.bias)[r];
    for (int64_t s = 0; s < n; ++s) repeated.back().insert(repeated.back().end(), one.begin(), one.end());
  }
  for (size_t i = 0; i < layers.size(); ++i)
    layers[i].bias = biases[i].data(), own.push_back(terms[i].data()), equal.push_back(repeated[i].data());
  Flow shifted = model.flow;
  shifted.layers = layers.data();
  std::vector<T> z3 = nans<T>(n * d), z4 = z3, x3 = z3;
  kernels.flow_forward(model.flow, model.places.data(), equal.data(), x.data(), n, z3.data(), ladj2.data(), nullptr, nullptr, threads);
  kernels.flow_forward(shifted, model.places.data(), nullptr, x.data(), n, z4.data(), ladj2.data(), nullptr, nullptr, threads);
  check(close(z3, z4, sizeof(T) == 8 ? 1e-11 : 1e-4), name + "equal terms");
  kernels.flow_forward(model.flow, model.places.data(), own.data(), x.data(), n, z3.data(), ladj2.data(), nullptr, nullptr, threads);
  kernels.flow_inverse(inverse, own.data(), z3.data(), n, x3.data(), minus.data(), threads);
  check(close(x3, x, tolerance), name + "x of the inverse with terms");

  std::vector<T> result = z;
  for (const auto* more : {&ladj, &saved, &x2}) result.insert(result.end(), more->begin(), more->end());
  if constexpr (std::is_same_v<T, W>) {
    const std::vector<T> grad_z = model.draws(n * d), grad_ladj = model.draws(n);
    const auto backward = [&](const Flow& flow, T* grad_x, void* const* biases, const Target* targets) {
      kernels.flow_backward(flow, grad_z.data(), grad_ladj.data(), saved.data(), n, grad_x, biases, targets, threads);
    };
    const Gradients<T> all(model.layers, n * d, [&](T* g, void* const* biases, const Target* t) { backward(model.flow, g, biases, t); });
    std::vector<double> squares(model.layers.size(), -1);
    Gradients<T>(model.layers, 0, [&](T*, void* const* biases, Target* targets) {
      for (std::size_t i = 0; i < squares.size(); ++i) targets[i] = {kNorm, &squares[i], nullptr, nullptr, nullptr, nullptr};
      backward(model.flow, nullptr, biases, targets);
    });
    for (std::size_t i = 0; i < squares.size(); ++i) {
      double expected = 0;
      for (const T g : all.weights[i]) expected += static_cast<double>(g) * g;
      check(std::abs(squares[i] - expected) <= tolerance * expected, name + "the norm of layer " + std::to_string(i));
    }
    // Adam with beta1 = beta2 = 0 leaves the gradient itself in the first moment, and its square in the second.
    const AdamNumbers numbers{1e-3, 0, 0, 1e-3, 1, 0, 1e-3, 0, 0};
    std::vector<std::vector<T>> first, second;
    for (const auto& weight : model.weights) first.push_back(std::vector<T>(weight.size(), 0)), second.push_back(first.back());
    std::vector<std::vector<T>> before = model.weights;
    const Gradients<T> adam(model.layers, n * d, [&](T* g, void* const* biases, Target* targets) {
      for (std::size_t i = 0; i < first.size(); ++i)
        targets[i] = {kAdam, nullptr, model.weights[i].data(), first[i].data(), second[i].data(), &numbers};
      backward(model.flow, g, biases, targets);
    });
    check(same(adam.x, all.x), name + "the gradient of x beside Adam");
    for (std::size_t i = 0; i < first.size(); ++i) {
      check(same(adam.biases[i], all.biases[i]), name + "the gradient of a bias beside Adam");
      check(all.weights[i].empty() || close(first[i], all.weights[i], tolerance), name + "Adam's first moment");
      for (std::size_t j = 0; j < first[i].size(); ++j) before[i][j] -= T(1e-3) * first[i][j] / (std::sqrt(second[i][j]) + T(1e-3));
      check(before[i].empty() || close(model.weights[i], before[i], tolerance), name + "Adam's step");
      result.insert(result.end(), all.weights[i].begin(), all.weights[i].end());
      result.insert(result.end(), all.biases[i].begin(), all.biases[i].end());
    }
    result.insert(result.end(), all.x.begin(), all.x.end());

    // One layer at a time: nothing of it wanted but the gradient of its input, or of the bias; scaled.
    const Layer& layer = model.layers[0];
    const std::vector<T> grad_y = model.draws(n * layer.rows);
    std::vector<T> y = nans<T>(n * layer.rows), grad = nans<T>(n * layer.columns), twice = grad, of_bias = nans<T>(layer.rows);
    kernels.linear(layer, x.data(), n, true, y.data(), threads);
    Source source{};
    source.grad_y = grad_y.data(), source.relu_of = y.data(), source.scale = 1;
    const Target none{};
    kernels.layer_backward(layer, source, x.data(), n, grad.data(), of_bias.data(), none, threads);
    source.scale = 2;
    kernels.layer_backward(layer, source, x.data(), n, twice.data(), nullptr, none, threads);
    for (T& value : grad) value *= 2;
    check(same(grad, twice), name + "a scaled gradient");
    result.insert(result.end(), of_bias.begin(), of_bias.end());

    const Layer& output = model.layers[shape.hidden.size()];
    const std::vector<T> h = model.draws(n * output.columns), grad_a = model.draws(n * d);
    std::vector<T> log_scale = nans<T>(n * d), of_x = log_scale, of_h = nans<T>(n * output.columns);
    kernels.affine(output, map, h.data(), x.data(), n, z2.data(), ladj2.data(), log_scale.data(), threads);
    source = {};
    source.grad_z = grad_z.data(), source.grad_ladj = grad_ladj.data(), source.grad_log_scale = grad_a.data();
    source.x = x.data(), source.z = z2.data(), source.log_scale = log_scale.data(), source.grad_x = of_x.data();
    source.map = map, source.scale = 1;
    kernels.layer_backward(output, source, h.data(), n, of_h.data(), nullptr, none, threads);
    for (const auto* more : {&log_scale, &of_x, &of_h}) result.insert(result.end(), more->begin(), more->end());
  }
  for (const T value : result) check(std::isfinite(value), name + "a number was not written, or is not finite");
  return result;
}

const std::vector<AffineMap> kMaps{{kShiftFirst, kClamp, 0.5, 0},    {kScaleFirst, kTanh, 0.5, 0},
                                   {kScaleFirst, kSoftplus, 9, 1e-2}, {kShiftFirst, kSigmoid, 2, 1e-2},
                                   {kShiftFirst, kSoftClip, 0.5, 0},  {kScaleFirst, kClamp, 0.5, 0}};

// `firsts`: what the first instruction set gave for each shape, the same weights and samples.
template <class T, class W>
void test(const std::vector<int64_t>& rounds, std::vector<std::vector<T>>* firsts) {
  std::vector<Shape> shapes;
  for (const int64_t n : {0, 1, 2, 3, 5, 8, 9, 13, 31, 64, 65, 129, 150})
    for (const auto& [features, hidden] : std::vector<std::pair<int64_t, std::vector<int64_t>>>{
             {1, {1}}, {1, {17, 3}}, {2, {5}}, {13, {9, 31}}, {33, {70}}, {40, {16, 48, 7}}, {129, {20}}, {700, {34, 50}}})
      if (n * features < 20000) shapes.push_back({n, features, hidden, static_cast<int>(shapes.size() % 4), 1 + static_cast<int64_t>(shapes.size()) % 3});
  shapes.push_back({3, 2500, {40}, 0, 1});
  shapes.push_back({2, 90, {1300, 150}, 1, 5});  // a step of the inverse that is wide
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    const auto run = [&](int64_t threads) { return everything<T, W>(shapes[i], kMaps[i % kMaps.size()], threads, 1000 + static_cast<unsigned>(i)); };
    const std::vector<T> expected = run(rounds.front());
    if (i == firsts->size()) firsts->push_back(expected);
    if (sizeof(T) == 8)  // in float32 a unit that is almost zero may be active with one of them alone, and its gradients with it
      check(close(expected, (*firsts)[i], 1e-9), "shape " + std::to_string(i) + " with two instruction sets");
    for (std::size_t k = 1; k < rounds.size(); ++k)
      check(same(run(rounds[k]), expected), "shape " + std::to_string(i) + " with " + std::to_string(rounds[k]) + " threads");
    if (i % 5 == 0) {
      std::vector<T> here, there;
      std::thread one([&] { here = run(rounds.back()); }), two([&] { there = run(rounds.back()); });
      one.join(), two.join();
      check(same(here, expected) && same(there, expected), "shape " + std::to_string(i) + " from two threads at once");
    }
  }
  std::printf("%zu shapes\n", shapes.size());
}

}  // namespace

int main(int count, char** arguments) {
  std::vector<int64_t> rounds;
  for (int i = 1; i < count; ++i) rounds.push_back(std::atol(arguments[i]));
  check(!rounds.empty(), "a number of threads is wanted");
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  std::vector<std::vector<float>> singles, halves;
  std::vector<std::vector<double>> doubles;
  const char* isa = use_isa(0);
  check(isa != nullptr, "an instruction set is wanted");
  for (int64_t i = 0; isa != nullptr; isa = use_isa(++i)) {
    std::printf("%s:\n", isa);
    for (const int64_t threads : rounds) test_storage(threads);
    std::printf("matrix unit: %s\n", test_amx() ? "tested" : "not here");
    // The pool's threads are created by two calls at once.
    const auto first = [&] { everything<float, float>({9, 700, {34, 50}, 0, 1}, kMaps[0], rounds.back(), 1); };
    std::thread one(first), two(first);
    one.join(), two.join();
    test<float, float>(rounds, &singles);
    test<double, double>(rounds, &doubles);
    test<float, Half>(rounds, &halves);
  }
}
