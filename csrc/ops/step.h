// One reverse step of any solver: m = m_u + g m_u + w (m_c - m_u), x0 = clip(a_x x + a_m m),
// x' = c_x x + c_m m + c_0 x0 + c_u m_u + Σ c_k h_k + c_z z, and, for later steps,
// h' = e_x x + e_m m + e_0 x0 + e_u m_u. Classifier-free guidance has g = 0; without guidance there
// is no m_u. Instantiated per set of tensors that it reads and writes, not per option.
#pragma once

#include <math.h>

#include "core/op.h"

DC_KERNEL_NAMESPACE_BEGIN

// The coefficients of a step by name: guidance (w, g, c_u, e_u) and threshold, then the columns of a
// solver table. An instance has the first kStepCoefs of them, or all up to c_k of its last history
// tensor.
template <class R>
struct StepRow {
  R* c;
  DC_HD explicit StepRow(R* c) : c(c) {}

  DC_HD R& guidance() const { return c[0]; }
  DC_HD R& gain() const { return c[1]; }
  DC_HD R& c_u() const { return c[2]; }
  DC_HD R& e_u() const { return c[3]; }
  DC_HD R& threshold() const { return c[4]; }
  DC_HD R& c_x() const { return c[5]; }
  DC_HD R& c_m() const { return c[6]; }
  DC_HD R& c_0() const { return c[7]; }
  DC_HD R& c_z() const { return c[8]; }
  DC_HD R& a_x() const { return c[9]; }
  DC_HD R& a_m() const { return c[10]; }
  DC_HD R& clip_min() const { return c[11]; }
  DC_HD R& clip_max() const { return c[12]; }
  DC_HD R& e_x() const { return c[13]; }
  DC_HD R& e_m() const { return c[14]; }
  DC_HD R& e_0() const { return c[15]; }
  DC_HD R& c_k(int k) const { return c[16 + k]; }  // of history k, counted from 0
};
// The names of the coefficients in their order, for Python.
constexpr const char* kStepColumns[] = {
    "guidance", "gain",     "c_u",      "e_u", "threshold", "c_x", "c_m", "c_0", "c_z", "a_x",
    "a_m",      "clip_min", "clip_max", "e_x", "e_m",       "e_0", "c_1", "c_2", "c_3"};
constexpr int kStepCoefs = 13;  // of a step without history
constexpr int kKeepCoefs = 16;  // of a step that keeps h' or has history; c_k follow
constexpr int kMaxHistory = 3;

// A threshold s other than 0 clips to [-s, s] instead, and divides x0 by s.
template <int kCoefs, class R>
DC_HD void set_threshold(R* c) {
  const StepRow<R> row(c);
  const R s = row.threshold();
  if (s == R(0)) return;
  row.clip_min() = -s;
  row.clip_max() = s;
  row.c_0() /= s;
  if constexpr (kCoefs >= kKeepCoefs) row.e_0() /= s;
}

// Formulas that all steps share. The first inputs are x, m (or m_c), [m_u].
template <bool kGuided>
struct Prediction {
  static constexpr int n = 2 + kGuided;

