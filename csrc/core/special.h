// The normal distribution's tail and the logarithm, in double, for formulas that would cancel in
// float. `R` is the type of the result: float asks for fewer terms. tests/test_special.py derives
// the coefficients.
#pragma once

#include "core/math.h"

DC_KERNEL_NAMESPACE_BEGIN

template <int kCount>
DC_HD double polynomial(const double (&c)[kCount], double x) {
  double y = c[kCount - 1];
  DC_UNROLL
  for (int k = kCount - 2; k >= 0; --k) y = mul_add(y, x, c[k]);
  return y;
}

// ---- e^{t²/2} P(Z > t) = erfcx(t / sqrt 2) / 2 for t >= 0
// ------------------------------------------------------------------------------------------------
//
// With u = 5 / (t + 5), in (0, 1], it is u times a polynomial in 2 u - 1: to 1.3e-16 of itself at
// every t for double, 1.9e-11 for float, and 0 at infinity.

template <class R>
DC_HD double scaled_tail(double t) {
#ifdef __CUDA_ARCH__
  return 0.5 * ::erfcx(t * 0x1.6a09e667f3bcdp-1);
#else
  const double u = 5.0 / (t + 5.0), q = mul_add(2.0, u, -1.0);
  if constexpr (sizeof(R) == 4) {
    constexpr double kTail32[] = {
        0x1.3b0fbcb4c77bep-3,   0x1.108a69903f1d1p-3,   0x1.95c11dc9e214bp-4,
        0x1.00d8aac01af07p-4,   0x1.0e5e8dfc4d575p-5,   0x1.c4f9fa4f9f654p-7,
        0x1.1090f9ee04b2fp-8,   0x1.39d5b417e93c5p-11,  -0x1.4ed6d387bafa3p-13,
        -0x1.c83a2778e2a05p-14, -0x1.86da9114f06b7p-17, 0x1.448d54413e626p-17,
        0x1.959a483a219d9p-19,  -0x1.3f7ec60a48254p-21, -0x1.55ecd4fe107d7p-22};
    return u * polynomial(kTail32, q);
  } else {
    constexpr double kTail64[] = {
        0x1.3b0fbcb4c77bep-3,   0x1.108a698eca1b3p-3,   0x1.95c11dc6c5945p-4,
        0x1.00d8ab2d2a9acp-4,   0x1.0e5e8ee59a878p-5,   0x1.c4f9d547a3937p-7,
        0x1.1090aa5d9a50cp-8,   0x1.39e0d84ffc291p-11,  -0x1.4ea693544b3b2p-13,
        -0x1.c9182206e009bp-14, -0x1.8e76a1463293bp-17, 0x1.4df2126ab0ebep-17,
        0x1.bfc7a3e83bb9bp-19,  -0x1.ab2007b25af15p-21, -0x1.295afad1a370fp-21,
        0x1.1c63054067988p-24,  0x1.74d3624186635p-24,  -0x1.ec48cb0af8f9ap-28,
        -0x1.d217f994e0f94p-27, 0x1.13bcff5c31984p-30,  0x1.03ac238f195fep-29,
        -0x1.bb15f5bbc8569p-34, -0x1.672727b7fa6e1p-33};
    return u * polynomial(kTail64, q);
  }
#endif
}

// ---- log
// ------------------------------------------------------------------------------------------------
//
// x = 2^k m with sqrt ½ <= m < sqrt 2. With f = m - 1 and s = f / (2 + f), log m = 2 atanh s =
// f - s (f - s² p(s²)), where f²/2 is split off because it is the larger part of what is small.

// log x to about 1 ulp for positive normal x; -infinity for 0, NaN below it and for NaN.
template <class R>
DC_HD double log(double x) {
#ifdef __CUDA_ARCH__
  return ::log(x);
#else
  constexpr uint64_t kSqrtHalf = 0x3fe6a09e667f3bcd, kMantissa = 0xfffffffffffff;
  constexpr double kLn2High = 0x1.62e42p-1, kLn2Low = 0x1.fdf473de6af28p-22;
  // 1024 more than k, so that it is positive, in the low bits of 2^52.
  const uint64_t t = bit_cast<uint64_t>(x) - kSqrtHalf + (uint64_t(1024) << 52);
  const double k = bit_cast<double>((t >> 52) | 0x4330000000000000) - (0x1p52 + 1024.0);
  const double f = bit_cast<double>((t & kMantissa) + kSqrtHalf) - 1.0;
  const double s = f / (2.0 + f), z = s * s, half = 0.5 * f * f;
  double p;
  if constexpr (sizeof(R) == 4) {
    constexpr double kLog32[] = {0x1.5555554bb2b2cp-1, 0x1.9999eb5d84f14p-2, 0x1.245c438323e9ap-2,
                                 0x1.ddced7078dd3ap-3};
    p = z * polynomial(kLog32, z);
  } else {
    constexpr double kLog64[] = {0x1.5555555555558p-1, 0x1.99999999952e2p-2, 0x1.2492492df148dp-2,
                                 0x1.c71c62e5800a1p-3, 0x1.7462b4ab2ef6bp-3, 0x1.39fe606542ddep-3,
                                 0x1.2b584aae78a57p-3};
    p = z * polynomial(kLog64, z);
  }
  const double low = mul_add(s, half + p, k * kLn2Low);
  const double y = mul_add(k, kLn2High, f - (half - low));
  constexpr double kInfinity = __builtin_inf(), kNan = __builtin_nan("");
  return x > 0.0 ? y : (x == 0.0 ? -kInfinity : kNan);
#endif
}

// What log(1 + y) is more than log of the sum as it is rounded.
DC_HD double lost_in(double sum, double y) { return (y - (sum - 1.0)) / sum; }

DC_KERNEL_NAMESPACE_END
