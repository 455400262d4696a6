// What the compiler was allowed to use. Nothing here runs a wide instruction: it is asked before any kernel is.
#include "kernels.h"

namespace fastmaf {

const char* const* required_features() {
  static const char* const names[] = {
#if defined(__AVX512F__)
      "avx512f",
#endif
#if defined(__AVX512VL__)
      "avx512vl",
#endif
#if defined(__AVX512BW__)
      "avx512bw",
#endif
#if defined(__AVX512DQ__)
      "avx512dq",
#endif
#if defined(__AVX2__)
      "avx2",
#endif
#if defined(__AVX__)
      "avx",
#endif
#if defined(__FMA__)
      "fma",
#endif
#if defined(__BMI2__)
      "bmi2",
#endif
      nullptr};
  return names;
}

int float_lanes() { return kLanes<float>; }

}  // namespace fastmaf