  template <class R>
  DC_HD static R output(const R* c, const R* x) {
    if constexpr (!kGuided) return x[1];
    const R m_u = x[n - 1];
    return mul_add(StepRow(c).guidance(), x[1] - m_u, mul_add(StepRow(c).gain(), m_u, m_u));
  }
  template <class R>
  DC_HD static R predicted_x0(const R* c, R x, R m) {
    const StepRow row(c);
    return mul_add(row.a_x(), x, row.a_m() * m);
  }
  template <class R>
  DC_HD static R x0(const R* c, R x, R m) {
    const StepRow row(c);
    return clamp(predicted_x0(c, x, m), row.clip_min(), row.clip_max());
  }
  // b_x x + b_m m + b_0 x0. With b_m = 0 the term is skipped: an m that overflowed to infinity then
  // only enters through the clip, and does not give 0 · inf = NaN.
  template <class R>
  DC_HD static R mix(R b_x, R b_m, R b_0, R x, R m, R x0) {
    const R rest = b_m == R(0) ? b_0 * x0 : mul_add(b_m, m, b_0 * x0);
    return mul_add(b_x, x, rest);
  }
  // + b_u m_u, also skipped with b_u = 0.
  template <class R>
  DC_HD static R with_uncond(R b_u, const R* x, R rest) {
    if constexpr (!kGuided) return rest;
    return b_u == R(0) ? rest : mul_add(b_u, x[n - 1], rest);
  }
  template <class R>
  DC_HD static R next(const R* c, const R* x, R m, R x0) {
    const StepRow row(c);
    return with_uncond(row.c_u(), x, mix(row.c_x(), row.c_m(), row.c_0(), x[0], m, x0));
  }
  template <class R>
  DC_HD static R mean(const R* c, const R* x) {
    const R m = output(c, x);
    return next(c, x, m, x0(c, x[0], m));
  }
  // The derivatives of b_x x + b_m m + b_0 x0 by x and by m; x0 has none outside the clip range.
  template <class R>
  struct Slope {
    R x, m;
    DC_HD Slope(const R* c, const R* in, R b_x, R b_m, R b_0) {
      const StepRow row(c);
      const R x0 = predicted_x0(c, in[0], output(c, in));
      const R through = x0 < row.clip_min() || x0 > row.clip_max() ? R(0) : b_0;
      x = mul_add(through, row.a_x(), b_x);
      m = mul_add(through, row.a_m(), b_m);
    }
    DC_HD static Slope of_mean(const R* c, const R* in) {
      const StepRow row(c);
      return Slope(c, in, row.c_x(), row.c_m(), row.c_0());
    }
    DC_HD static Slope of_kept(const R* c, const R* in) {
      const StepRow row(c);
      return Slope(c, in, row.e_x(), row.e_m(), row.e_0());
    }
  };
  // Converts the gradient of the guided m to the gradient of m, or of m_c and m_u.
  template <class R>
  DC_HD static void to_model_outputs(const R* c, R dm, R* y) {
    const R w = StepRow(c).guidance();
    y[0] = kGuided ? w * dm : dm;
    if constexpr (kGuided) y[1] = mul_add(StepRow(c).gain(), dm, dm) - w * dm;
  }
  // Adds the gradient through b_u m_u to that of m_u, the last of `y`.
  template <class R>
  DC_HD static void add_uncond(R b_u, R grad, R* y) {
    if constexpr (kGuided) y[1] = b_u == R(0) ? y[1] : mul_add(b_u, grad, y[1]);
  }
};

// The base of all step kernels, whose coefficients are those of StepRow.
struct StepBase : OpBase {
  static constexpr unsigned hooks = kPrepare;
  static constexpr int n_uncounted = 3;  // gain, c_u, e_u
};

enum StepNoise { kStill, kNoisy, kLearnedNoise };

// Inputs: x, m (or m_c), [m_u], [h_1, ...], [v], [z]; outputs: x', [h'].
// Learned: the noise is c_z exp(s_0 + s_v v) z; s_0 and s_v follow the columns of the table.
template <bool kGuided, int kHistory, bool kKeeps, StepNoise kNoise>
struct ReverseStep : StepBase {
  using P = Prediction<kGuided>;
  static_assert(kHistory <= kMaxHistory);
  static constexpr const char kHistoryName[] = {'_', 'h', char('0' + kHistory), 0};
  static constexpr KernelName kName{"reverse_step",
                                    kGuided ? "_guided" : "",
                                    kHistory ? kHistoryName : "",
                                    kKeeps ? "_keep" : "",
                                    kNoise == kLearnedNoise ? "_learned" : "",
                                    kNoise != kStill ? "_noise" : ""};
  static constexpr const char* name = kName.text;
  static constexpr int n_in = P::n + kHistory + kNoise, n_out = 1 + kKeeps;
  static constexpr int kColumns = kHistory || kKeeps ? kKeepCoefs + kHistory : kStepCoefs;
  static constexpr int n_coef = kColumns + (kNoise == kLearnedNoise ? 2 : 0);

