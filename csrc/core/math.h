// Elementary functions: vectorizable code on the host, the CUDA math library on the device.
#pragma once

#include "core/number.h"

#ifdef __CUDACC__
#include <math.h>
#endif

DC_KERNEL_NAMESPACE_BEGIN

// a * b + c; fused where the hardware has it (elsewhere fma is a library call, which does not
// vectorize).
DC_HD float mul_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
DC_HD double mul_add(double a, double b, double c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

// |x|, in float for float: CUDA does not narrow __builtin_fabs.
DC_HD float magnitude(float x) { return __builtin_fabsf(x); }
DC_HD double magnitude(double x) { return __builtin_fabs(x); }

constexpr double kLogTwoPi = 1.8378770664093454836;  // log 2π

// Σ c[k] x^k by Horner's rule. `A` is the arithmetic: fused for plain numbers, or the lanes of
// noise/philox.h.
struct FusedArithmetic {
  template <class R>
  DC_HD static R real(R x) {
    return x;
  }
  template <class R>
  DC_HD static R multiply_add(R a, R b, R c) {
    return mul_add(a, b, c);
  }
};
template <class A = FusedArithmetic, class C, int kCount, class T>
DC_HD T polynomial(const C (&c)[kCount], T x) {
  T y = A::real(c[kCount - 1]);
  DC_UNROLL
  for (int k = kCount - 2; k >= 0; --k) y = A::multiply_add(y, x, A::real(c[k]));
  return y;
}

// min(max(x, lo), hi). NaN for a NaN in x.
template <class R>
DC_HD R clamp(R x, R lo, R hi) {
  R above = x < lo ? lo : x;
  return above > hi ? hi : above;
}

// ---- exp and expm1 ------------------------------------------------------------------------------
//
// x = n ln 2 + r with |r| <= ln 2 / 2, and e^r = 1 + r + r² q(r). q is a minimax polynomial in
// relative error (2.7e-9 for float, 2.7e-18 for double), so that e^r - 1 - r = r² q(r) has full
// relative accuracy for the smallest r.

template <class R>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  using Bits = uint32_t;
  static constexpr int kMantissa = 23, kBias = 127;
  // Adding this rounds to an integer, which is then in the low bits.
  static constexpr float kRound = 0x1.8p23f;
  static constexpr float kLog2E = 0x1.715476p+0f, kLn2High = 0x1.63p-1f, kLn2Low = -0x1.bd0106p-13f;
  // Where e^x leaves the normal numbers.
  static constexpr float kLow = -0x1.5d58ap+6f, kHigh = 0x1.62e42ep+6f;
  static constexpr float kHalfHigh = 89.0f;  // e^x / 2 overflows above
  static constexpr float kHuge = 0x1p127f;
  DC_HD static float q(float r) { return mul_add(cubic(r), r, 0.5f); }
  DC_HD static float cubic(float r) {  // (e^r - 1 - r - r²/2) / r³
    constexpr float c[] = {0x1.555556p-3f, 0x1.5554eap-5f, 0x1.11114cp-7f, 0x1.6d4318p-10f,
                           0x1.a072d6p-13f};
    return polynomial(c, r);
  }
};

template <>
struct ExpConstants<double> {
  using Bits = uint64_t;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLog2E = 0x1.71547652b82fep+0, kLn2High = 0x1.62e42fefa38p-1,
                          kLn2Low = 0x1.ef35793c7673p-45;
  static constexpr double kLow = -0x1.6232bdd7abcd2p+9, kHigh = 0x1.62e42fefa39efp+9,
                          kHalfHigh = 710.0;
  static constexpr double kHuge = 0x1p1023;
  DC_HD static double q(double r) {
    constexpr double c[] = {0x1p-1,
                            0x1.5555555555557p-3,
                            0x1.555555555554ep-5,
                            0x1.11111111100dep-7,
                            0x1.6c16c16c1a0aap-10,
                            0x1.a01a01abe80b4p-13,
                            0x1.a01a019055ce1p-16,
                            0x1.71de022e90a82p-19,
                            0x1.27e510e65140dp-22,
                            0x1.af4df466148cdp-26,
                            0x1.1f19fe28c559p-29};
    return polynomial(c, r);
  }
};

// c ? a : b by bit masks. With several nested conditions a compiler may turn ?: into branches,
// which prevents vectorization of the loop.
template <class R>
DC_HD R blend(bool c, R a, R b) {
#ifdef __CUDA_ARCH__
  return c ? a : b;
#else
  using Bits = typename ExpConstants<R>::Bits;
  const Bits mask = c ? ~Bits(0) : Bits(0);
  return bit_cast<R>((bit_cast<Bits>(a) & mask) | (bit_cast<Bits>(b) & ~mask));
#endif
}

