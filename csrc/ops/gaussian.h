// Diagonal Gaussians in (mean, log-variance): KL, negative log-likelihood, reparameterisation.
// Nats.
#pragma once

#include "core/math.h"

DC_KERNEL_NAMESPACE_BEGIN

// A term summed over each row: the same inputs, one sum in place of the output, times the
// coefficient `scale`.
template <class Term>
struct SumOf {
  static constexpr int n_in = Term::n_in, n_out = 0, n_sum = 1, n_coef = 1;
  template <class R>
  DC_HD static void apply(const R*, const R* x, R* y) {
    Term::template apply<R>(nullptr, x, y);
  }
  template <class R>
  DC_HD static R sum_scale(const R* c) {
    return c[0];
  }
};

// The gradient of a term: of the elementwise op, whose upstream gradient is the last input ...
template <class Gradient>
struct ElementwiseGradient {
  static constexpr int n_in = Gradient::n_in + 1, n_out = Gradient::n_out, n_sum = 0, n_coef = 0;
  template <class R>
  DC_HD static void apply(const R*, const R* x, R* y) {
    Gradient::template apply<R>(x[Gradient::n_in], x, y);
  }
};
// ... and of its sum, whose upstream gradient is a number per row times `scale`.
template <class Gradient>
struct SumGradient {
  static constexpr int n_in = Gradient::n_in, n_out = Gradient::n_out, n_sum = 0, n_coef = 2;
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    Gradient::template apply<R>(c[0] * c[1], x, y);
  }
};

// KL(N1 || N2) = ½ [ expm1(d) - d + (mean1 - mean2)² e^{-logvar2} ],  d = logvar1 - logvar2
struct NormalKl {
  static constexpr const char* name = "normal_kl";
  static constexpr int n_in = 4, n_out = 1, n_sum = 0,
                       n_coef = 0;  // mean1, logvar1, mean2, logvar2
  template <class R>
  DC_HD static void apply(const R*, const R* x, R* y) {
    R delta = x[0] - x[2];
    y[0] = mul_add(R(0.5) * delta * delta, exp(-x[3]), HalfExpm1<R>(x[1] - x[3]).minus_d);
  }
};

enum Sides { kFirst = 1, kSecond = 2, kBoth = 3 };

template <int kSides>
struct NormalKlGradient {  // of (mean1, logvar1), of (mean2, logvar2), or of all four
  static constexpr int n_in = 4, n_out = kSides == kBoth ? 4 : 2;
  template <class R>
  DC_HD static void apply(R g, const R* x, R* y) {
    R delta = x[0] - x[2];
    R scaled = delta * exp(-x[3]);
    R excess = HalfExpm1<R>(x[1] - x[3]).plain;
    if (kSides & kFirst) {
      y[0] = g * scaled;
      y[1] = g * excess;
    }
    if (kSides & kSecond) {
      y[n_out - 2] = -g * scaled;
      y[n_out - 1] = -g * mul_add(R(0.5) * delta, scaled, excess);
    }
  }
};

struct NormalKlSum : SumOf<NormalKl> {
  static constexpr const char* name = "normal_kl_sum";
};
struct NormalKlBackward : ElementwiseGradient<NormalKlGradient<kBoth>> {
  static constexpr const char* name = "normal_kl_backward";
};
struct NormalKlBackwardFirst : ElementwiseGradient<NormalKlGradient<kFirst>> {
  static constexpr const char* name = "normal_kl_backward_first";
};
struct NormalKlBackwardSecond : ElementwiseGradient<NormalKlGradient<kSecond>> {
  static constexpr const char* name = "normal_kl_backward_second";
};
struct NormalKlSumBackward : SumGradient<NormalKlGradient<kBoth>> {
  static constexpr const char* name = "normal_kl_sum_backward";
};
struct NormalKlSumBackwardFirst : SumGradient<NormalKlGradient<kFirst>> {
  static constexpr const char* name = "normal_kl_sum_backward_first";
};
struct NormalKlSumBackwardSecond : SumGradient<NormalKlGradient<kSecond>> {
  static constexpr const char* name = "normal_kl_sum_backward_second";
};

