// The native kernels of single layers as torch ops, fastmaf_native::*: checks, outputs, and the choice of types; the arithmetic is elsewhere.
// This file is compiled for the baseline of the architecture, so that it can tell whether the processor can run the others.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <cstring>
#include <string>
#include <tuple>

#include "checks.h"

namespace fastmaf_native {
namespace {

// ---- masked_linear

Tensor masked_linear(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& prefix, const Tensor& tiles,
                     c10::string_view activation) {
  const char* op = "masked_linear";
  const bool relu = is_relu(op, activation);
  const long n = batch(op, "x", x);
  return for_dtypes(op, x, weight, [&](auto t, auto w) {
    using T = decltype(t);
    const auto p = packed<const decltype(w)>(op, weight, prefix, tiles, x.size(1));
    check(op, "bias", bias, x.scalar_type(), {p.rows});
    Tensor y = at::empty({n, p.rows}, x.options());
    fastmaf::masked_linear<T>(p, bias.const_data_ptr<T>(), x.const_data_ptr<T>(), n, relu, y.mutable_data_ptr<T>(), threads());
    return y;
  });
}

// Checks the arguments of masked_linear's backward passes and calls body(T{}, Packed, LinearGradient, n).
template <class Body>
auto with_linear(const char* op, const Tensor& grad_y, const Tensor& x, const Tensor& y, const Tensor& weight,
                 const Tensor& prefix, const Tensor& tiles, c10::string_view activation, double scale, Body&& body) {
  const bool relu = is_relu(op, activation);
  const long n = batch(op, "x", x);
  return for_dtype(op, x, [&](auto t) {
    using T = decltype(t);
    const auto p = packed<const T>(op, weight, prefix, tiles, x.size(1));
    check(op, "grad_y", grad_y, x.scalar_type(), {n, p.rows});
    if (relu) check(op, "y", y, x.scalar_type(), {n, p.rows});
    const fastmaf::LinearGradient<T> source{grad_y.const_data_ptr<T>(), relu ? y.const_data_ptr<T>() : nullptr,
                                            static_cast<T>(scale)};
    return body(t, p, source, n);
  });
}

std::tuple<Tensor, Tensor, Tensor> masked_linear_backward(const Tensor& grad_y, const Tensor& x, const Tensor& y,
                                                          const Tensor& weight, const Tensor& prefix, const Tensor& tiles,
                                                          c10::string_view activation, bool need_grad_x, bool need_grad_weight) {
  const char* op = "masked_linear_backward";
  return with_linear(op, grad_y, x, y, weight, prefix, tiles, activation, 1, [&](auto t, const auto& p, const auto& source, long n) {
    using T = decltype(t);
    Tensor grad_x = need_grad_x ? at::empty_like(x) : at::empty({0}, x.options());
    Tensor grad_weight = need_grad_weight ? gradient_of(weight) : at::empty({0}, x.options());
    Tensor grad_bias = at::empty({p.rows}, x.options());
    T* into = need_grad_x ? grad_x.mutable_data_ptr<T>() : nullptr;
    const auto run = [&](const auto& target) {
      fastmaf::linear_backward(p, source, x.const_data_ptr<T>(), n, into, grad_bias.mutable_data_ptr<T>(), target, threads());
    };
    if (need_grad_weight)
      run(fastmaf::WriteGradient<T>{grad_weight.mutable_data_ptr<T>()});
    else
      run(fastmaf::NoWeightGradient{});
    return std::make_tuple(grad_x, grad_weight, grad_bias);
  });
}

std::tuple<Tensor, Tensor> masked_linear_adam_(const Tensor& grad_y, const Tensor& x, const Tensor& y, const Tensor& weight,
                                               const Tensor& prefix, const Tensor& tiles, c10::string_view activation,
                                               bool need_grad_x, const Tensor& exp_avg, const Tensor& exp_avg_sq, double scale,
                                               at::ArrayRef<double> adam) {
  const char* op = "masked_linear_adam_";
  return with_linear(op, grad_y, x, y, weight, prefix, tiles, activation, scale,
                     [&](auto t, const auto& p, const auto& source, long n) {
                       using T = decltype(t);
                       const auto target = adam_step<T>(op, weight, exp_avg, exp_avg_sq, adam);
                       Tensor grad_x = need_grad_x ? at::empty_like(x) : at::empty({0}, x.options());
                       // A scale is for the weight alone: the others' gradients are not formed then.
                       TORCH_CHECK(scale == 1 || !need_grad_x, op, ": a scale goes with need_grad_x = False; found ", scale);
                       Tensor grad_bias = at::empty({scale == 1 ? p.rows : 0}, x.options());
                       fastmaf::linear_backward(p, source, x.const_data_ptr<T>(), n,
                                                need_grad_x ? grad_x.mutable_data_ptr<T>() : nullptr,
                                                scale == 1 ? grad_bias.mutable_data_ptr<T>() : nullptr, target, threads());
                       return std::make_tuple(grad_x, grad_bias);
                     });
}

double masked_linear_squared_norm(const Tensor& grad_y, const Tensor& x, const Tensor& y, const Tensor& weight,
                                  const Tensor& prefix, const Tensor& tiles, c10::string_view activation) {
  return with_linear("masked_linear_squared_norm", grad_y, x, y, weight, prefix, tiles, activation, 1,
                     [&](auto t, const auto& p, const auto& source, long n) {
                       using T = decltype(t);
                       double total = 0;
                       fastmaf::linear_backward<T>(p, source, x.const_data_ptr<T>(), n, nullptr, nullptr,
                                                   fastmaf::SquaredNorm{&total}, threads());
                       return total;
                     });
}

// ---- affine_output

std::tuple<Tensor, Tensor, Tensor> affine_output(const Tensor& h, const Tensor& x, const Tensor& weight, const Tensor& bias,
                                                 const Tensor& prefix, const Tensor& tiles, double bound, bool soft) {
  const char* op = "affine_output";
  const long n = batch(op, "h", h);
  return for_dtypes(op, x, weight, [&](auto t, auto w) {
    using T = decltype(t);
    const auto p = packed<const decltype(w)>(op, weight, prefix, tiles, h.size(1));
    TORCH_CHECK(p.rows % 2 == 0, op, ": rows come in pairs of shift and log-scale; found ", p.rows);
    check(op, "h", h, x.scalar_type(), {n, p.columns});
    check(op, "x", x, x.scalar_type(), {n, p.rows / 2});
    check(op, "bias", bias, x.scalar_type(), {p.rows});
    Tensor z = at::empty_like(x), ladj = at::empty({n}, x.options()), log_scale = at::empty_like(x);
    fastmaf::affine_output<T>(p, bias.const_data_ptr<T>(), h.const_data_ptr<T>(), x.const_data_ptr<T>(), n, Bound{bound, soft},
                              z.mutable_data_ptr<T>(), ladj.mutable_data_ptr<T>(), log_scale.mutable_data_ptr<T>(), threads());
    return std::make_tuple(z, ladj, log_scale);
  });
}

// The tensors that affine_output's backward passes start from.
struct AffineSaved {
  const Tensor &grad_z, &grad_ladj, &grad_log_scale, &h, &weight, &z, &log_scale, &prefix, &tiles;
  Bound bound;
  double scale;
};

template <class Body>
auto with_affine(const char* op, const AffineSaved& s, const Tensor* grad_x, Body&& body) {
  const long n = batch(op, "h", s.h);
  return for_dtype(op, s.h, [&](auto t) {
    using T = decltype(t);
    const auto p = packed<const T>(op, s.weight, s.prefix, s.tiles, s.h.size(1));
    const long features = p.rows / 2;
    check(op, "grad_z", s.grad_z, s.h.scalar_type(), {n, features});
    check(op, "grad_ladj", s.grad_ladj, s.h.scalar_type(), {n});
    check(op, "grad_log_scale", s.grad_log_scale, s.h.scalar_type(), {n, features});
    check(op, "z", s.z, s.h.scalar_type(), {n, features});
    check(op, "log_scale", s.log_scale, s.h.scalar_type(), {n, features});
    const fastmaf::AffineGradient<T> source{s.grad_z.const_data_ptr<T>(),
                                            s.grad_ladj.const_data_ptr<T>(),
                                            s.grad_log_scale.const_data_ptr<T>(),
                                            s.z.const_data_ptr<T>(),
                                            s.log_scale.const_data_ptr<T>(),
                                            s.bound,
                                            grad_x ? grad_x->mutable_data_ptr<T>() : nullptr,
                                            static_cast<T>(s.scale)};
    return body(t, p, source, n);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> affine_output_backward(const Tensor& grad_z, const Tensor& grad_ladj,
                                                                  const Tensor& grad_log_scale, const Tensor& h,
                                                                  const Tensor& z, const Tensor& log_scale, const Tensor& weight,
                                                                  const Tensor& prefix, const Tensor& tiles, double bound,
                                                                  bool soft, bool need_grad_weight) {
  const AffineSaved saved{grad_z, grad_ladj, grad_log_scale, h, weight, z, log_scale, prefix, tiles, {bound, soft}, 1};
  Tensor grad_x = at::empty_like(z);
  return with_affine("affine_output_backward", saved, &grad_x, [&](auto t, const auto& p, const auto& source, long n) {
    using T = decltype(t);
    Tensor grad_h = at::empty_like(h), grad_bias = at::empty({p.rows}, h.options());
    Tensor grad_weight = need_grad_weight ? gradient_of(weight) : at::empty({0}, h.options());
    const auto run = [&](const auto& target) {
      fastmaf::linear_backward(p, source, h.const_data_ptr<T>(), n, grad_h.mutable_data_ptr<T>(),
                               grad_bias.mutable_data_ptr<T>(), target, threads());
    };
    if (need_grad_weight)
      run(fastmaf::WriteGradient<T>{grad_weight.mutable_data_ptr<T>()});
    else
      run(fastmaf::NoWeightGradient{});
    return std::make_tuple(grad_h, grad_weight, grad_bias, grad_x);
  });
}

std::tuple<Tensor, Tensor, Tensor> affine_output_adam_(const Tensor& grad_z, const Tensor& grad_ladj,
                                                       const Tensor& grad_log_scale, const Tensor& h, const Tensor& z,
                                                       const Tensor& log_scale, const Tensor& weight, const Tensor& prefix,
                                                       const Tensor& tiles, double bound, bool soft, bool need_inputs,
                                                       const Tensor& exp_avg, const Tensor& exp_avg_sq, double scale,
                                                       at::ArrayRef<double> adam) {
  const char* op = "affine_output_adam_";
  const AffineSaved saved{grad_z, grad_ladj, grad_log_scale, h, weight, z, log_scale, prefix, tiles, {bound, soft}, scale};
  Tensor grad_x = need_inputs ? at::empty_like(z) : at::empty({0}, z.options());
  return with_affine(op, saved, need_inputs ? &grad_x : nullptr, [&](auto t, const auto& p, const auto& source, long n) {
    using T = decltype(t);
    const auto target = adam_step<T>(op, weight, exp_avg, exp_avg_sq, adam);
    Tensor grad_h = need_inputs ? at::empty_like(h) : at::empty({0}, h.options());
    TORCH_CHECK(scale == 1 || !need_inputs, op, ": a scale goes with need_inputs = False; found ", scale);
    Tensor grad_bias = at::empty({scale == 1 ? p.rows : 0}, h.options());
    fastmaf::linear_backward(p, source, h.const_data_ptr<T>(), n, need_inputs ? grad_h.mutable_data_ptr<T>() : nullptr,
                             scale == 1 ? grad_bias.mutable_data_ptr<T>() : nullptr, target, threads());
    return std::make_tuple(grad_h, grad_bias, grad_x);
  });
}

double affine_output_squared_norm(const Tensor& grad_z, const Tensor& grad_ladj, const Tensor& grad_log_scale, const Tensor& h,
                                  const Tensor& z, const Tensor& log_scale, const Tensor& weight, const Tensor& prefix,
                                  const Tensor& tiles, double bound, bool soft) {
  const AffineSaved saved{grad_z, grad_ladj, grad_log_scale, h, weight, z, log_scale, prefix, tiles, {bound, soft}, 1};
  return with_affine("affine_output_squared_norm", saved, nullptr, [&](auto t, const auto& p, const auto& source, long n) {
    using T = decltype(t);
    double total = 0;
    fastmaf::linear_backward<T>(p, source, h.const_data_ptr<T>(), n, nullptr, nullptr, fastmaf::SquaredNorm{&total}, threads());
    return total;
  });
}

// ---- the library itself

std::string missing_cpu_features() {
  std::string missing;
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  for (const char* const* name = fastmaf::required_features(); *name; ++name) {
    const auto is = [&](const char* other) { return std::strcmp(*name, other) == 0; };
    const bool there = is("avx512f")    ? __builtin_cpu_supports("avx512f")
                       : is("avx512vl") ? __builtin_cpu_supports("avx512vl")
                       : is("avx512bw") ? __builtin_cpu_supports("avx512bw")
                       : is("avx512dq") ? __builtin_cpu_supports("avx512dq")
                       : is("avx2")     ? __builtin_cpu_supports("avx2")
                       : is("avx")      ? __builtin_cpu_supports("avx")
                       : is("fma")      ? __builtin_cpu_supports("fma")
                       : is("bmi2")     ? __builtin_cpu_supports("bmi2")
                                        : false;
    if (!there) missing += (missing.empty() ? "" : ", ") + std::string(*name);
  }
#endif
  return missing;
}

std::string build_info() { return FASTMAF_BUILD_INFO; }

}  // namespace
}  // namespace fastmaf_native

using namespace fastmaf_native;

#define FASTMAF_LINEAR "Tensor grad_y, Tensor x, Tensor y, "
#define FASTMAF_AFFINE "Tensor grad_z, Tensor grad_ladj, Tensor grad_log_scale, Tensor h, Tensor z, Tensor log_scale, "
#define FASTMAF_LINEAR_ARGS " weight, Tensor prefix, Tensor tiles, str activation"
#define FASTMAF_AFFINE_ARGS " weight, Tensor prefix, Tensor tiles, float bound, bool soft"
#define FASTMAF_ADAM ", Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, float scale, float[] adam"

TORCH_LIBRARY(fastmaf_native, m) {
  m.def("masked_linear(Tensor x, Tensor weight, Tensor bias, Tensor prefix, Tensor tiles, str activation) -> Tensor");
  m.def("masked_linear_backward(" FASTMAF_LINEAR "Tensor" FASTMAF_LINEAR_ARGS
        ", bool need_grad_x, bool need_grad_weight) -> (Tensor, Tensor, Tensor)");
  m.def("masked_linear_adam_(" FASTMAF_LINEAR "Tensor(a!)" FASTMAF_LINEAR_ARGS ", bool need_grad_x" FASTMAF_ADAM
        ") -> (Tensor, Tensor)");
  m.def("masked_linear_squared_norm(" FASTMAF_LINEAR "Tensor" FASTMAF_LINEAR_ARGS ") -> float");
  m.def("affine_output(Tensor h, Tensor x, Tensor weight, Tensor bias, Tensor prefix, Tensor tiles, float bound, bool soft)"
        " -> (Tensor, Tensor, Tensor)");
  m.def("affine_output_backward(" FASTMAF_AFFINE "Tensor" FASTMAF_AFFINE_ARGS
        ", bool need_grad_weight) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("affine_output_adam_(" FASTMAF_AFFINE "Tensor(a!)" FASTMAF_AFFINE_ARGS ", bool need_inputs" FASTMAF_ADAM
        ") -> (Tensor, Tensor, Tensor)");
  m.def("affine_output_squared_norm(" FASTMAF_AFFINE "Tensor" FASTMAF_AFFINE_ARGS ") -> float");
  m.def("empty_on_huge_pages(int numel, ScalarType dtype) -> Tensor", &empty_on_huge_pages);
  m.def("missing_cpu_features() -> str", &missing_cpu_features);
  m.def("build_info() -> str", &build_info);
}

TORCH_LIBRARY_IMPL(fastmaf_native, CPU, m) {
  m.impl("masked_linear", &masked_linear);
  m.impl("masked_linear_backward", &masked_linear_backward);
  m.impl("masked_linear_adam_", &masked_linear_adam_);
  m.impl("masked_linear_squared_norm", &masked_linear_squared_norm);
  m.impl("affine_output", &affine_output);
  m.impl("affine_output_backward", &affine_output_backward);
  m.impl("affine_output_adam_", &affine_output_adam_);
  m.impl("affine_output_squared_norm", &affine_output_squared_norm);
}
