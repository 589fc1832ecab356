// The threshold of dynamic thresholding: a quantile of |x0| over each sample, before the clip of a
// reverse step, clamped to [1, maximum].
#pragma once

#include "ops/step.h"

DC_KERNEL_NAMESPACE_BEGIN

// Inputs: x, m (or m_c), [m_u]. Coefficients: the first kStepCoefs of StepRow, ratio, maximum.
template <bool kGuided>
struct X0Quantile : OpBase {
  using P = Prediction<kGuided>;
  static constexpr const char* name = kGuided ? "x0_quantile_guided" : "x0_quantile";
  static constexpr int n_in = P::n, n_sum = 1, n_coef = kStepCoefs + 2;
  static constexpr int ratio = kStepCoefs;
  static constexpr unsigned hooks = kSelect;
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    y[0] = P::predicted_x0(c, x[0], P::output(c, x));
  }
  DC_HD static double selected(const double* c, double quantile) {
    return clamp(quantile, 1.0, c[n_coef - 1]);
  }
};

DC_KERNEL_NAMESPACE_END