  template <class R>
  DC_HD static void prepare(R* c) {
    set_threshold<n_coef>(c);
  }
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    const StepRow row(c);
    const R m = P::output(c, x), x0 = P::x0(c, x[0], m);
    R next = P::next(c, x, m, x0);
    DC_UNROLL
    for (int k = 0; k < kHistory; ++k) {
      const R c_k = row.c_k(k);  // 0: h_k is ignored, even if NaN
      next = c_k == R(0) ? next : mul_add(c_k, x[P::n + k], next);
    }
    if constexpr (kNoise == kNoisy) next = mul_add(row.c_z(), x[n_in - 1], next);
    if constexpr (kNoise == kLearnedNoise) {
      const R deviation = row.c_z() * exp(mul_add(c[kColumns + 1], x[n_in - 2], c[kColumns]));
      next = mul_add(deviation, x[n_in - 1], next);
    }
    if constexpr (kKeeps) {
      const R kept = P::mix(row.e_x(), row.e_m(), row.e_0(), x[0], m, x0);
      y[1] = P::with_uncond(row.e_u(), x, kept);
    }
    y[0] = next;
  }
};

// Inputs: g, [g_h], x, m (or m_c), [m_u]; outputs: dx, dm (or dm_c), [dm_u], [dz].
template <bool kGuided, bool kKeeps, bool kOfNoise>
struct ReverseStepBackward : StepBase {
  using P = Prediction<kGuided>;
  static constexpr KernelName kName{"reverse_step", kGuided ? "_guided" : "", kKeeps ? "_keep" : "",
                                    "_backward", kOfNoise ? "_noise" : ""};
  static constexpr const char* name = kName.text;
  static constexpr int kFirst = 1 + kKeeps;
  static constexpr int n_in = kFirst + P::n, n_out = P::n + kOfNoise;
  static constexpr int n_coef = kKeeps ? kKeepCoefs : kStepCoefs;
  template <class R>
  DC_HD static void prepare(R* c) {
    set_threshold<n_coef>(c);
  }
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    using Slope = typename P::template Slope<R>;
    const Slope slope = Slope::of_mean(c, x + kFirst);
    R dx = x[0] * slope.x, dm = x[0] * slope.m;
    if constexpr (kKeeps) {
      const Slope kept = Slope::of_kept(c, x + kFirst);
      dx = mul_add(x[1], kept.x, dx);
      dm = mul_add(x[1], kept.m, dm);
    }
    y[0] = dx;
    P::to_model_outputs(c, dm, y + 1);
    P::add_uncond(StepRow(c).c_u(), x[0], y + 1);
    if constexpr (kKeeps) P::add_uncond(StepRow(c).e_u(), x[1], y + 1);
    if constexpr (kOfNoise) y[n_out - 1] = x[0] * StepRow(c).c_z();
  }
};

// Densities measure distances in units of c_z. In each element the unit is only a power of two, as a
// division takes as long as the rest of the formula; the exact one comes in once a row.
//
// A sum of squares in units of c_z, from the sum in units of its power of two.
template <class R>
DC_HD double over_square(double total, R c_z) {
  const double unit = double(c_z) * double(power_near_inverse(c_z));
  return total / (unit * unit);
}
// distance · g / c_z². 0 where c_z is.
template <class R>
DC_HD R scaled_distance(R distance, R g, R c_z) {
  const R near = power_near_inverse(c_z), factor = g / c_z / (c_z * near);
  return blend(c_z != R(0), distance * near * factor, R(0));
}

// log N(x'; mean, c_z² I) of a step, summed over a sample; 0 if the step is deterministic and has
// no density. Inputs: x, m (or m_c), [m_u], x'.
template <bool kGuided>
struct StepLogProb : StepBase {
  using P = Prediction<kGuided>;
  static constexpr const char* name = kGuided ? "step_log_prob_guided" : "step_log_prob";
  static constexpr int n_in = P::n + 1, n_sum = 1, n_coef = kStepCoefs;
  static constexpr unsigned hooks = kPrepare | kFinalizeSum;
  template <class R>
  DC_HD static void prepare(R* c) {
    set_threshold<n_coef>(c);
  }
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    const R z = (x[n_in - 1] - P::mean(c, x)) * power_near_inverse(StepRow(c).c_z());
    y[0] = z * z;
  }
  template <class R>
  DC_HD static double finalize_sum(const R* c, double total, double n) {
    const double deviation = StepRow(c).c_z();
    const double squares = over_square(total, StepRow(c).c_z());
    return deviation == 0 ? 0 : 0 - (0.5 * (squares + n * kLogTwoPi) + n * ::log(deviation));
  }
};

