// Denoising losses: weighted squared error to a target, summed over each row and scaled by weight /
// n. If a gradient is needed, the same pass computes it for the expected upstream gradient, and
// Rescale corrects it if the upstream gradient differs. An expected gradient of 0 stands for
// unknown (float16, where the product of weight and gradient may overflow or underflow): the pass
// then stores the error, from which Rescale computes the gradient.
#pragma once

#include "core/op.h"
#include "noise/philox.h"

DC_KERNEL_NAMESPACE_BEGIN

template <class Target>
struct SquaredError : OpBase {  // weight · Σ (m - target)² / n
  static constexpr unsigned hooks = kFinalizeSum;
  template <class R>
  DC_HD static R error(const R* c, const R* x) {
    return x[0] - Target::target(c, x);
  }
  // Times the mask, where there is one.
  template <class R>
  DC_HD static R masked(const R*, R error) {
    return error;
  }
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    y[0] = error(c, x) * error(c, x);
  }
  template <class R>
  DC_HD static double finalize_sum(const R* c, double total, double) {
    return total * double(c[0] * c[1]);
  }
};

struct TargetLoss : SquaredError<TargetLoss> {
  static constexpr const char* name = "target_loss";
  static constexpr int n_in = 2, n_sum = 1, n_coef = 2;  // m, target; weight, 1/n
  template <class R>
  DC_HD static R target(const R*, const R* x) {
    return x[1];
  }
};

struct MixedTargetLoss : SquaredError<MixedTargetLoss> {  // the target is a x_0 + b ε
  static constexpr const char* name = "mixed_target_loss";
  static constexpr int n_in = 3, n_sum = 1, n_coef = 4;  // m, x_0, ε; weight, 1/n, a, b
  template <class R>
  DC_HD static R target(const R* c, const R* x) {
    return mul_add(c[2], x[1], c[3] * x[2]);
  }
};

// weight · Σ q (m - target)² · scale, with 1/n or 1/Σq for the scale. Where the mask q is 0 nothing
// else is used, so an infinite or NaN value there has no effect.
struct MaskedLoss : SquaredError<MaskedLoss> {
  static constexpr const char* name = "masked_loss";
  static constexpr int n_in = 4, n_sum = 1, n_coef = 4;  // m, x_0, ε, q; weight, scale, a, b
  template <class R>
  DC_HD static R unmasked_error(const R* c, const R* x) {
    // With a = 0 (the target is one tensor, given twice) an infinite one must not give NaN.
    const R noise = c[3] * x[2];
    const R target = c[2] == R(0) ? noise : mul_add(c[2], x[1], noise);
    return x[0] - target;
  }
  template <class R>
  DC_HD static R error(const R* c, const R* x) {
    return blend(x[3] == R(0), R(0), unmasked_error(c, x));
  }
  template <class R>
  DC_HD static R masked(const R* x, R error) {
    return x[3] * error;
  }
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    const R e = error(c, x);
    y[0] = masked(x, e) * e;
  }
};

template <class Loss>
struct WithGradient : OpBase {  // also 2 weight slope (m - target), slope = expected gradient / n
  static constexpr KernelName kName{Loss::name, "_gradient"};
  static constexpr const char* name = kName.text;
  static constexpr int n_in = Loss::n_in, n_out = 1, n_sum = 1, n_coef = Loss::n_coef + 1;
  static constexpr unsigned hooks = kFinalizeSum;
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    const R error = Loss::error(c, x), masked = Loss::masked(x, error);
    const R slope = c[n_coef - 1];
    y[0] = slope == R(0) ? masked : R(2) * c[0] * slope * masked;
    y[1] = masked * error;
  }
  template <class R>
  DC_HD static double finalize_sum(const R* c, double total, double n) {
    return Loss::finalize_sum(c, total, n);
  }
};

// The square root of a number in [1, 2^60] and a / b for such a b, without the code that CUDA adds
// for all other numbers, which is most of a kernel.
template <class R>
DC_HD R root_above_one(R x) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(R) == 4)
    return short_sqrt(x);
  else
    return ::sqrt(x);
#else
  if constexpr (sizeof(R) == 4)
    return __builtin_sqrtf(x);
  else
    return __builtin_sqrt(x);
#endif
}
template <class R>
DC_HD R ratio_above_one(R a, R b) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(R) == 4) return __fdividef(a, b);
#endif
  return a / b;
}

// weight · Σ ρ(m - target) / n for a ρ that is linear in errors e beyond δ, and its gradient:
//   2 δ (√(e² + δ²) - δ) = 2 δ |e| c / (r + 1), slope ± 2 δ c / r        pseudo-Huber
//   |e| - δ/2, or e² / 2δ where |e| < δ = c (|e| - δ c / 2), slope ± c   smooth L1
// with c = |e| / δ and r = √(1 + c²), so that nothing cancels. c is limited: in the first where r is
// c and 1 rounded, so that nothing overflows either, in the second to 1.
struct RobustLossGradient : OpBase {
  static constexpr const char* name = "robust_loss_gradient";
  // m, x_0, ε; weight, 1/n, a, b, δ, 1 for smooth L1 and 0 for pseudo-Huber, slope as below
  static constexpr int n_in = 3, n_out = 1, n_sum = 1, n_coef = 7;
  static constexpr unsigned hooks = kFinalizeSum;
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    constexpr R kLimit = sizeof(R) == 4 ? R(0x1p26) : R(0x1p55);
    const R e = MaskedLoss::unmasked_error(c, x), size = magnitude(e), delta = c[4];
    const bool smooth = c[5] != R(0);
    const R scaled = size * (R(1) / delta), limit = smooth ? R(1) : kLimit;
    const R part = scaled > limit ? limit : scaled;
    const R root = root_above_one(mul_add(part, part, R(1)));
    const R share = ratio_above_one(part, root * (root + R(1)));
    const R pseudo = R(2) * delta * (size * (share * root));
    y[1] = blend(smooth, part * mul_add(R(-0.5) * delta, part, size), pseudo);
    const R half = blend(smooth, R(0.5) * part, delta * (share * (root + R(1))));
    const R slope = c[6], factor = blend(slope == R(0), R(1), R(2) * c[0] * slope);
    y[0] = factor * (e < R(0) ? -half : half);
  }
  template <class R>
  DC_HD static double finalize_sum(const R* c, double total, double n) {
    return MaskedLoss::finalize_sum(c, total, n);
  }
};

// The gradient of m for the upstream gradient g. If g is the expected one, the input is already the
// gradient, and a row written in place does not change.
struct Rescale : OpBase {
  static constexpr const char* name = "rescale";
  static constexpr int n_in = 1, n_out = 1, n_coef = 4;  // weight, 1/n, g, expected
  static constexpr unsigned hooks = kPrepare | kIdle;
  template <class R>
  DC_HD static bool idle(const R* c) {
    return c[3] != R(0) && c[2] == c[3];
  }
  template <class R>
  DC_HD static void prepare(R* c) {  // c[0] becomes the factor
    const R factor = c[3] == R(0) ? R(2) * c[0] * c[1] * c[2] : c[2] / c[3];
    c[0] = idle(c) ? R(1) : factor;
  }
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    y[0] = c[0] * x[0];
  }
};

DC_KERNEL_NAMESPACE_END
