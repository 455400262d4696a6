// The functions that Python calls, and the choice of the instruction set. Compiled for the baseline of the architecture: it must run on
// every CPU. Each function returns 0, or the number of an Error.
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "api.h"
#include "thread_pool.h"
#if defined(__x86_64__)
#include "cpu_features.h"
#endif

namespace fastmaf {

#define FASTMAF_DECLARE(isa) \
  namespace isa {            \
  extern const Kernels kernels[3]; \
  }
FASTMAF_DECLARE(scalar)
FASTMAF_DECLARE(baseline)
#if defined(__x86_64__)
FASTMAF_DECLARE(avx2)
FASTMAF_DECLARE(avx512)
#endif

namespace {

enum Error { kFine, kNoMemory, kOtherVersion, kBadPermutation, kFailed };
constexpr int64_t kVersion = 6;

struct Isa {
  const char* name;
  const Kernels* kernels;
  bool (*runs)();
};
bool always() { return true; }
#if defined(__x86_64__)
bool has_avx2() { return CpuFeatures().avx2; }
bool has_avx512() { return CpuFeatures().avx512; }
#endif
// The best first.
const Isa kIsas[] = {
#if defined(__x86_64__)
    {"avx512", avx512::kernels, has_avx512},
    {"avx2", avx2::kernels, has_avx2},
#endif
    {"baseline", baseline::kernels, always},
    {"scalar", scalar::kernels, always},
};
const Isa* chosen = nullptr;

const Kernels& kernels(int64_t weight_dtype) { return chosen->kernels[weight_dtype]; }

template <class Body>
int guarded(const Body& body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  } catch (...) {
    return kFailed;
  }
}

// places = the inverse of an order, if it is a permutation. Looked at on every call: a write to its memory shows in nothing but the values,
// and one that is out of range would read foreign memory.
bool invert(const int64_t* order, int64_t features, int32_t* places) {
  if (order == nullptr) return true;
  std::fill(places, places + features, -1);
  for (int64_t d = 0; d < features; ++d) {
    if (order[d] < 0 || order[d] >= features || places[order[d]] >= 0) return false;
    places[order[d]] = static_cast<int32_t>(d);
  }
  return true;
}

template <class Body>
int with_flow(const Flow* flow, const Body& body) {
  if (flow->size != sizeof(Flow) || flow->version != kVersion) return kOtherVersion;
  return guarded([&] {
    thread_local std::vector<int32_t> places;
    places.resize((flow->block_count + 1) * flow->features);
    for (int64_t b = 0; b <= flow->block_count; ++b) {
      const int64_t* order = b < flow->block_count ? flow->blocks[b].permutation : flow->permutation;
      if (!invert(order, flow->features, places.data() + b * flow->features)) return static_cast<int>(kBadPermutation);
    }
    body(places.data());
    return static_cast<int>(kFine);
  });
}

}  // namespace
}  // namespace fastmaf

using namespace fastmaf;

FASTMAF_EXPORT int64_t fastmaf_version() { return kVersion; }

// The names of the instruction sets that this library has and this CPU runs, the best first; `runs` false: all that it has.
FASTMAF_EXPORT const char* fastmaf_isa(int64_t number, bool runs) {
  for (const Isa& isa : kIsas)
    if ((!runs || isa.runs()) && number-- == 0) return isa.name;
  return nullptr;
}

// Chooses the instruction set; returns 0 where the library or the CPU does not have it.
FASTMAF_EXPORT int fastmaf_use_isa(const char* name) {
  for (const Isa& isa : kIsas)
    if (std::strcmp(isa.name, name) == 0 && isa.runs()) {
      chosen = &isa;
      return 1;
    }
  return 0;
}

FASTMAF_EXPORT const char* fastmaf_used_isa() { return chosen ? chosen->name : nullptr; }

// Whether the kernels of the chosen instruction set use a matrix unit of this CPU (AMX), for bfloat16 weights.
FASTMAF_EXPORT bool fastmaf_uses_matrix_unit() { return chosen && chosen->kernels[kBfloat16].has_matrix_unit(); }

// z, saved and squares may be null: not wanted; terms: see Kernels.
FASTMAF_EXPORT int fastmaf_flow_forward(const Flow* flow, const void* const* terms, const void* x, int64_t n, void* z, void* ladj,
                                        void* saved, void* squares, int64_t threads) {
  return with_flow(flow, [&](const int32_t* places) {
    kernels(flow->weight_dtype).flow_forward(*flow, places, terms, x, n, z, ladj, saved, squares, threads);
  });
}

FASTMAF_EXPORT int fastmaf_flow_inverse(const Flow* flow, const void* const* terms, const void* z, int64_t n, void* x, void* ladj,
                                        int64_t threads) {
  return with_flow(flow, [&](const int32_t*) { kernels(flow->weight_dtype).flow_inverse(*flow, terms, z, n, x, ladj, threads); });
}

FASTMAF_EXPORT int fastmaf_flow_backward(const Flow* flow, const void* grad_z, const void* grad_ladj, const void* saved, int64_t n,
                                         void* grad_x, void* const* grad_biases, const Target* targets, int64_t threads) {
  return with_flow(flow, [&](const int32_t*) {
    kernels(flow->dtype).flow_backward(*flow, grad_z, grad_ladj, saved, n, grad_x, grad_biases, targets, threads);
  });
}

FASTMAF_EXPORT int fastmaf_linear(int64_t weight_dtype, const Layer* layer, const void* x, int64_t n, bool relu, void* y, int64_t threads) {
  return guarded([&] { return kernels(weight_dtype).linear(*layer, x, n, relu, y, threads), 0; });
}

FASTMAF_EXPORT int fastmaf_affine(int64_t weight_dtype, const Layer* layer, const AffineMap* map, const void* h, const void* x, int64_t n,
                                  void* z, void* ladj, void* log_scale, int64_t threads) {
  return guarded([&] { return kernels(weight_dtype).affine(*layer, *map, h, x, n, z, ladj, log_scale, threads), 0; });
}

FASTMAF_EXPORT int fastmaf_layer_backward(int64_t dtype, const Layer* layer, const Source* source, const void* x, int64_t n, void* grad_x,
                                          void* grad_bias, const Target* target, int64_t threads) {
  return guarded([&] { return kernels(dtype).layer_backward(*layer, *source, x, n, grad_x, grad_bias, *target, threads), 0; });
}

