// Which vector instructions of x86 a process may use: the processor has them, and the system keeps their registers when it switches
// threads. Not __builtin_cpu_supports: zig's runtime answers no to everything.
#pragma once

#include <cpuid.h>

namespace fastmaf {

struct CpuFeatures {
  bool avx2 = false;    // with FMA and BMI2
  bool avx512 = false;  // F, VL, BW and DQ

  CpuFeatures() {
    constexpr unsigned kFma = 1u << 12, kXgetbv = 1u << 27, kAvx = 1u << 28;
    constexpr unsigned kAvx2 = 1u << 5, kBmi2 = 1u << 8, kAvx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
    constexpr unsigned kRegisters256 = 0x6, kRegisters512 = 0xe6;
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !has(c, kFma | kXgetbv | kAvx)) return;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    unsigned saved, upper;
    __asm__ volatile("xgetbv" : "=a"(saved), "=d"(upper) : "c"(0));
    avx2 = has(b, kAvx2 | kBmi2) && has(saved, kRegisters256);
    avx512 = avx2 && has(b, kAvx512) && has(saved, kRegisters512);
  }

 private:
  static bool has(unsigned word, unsigned bits) { return (word & bits) == bits; }
};

}  // namespace fastmaf
