// The tail of the normal distribution, the logarithm, and numbers of two floats for formulas that
// would cancel in float. float needs fewer terms. tests/native/test_special.py derives the
// coefficients.
#pragma once

#include "core/math.h"

DC_KERNEL_NAMESPACE_BEGIN

// ---- exp and expm1 ------------------------------------------------------------------------------

// e^x - 1 where e^x is a normal number; elsewhere arbitrary, and NaN for NaN.
template <class R>
DC_HD R normal_expm1(R x) {
  using K = ExpConstants<R>;
  const ExpReduction<R> e(x);
  const R scale = bit_cast<R>(typename K::Bits((e.n + K::kBias) << K::kMantissa));
  return mul_add(scale, mul_add(e.r * e.r, e.q, e.r), scale - R(1));
}

// e^x where that is a normal number, elsewhere arbitrary, and NaN for NaN: for float formulas that
// cancel, to 6e-14, with fewer terms than in math.h.
DC_HD double exp_in_double(float, double x) {
#ifdef __CUDA_ARCH__
  return ::exp(x);
#else
  using K = ExpConstants<double>;
  constexpr double kExp32[] = {0x1.fffffffffe069p-2,  0x1.5555555554f97p-3,  0x1.55555565c559fp-5,
                               0x1.111111170ad56p-7,  0x1.6c166be75a859p-10, 0x1.a019c3721fb3ep-13,
                               0x1.a136b06babd51p-16, 0x1.72ad3ae3ed777p-19};
  const double shifted = mul_add(x, K::kLog2E, K::kRound);
  const double r = mul_add(K::kRound - shifted, 0x1.62e42fefa39efp-1, x);
  const double scale = bit_cast<double>((bit_cast<uint64_t>(shifted) + K::kBias) << K::kMantissa);
  return mul_add(scale, mul_add(r * r, polynomial(kExp32, r), r), scale);
#endif
}
DC_HD double exp_in_double(double, double x) { return normal_exp(x); }

// ---- Numbers of two floats ----------------------------------------------------------------------

// a - b rounded, and in `low` what that lost (NaN if the result is infinite).
DC_HD float difference(float a, float b, float& low) {
  const float result = a - b, of_b = a - result;
  low = (a - (result + of_b)) + (of_b - b);
  return result;
}

// The first 12 significant bits of x. The product of two such numbers is exact.
DC_HD float leading(float x) { return bit_cast<float>(bit_cast<uint32_t>(x) & 0xfffff000u); }

struct SplitFloat {
  float top, rest;  // top has 12 significant bits
  DC_HD SplitFloat(float top, float rest) : top(top), rest(rest) {}
  DC_HD SplitFloat(double x) : top(leading(float(x))), rest(float(x - double(top))) {}
};

// e^x to 1e-9 where that is a normal number; elsewhere arbitrary, and NaN for NaN. As in math.h,
// with r = a + b and a²/2 exact, because r²/2 is the largest term that is rounded.
DC_HD SplitFloat split_exp(float x) {
  using K = ExpConstants<float>;
  const float shifted = mul_add(x, K::kLog2E, K::kRound), n = shifted - K::kRound;
  const float high = mul_add(-n, K::kLn2High, x), low = -n * K::kLn2Low;  // `high` is exact
  const float r = high + low, a = leading(r), b = (r - a) + ((high - r) + low);
  const float square = 0.5f * a * a;
  const float small = mul_add(r * r * r, K::cubic(r), mul_add(0.5f * b, a + r, b));
  const float top = leading(1.0f + (a + (square + small)));
  const float scale = bit_cast<float>((bit_cast<uint32_t>(shifted) + K::kBias) << K::kMantissa);
  return {scale * top, scale * ((((1.0f - top) + a) + square) + small)};
}
DC_HD double split_exp(double x) { return normal_exp(x); }  // has enough digits