// Coefficients: those of the step, then g of each sample. Outputs: dm (or dm_c), [dm_u]; with kAll:
// dx, those, dx'.
template <bool kGuided, bool kAll>
struct StepLogProbBackward : StepBase {
  using P = Prediction<kGuided>;
  static constexpr KernelName kName{"step_log_prob", kGuided ? "_guided" : "", "_backward",
                                    kAll ? "_all" : ""};
  static constexpr const char* name = kName.text;
  static constexpr int n_in = P::n + 1, n_out = 1 + kGuided + 2 * kAll;
  static constexpr int n_coef = kStepCoefs + 1;
  template <class R>
  DC_HD static void prepare(R* c) {
    set_threshold<n_coef>(c);
  }
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    const auto slope = P::template Slope<R>::of_mean(c, x);
    const R distance = x[n_in - 1] - P::mean(c, x);
    const R dmean = scaled_distance(distance, c[kStepCoefs], StepRow(c).c_z());
    P::to_model_outputs(c, dmean * slope.m, y + kAll);
    P::add_uncond(StepRow(c).c_u(), dmean, y + kAll);
    if constexpr (kAll) {
      y[0] = dmean * slope.x;
      y[n_out - 1] = -dmean;
    }
  }
};

// KL(N(mean_1, c_z² I) || N(mean_2, c_z² I)) = Σ (mean_1 - mean_2)² / (2 c_z²) of one step that two
// models take from the same x; 0 if the step is deterministic. Inputs: x, m_1, m_2. The means are
// never subtracted: c_x x and, where no x0 is clipped, a_x x drop out before anything is rounded.
struct StepKl : StepBase {
  using P = Prediction<false>;
  static constexpr const char* name = "step_kl";
  static constexpr int n_in = 3, n_sum = 1, n_coef = kStepCoefs;
  static constexpr unsigned hooks = kPrepare | kFinalizeSum;
  template <class R>
  DC_HD static void prepare(R* c) {
    set_threshold<n_coef>(c);
  }
  template <class R>
  DC_HD static R difference(const R* c, const R* x) {
    const StepRow row(c);
    const R apart = x[1] - x[2];
    const R first = P::predicted_x0(c, x[0], x[1]), second = P::predicted_x0(c, x[0], x[2]);
    const R low = row.clip_min(), high = row.clip_max();
    // An infinite or NaN x0 is not inside, so that it is not hidden.
    const bool inside = (first > low) & (first < high) & (second > low) & (second < high);
    const R clipped = clamp(first, low, high) - clamp(second, low, high);
    const R x0 = blend(inside, row.a_m() * apart, clipped);
    return row.c_m() == R(0) ? row.c_0() * x0 : mul_add(row.c_m(), apart, row.c_0() * x0);
  }
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    const R z = difference(c, x) * power_near_inverse(StepRow(c).c_z());
    y[0] = z * z;
  }
  template <class R>
  DC_HD static double finalize_sum(const R* c, double total, double) {
    const R c_z = StepRow(c).c_z();
    return c_z == R(0) ? 0 : 0.5 * over_square(total, c_z);
  }
};

// The same inputs. Coefficients: those of the step, then g of each sample. Output: dm_1; dm_2 is that
// of the inputs x, m_2, m_1, since the KL of equal deviations is symmetric.
struct StepKlBackward : StepBase {
  using P = Prediction<false>;
  static constexpr const char* name = "step_kl_backward";
  static constexpr int n_in = 3, n_out = 1, n_coef = kStepCoefs + 1;
  template <class R>
  DC_HD static void prepare(R* c) {
    set_threshold<n_coef>(c);
  }
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    const R distance = StepKl::difference(c, x);
    const R dmean = scaled_distance(distance, c[kStepCoefs], StepRow(c).c_z());
    y[0] = dmean * P::template Slope<R>::of_mean(c, x).m;
  }
};

DC_KERNEL_NAMESPACE_END
