// The Gaussian's mass in the bin of a pixel. Nats.
#pragma once

#include "core/special.h"
#include "ops/gaussian.h"

DC_KERNEL_NAMESPACE_BEGIN

// Half the distance of neighbouring pixels k / 127.5 - 1, and where the bins that are open begin.
constexpr double kHalfBin = 1.0 / 255.0, kOpen = 0.999;

// The bin lo .. hi around z in units of the scale, folded to z >= 0; eta is half its width. An open
// bin begins at lo. With E(t) = e^{t²/2} P(Z > t) the mass is one of
//   e^{-lo²/2} (E(lo) - E(hi) e^{-b2})          lo >= 0,  b2 = (hi² - lo²) / 2 = 2 z eta
//   1 - e^{-lo²/2} (E(-lo) + E(hi) e^{-b2})     lo < 0
//   2 eta φ(z) (1 + Σ eta^{2n} He_{2n}(z) / (2n + 1)!)        where the bin is narrow,
// and `part` is what is in brackets there, the mass itself where lo < 0. The three are computed and
// one is taken: a loop with branches would not become one of vectors.
//
// A bin is often far narrower than the scale, or so much wider that its mass is 1 but for a little:
// the ends of the bin and lo² are formed in double, and the rest in R.
template <class R>
struct PixelBin {
  // From here up, the difference of two tails loses less than the series lacks.
  static constexpr R kNarrow = sizeof(R) == 4 ? R(0x1p-2) : R(0x1p-5);
  // No 0 times infinity: smaller scales are this one, and larger ones e^345.
  static constexpr R kSmallest = sizeof(R) == 4 ? R(-80) : R(-690);

  double d, inverse;   // |x - mean|, less than 0 beyond an open bin; 1 over the scale
  R sign, z, eta, lo;  // sign: of d z / d x
  R root, outside, part;
  bool is_open, narrow, tail;

  DC_HD explicit PixelBin(const R* inputs) {
    const R x = inputs[0], mean = inputs[1];
    is_open = __builtin_fabs(x) > R(kOpen);
    sign = (is_open ? x : x - mean) < R(0) ? R(-1) : R(1);
    d = double(sign * x) - double(sign * mean);
    inverse = Exponential<R>(-double(clamp(inputs[2], kSmallest, R(345)))).plain;
    const double begin = (d - kHalfBin) * inverse;
    z = sign * (x - mean) * R(inverse), eta = R(kHalfBin) * R(inverse), lo = R(begin);
    const R slope = z * eta;
    narrow = blend(is_open, R(1), eta > slope ? eta : slope) < kNarrow;
    tail = lo >= R(0);
    // The root of φ(lo) / φ(z), or of φ(lo) / φ(0), which may be too small for R. Its logarithm has
    // more places than R.
    const R at = narrow ? R(0.5) * slope - R(0.25) * eta * eta : R(-0.25) * lo * lo;
    const R more = narrow ? R(0) : R(-0.25 * begin * begin - double(at));
    const R rounded = normal_exp(at);
    root = at < ExpConstants<R>::kLow ? R(0) : mul_add(rounded, more, rounded);
    const R decay = is_open | (slope > R(30)) ? R(0) : normal_exp(R(-2) * slope);
    const R near = scaled_tail<R>(__builtin_fabs(lo));
    const R far = scaled_tail<R>(__builtin_fabs(z + eta)) * decay;
    outside = (near + far) * root * root;
    part = narrow ? R(1) + series(slope * slope, eta * eta) : (tail ? near - far : R(1) - outside);
  }

  // The sum over n of the narrow bin, b = (z eta)² and e = eta², of terms that matter to R.
  DC_HD static R series(R b, R e) {
    const R second = mul_add(mul_add(R(-6), e, b), b, R(3) * e * e);
    const R third =
        mul_add(mul_add(mul_add(R(-15), e, b), b, R(45) * e * e), b, R(-15) * e * e * e);
    return mul_add(b - e, R(1.0 / 6.0), mul_add(third, R(1.0 / 5040.0), second * R(1.0 / 120.0)));
  }
};

// log of the mass of N(mean, e^{2 log_scale}) in the bin of x; the inputs are those three.
template <class R>
DC_OUTLINED R log_mass(const R* inputs) {
  constexpr R kLogBinPhi = R(-5.7670548978031535786);  // log(2/255 φ(0))
  const PixelBin<R> bin(inputs);
  const R narrow = kLogBinPhi - inputs[2] - R(0.5) * bin.z * bin.z;
  const R rest = bin.tail ? R(-0.5) * bin.lo * bin.lo : lost_in(bin.part, -bin.outside);
  return -__builtin_fabs((bin.narrow ? narrow : rest) + log(bin.part));  // -0 for 1
}

// Its gradient times g: the mass loses φ(lo) at lo and, where the bin is closed, gains φ(hi) =
// φ(lo) e^{-b2} at hi.
template <class R>
struct LogMassSlope {
  R of_x, of_log_scale;
};
template <class R>
DC_OUTLINED LogMassSlope<R> log_mass_slope(R g, const R* inputs) {
  constexpr R kPhi0 = R(0.39894228040143267794);
  const PixelBin<R> bin(inputs);
  const double b2 = 2.0 * bin.d * bin.inverse * (kHalfBin * bin.inverse);
  const double drop = bin.is_open | (b2 > 60.0) ? -1.0 : Exponential<R>(-b2).minus_one;
  // φ(lo) over the mass, and over the scale. A g of 0 comes first, for it has to remain 0.
  const R root = blend(bin.narrow, bin.root, blend(bin.tail, R(1), bin.root));
  const R factor = g * blend(bin.narrow, R(0.5 / kHalfBin), kPhi0) * root / bin.part;
  const R at_lo = factor * blend(bin.narrow, R(1), R(bin.inverse)) * root;
  // Of the scale: lo φ(lo) - hi φ(hi), which would cancel.
  const R of_scale = R(mul_add(bin.d, drop, kHalfBin * (2.0 + drop)));
  return {bin.sign * at_lo * R(drop), -at_lo * of_scale};
}

struct DiscretizedGaussianLogLikelihood : OpBase {
  static constexpr const char* name = "discretized_gaussian_log_likelihood";
  static constexpr bool in_double = true;
  static constexpr int n_in = 3, n_out = 1;  // x, mean, log_scale
  template <class R>
  DC_HD static void apply(const R*, const R* x, R* y) {
    y[0] = log_mass(x);
  }
};

template <bool kOfX>
struct DiscretizedGradient {  // of (mean, log_scale), or of (x, mean, log_scale)
  using Term = DiscretizedGaussianLogLikelihood;
  static constexpr const char* variant = kOfX ? "" : "_parameters";
  static constexpr int n_in = 3, n_out = 2 + kOfX;
  template <class R>
  DC_HD static void apply(R g, const R* x, R* y) {
    const LogMassSlope<R> slope = log_mass_slope(g, x);
    if (kOfX) y[0] = slope.of_x;
    y[n_out - 2] = -slope.of_x;
    y[n_out - 1] = slope.of_log_scale;
  }
};

DC_KERNEL_NAMESPACE_END
