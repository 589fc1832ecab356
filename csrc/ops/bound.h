// Terms of the variational bound, summed over each row: the KL of a step or, if the row's `decoder`
// is not 0, minus the discretized log-likelihood. All are functions of the error of the predicted
// x_0, e = b_0 x_0 + b_g given + b_m m. It is computed in double, with coefficients given as float
// + remainder, because at low signal levels predicted noise is multiplied by hundreds.
#pragma once

#include "core/math.h"
#include "ops/likelihood.h"

DC_KERNEL_NAMESPACE_BEGIN

// The coefficients of a term by name: the scale of the sum, then the columns of a table. The last
// three belong to a learned variance.
template <class R>
struct VlbRow {
  const R* c;
  DC_HD explicit VlbRow(const R* c) : c(c) {}

  DC_HD R scale() const { return c[0]; }
  DC_HD R b_0() const { return c[1]; }
  DC_HD R b_g() const { return c[2]; }
  DC_HD R b_m() const { return c[3]; }
  DC_HD R b_0_low() const { return c[4]; }
  DC_HD R b_g_low() const { return c[5]; }
  DC_HD R b_m_low() const { return c[6]; }
  DC_HD R clip_min() const { return c[7]; }
  DC_HD R clip_max() const { return c[8]; }
  DC_HD R decoder() const { return c[9]; }
  DC_HD R factor() const { return c[10]; }
  DC_HD R offset() const { return c[11]; }
  DC_HD R d_0() const { return c[12]; }
  DC_HD R d_low() const { return c[13]; }
  DC_HD R d_v() const { return c[14]; }
  DC_HD R kl() const { return c[15]; }
};
// The names of the coefficients in their order, for Python.
constexpr const char* kVlbColumns[] = {
    "scale",    "b_0",     "b_g",    "b_m",    "b_0_low", "b_g_low", "b_m_low", "clip_min",
    "clip_max", "decoder", "factor", "offset", "d_0",     "d_low",   "d_v",     "kl"};
constexpr int kVlbCoefs = 13, kLearnedVlbCoefs = 16;

// The first inputs are x_0, m, [v], given (x_t, or the noise in it).
template <bool kLearned>
struct BoundError : OpBase {
  static constexpr bool in_double = true;
  static constexpr int n = 3 + kLearned, n_coef = kLearned ? kLearnedVlbCoefs : kVlbCoefs;

  // x_0 minus the clipped prediction. `inside`: whether the prediction was inside the clip range.
  template <class R>
  DC_HD static double error(const R* c, const R* x, bool& inside) {
    const VlbRow row(c);
    const double b_0 = double(row.b_0()) + double(row.b_0_low());
    const double b_g = double(row.b_g()) + double(row.b_g_low());
    const double b_m = double(row.b_m()) + double(row.b_m_low()), x0 = x[0];
    double e = mul_add(b_m, double(x[1]), mul_add(b_g, double(x[n - 1]), b_0 * x0));
    const double most = x0 - double(row.clip_min()), least = x0 - double(row.clip_max());
    inside = !(e > most || e < least);
    e = e > most ? most : e;
    return e < least ? least : e;
  }
  // de / dm inside the clip range.
  template <class R>
  DC_HD static R slope(const R* c) {
    const VlbRow row(c);
    return R(double(row.b_m()) + double(row.b_m_low()));
  }
  // log β̃ - log σ², where σ² is the variance of p; only -log σ² if there is no β̃.
  template <class R>
  DC_HD static R log_ratio(const R* c, const R* x) {
    const VlbRow row(c);
    if constexpr (kLearned)
      return mul_add(-row.d_v(), x[2], row.d_0()) + row.d_low();
    else
      return row.d_0();
  }
};

// The decoder term: minus the log-mass of N(x_0 - e, σ²) in the bin of x_0.
template <bool kLearned>
struct DecoderTerm : BoundError<kLearned> {
  using Base = BoundError<kLearned>;
  static constexpr int n_in = Base::n, n_sum = 1;
  struct BinInputs {
    double x[3];
    bool inside;
    template <class R>
    DC_HD BinInputs(const R* c, const R* in) {
      x[0] = in[0];
      x[1] = x[0] - Base::error(c, in, inside);
      x[2] = -0.5 * double(Base::log_ratio(c, in));
    }
  };
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    const BinInputs bin_inputs(c, x);
    double log_likelihood;
    DiscretizedGaussianLogLikelihood::apply<double>(nullptr, bin_inputs.x, &log_likelihood);
    y[0] = R(-log_likelihood);
  }
};