template <class R>
struct ExpReduction {
  using K = ExpConstants<R>;
  using Bits = typename K::Bits;
  R r, q;
  Bits n;  // in the low bits

  // Outside the range of exp the result is arbitrary (NaN for NaN), and the caller replaces it.
  // Clamping x first would cost more: to preserve NaN, the compiler cannot use vector minimum and
  // maximum instructions.
  DC_HD explicit ExpReduction(R x) {
    R shifted = mul_add(x, K::kLog2E, K::kRound);
    R rounded = shifted - K::kRound;
    r = mul_add(-rounded, K::kLn2Low, mul_add(-rounded, K::kLn2High, x));
    n = bit_cast<Bits>(shifted);
    q = K::q(r);
  }
};

// e^x to about 1 ulp where that is a normal number; elsewhere arbitrary, and NaN for NaN.
template <class R>
DC_HD R normal_exp(R x) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(R) == 4)
    return ::expf(x);
  else
    return ::exp(x);
#else
  using K = ExpConstants<R>;
  using Bits = typename K::Bits;
  ExpReduction<R> e(x);
  R significand = R(1) + mul_add(e.r * e.r, e.q, e.r);
  return bit_cast<R>(Bits(bit_cast<Bits>(significand) + (e.n << K::kMantissa)));
#endif
}

// e^x to about 1 ulp; 0 below the smallest normal number, infinity above the largest, NaN for NaN.
template <class R>
DC_HD R exp(R x) {
#ifdef __CUDA_ARCH__
  return normal_exp(x);
#else
  using K = ExpConstants<R>;
  R y = x < K::kLow ? R(0) : normal_exp(x);
  return x <= K::kHigh ? y : x * K::kHuge;  // infinity, or NaN for NaN
#endif
}

// A power of two near 1 / |c|: products with it are exact, and c times it is between 1 and 4 unless c
// is subnormal.
template <class R>
DC_HD R power_near_inverse(R c) {
  using K = ExpConstants<R>;
  using Bits = typename K::Bits;
  const Bits exponent = (bit_cast<Bits>(magnitude(c)) >> K::kMantissa), most = 2 * K::kBias - 1;
  return bit_cast<R>(Bits((most + 1 - (exponent < most ? exponent : most)) << K::kMantissa));
}

// e^x as a factor of `square`, so that a square of 0 adds 0 where e^x overflows. NaN in x may be
// lost.
template <class R>
DC_HD R exp_times(R x, R square) {
  return blend(square != R(0), exp(x), R(0));
}

// factor e^x; 0 for a factor whose square is 0 where e^x may overflow. NaN for NaN.
template <class R>
DC_HD R times_exp(R factor, R x) {
  return ((factor * factor == R(0)) & (x > R(0))) ? R(0) : factor * exp(x);
}

// ½ (expm1(d) - d) and ½ expm1(d), for the Gaussian KL and its gradient. With s = 2^n / 2,
// e^d / 2 = s (1 + r + r² q), so
//   ½ (e^d - 1 - d) = s r² q + [s r + (s - ½) - d / 2],
// whose bracket is exactly 0 where n = 0: nothing cancels for small d. The factor ½ is included
// because the formulas need it and it delays overflow.
template <class R>
struct HalfExpm1 {
  R minus_d;
  R plain;

  DC_HD explicit HalfExpm1(R d) {
    using K = ExpConstants<R>;
    using Bits = typename K::Bits;
    constexpr R kLow = R(-60);  // expm1 is -1 from here down
    ExpReduction<R> e(d);
    R s = bit_cast<R>(Bits((e.n + Bits(K::kBias - 1)) << K::kMantissa)), r2 = e.r * e.r;
    R linear = R(-0.5) * d;
    R half = mul_add(s * r2, e.q, mul_add(s, e.r, (s - R(0.5)) + linear));
    R half_plain = mul_add(s, mul_add(r2, e.q, e.r), s - R(0.5));
    R infinity = K::kHuge * K::kHuge;
    R above_low = d < kLow ? linear - R(0.5) : half,
      plain_above_low = d < kLow ? R(-0.5) : half_plain;
    minus_d = d > K::kHalfHigh ? infinity : above_low;
    plain = d > K::kHalfHigh ? infinity : plain_above_low;
  }
};

DC_KERNEL_NAMESPACE_END
