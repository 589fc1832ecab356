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
// float has the scale, the begin of the bin and lo² to 1e-9, each as two floats.
template <class R>
struct PixelBin {
  // Above this, the cancellation in the difference of two tails is smaller than the truncation
  // error of the series.
  static constexpr R kNarrow = sizeof(R) == 4 ? R(0x1p-2) : R(0x1p-5);

  R inverse;                    // 1 / scale
  R sign, z, eta, lo;           // sign: of d z / d x
  R drop, root, outside, part;  // drop: e^{-b2} - 1
  bool is_open, narrow, tail;

  // `scale` is e^{-log_scale}: a SplitFloat for float.
  template <class Scale>
  DC_HD PixelBin(const R* inputs, Scale scale) {
    const R x = inputs[0], mean = inputs[1];
    is_open = magnitude(x) > R(kOpen);
    sign = (is_open ? x : x - mean) < R(0) ? R(-1) : R(1);
    // The square root of φ(lo) / φ(0), because that may underflow in R; if narrow, of e^{-eta²/2}.
    // Its logarithm `at` + `more` has more precision than R.
    R at, more;
    if constexpr (sizeof(R) == 4) {
      begin(sign * x, sign * mean, scale, at, more);
    } else {
      inverse = scale, lo = (sign * x - sign * mean - kHalfBin) * inverse;
      at = -0.25 * lo * lo, more = -0.25 * lo * lo - at;
    }
    z = sign * (x - mean) * inverse, eta = R(kHalfBin) * inverse;
    const R slope = z * eta;
    narrow = blend(is_open, R(1), eta > slope ? eta : slope) < kNarrow;
    tail = lo >= R(0);
    at = narrow ? R(-0.25) * eta * eta : at;
    const R rounded = normal_exp(at), exact = mul_add(rounded, narrow ? R(0) : more, rounded);
    root = at >= ExpConstants<R>::kLow ? exact : R(0);  // also where lo is infinite and `at` NaN
    drop = (is_open | (slope > R(30))) ? R(-1) : normal_expm1(R(-2) * slope);
    const R near = scaled_tail<R>(magnitude(lo));
    const R far = scaled_tail<R>(magnitude(z + eta)) * (R(1) + drop);
    outside = (near + far) * root * root;
    part = narrow ? R(1) + series(slope * slope, eta * eta) : (tail ? near - far : R(1) - outside);
  }

  // The log-scale is clamped, which prevents 0 times infinity. By blends: it may be the same for a
  // row, and the conditions of clamp() would become branches then.
  DC_HD static R clamped(R log_scale) {
    constexpr R low = sizeof(R) == 4 ? R(-80) : R(-690), high = sizeof(R) == 4 ? R(87) : R(345);
    const R above = blend(log_scale < low, low, log_scale);
    return blend(above > high, high, above);
  }

  // Sets inverse and lo, and `at` + `more` to -lo²/4. In an open bin lo < 0 if the mean is beyond x.
  DC_HD void begin(float x, float mean, SplitFloat scale, float& at, float& more) {
    constexpr float kHalf = float(kHalfBin), kHalfLow = float(kHalfBin - double(kHalf));
    float low, lower;
    const float d = difference(x, mean, low), high = difference(d, kHalf, lower);
    low = blend(magnitude(d) < 0x1p60f, low + (lower - kHalfLow), 0.0f);  // not infinity's NaN
    const float distance = high + low;
    const float first = leading(distance), rest = (distance - first) + (low - (distance - high));
    inverse = scale.top + scale.rest, lo = distance * inverse;
    const float top = leading(lo);
    const float lo_rest = (first * scale.top - top) + mul_add(first, scale.rest, rest * inverse);
    const float square = -0.25f * top * top;
    const float others = -0.5f * lo_rest * mul_add(0.5f, lo_rest, top);
    at = square + others, more = (square - at) + others;
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
  const PixelBin<R> bin(inputs, split_exp(-PixelBin<R>::clamped(log_scale)));
  const R narrow = kLogBinPhi - log_scale - R(0.5) * bin.z * bin.z;
  const R rest = bin.tail ? R(-0.5) * bin.lo * bin.lo : log1p_correction(bin.part, -bin.outside);
  return -magnitude((bin.narrow ? narrow : rest) + log(bin.part));  // -0 for 1
}

// The gradient of log_mass, times g: the derivative of the mass is -φ(lo) at lo and, if the bin is
// closed, φ(hi) = φ(lo) e^{-b2} at hi. In a narrow bin, with t = z eta, these are
//   -2 eta φ(z) e^{-eta²/2} z sinh t / t                                   by x over the scale,
//   -2 eta φ(z) e^{-eta²/2} ((1 - z²) sinh t / t + cosh t - sinh t / t)    by the log-scale,
// where only 1 - z² cancels: it is computed in double.
template <class R>
struct LogMassSlope {
  R of_x, of_log_scale;
};
template <class R>
DC_OUTLINED LogMassSlope<R> log_mass_slope(R g, R x, R mean, R log_scale) {
  const R inputs[] = {x, mean, log_scale};
  constexpr R kPhi0 = R(0.39894228040143267794);
  const double inverse = exp_in_double(log_scale, -double(PixelBin<R>::clamped(log_scale)));
  const double z = (double(x) - double(mean)) * inverse;
  const R cancelled = R(mul_add(z, z, -1.0));
  const PixelBin<R> bin(inputs, inverse);
  const R slope = bin.z * bin.eta, t2 = slope * slope;
  const R sinh =
      mul_add(mul_add(mul_add(t2, R(1.0 / 5040), R(1.0 / 120)), t2, R(1.0 / 6)), t2, R(1));
  const R rest = mul_add(mul_add(t2, R(-1.0 / 840), R(-1.0 / 30)), t2, R(-1.0 / 3)) * t2;
  const R wide = mul_add(R(-1) - bin.drop, bin.z + bin.eta, bin.lo);
  // φ(lo) over the mass or, in a narrow bin, over φ(z) and part. g is the first factor, so that
  // g = 0 gives 0.
  const R root = blend(bin.narrow | !bin.tail, bin.root, R(1));
  const R factor = g * blend(bin.narrow, R(1), kPhi0) * root / bin.part;
  return {bin.sign * (factor * bin.inverse * root) * blend(bin.narrow, -bin.z * sinh, bin.drop),
          factor * root * blend(bin.narrow, mul_add(cancelled, sinh, rest), wide)};
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