template <bool kLearned>
struct VlbTerm : BoundError<kLearned> {
  using Base = BoundError<kLearned>;
  using Other = DecoderTerm<kLearned>;
  static constexpr const char* name = kLearned ? "vlb_term_learned" : "vlb_term";
  static constexpr int n_in = Base::n, n_sum = 1;
  static constexpr unsigned hooks = kOther | kFinalizeSum;
  template <class R>
  DC_HD static bool other(const R* c) {
    return VlbRow(c).decoder() != R(0);
  }
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    [[maybe_unused]] const VlbRow row(c);
    bool inside;
    const R e = R(Base::error(c, x, inside));
    if constexpr (kLearned) {
      const R d = Base::log_ratio(c, x);
      const HalfExpm1<R> half(d);
      const R kl_part = row.kl() != R(0) ? half.minus_d : R(-0.5) * d;
      const R square = row.factor() * e * e;
      y[0] = mul_add(square, exp_times(d, square), kl_part);
    } else {
      y[0] = e * e;
    }
  }
  template <class R>
  DC_HD static double finalize_sum(const R* c, double total, double n) {
    const VlbRow row(c);
    const double factor = kLearned ? 1.0 : double(row.factor());
    return double(row.scale()) * (factor * total + n * double(row.offset()));
  }
};

// Coefficients: those of the term, then g of each sample. Outputs: dm, [dv].
template <bool kLearned>
struct DecoderTermBackward : BoundError<kLearned> {
  using Base = BoundError<kLearned>;
  static constexpr int n_in = Base::n, n_out = 1 + kLearned, n_coef = Base::n_coef + 1;
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    const typename DecoderTerm<kLearned>::BinInputs bin_inputs(c, x);
    double of[2];  // the mean, the log-scale
    DiscretizedGradient<false>::apply<double>(1.0, bin_inputs.x, of);
    const VlbRow row(c);
    const R g = c[Base::n_coef] * row.scale();
    y[0] = bin_inputs.inside ? g * R(of[0]) * Base::slope(c) : R(0);
    if constexpr (kLearned) y[1] = R(-0.5) * g * row.d_v() * R(of[1]);
  }
};

template <bool kLearned>
struct VlbTermBackward : BoundError<kLearned> {
  using Base = BoundError<kLearned>;
  using Other = DecoderTermBackward<kLearned>;
  static constexpr const char* name = kLearned ? "vlb_term_learned_backward" : "vlb_term_backward";
  static constexpr unsigned hooks = kOther;
  static constexpr int n_in = Base::n, n_out = 1 + kLearned, n_coef = Base::n_coef + 1;
  template <class R>
  DC_HD static bool other(const R* c) {
    return VlbRow(c).decoder() != R(0);
  }
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    bool inside;
    const R e = R(Base::error(c, x, inside));
    const VlbRow row(c);
    const R g = c[Base::n_coef] * row.scale();
    R slope = R(2) * row.factor() * e;
    if constexpr (kLearned) {
      const R d = Base::log_ratio(c, x), square = row.factor() * e * e;
      const R ratio = ((square == R(0)) & (d > R(0))) ? R(0) : exp(d);
      const HalfExpm1<R> half(d);
      const R kl_part = row.kl() != R(0) ? half.plain : R(-0.5);
      y[1] = -g * row.d_v() * mul_add(square, ratio, kl_part);
      slope *= ratio;
    }
    y[0] = inside ? g * slope * Base::slope(c) : R(0);
  }
};

// Σ x² of each row, for the KL of q(x_T | x_0) to the standard normal.
struct PriorKl : OpBase {
  static constexpr const char* name = "prior_kl";
  static constexpr int n_in = 1, n_sum = 1, n_coef = 2;  // x_0; factor, offset
  static constexpr unsigned hooks = kFinalizeSum;
  template <class R>
  DC_HD static void apply(const R*, const R* x, R* y) {
    y[0] = x[0] * x[0];
  }
  template <class R>
  DC_HD static double finalize_sum(const R* c, double total, double n) {
    return double(c[0]) * total + n * double(c[1]);
  }
};

DC_KERNEL_NAMESPACE_END
