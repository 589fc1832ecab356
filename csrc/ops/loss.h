// Denoising losses: weighted squared error to a target, summed over each row and scaled by weight /
// n.
#pragma once

#include "core/math.h"

DC_KERNEL_NAMESPACE_BEGIN

struct TargetLoss {  // weight · Σ (m - target)² / n
  static constexpr const char* name = "target_loss";
  static constexpr int n_in = 2, n_out = 0, n_sum = 1, n_coef = 2;  // m, target; weight, 1/n
  template <class R>
  DC_HD static void apply(const R*, const R* x, R* y) {
    R error = x[0] - x[1];
    y[0] = error * error;
  }
  template <class R>
  DC_HD static R sum_scale(const R* c) {
    return c[0] * c[1];
  }
};
struct TargetLossBackward {  // dm = 2 g weight (m - target) / n
  static constexpr const char* name = "target_loss_backward";
  static constexpr int n_in = 2, n_out = 1, n_sum = 0, n_coef = 3;  // m, target; weight, 1/n, g
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    y[0] = R(2) * c[2] * c[0] * c[1] * (x[0] - x[1]);
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
struct MixedTargetLossBackward {
  static constexpr const char* name = "mixed_target_loss_backward";
  static constexpr int n_in = 3, n_out = 1, n_sum = 0,
                       n_coef = 5;  // m, x_0, ε; weight, 1/n, a, b, g
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    y[0] = R(2) * c[4] * c[0] * c[1] * MixedTargetLoss::error(c, x);
  }
};

DC_KERNEL_NAMESPACE_END
