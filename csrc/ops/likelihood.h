// The Gaussian's mass in the bin of a pixel. Nats.
#pragma once

#include "core/special.h"
#include "ops/gaussian.h"

DC_KERNEL_NAMESPACE_BEGIN

// Half the distance of neighbouring pixels k / 127.5 - 1, and where the bins that are open begin.
constexpr double kHalfBin = 1.0 / 255.0, kOpen = 0.999;

// The bin lo .. hi around z in units of the scale, folded to z >= 0; eta is half its width. An open
// bin begins at lo. All in double: a bin is often far narrower than the scale, or so much wider
// that its mass is 1 but for a little. With E(t) = e^{t²/2} P(Z > t) the mass is one of
//   e^{-lo²/2} (E(lo) - E(hi) e^{-b2})          lo >= 0,  b2 = (hi² - lo²) / 2 = 2 z eta
//   1 - e^{-lo²/2} (E(-lo) + E(hi) e^{-b2})     lo < 0
//   2 eta φ(z) (1 + Σ eta^{2n} He_{2n}(z) / (2n + 1)!)        where the bin is narrow,
// and `part` is what is in brackets there, the mass itself where lo < 0. The three are computed and
// one is taken: a loop with branches would not become one of vectors. R: how exact it has to be.
template <class R>
struct PixelBin {
  double sign, inverse, z, eta, lo;    // sign: of d z / d x
  double drop, spread, outside, part;  // drop: e^{-b2} - 1
  bool narrow, tail;

  DC_HD explicit PixelBin(const R* inputs) {
    const double x = inputs[0], d = x - double(inputs[1]);
    const bool is_open = __builtin_fabs(x) > kOpen;
    sign = __builtin_copysign(1.0, is_open ? x : d);
    // Scales of 0 and infinity are small and large ones: no 0 times infinity.
    inverse = Exponential<R>(-clamp(double(inputs[2]), -690.0, 345.0)).plain;
    z = sign * d * inverse;
    eta = kHalfBin * inverse;
    lo = (sign * d - kHalfBin) * inverse;
    const double slope = z * eta;
    const double shrunk = slope > 30.0 ? -1.0 : Exponential<R>(-2.0 * slope).minus_one;
    drop = is_open ? -1.0 : shrunk;
    narrow = (is_open ? 1.0 : (eta > slope ? eta : slope)) < 0x1p-5;
    tail = lo >= 0.0;
    // φ(lo) / φ(z), or φ(lo) / φ(0).
    const double at = narrow ? slope - 0.5 * eta * eta : -0.5 * lo * lo;
    spread = at < -700.0 ? 0.0 : Exponential<R>(at).plain;
    const double near = scaled_tail<R>(__builtin_fabs(lo));
    const double far = scaled_tail<R>(__builtin_fabs(z + eta)) * (1.0 + drop);
    outside = (near + far) * spread;
    part = narrow ? 1.0 + series(slope * slope, eta * eta) : (tail ? near - far : 1.0 - outside);
  }

  // The sum over n of the narrow bin, b = (z eta)² and e = eta², of terms that matter to R.
  DC_HD static double series(double b, double e) {
    double second = mul_add(mul_add(-6.0, e, b), b, 3.0 * e * e) * (1.0 / 120.0);
    if constexpr (sizeof(R) == 8) {
      double third = mul_add(mul_add(mul_add(-15.0, e, b), b, 45.0 * e * e), b, -15.0 * e * e * e);
      second = mul_add(third, 1.0 / 5040.0, second);
    }
    return mul_add(b - e, 1.0 / 6.0, second);
  }
};

// log of the mass of N(mean, e^{2 log_scale}) in the bin of x
template <class R>
DC_OUTLINED double log_mass(R x, R mean, R log_scale) {
  constexpr double kLogBinPhi = -5.7670548978031535786;  // log(2/255 φ(0))
  const R inputs[] = {x, mean, log_scale};
  const PixelBin<R> bin(inputs);
  const double narrow = kLogBinPhi - double(log_scale) - 0.5 * bin.z * bin.z;
  const double rest = bin.tail ? -0.5 * bin.lo * bin.lo : lost_in(bin.part, -bin.outside);
  return -__builtin_fabs((bin.narrow ? narrow : rest) + log<R>(bin.part));  // -0 for 1
}

// Its gradient: the mass loses φ(lo) at lo and, where the bin is closed, gains φ(hi) = φ(lo)
// e^{-b2} at hi.
struct LogMassSlope {
  double of_x, of_log_scale;
};
template <class R>
DC_OUTLINED LogMassSlope log_mass_slope(R x, R mean, R log_scale) {
  constexpr double kPhi0 = 0.39894228040143267794;
  const R inputs[] = {x, mean, log_scale};
  const PixelBin<R> bin(inputs);
  const double at_lo =  // φ(lo) over the mass
      (bin.narrow ? 0.5 * bin.spread : (bin.tail ? kPhi0 : kPhi0 * bin.spread)) /
      ((bin.narrow ? bin.eta : 1.0) * bin.part);
  // Of the scale: lo φ(lo) - hi φ(hi), which would cancel.
  return {bin.sign * at_lo * bin.drop * bin.inverse,
          -at_lo * mul_add(bin.z, bin.drop, bin.eta * (2.0 + bin.drop))};
}

struct DiscretizedGaussianLogLikelihood {
  static constexpr const char* name = "discretized_gaussian_log_likelihood";
  static constexpr bool in_double = true;
  static constexpr int n_in = 3, n_out = 1, n_sum = 0, n_coef = 0;  // x, mean, log_scale
  template <class R>
  DC_HD static void apply(const R*, const R* x, R* y) {
    y[0] = R(log_mass(x[0], x[1], x[2]));
  }
};

template <bool kOfX>
struct DiscretizedGradient {  // of (mean, log_scale), or of (x, mean, log_scale)
  static constexpr int n_in = 3, n_out = 2 + kOfX;
  template <class R>
  DC_HD static void apply(R g, const R* x, R* y) {
    const LogMassSlope slope = log_mass_slope(x[0], x[1], x[2]);
    if (kOfX) y[0] = R(double(g) * slope.of_x);
    y[n_out - 2] = R(-double(g) * slope.of_x);
    y[n_out - 1] = R(double(g) * slope.of_log_scale);
  }
};

struct DiscretizedGaussianLogLikelihoodSum : SumOf<DiscretizedGaussianLogLikelihood> {
  static constexpr const char* name = "discretized_gaussian_log_likelihood_sum";
  static constexpr bool in_double = true;
};
struct DiscretizedBackward : ElementwiseGradient<DiscretizedGradient<true>> {
  static constexpr const char* name = "discretized_gaussian_log_likelihood_backward";
  static constexpr bool in_double = true;
};
struct DiscretizedBackwardParameters : ElementwiseGradient<DiscretizedGradient<false>> {
  static constexpr const char* name = "discretized_gaussian_log_likelihood_backward_parameters";
  static constexpr bool in_double = true;
};
struct DiscretizedSumBackward : SumGradient<DiscretizedGradient<true>> {
  static constexpr const char* name = "discretized_gaussian_log_likelihood_sum_backward";
  static constexpr bool in_double = true;
};
struct DiscretizedSumBackwardParameters : SumGradient<DiscretizedGradient<false>> {
  static constexpr const char* name = "discretized_gaussian_log_likelihood_sum_backward_parameters";
  static constexpr bool in_double = true;
};

DC_KERNEL_NAMESPACE_END
