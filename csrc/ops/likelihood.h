// The probability mass of a Gaussian in the bin of a pixel, in nats.
#pragma once

#include "core/special.h"
#include "ops/gaussian.h"

DC_KERNEL_NAMESPACE_BEGIN

// Half the distance between neighboring pixels k / 127.5 - 1. Bins with |x| > kOpen are open.
constexpr double kHalfBin = 1.0 / 255.0, kOpen = 0.999;

// The bin lo .. hi around z in units of the scale, folded to z >= 0; eta is half its width. An open
// bin begins at lo. With E(t) = e^{t²/2} P(Z > t) the mass is one of
//   e^{-lo²/2} (E(lo) - E(hi) e^{-b2})          lo >= 0,  b2 = (hi² - lo²) / 2 = 2 z eta
//   1 - e^{-lo²/2} (E(-lo) + E(hi) e^{-b2})     lo < 0
//   2 eta φ(z) (1 + Σ eta^{2n} He_{2n}(z) / (2n + 1)!)        where the bin is narrow,
// and `part` is the factor in parentheses, or the mass itself for lo < 0. All three are computed
// and one is selected, because a loop with branches does not vectorize.
//
// A bin may be far narrower than the scale, or so much wider that its mass is almost 1. Therefore
// the ends of the bin and lo² are computed in double, the rest in R.
template <class R>
struct PixelBin {
  // Above this, the cancellation in the difference of two tails is smaller than the truncation
  // error of the series.
  static constexpr R kNarrow = sizeof(R) == 4 ? R(0x1p-2) : R(0x1p-5);
  // The log-scale is clamped to [kSmallest, 345], which prevents 0 times infinity.
  static constexpr R kSmallest = sizeof(R) == 4 ? R(-80) : R(-690);

  double d, inverse;   // |x - mean|, in an open bin negative if the mean is beyond x; 1 / scale
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
    // The square root of φ(lo) / φ(z), or of φ(lo) / φ(0), because the ratio may underflow in R.
    // Its logarithm `at` + `more` has more precision than R.
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

  // The sum over n for a narrow bin, with b = (z eta)² and e = eta², up to the precision of R.
  DC_HD static R series(R b, R e) {
    const R second = mul_add(mul_add(R(-6), e, b), b, R(3) * e * e);
    const R third =
        mul_add(mul_add(mul_add(R(-15), e, b), b, R(45) * e * e), b, R(-15) * e * e * e);
    return mul_add(b - e, R(1.0 / 6.0), mul_add(third, R(1.0 / 5040.0), second * R(1.0 / 120.0)));
  }
};

// The log of the mass of N(mean, e^{2 log_scale}) in the bin of x. By value, as in a call on CUDA an
// array is passed in memory.
template <class R>
DC_OUTLINED R log_mass(R x, R mean, R log_scale) {
  const R inputs[] = {x, mean, log_scale};
  constexpr R kLogBinPhi = R(-5.7670548978031535786);  // log(2/255 φ(0))
  const PixelBin<R> bin(inputs);
  const R narrow = kLogBinPhi - log_scale - R(0.5) * bin.z * bin.z;
  const R rest = bin.tail ? R(-0.5) * bin.lo * bin.lo : log1p_correction(bin.part, -bin.outside);
  return -__builtin_fabs((bin.narrow ? narrow : rest) + log(bin.part));  // -0 for 1
}

// The gradient of log_mass, times g: the derivative of the mass is -φ(lo) at lo and, if the bin is
// closed, φ(hi) = φ(lo) e^{-b2} at hi.
template <class R>
struct LogMassSlope {
  R of_x, of_log_scale;
};
template <class R>
DC_OUTLINED LogMassSlope<R> log_mass_slope(R g, R x, R mean, R log_scale) {
  const R inputs[] = {x, mean, log_scale};
  constexpr R kPhi0 = R(0.39894228040143267794);
  const PixelBin<R> bin(inputs);
  const double b2 = 2.0 * bin.d * bin.inverse * (kHalfBin * bin.inverse);
  const double drop = bin.is_open | (b2 > 60.0) ? -1.0 : Exponential<R>(-b2).minus_one;
  // φ(lo) over the mass, and over the scale. g is the first factor, so that g = 0 gives 0.
  const R root = blend(bin.narrow, bin.root, blend(bin.tail, R(1), bin.root));
  const R factor = g * blend(bin.narrow, R(0.5 / kHalfBin), kPhi0) * root / bin.part;
  const R at_lo = factor * blend(bin.narrow, R(1), R(bin.inverse)) * root;
  // The derivative by the scale, lo φ(lo) - hi φ(hi), in a form that does not cancel.
  const R of_scale = R(mul_add(bin.d, drop, kHalfBin * (2.0 + drop)));
  return {bin.sign * at_lo * R(drop), -at_lo * of_scale};
}

struct DiscretizedGaussianLogLikelihood : OpBase {
  static constexpr const char* name = "discretized_gaussian_log_likelihood";
  static constexpr bool in_double = true;
  static constexpr int n_in = 3, n_out = 1;  // x, mean, log_scale
  template <class R>
  DC_HD static void apply(const R*, const R* x, R* y) {
    y[0] = log_mass(x[0], x[1], x[2]);
  }
};

template <bool kOfX>
struct DiscretizedGradient {  // of (mean, log_scale), or of (x, mean, log_scale)
  using Term = DiscretizedGaussianLogLikelihood;
  static constexpr const char* variant = kOfX ? "" : "_parameters";
  static constexpr int n_in = 3, n_out = 2 + kOfX;
  template <class R>
  DC_HD static void apply(R g, const R* x, R* y) {
    const LogMassSlope<R> slope = log_mass_slope(g, x[0], x[1], x[2]);
    if (kOfX) y[0] = slope.of_x;
    y[n_out - 2] = -slope.of_x;
    y[n_out - 1] = slope.of_log_scale;
  }
};

DC_KERNEL_NAMESPACE_END
