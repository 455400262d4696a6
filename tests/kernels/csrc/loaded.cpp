// The kernels of a library, the file that FASTMAF_LIBRARY names: functions are found by their names and called with the numbers and
// pointers that kernels/native_library.py declares, as ctypes does. They stand for the tests' `loaded` instruction set.
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "api.h"
#if defined(_WIN32)
#include <windows.h>
#else
#include <dlfcn.h>
#endif

const char* use_isa(int64_t number);

namespace {

using namespace fastmaf;

[[noreturn]] void fail(const char* what, const char* of) {
  std::fprintf(stderr, "FAILED: %s: %s\n", what, of);
  std::exit(1);
}

void* find(const char* name) {
  static const char* path = std::getenv("FASTMAF_LIBRARY");
  if (path == nullptr) fail("not set", "FASTMAF_LIBRARY");
#if defined(_WIN32)
  static const HMODULE library = [] {
    char full[4096];
    const DWORD length = GetFullPathNameA(path, sizeof full, full, nullptr);
    if (length == 0 || length >= sizeof full) fail("has no full path", path);
    return LoadLibraryExA(full, nullptr, LOAD_LIBRARY_SEARCH_DEFAULT_DIRS | LOAD_LIBRARY_SEARCH_DLL_LOAD_DIR);
  }();
  void* function = library ? reinterpret_cast<void*>(GetProcAddress(library, name)) : nullptr;
#else
  static void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  void* function = library ? dlsym(library, name) : nullptr;
#endif
  if (library == nullptr) fail("cannot be loaded", path);
  if (function == nullptr) fail("has not the function", name);
  return function;
}

template <class Result, class... Args>
Result call(const char* name, Args... args) {
  return reinterpret_cast<Result (*)(Args...)>(find(name))(args...);
}
template <class... Args>
void run(const char* name, Args... args) {
  if (call<int>(name, args...) != 0) fail("returned an error", name);
}

// Of a flow as the library knows it; others are refused.
Flow known(const Flow& flow) {
  Flow copy = flow;
  copy.version = call<int64_t>("fastmaf_version") + 1;
  if (call<int>("fastmaf_flow_inverse", static_cast<const Flow*>(&copy), static_cast<const void* const*>(nullptr),
                static_cast<const void*>(nullptr), int64_t{0}, static_cast<void*>(nullptr), static_cast<void*>(nullptr), int64_t{1}) != 2)
    fail("a struct of another version", "is not refused");
  copy.version -= 1;
  return copy;
}

template <int64_t kDtype>
struct Entry {
  static void forward(const Flow& flow, const int32_t*, const void* const* terms, const void* x, int64_t n, void* z, void* ladj,
                      void* saved, void* squares, int64_t threads) {
    const Flow copy = known(flow);
    run("fastmaf_flow_forward", &copy, terms, x, n, z, ladj, saved, squares, threads);
  }
  static void inverse(const Flow& flow, const void* const* terms, const void* z, int64_t n, void* x, void* ladj, int64_t threads) {
    const Flow copy = known(flow);
    run("fastmaf_flow_inverse", &copy, terms, z, n, x, ladj, threads);
  }
  static void backward(const Flow& flow, const void* grad_z, const void* grad_ladj, const void* saved, int64_t n, void* grad_x,
                       void* const* grad_biases, const Target* targets, int64_t threads) {
    const Flow copy = known(flow);
    run("fastmaf_flow_backward", &copy, grad_z, grad_ladj, saved, n, grad_x, grad_biases, targets, threads);
  }
  static void linear(const Layer& layer, const void* x, int64_t n, bool relu, void* y, int64_t threads) {
    run("fastmaf_linear", kDtype, &layer, x, n, relu, y, threads);
  }
  static void affine(const Layer& layer, const AffineMap& map, const void* h, const void* x, int64_t n, void* z, void* ladj,
                     void* log_scale, int64_t threads) {
    run("fastmaf_affine", kDtype, &layer, &map, h, x, n, z, ladj, log_scale, threads);
  }
  static void backward_of_layer(const Layer& layer, const Source& source, const void* x, int64_t n, void* grad_x, void* grad_bias,
                                const Target& target, int64_t threads) {
    run("fastmaf_layer_backward", kDtype, &layer, &source, x, n, grad_x, grad_bias, &target, threads);
  }
  static bool has_matrix_unit() { return kDtype == kBfloat16 && call<bool>("fastmaf_uses_matrix_unit"); }
  static constexpr Kernels kernels() { return {forward, inverse, backward, linear, affine, backward_of_layer, has_matrix_unit}; }
};

}  // namespace

namespace fastmaf {
namespace loaded {
extern const Kernels kernels[3];
const Kernels kernels[3] = {Entry<kFloat32>::kernels(), Entry<kFloat64>::kernels(), Entry<kBfloat16>::kernels()};
}  // namespace loaded
}  // namespace fastmaf

// Those that this processor runs, the best first.
const char* use_isa(int64_t number) {
  const char* isa = call<const char*>("fastmaf_isa", number, true);
  if (isa && call<int>("fastmaf_use_isa", isa) != 1) fail("cannot be used", isa);
  return isa;
}

// What test_storage.cpp calls.
extern "C" {
#define FASTMAF_CALL(name, parameters, ...) \
  int name parameters { return call<int>(#name, __VA_ARGS__); }
using Numbers = const int64_t*;
FASTMAF_CALL(fastmaf_rows_to_panels,
             (const void* rows, void* weight, Numbers prefix, Numbers panels, int64_t out, int64_t count, int64_t size, uint64_t exponent,
              int64_t threads),
             rows, weight, prefix, panels, out, count, size, exponent, threads)
FASTMAF_CALL(fastmaf_panels_to_rows,
             (const void* weight, void* rows, Numbers prefix, Numbers panels, int64_t out, int64_t count, int64_t size, uint64_t exponent,
              int64_t threads),
             weight, rows, prefix, panels, out, count, size, exponent, threads)
FASTMAF_CALL(fastmaf_file_to_panels,
             (int64_t file, int64_t place, void* weight, Numbers prefix, Numbers panels, int64_t out, int64_t count, int64_t size,
              uint64_t exponent, int64_t threads),
             file, place, weight, prefix, panels, out, count, size, exponent, threads)
FASTMAF_CALL(fastmaf_panels_to_file,
             (int64_t file, int64_t place, const void* weight, Numbers prefix, Numbers panels, int64_t out, int64_t count, int64_t size,
              uint64_t exponent, int64_t threads),
             file, place, weight, prefix, panels, out, count, size, exponent, threads)
FASTMAF_CALL(fastmaf_uniform_float,
             (float* weight, Numbers prefix, Numbers panels, int64_t out, int64_t count, uint64_t key, double bound, int64_t threads), weight,
             prefix, panels, out, count, key, bound, threads)
FASTMAF_CALL(fastmaf_uniform_double,
             (double* weight, Numbers prefix, Numbers panels, int64_t out, int64_t count, uint64_t key, double bound, int64_t threads),
             weight, prefix, panels, out, count, key, bound, threads)
FASTMAF_CALL(fastmaf_zero_padding, (const void* weights, int64_t count), weights, count)
}
