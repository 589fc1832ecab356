// One reverse step of any solver: m = m_u + w (m_c - m_u), x0 = clip(a_x x + a_m m),
// x' = c_x x + c_m m + c_0 x0 + Σ c_k h_k + c_z z, and, for the steps to come,
// h' = e_x x + e_m m + e_0 x0.   Instantiated per set of tensors it touches, never per option.
#pragma once

#include "core/math.h"

DC_KERNEL_NAMESPACE_BEGIN

enum StepCoef { kCx, kCm, kC0, kCz, kAx, kAm, kClipMin, kClipMax, kGuidance, kStepCoefs };

struct StepName {
  char text[48];
  constexpr StepName(bool guided, int history, bool noisy) : text{} {
    int n = 0;
    const char digits[] = {'_', 'h', char('0' + history), 0};
    const char* const parts[] = {"reverse_step", guided ? "_guided" : "", history ? digits : "",
                                 noisy ? "_noise" : ""};
    for (const char* part : parts)
      for (; *part; ++part) text[n++] = *part;
  }
};

// Inputs: x, m (or m_c), [m_u], [h_1, ...], [z]; outputs: x', [h']. Coefficients: StepCoef, then
// c_1 ... c_kHistory, e_x, e_m, e_0 where there is history.
template <bool kGuided, int kHistory, bool kNoisy>
struct ReverseStep {
  static constexpr StepName kName{kGuided, kHistory, kNoisy};
  static constexpr const char* name = kName.text;
  static constexpr int n_in = 2 + kGuided + kHistory + kNoisy, n_out = kHistory ? 2 : 1, n_sum = 0;
  static constexpr int n_coef = kStepCoefs + (kHistory ? kHistory + 3 : 0);

  // c_x x + c_m m + c_0 x0. Where m has no part of its own, one that overflowed to infinity is met
  // by the clip, not by 0 · inf.
  template <class R>
  DC_HD static R mix(R c_x, R c_m, R c_0, R x, R m, R x0) {
    const R rest = c_m == R(0) ? c_0 * x0 : mul_add(c_m, m, c_0 * x0);
    return mul_add(c_x, x, rest);
  }
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    const R m = kGuided ? mul_add(c[kGuidance], x[1] - x[2], x[2]) : x[1];
    const R x0 = clamp(mul_add(c[kAx], x[0], c[kAm] * m), c[kClipMin], c[kClipMax]);
    R next = mix(c[kCx], c[kCm], c[kC0], x[0], m, x0);
    DC_UNROLL
    for (int k = 0; k < kHistory; ++k) next = mul_add(c[kStepCoefs + k], x[2 + kGuided + k], next);
    if constexpr (kHistory > 0) {
      const R* e = c + kStepCoefs + kHistory;
      y[1] = mix(e[0], e[1], e[2], x[0], m, x0);
    }
    y[0] = kNoisy ? mul_add(c[kCz], x[n_in - 1], next) : next;
  }
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
