// The threshold of dynamic thresholding: a quantile of |x0| over each sample, at least 1 and at
// most a given maximum.  x0 = a_x x + a_m m, m = m_u + w (m_c - m_u), as in a reverse step.
#pragma once

#include "core/math.h"

DC_KERNEL_NAMESPACE_BEGIN

enum ThresholdCoef {
  kThresholdAx,
  kThresholdAm,
  kThresholdGuidance,
  kThresholdRatio,
  kThresholdMax,
  kThresholdCoefs
};

template <bool kGuided>
struct X0Quantile {  // inputs: x, m (or m_c), [m_u]
  static constexpr const char* name = kGuided ? "x0_quantile_guided" : "x0_quantile";
  static constexpr int n_in = 2 + kGuided, n_out = 0, n_sum = 1, n_coef = kThresholdCoefs;
  static constexpr int ratio = kThresholdRatio;
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    const R m = kGuided ? mul_add(c[kThresholdGuidance], x[1] - x[n_in - 1], x[n_in - 1]) : x[1];
    y[0] = mul_add(c[kThresholdAx], x[0], c[kThresholdAm] * m);
  }
  DC_HD static double selected(const double* c, double quantile) {
    return clamp(quantile, 1.0, c[kThresholdMax]);
  }
};

DC_KERNEL_NAMESPACE_END
