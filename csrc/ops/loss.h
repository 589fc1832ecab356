// Denoising losses: weighted squared error to a target, summed over each row and scaled by weight / n.
// Where a gradient is wanted it is made in the same pass, as if the upstream gradient were the one
// expected; Rescale mends it where another comes.
#pragma once

#include "core/math.h"

DC_KERNEL_NAMESPACE_BEGIN

struct TargetLoss {  // weight · Σ (m - target)² / n
  static constexpr const char* name = "target_loss";
  static constexpr int n_in = 2, n_out = 0, n_sum = 1, n_coef = 2;  // m, target; weight, 1/n
  template <class R>
  DC_HD static R error(const R*, const R* x) {
    return x[0] - x[1];
  }
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    y[0] = error(c, x) * error(c, x);
  }
  template <class R>
  DC_HD static R sum_scale(const R* c) {
    return c[0] * c[1];
  }
};

struct MixedTargetLoss {  // the target is a x_0 + b ε
  static constexpr const char* name = "mixed_target_loss";
  static constexpr int n_in = 3, n_out = 0, n_sum = 1, n_coef = 4;  // m, x_0, ε; weight, 1/n, a, b
  template <class R>
  DC_HD static R error(const R* c, const R* x) {
    return x[0] - mul_add(c[2], x[1], c[3] * x[2]);
  }
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    y[0] = error(c, x) * error(c, x);
  }
  template <class R>
  DC_HD static R sum_scale(const R* c) {
    return c[0] * c[1];
  }
};

template <class Loss>
struct WithGradient {  // and dm = 2 weight slope (m - target), slope = expected gradient / n
  static constexpr int n_in = Loss::n_in, n_out = 1, n_sum = 1, n_coef = Loss::n_coef + 1;
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    const R error = Loss::error(c, x);
    y[0] = R(2) * c[0] * c[n_coef - 1] * error;
    y[1] = error * error;
  }
  template <class R>
  DC_HD static R sum_scale(const R* c) {
    return Loss::sum_scale(c);
  }
};
struct TargetLossGradient : WithGradient<TargetLoss> {
  static constexpr const char* name = "target_loss_gradient";
};
struct MixedTargetLossGradient : WithGradient<MixedTargetLoss> {
  static constexpr const char* name = "mixed_target_loss_gradient";
};

struct Rescale {  // y = x · g / expected: in place, nothing is touched where g is what was expected
  static constexpr const char* name = "rescale";
  static constexpr int n_in = 1, n_out = 1, n_sum = 0, n_coef = 2;  // x; g, expected
  template <class R>
  DC_HD static bool idle(const R* c) {
    return c[0] == c[1];
  }
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    y[0] = idle(c) ? x[0] : c[0] / c[1] * x[0];
  }
};

DC_KERNEL_NAMESPACE_END
