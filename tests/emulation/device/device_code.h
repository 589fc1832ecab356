// Included before all other code (-include), to compile the branches that a device compiles,
// `#ifdef __CUDA_ARCH__`, with the C library in place of CUDA's. The compiler may contract a * b + c,
// as nvcc does, except in the functions that CUDA promises to round separately.
#pragma once

#include <immintrin.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <functional>
#include <numeric>
#include <type_traits>
#include <vector>

inline float emulated_rounded(float x) {
  asm("" : "+x"(x));  // no contraction across this
  return x;
}
inline float __fmul_rn(float a, float b) { return emulated_rounded(a * b); }
inline float __fadd_rn(float a, float b) { return emulated_rounded(a + b); }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __int2float_rn(int i) { return float(i); }

namespace diffcore {
inline void wide_product(uint32_t a, uint32_t b, uint32_t* high, uint32_t* low) {
  const uint64_t product = uint64_t(a) * b;
  *high = uint32_t(product >> 32);
  *low = uint32_t(product);
}
inline float approximate_rsqrt(float x) { return 1 / __builtin_sqrtf(x); }
}  // namespace diffcore

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __half2float(__half x) { return _cvtsh_ss(x.bits); }
inline __half __float2half_rn(float x) { return {_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)}; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return {uint16_t(x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// exp(x^2) erfc(x), above 100 by the asymptotic series.
inline double erfcx(double x) {
  const long double t = x;
  if (x < 100) return double(expl(t * t) * erfcl(t));
  const long double v = 1 / (t * t);
  const long double series = 1 - v / 2 * (1 - 3 * v / 2 * (1 - 5 * v / 2 * (1 - 7 * v / 2)));
  return double(series / (t * 1.772453850905516027298L));
}

#define __CUDACC__ 13
#define __CUDA_ARCH__ 900
