// Diagonal Gaussians in (mean, log-variance): KL, negative log-likelihood, reparameterization. In
// nats.
#pragma once

#include "ops/family.h"

DC_KERNEL_NAMESPACE_BEGIN

// KL(N1 || N2) = ½ [ expm1(d) - d + (mean1 - mean2)² e^{-logvar2} ],  d = logvar1 - logvar2
struct NormalKl : OpBase {
  static constexpr const char* name = "normal_kl";
  static constexpr int n_in = 4, n_out = 1;  // mean1, logvar1, mean2, logvar2
  template <class R>
  DC_HD static void apply(const R*, const R* x, R* y) {
    R delta = x[0] - x[2];
    R square = R(0.5) * delta * delta;
    y[0] = mul_add(square, exp_times(-x[3], square), HalfExpm1<R>(x[1] - x[3]).minus_d);
  }
};

// The gradient of (mean1, logvar1), of (mean2, logvar2), or of all four.
enum class Sides { kBoth, kFirst, kSecond };

template <Sides kSides>
struct NormalKlGradient {
  using Term = NormalKl;
  static constexpr const char* variant = kSides == Sides::kBoth    ? ""
                                         : kSides == Sides::kFirst ? "_first"
                                                                   : "_second";
  static constexpr int n_in = 4, n_out = kSides == Sides::kBoth ? 4 : 2;
  template <class R>
  DC_HD static void apply(R g, const R* x, R* y) {
    R delta = x[0] - x[2];
    R scaled = times_exp(delta, -x[3]);
    R excess = HalfExpm1<R>(x[1] - x[3]).plain;
    if constexpr (kSides != Sides::kSecond) {
      y[0] = g * scaled;
      y[1] = g * excess;
    }
    if constexpr (kSides != Sides::kFirst) {
      y[n_out - 2] = -g * scaled;
      y[n_out - 1] = -g * mul_add(R(0.5) * delta, scaled, excess);
    }
  }
};

// KL(N || N(0, 1)) = ½ [ mean² + expm1(logvar) - logvar ]
struct StandardNormalKl : OpBase {
  static constexpr const char* name = "standard_normal_kl";
  static constexpr int n_in = 2, n_out = 1;  // mean, logvar
  template <class R>
  DC_HD static void apply(const R*, const R* x, R* y) {
    y[0] = mul_add(R(0.5) * x[0], x[0], HalfExpm1<R>(x[1]).minus_d);
  }
};
struct StandardNormalKlGradient {
  using Term = StandardNormalKl;
  static constexpr const char* variant = "";
  static constexpr int n_in = 2, n_out = 2;
  template <class R>
  DC_HD static void apply(R g, const R* x, R* y) {
    y[0] = g * x[0];
    y[1] = g * HalfExpm1<R>(x[1]).plain;
  }
};

// -log N(x; mean, e^logvar) = ½ [ log 2π + logvar + (x - mean)² e^{-logvar} ]
struct GaussianNll : OpBase {
  static constexpr const char* name = "gaussian_nll";
  static constexpr int n_in = 3, n_out = 1;  // x, mean, logvar
  template <class R>
  DC_HD static void apply(const R*, const R* x, R* y) {
    R delta = x[0] - x[1];
    R square = delta * delta;
    y[0] = R(0.5) * mul_add(square, exp_times(-x[2], square), R(kLogTwoPi) + x[2]);
  }
};
template <bool kOfX>
struct GaussianNllGradient {  // of (mean, logvar), or of (x, mean, logvar)
  using Term = GaussianNll;
  static constexpr const char* variant = kOfX ? "" : "_parameters";
  static constexpr int n_in = 3, n_out = 2 + kOfX;
  template <class R>
  DC_HD static void apply(R g, const R* x, R* y) {
    R delta = x[0] - x[1];
    R scaled = times_exp(delta, -x[2]);
    if (kOfX) y[0] = g * scaled;
    y[n_out - 2] = -g * scaled;
    y[n_out - 1] = R(0.5) * g * mul_add(-delta, scaled, R(1));
  }
};

// z = mean + e^{logvar / 2} ε
struct Reparameterize : OpBase {
  static constexpr const char* name = "reparameterize";
  static constexpr int n_in = 3, n_out = 1;  // mean, logvar, ε
  template <class R>
  DC_HD static void apply(const R*, const R* x, R* y) {
    y[0] = mul_add(exp(R(0.5) * x[1]), x[2], x[0]);
  }
};
// Inputs: g, logvar, ε; output: dlogvar (dmean is g itself).
struct ReparameterizeBackward : OpBase {
  static constexpr const char* name = "reparameterize_backward";
  static constexpr int n_in = 3, n_out = 1;
  template <class R>
  DC_HD static void apply(const R*, const R* x, R* y) {
    y[0] = R(0.5) * x[0] * exp(R(0.5) * x[1]) * x[2];
  }
};

// The reparameterized sample and, in the same pass, the KL of each row to the standard normal.
struct ReparameterizeKl : OpBase {
  static constexpr const char* name = "reparameterize_kl";
  static constexpr int n_in = 3, n_out = 1, n_sum = 1;  // mean, logvar, ε
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    Reparameterize::apply(c, x, y);
    StandardNormalKl::apply(c, x, y + 1);
  }
};
// Inputs: mean, logvar, g_z, ε; coefficient: g_kl; outputs: dmean, dlogvar.
struct ReparameterizeKlBackward : OpBase {
  static constexpr const char* name = "reparameterize_kl_backward";
  static constexpr int n_in = 4, n_out = 2, n_coef = 1;
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    R noise_part = R(0.5) * x[2] * exp(R(0.5) * x[1]) * x[3];
    y[0] = mul_add(c[0], x[0], x[2]);
    y[1] = mul_add(c[0], HalfExpm1<R>(x[1]).plain, noise_part);
  }
};

DC_KERNEL_NAMESPACE_END