// KL(N || N(0, 1)) = ½ [ mean² + expm1(logvar) - logvar ]
struct StandardNormalKl {
  static constexpr const char* name = "standard_normal_kl";
  static constexpr int n_in = 2, n_out = 1, n_sum = 0, n_coef = 0;  // mean, logvar
  template <class R>
  DC_HD static void apply(const R*, const R* x, R* y) {
    y[0] = mul_add(R(0.5) * x[0], x[0], HalfExpm1<R>(x[1]).minus_d);
  }
};
struct StandardNormalKlGradient {
  static constexpr int n_in = 2, n_out = 2;
  template <class R>
  DC_HD static void apply(R g, const R* x, R* y) {
    y[0] = g * x[0];
    y[1] = g * HalfExpm1<R>(x[1]).plain;
  }
};
struct StandardNormalKlSum : SumOf<StandardNormalKl> {
  static constexpr const char* name = "standard_normal_kl_sum";
};
struct StandardNormalKlBackward : ElementwiseGradient<StandardNormalKlGradient> {
  static constexpr const char* name = "standard_normal_kl_backward";
};
struct StandardNormalKlSumBackward : SumGradient<StandardNormalKlGradient> {
  static constexpr const char* name = "standard_normal_kl_sum_backward";
};

// -log N(x; mean, e^logvar) = ½ [ log 2π + logvar + (x - mean)² e^{-logvar} ]
struct GaussianNll {
  static constexpr const char* name = "gaussian_nll";
  static constexpr int n_in = 3, n_out = 1, n_sum = 0, n_coef = 0;  // x, mean, logvar
  template <class R>
  DC_HD static void apply(const R*, const R* x, R* y) {
    constexpr double kLog2Pi = 1.8378770664093454836;
    R delta = x[0] - x[1];
    y[0] = R(0.5) * mul_add(delta * delta, exp(-x[2]), R(kLog2Pi) + x[2]);
  }
};
template <bool kOfX>
struct GaussianNllGradient {  // of (mean, logvar), or of (x, mean, logvar)
  static constexpr int n_in = 3, n_out = 2 + kOfX;
  template <class R>
  DC_HD static void apply(R g, const R* x, R* y) {
    R delta = x[0] - x[1];
    R scaled = delta * exp(-x[2]);
    if (kOfX) y[0] = g * scaled;
    y[n_out - 2] = -g * scaled;
    y[n_out - 1] = R(0.5) * g * mul_add(-delta, scaled, R(1));
  }
};
struct GaussianNllSum : SumOf<GaussianNll> {
  static constexpr const char* name = "gaussian_nll_sum";
};
struct GaussianNllBackward : ElementwiseGradient<GaussianNllGradient<true>> {
  static constexpr const char* name = "gaussian_nll_backward";
};
struct GaussianNllBackwardParameters : ElementwiseGradient<GaussianNllGradient<false>> {
  static constexpr const char* name = "gaussian_nll_backward_parameters";
};
struct GaussianNllSumBackward : SumGradient<GaussianNllGradient<true>> {
  static constexpr const char* name = "gaussian_nll_sum_backward";
};
struct GaussianNllSumBackwardParameters : SumGradient<GaussianNllGradient<false>> {
  static constexpr const char* name = "gaussian_nll_sum_backward_parameters";
};

// z = mean + e^{logvar / 2} ε
struct Reparameterize {
  static constexpr const char* name = "reparameterize";
  static constexpr int n_in = 3, n_out = 1, n_sum = 0, n_coef = 0;  // mean, logvar, ε
  template <class R>
  DC_HD static void apply(const R*, const R* x, R* y) {
    y[0] = mul_add(exp(R(0.5) * x[1]), x[2], x[0]);
  }
};
struct ReparameterizeBackward {  // inputs: g, logvar, ε; output: dlogvar (dmean is g itself)
  static constexpr const char* name = "reparameterize_backward";
  static constexpr int n_in = 3, n_out = 1, n_sum = 0, n_coef = 0;
  template <class R>
  DC_HD static void apply(const R*, const R* x, R* y) {
    y[0] = R(0.5) * x[0] * exp(R(0.5) * x[1]) * x[2];
  }
};

// The reparameterised sample and, in the same pass, the KL of each row to the standard normal.
struct ReparameterizeKl {
  static constexpr const char* name = "reparameterize_kl";
  static constexpr int n_in = 3, n_out = 1, n_sum = 1, n_coef = 0;  // mean, logvar, ε
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    Reparameterize::apply(c, x, y);
    StandardNormalKl::apply(c, x, y + 1);
  }
  template <class R>
  DC_HD static R sum_scale(const R*) {
    return R(1);
  }
};
struct ReparameterizeKlBackward {  // inputs: mean, logvar, g_z, ε; coefficient: g_kl; outputs:
                                   // dmean, dlogvar
  static constexpr const char* name = "reparameterize_kl_backward";
  static constexpr int n_in = 4, n_out = 2, n_sum = 0, n_coef = 1;
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    R spread = R(0.5) * x[2] * exp(R(0.5) * x[1]) * x[3];
    y[0] = mul_add(c[0], x[0], x[2]);
    y[1] = mul_add(c[0], HalfExpm1<R>(x[1]).plain, spread);
  }
};

DC_KERNEL_NAMESPACE_END
