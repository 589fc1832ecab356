// Linear maps: q_sample, training targets, conversions between predictions, and their gradients.
#pragma once

#include "core/op.h"

DC_KERNEL_NAMESPACE_BEGIN

struct Scale : OpBase {  // y = a x
  static constexpr const char* name = "scale";
  static constexpr int n_in = 1, n_out = 1, n_coef = 1;
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    y[0] = c[0] * x[0];
  }
};

struct ScaleTwice : OpBase {  // y_0 = a x, y_1 = b x: both gradients of a x_0 + b x_1
  static constexpr const char* name = "scale_twice";
  static constexpr int n_in = 1, n_out = 2, n_coef = 2;
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    y[0] = c[0] * x[0];
    y[1] = c[1] * x[0];
  }
};

struct LinearCombination : OpBase {  // y = a x_0 + b x_1
  static constexpr const char* name = "linear_combination";
  static constexpr int n_in = 2, n_out = 1, n_coef = 2;
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    y[0] = mul_add(c[0], x[0], c[1] * x[1]);
  }
};

// y_0 = a x_0 + b x_1, y_1 = c x_0 + d x_1: x_t and its training target.
struct LinearPair : OpBase {
  static constexpr const char* name = "linear_pair";
  static constexpr int n_in = 2, n_out = 2, n_coef = 4;
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    LinearCombination::apply(c, x, y);
    // With c = 0 (the target ε) an infinite x_0 must not give NaN.
    y[1] = c[2] == R(0) ? c[3] * x[1] : mul_add(c[2], x[0], c[3] * x[1]);
  }
};

// x where the mask q is 1, the known samples at the level (alpha, sigma) where it is 0, and both by
// their shares between: y = q x + (1 - q) (alpha known + sigma z). At 0 and 1 the other side is
// dropped, so an infinite or NaN value of it has no effect there.
struct Blend : OpBase {
  static constexpr const char* name = "blend";
  static constexpr int n_in = 4, n_out = 1, n_coef = 2;  // x, q, known, z; alpha, sigma
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    R noised;
    LinearCombination::apply(c, x + 2, &noised);
    const R q = x[1];
    const R mixed = mul_add(q, x[0], (R(1) - q) * noised);
    y[0] = blend(q == R(1), x[0], blend(q == R(0), noised, mixed));
  }
};

struct Randn : OpBase {  // the noise itself
  static constexpr const char* name = "randn";
  static constexpr int n_in = 1, n_out = 1;
  template <class R>
  DC_HD static void apply(const R*, const R* x, R* y) {
    y[0] = x[0];
  }
};

DC_KERNEL_NAMESPACE_END