// ---- e^{t²/2} P(Z > t) = erfcx(t / sqrt 2) / 2 for t >= 0 ---------------------------------------
//
// With u = k / (t + k), in (0, 1], it is u times a polynomial in 2 u - 1. The relative error before
// rounding is at most 1.3e-16 for double and 3.2e-8 for float; the result is 0 at infinity.

template <class R>
DC_HD R scaled_tail(R t) {
  constexpr R k = sizeof(R) == 4 ? R(3.5) : R(5);
  const R u = k / (t + k), q = mul_add(R(2), u, R(-1));
  if constexpr (sizeof(R) == 4) {
    constexpr float kTail32[] = {0x1.b396fap-3f,   0x1.4aef3cp-3f,  0x1.71233p-4f,
                                 0x1.0f9fp-5f,     0x1.45ebc6p-8f,  -0x1.e43c26p-10f,
                                 -0x1.dc3382p-11f, 0x1.f4a476p-14f, 0x1.0f3f7cp-13f,
                                 -0x1.4c0c08p-17f, -0x1.dd1d3cp-17f};
    return u * polynomial(kTail32, q);
  } else {
#ifdef __CUDA_ARCH__
    return 0.5 * ::erfcx(t * 0x1.6a09e667f3bcdp-1);
#else
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
#endif
  }
}

// ---- log ----------------------------------------------------------------------------------------
//
// x = 2^k m with sqrt ½ <= m < sqrt 2. With f = m - 1 and s = f / (2 + f), log m = 2 atanh s =
// f - s (f - s² p(s²)), where f²/2 is split off because it is the largest of the small terms.

template <class R>
struct LogConstants;

template <>
struct LogConstants<float> {
  static constexpr uint32_t kSqrtHalf = 0x3f3504f3;  // its bits
  DC_HD static float p(float z) {
    constexpr float kLog32[] = {0x1.55555cp-1f, 0x1.997c3p-2f, 0x1.2ee61p-2f};
    return polynomial(kLog32, z);
  }
};

template <>
struct LogConstants<double> {
  static constexpr uint64_t kSqrtHalf = 0x3fe6a09e667f3bcd;
  DC_HD static double p(double z) {
    constexpr double kLog64[] = {0x1.5555555555558p-1, 0x1.99999999952e2p-2, 0x1.2492492df148dp-2,
                                 0x1.c71c62e5800a1p-3, 0x1.7462b4ab2ef6bp-3, 0x1.39fe606542ddep-3,
                                 0x1.2b584aae78a57p-3};
    return polynomial(kLog64, z);
  }
};

// log x to about 1 ulp for positive normal x; arbitrary for other x, including NaN.
template <class R>
DC_HD R log(R x) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(R) == 4)
    return ::logf(x);
  else
    return ::log(x);
#else
  using K = ExpConstants<R>;
  using L = LogConstants<R>;
  using Bits = typename K::Bits;
  // k + kOffset, which is positive, goes into the low bits of kBase = 2^kMantissa.
  constexpr R kBase = R(Bits(1) << K::kMantissa), kOffset = R(K::kBias + 1);
  const Bits t = bit_cast<Bits>(x) - L::kSqrtHalf + (Bits(K::kBias + 1) << K::kMantissa);
  const R k = bit_cast<R>((t >> K::kMantissa) | bit_cast<Bits>(kBase)) - (kBase + kOffset);
  const Bits mantissa = t & ((Bits(1) << K::kMantissa) - 1);
  const R f = bit_cast<R>(mantissa + L::kSqrtHalf) - R(1);
  const R s = f / (R(2) + f), z = s * s, half = R(0.5) * f * f;
  const R low = mul_add(s, mul_add(z, L::p(z), half), k * K::kLn2Low);
  return mul_add(k, K::kLn2High, f - (half - low));
#endif
}

// The first-order correction of log(sum) to log(1 + y), where sum is 1 + y after rounding. The
// exact term is divided by the sum, but it matters only where the sum is 1.
template <class R>
DC_HD R log1p_correction(R sum, R y) {
  return y - (sum - R(1));
}

DC_KERNEL_NAMESPACE_END
