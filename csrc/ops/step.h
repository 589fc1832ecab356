// One reverse step of any solver: m = m_u + w (m_c - m_u), x0 = clip(a_x x + a_m m),
// x' = c_x x + c_m m + c_0 x0 + Σ c_k h_k + c_z z, and, for the steps to come,
// h' = e_x x + e_m m + e_0 x0.   Instantiated per set of tensors it touches, never per option.
#pragma once

#include <math.h>

#include "core/math.h"

DC_KERNEL_NAMESPACE_BEGIN

// Guidance and threshold, then columns of a solver's table: as many as an instance needs.
enum StepCoef {
  kGuidance,
  kThreshold,
  kCx,
  kCm,
  kC0,
  kCz,
  kAx,
  kAm,
  kClipMin,
  kClipMax,
  kEx,
  kEm,
  kE0,
  kC1
};
constexpr int kStepCoefs = kEx;

// A threshold s other than 0 clips to [-s, s] instead, and x0 counts divided by s.
template <int kCoefs, class R>
DC_HD void set_threshold(R* c) {
  const R s = c[kThreshold];
  if (s == R(0)) return;
  c[kClipMin] = -s;
  c[kClipMax] = s;
  c[kC0] /= s;
  if (kCoefs > kE0) c[kE0] /= s;
}

// What every step has in common. Inputs begin with x, m (or m_c), [m_u].
template <bool kGuided>
struct Prediction {
  static constexpr int n = 2 + kGuided;

  template <class R>
  DC_HD static R output(const R* c, const R* x) {
    return kGuided ? mul_add(c[kGuidance], x[1] - x[n - 1], x[n - 1]) : x[1];
  }
  template <class R>
  DC_HD static R said(const R* c, R x, R m) {
    return mul_add(c[kAx], x, c[kAm] * m);
  }
  template <class R>
  DC_HD static R x0(const R* c, R x, R m) {
    return clamp(said(c, x, m), c[kClipMin], c[kClipMax]);
  }
  // b_x x + b_m m + b_0 x0. Where m has no part of its own, one that overflowed to infinity is met
  // by the clip, not by 0 · inf.
  template <class R>
  DC_HD static R mix(R b_x, R b_m, R b_0, R x, R m, R x0) {
    const R rest = b_m == R(0) ? b_0 * x0 : mul_add(b_m, m, b_0 * x0);
    return mul_add(b_x, x, rest);
  }
  template <class R>
  DC_HD static R mean(const R* c, const R* x) {
    const R m = output(c, x);
    return mix(c[kCx], c[kCm], c[kC0], x[0], m, x0(c, x[0], m));
  }
  // How b_x x + b_m m + b_0 x0 changes with x and with m: the clip passes nothing outside.
  template <class R>
  struct Slope {
    R x, m;
    DC_HD Slope(const R* c, const R* in, R b_x, R b_m, R b_0) {
      const R x0 = said(c, in[0], output(c, in));
      const R through = x0 < c[kClipMin] || x0 > c[kClipMax] ? R(0) : b_0;
      x = mul_add(through, c[kAx], b_x);
      m = mul_add(through, c[kAm], b_m);
    }
    DC_HD Slope(const R* c, const R* in) : Slope(c, in, c[kCx], c[kCm], c[kC0]) {}
  };
  // The gradient of m as that of m, or of m_c and m_u.
  template <class R>
  DC_HD static void spread(const R* c, R dm, R* y) {
    y[0] = kGuided ? c[kGuidance] * dm : dm;
    if (kGuided) y[kGuided] = dm - c[kGuidance] * dm;
  }
};

enum StepNoise { kStill, kNoisy, kLearnedNoise };

struct StepName {
  char text[48];
  constexpr StepName(bool guided, int history, bool keeps, StepNoise noise) : text{} {
    int n = 0;
    const char digits[] = {'_', 'h', char('0' + history), 0};
    const char* const parts[] = {"reverse_step",
                                 guided ? "_guided" : "",
                                 history ? digits : "",
                                 keeps ? "_keep" : "",
                                 noise == kLearnedNoise ? "_learned" : "",
                                 noise != kStill ? "_noise" : ""};
    for (const char* part : parts)
      for (; *part; ++part) text[n++] = *part;
  }
};

// Inputs: x, m (or m_c), [m_u], [h_1, ...], [v], [z]; outputs: x', [h'].
// Learned: the noise is c_z exp(s_0 + s_v v) z; s_0 and s_v come after the table's columns.
template <bool kGuided, int kHistory, bool kKeeps, StepNoise kNoise>
struct ReverseStep {
  using P = Prediction<kGuided>;
  static constexpr StepName kName{kGuided, kHistory, kKeeps, kNoise};
  static constexpr const char* name = kName.text;
  static constexpr int n_in = P::n + kHistory + kNoise, n_out = 1 + kKeeps, n_sum = 0;
  static constexpr int kColumns = kHistory || kKeeps ? kC1 + kHistory : kStepCoefs;
  static constexpr int n_coef = kColumns + (kNoise == kLearnedNoise ? 2 : 0);

