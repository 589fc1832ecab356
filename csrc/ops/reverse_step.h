// One reverse step of any solver: m = m_u + w (m_c - m_u), x0 = clip(a_x x + a_m m),
// x' = c_x x + c_m m + c_0 x0 + c_z z.   Instantiated per set of tensors it reads, never per
// option.
#pragma once

#include "core/math.h"

DC_KERNEL_NAMESPACE_BEGIN

enum StepCoef { kCx, kCm, kC0, kCz, kAx, kAm, kClipMin, kClipMax, kGuidance, kStepCoefs };

template <bool kGuided, bool kNoisy>
struct ReverseStepBase {  // inputs: x, m (or m_c), [m_u], [z]
  static constexpr int n_in = 2 + kGuided + kNoisy, n_out = 1, n_sum = 0, n_coef = kStepCoefs;
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    R m = kGuided ? mul_add(c[kGuidance], x[1] - x[2], x[2]) : x[1];
    R x0 = clamp(mul_add(c[kAx], x[0], c[kAm] * m), c[kClipMin], c[kClipMax]);
    // Where m has no part of its own, one that overflowed to infinity is met by the clip, not by 0
    // · inf.
    R rest = c[kCm] == R(0) ? c[kC0] * x0 : mul_add(c[kCm], m, c[kC0] * x0);
    R next = mul_add(c[kCx], x[0], rest);
    y[0] = kNoisy ? mul_add(c[kCz], x[n_in - 1], next) : next;
  }
};

struct ReverseStep : ReverseStepBase<false, false> {
  static constexpr const char* name = "reverse_step";
};
struct ReverseStepNoise : ReverseStepBase<false, true> {
  static constexpr const char* name = "reverse_step_noise";
};
struct ReverseStepGuided : ReverseStepBase<true, false> {
  static constexpr const char* name = "reverse_step_guided";
};
struct ReverseStepGuidedNoise : ReverseStepBase<true, true> {
  static constexpr const char* name = "reverse_step_guided_noise";
};

template <bool kGuided>
struct ReverseStepBackwardBase {  // inputs: g, x, m (or m_c), [m_u]; outputs: dx, dm (or dm_c),
                                  // [dm_u]
  static constexpr int n_in = 3 + kGuided, n_out = 2 + kGuided, n_sum = 0, n_coef = kStepCoefs;
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    R m = kGuided ? mul_add(c[kGuidance], x[2] - x[3], x[3]) : x[2];
    R x0 = mul_add(c[kAx], x[1], c[kAm] * m);
    R through = x0 < c[kClipMin] || x0 > c[kClipMax]
                    ? R(0)
                    : c[kC0];  // the clip passes no gradient outside
    R dm = x[0] * mul_add(through, c[kAm], c[kCm]);
    y[0] = x[0] * mul_add(through, c[kAx], c[kCx]);
    y[1] = kGuided ? c[kGuidance] * dm : dm;
    if (kGuided) y[n_out - 1] = dm - c[kGuidance] * dm;
  }
};

struct ReverseStepBackward : ReverseStepBackwardBase<false> {
  static constexpr const char* name = "reverse_step_backward";
};
struct ReverseStepGuidedBackward : ReverseStepBackwardBase<true> {
  static constexpr const char* name = "reverse_step_guided_backward";
};

DC_KERNEL_NAMESPACE_END
