// Terms of the variational bound, summed over each row: the KL of a step or, where the row's
// `decoder` says so, minus the discretised log-likelihood. All follow from the error of the
// predicted x_0, e = b_0 x_0 + b_g given + b_m m, whose coefficients come as float + remainder and
// which is formed in double: predicted noise is multiplied by hundreds where little signal is left.
#pragma once

#include "core/math.h"
#include "ops/likelihood.h"

DC_KERNEL_NAMESPACE_BEGIN

enum BoundCoef {
  kScale,
  kB0,
  kBGiven,
  kBm,
  kB0Low,
  kBGivenLow,
  kBmLow,
  kLowest,
  kHighest,
  kDecoder,
  kFactor,
  kOffset,
  kD0,
  kDLow,
  kDv,
  kKl
};

// Inputs begin with x_0, m, [v], given (x_t, or the noise in it).
template <bool kLearned>
struct BoundError {
  static constexpr bool in_double = true;
  static constexpr int n = 3 + kLearned, n_coef = kLearned ? kKl + 1 : kDLow;

  // x_0 minus the prediction, clipped; `inside`: whether the clip let it pass.
  template <class R>
  DC_HD static double error(const R* c, const R* x, bool& inside) {
    const double b_0 = double(c[kB0]) + double(c[kB0Low]);
    const double b_given = double(c[kBGiven]) + double(c[kBGivenLow]);
    const double b_m = double(c[kBm]) + double(c[kBmLow]), x0 = x[0];
    double e = mul_add(b_m, double(x[1]), mul_add(b_given, double(x[n - 1]), b_0 * x0));
    const double most = x0 - double(c[kLowest]), least = x0 - double(c[kHighest]);
    inside = !(e > most || e < least);
    e = e > most ? most : e;
    return e < least ? least : e;
  }
  // de / dm where it let it pass.
  template <class R>
  DC_HD static R slope(const R* c) {
    return R(double(c[kBm]) + double(c[kBmLow]));
  }
  // log β̃ - log σ², σ² being the variance of p; minus the latter where there is no β̃.
  template <class R>
  DC_HD static R log_ratio(const R* c, const R* x) {
    if constexpr (kLearned)
      return mul_add(-c[kDv], x[2], c[kD0]) + c[kDLow];
    else
      return c[kD0];
  }
  template <class R>
  DC_HD static bool other(const R* c) {
    return c[kDecoder] != R(0);
  }
};

// The decoder's term: minus the log-mass of N(x_0 - e, σ²) in the bin of x_0.
template <bool kLearned>
struct DecoderTerm : BoundError<kLearned> {
  using Base = BoundError<kLearned>;
  static constexpr int n_in = Base::n, n_out = 0, n_sum = 1;
  struct Seen {
    double x[3];
    bool inside;
    template <class R>
    DC_HD Seen(const R* c, const R* in) {
      x[0] = in[0];
      x[1] = x[0] - Base::error(c, in, inside);
      x[2] = -0.5 * double(Base::log_ratio(c, in));
    }
  };
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    const Seen seen(c, x);
    double log_likelihood;
    DiscretizedGaussianLogLikelihood::apply<double>(nullptr, seen.x, &log_likelihood);
    y[0] = R(-log_likelihood);
  }
};

template <bool kLearned>
struct VlbTerm : BoundError<kLearned> {
  using Base = BoundError<kLearned>;
  using Other = DecoderTerm<kLearned>;
  static constexpr const char* name = kLearned ? "vlb_term_learned" : "vlb_term";
  static constexpr int n_in = Base::n, n_out = 0, n_sum = 1;
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    bool inside;
    const R e = R(Base::error(c, x, inside));
    if constexpr (kLearned) {
      const R d = Base::log_ratio(c, x);
      const HalfExpm1<R> half(d);
      const R spread = c[kKl] != R(0) ? half.minus_d : R(-0.5) * d;
      y[0] = mul_add(c[kFactor] * e * e, exp(d), spread);
    } else {
      y[0] = e * e;
    }
  }
  template <class R>
  DC_HD static double finish(const R* c, double total, double n) {
    const double factor = kLearned ? 1.0 : double(c[kFactor]);
    return double(c[kScale]) * (factor * total + n * double(c[kOffset]));
  }
};

// Coefficients: and g, of each sample. Outputs: dm, [dv].
template <bool kLearned>
struct DecoderTermBackward : BoundError<kLearned> {
  using Base = BoundError<kLearned>;
  static constexpr int n_in = Base::n, n_out = 1 + kLearned, n_sum = 0, n_coef = Base::n_coef + 1;
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    const typename DecoderTerm<kLearned>::Seen seen(c, x);
    double of[2];  // the mean, the log-scale
    DiscretizedGradient<false>::apply<double>(1.0, seen.x, of);
    const R g = c[Base::n_coef] * c[kScale];
    y[0] = seen.inside ? g * R(of[0]) * Base::slope(c) : R(0);
    if constexpr (kLearned) y[1] = R(-0.5) * g * c[kDv] * R(of[1]);
  }
};

template <bool kLearned>
struct VlbTermBackward : BoundError<kLearned> {
  using Base = BoundError<kLearned>;
  using Other = DecoderTermBackward<kLearned>;
  static constexpr const char* name = kLearned ? "vlb_term_learned_backward" : "vlb_term_backward";
  static constexpr int n_in = Base::n, n_out = 1 + kLearned, n_sum = 0, n_coef = Base::n_coef + 1;
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    bool inside;
    const R e = R(Base::error(c, x, inside));
    const R g = c[Base::n_coef] * c[kScale];
    R slope = R(2) * c[kFactor] * e;
    if constexpr (kLearned) {
      const R d = Base::log_ratio(c, x), ratio = exp(d);
      const HalfExpm1<R> half(d);
      const R spread = c[kKl] != R(0) ? half.plain : R(-0.5);
      y[1] = -g * c[kDv] * mul_add(c[kFactor] * e * e, ratio, spread);
      slope *= ratio;
    }
    y[0] = inside ? g * slope * Base::slope(c) : R(0);
  }
};

// Σ x² of each row, for the KL of q(x_T | x_0) to the standard normal.
struct PriorKl {
  static constexpr const char* name = "prior_kl";
  static constexpr int n_in = 1, n_out = 0, n_sum = 1, n_coef = 2;  // x_0; factor, offset
  template <class R>
  DC_HD static void apply(const R*, const R* x, R* y) {
    y[0] = x[0] * x[0];
  }
  template <class R>
  DC_HD static double finish(const R* c, double total, double n) {
    return double(c[0]) * total + n * double(c[1]);
  }
};

DC_KERNEL_NAMESPACE_END