  template <class R>
  DC_HD static void prepare(R* c) {
    set_threshold<n_coef>(c);
  }
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    const R m = P::output(c, x), x0 = P::x0(c, x[0], m);
    R next = P::mix(c[kCx], c[kCm], c[kC0], x[0], m, x0);
    DC_UNROLL
    for (int k = 0; k < kHistory; ++k) {
      const R c_k = c[kC1 + k];  // 0: h_k is not read, whatever it holds
      next = c_k == R(0) ? next : mul_add(c_k, x[P::n + k], next);
    }
    if constexpr (kNoise == kNoisy) next = mul_add(c[kCz], x[n_in - 1], next);
    if constexpr (kNoise == kLearnedNoise) {
      const R deviation = c[kCz] * exp(mul_add(c[kColumns + 1], x[n_in - 2], c[kColumns]));
      next = mul_add(deviation, x[n_in - 1], next);
    }
    if constexpr (kKeeps) y[1] = P::mix(c[kEx], c[kEm], c[kE0], x[0], m, x0);
    y[0] = next;
  }
};

// Inputs: g, [g_h], x, m (or m_c), [m_u]; outputs: dx, dm (or dm_c), [dm_u].
template <bool kGuided, bool kKeeps>
struct ReverseStepBackward {
  using P = Prediction<kGuided>;
  static constexpr const char* name =
      kGuided  ? kKeeps ? "reverse_step_guided_keep_backward" : "reverse_step_guided_backward"
      : kKeeps ? "reverse_step_keep_backward"
               : "reverse_step_backward";
  static constexpr int kFirst = 1 + kKeeps;
  static constexpr int n_in = kFirst + P::n, n_out = P::n, n_sum = 0;
  static constexpr int n_coef = kKeeps ? kC1 : kStepCoefs;
  template <class R>
  DC_HD static void prepare(R* c) {
    set_threshold<n_coef>(c);
  }
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    using Slope = typename P::template Slope<R>;
    const Slope slope(c, x + kFirst);
    R dx = x[0] * slope.x, dm = x[0] * slope.m;
    if constexpr (kKeeps) {
      const Slope kept(c, x + kFirst, c[kEx], c[kEm], c[kE0]);
      dx = mul_add(x[1], kept.x, dx);
      dm = mul_add(x[1], kept.m, dm);
    }
    y[0] = dx;
    P::spread(c, dm, y + 1);
  }
};

// log N(x'; mean, c_z² I) of a step, summed over a sample; 0 where there is no noise, and so no
// density. Inputs: x, m (or m_c), [m_u], x'.
template <bool kGuided>
struct StepLogProb {
  using P = Prediction<kGuided>;
  static constexpr const char* name = kGuided ? "step_log_prob_guided" : "step_log_prob";
  static constexpr int n_in = P::n + 1, n_out = 0, n_sum = 1, n_coef = kStepCoefs;
  template <class R>
  DC_HD static void prepare(R* c) {
    set_threshold<n_coef>(c);
  }
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    const R z = (x[n_in - 1] - P::mean(c, x)) / c[kCz];
    y[0] = z * z;
  }
  template <class R>
  DC_HD static double finish(const R* c, double total, double n) {
    constexpr double kLogTwoPi = 1.8378770664093454836;
    const double deviation = c[kCz];
    return deviation == 0 ? 0 : 0 - (0.5 * (total + n * kLogTwoPi) + n * ::log(deviation));
  }
};

// Coefficients: and g, of each sample. Outputs: dm (or dm_c), [dm_u]; all: dx, those, dx'.
template <bool kGuided, bool kAll>
struct StepLogProbBackward {
  using P = Prediction<kGuided>;
  static constexpr const char* name =
      kGuided ? kAll ? "step_log_prob_guided_backward_all" : "step_log_prob_guided_backward"
      : kAll  ? "step_log_prob_backward_all"
              : "step_log_prob_backward";
  static constexpr int n_in = P::n + 1, n_out = 1 + kGuided + 2 * kAll, n_sum = 0;
  static constexpr int n_coef = kStepCoefs + 1;
  template <class R>
  DC_HD static void prepare(R* c) {
    set_threshold<n_coef>(c);
  }
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    const typename P::template Slope<R> slope(c, x);
    const R z = (x[n_in - 1] - P::mean(c, x)) / c[kCz];
    const R dmean = c[kCz] == R(0) ? R(0) : c[kStepCoefs] * z / c[kCz];
    P::spread(c, dmean * slope.m, y + kAll);
    if constexpr (kAll) {
      y[0] = dmean * slope.x;
      y[n_out - 1] = -dmean;
    }
  }
};

DC_KERNEL_NAMESPACE_END
