// Elementary functions that vectorise on the host and are the CUDA library's own on the device.
#pragma once

#include "core/number.h"

#ifdef __CUDACC__
#include <math.h>
#endif

DC_KERNEL_NAMESPACE_BEGIN

// a * b + c; fused where the hardware has it (without it, the call would leave the vector loop).
DC_HD float mul_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
DC_HD double mul_add(double a, double b, double c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

// min(max(x, lo), hi) that keeps a NaN in x.
template <class R>
DC_HD R clamp(R x, R lo, R hi) {
  R above = x < lo ? lo : x;
  return above > hi ? hi : above;
}

// e^x to 1 ulp over the whole range, infinities, NaN and subnormal results included.
// x = n ln 2 + r; e^r = 1 + r + r² q(r), q a minimax polynomial (relative error 3.1e-9 on |r| <= ln
// 2 / 2); 2^n is applied in two factors, so that neither overflows where the result does not.
DC_HD float exp(float x) {
#ifdef __CUDA_ARCH__
  return ::expf(x);
#else
  constexpr float kRound =
      0x1.8p23f;  // adding it rounds to an integer and leaves that integer in the low bits
  float bounded = clamp(x, -110.0f, 100.0f);
  float shifted = mul_add(bounded, 0x1.715476p+0f, kRound);
  float n = shifted - kRound;
  float r = mul_add(n, 0x1.bd0106p-13f, mul_add(n, -0x1.63p-1f, bounded));  // ln 2 in two parts
  float q = 0x1.6a23d0p-10f;
  q = mul_add(q, r, 0x1.123a20p-7f);
  q = mul_add(q, r, 0x1.5558f2p-5f);
  q = mul_add(q, r, 0x1.555492p-3f);
  q = mul_add(q, r, 0x1.fffffcp-2f);
  float e = 1.0f + mul_add(r * r, q, r);
  int32_t power = int32_t(bit_cast<uint32_t>(shifted) - bit_cast<uint32_t>(kRound));
  int32_t half = power >> 1;
  float first = bit_cast<float>(uint32_t(half + 127) << 23);
  float second = bit_cast<float>(uint32_t(power - half + 127) << 23);
  return e * first * second;
#endif
}
DC_HD double exp(double x) {
#ifdef __CUDA_ARCH__
  return ::exp(x);
#else
  return __builtin_exp(x);
#endif
}

// expm1(d) - d and expm1(d), together. For |d| < 1 the Taylor series d² (1/2! + d/3! + d²/4! +
// ...), because there e^d - 1 - d cancels.
template <class R>
struct Expm1 {
  R minus_d;  // expm1(d) - d
  R plain;    // expm1(d)
};
template <class R>
DC_HD Expm1<R> expm1_of(R d) {
  constexpr int kTerms =
      sizeof(R) == 8 ? 18 : 10;  // the first term left out is below half an ulp at |d| = 1
  R series = R(0);
  double factorial = 1;
  for (int k = 2; k < kTerms + 2; ++k) factorial *= k;
  DC_UNROLL
  for (int k = kTerms + 1; k >= 2; --k) {
    series = mul_add(series, d, R(1 / factorial));
    factorial /= k;
  }
  R near = d * d * series;
  R far = exp(d) - R(1);
  bool is_near = d > R(-1) && d < R(1);
  return {is_near ? near : far - d, is_near ? near + d : far};
}

DC_KERNEL_NAMESPACE_END
