// Two numbers of a sample, w and g, for guidance m = m_u + g m_u + w (m_c - m_u) that depends on both
// predictions of it.
#pragma once

#include <math.h>

#include "core/op.h"

DC_KERNEL_NAMESPACE_BEGIN

// What the coefficients are: the kind, the scale, and two parameters of the kind.
enum GuidanceKind {
  kRescaled,       // phi
  kZeroStar,       //
  kProjected,      // eta, the largest norm of m_c - m_u
  kTangential,     //
  kNormPreserving  //
};
constexpr const char* kGuidanceKinds[] = {"rescaled", "zero_star", "projected", "tangential",
                                          "norm_preserving"};

// The sums of a sample over m_c and d = m_c - m_u. Not over m_u: where both predictions are close,
// sums of them would cancel.
struct GuidanceSums {
  double cc, cd, dd, c, d, n;

  // Of m_u, and of m = m_c + s d.
  DC_HD double uu() const { return cc - 2 * cd + dd; }
  DC_HD double square(double s) const { return cc + 2 * s * cd + s * s * dd; }
  DC_HD double variance(double s) const {
    const double sum = c + s * d;
    return n > 1 ? square(s) - sum * sum / n : 0;
  }
};

// sqrt(a / b) of numbers that rounding may have made negative; 1 where b is 0, NaN where one is.
DC_HD double root_of_ratio(double a, double b) { return b <= 0 ? 1 : ::sqrt((a < 0 ? 0 : a) / b); }

// Inputs: m_c, m_u; results: w, g.
struct GuidanceWeights : OpBase {
  static constexpr const char* name = "guidance_weights";
  static constexpr int n_in = 2, n_sum = 5, n_stored = 2, n_coef = 4;
  static constexpr unsigned hooks = kFinalizeSums;
  template <class R>
  DC_HD static void apply(const R*, const R* x, R* y) {
    const R c = x[0], d = x[0] - x[1];
    y[0] = c * c;
    y[1] = c * d;
    y[2] = d * d;
    y[3] = c;
    y[4] = d;
  }
  template <class R>
  DC_HD static void finalize_sums(const R* c, const double* totals, double n, double* stored) {
    const GuidanceSums sums{totals[0], totals[1], totals[2], totals[3], totals[4], n};
    const double scale = c[1], beyond = scale - 1;
    double w = scale, gain = 0;
    switch (int(c[0])) {
      case kRescaled:
        gain = double(c[2]) * (root_of_ratio(sums.variance(0), sums.variance(beyond)) - 1);
        w = scale + gain * scale;
        break;
      case kNormPreserving:
        gain = root_of_ratio(sums.square(0), sums.square(beyond)) - 1;
        w = scale + gain * scale;
        break;
      case kZeroStar: {  // m_u times its best factor, m_c . m_u / |m_u|^2
        const double uu = sums.uu();
        gain = uu <= 0 ? beyond : beyond * (sums.dd - sums.cd) / uu;
        break;
      }
      case kProjected: {  // d no longer than the limit, and eta times its part along m_c
        const double length = ::sqrt(sums.dd), limit = c[3];
        const double kept = length > limit ? limit / length : 1;
        const double along = sums.cc <= 0 ? 0 : kept * sums.cd / sums.cc;
        gain = -beyond * (1 - double(c[2])) * along;
        w = 1 + gain + beyond * kept;
        break;
      }
      case kTangential: {  // m_u projected on the first singular vector of both: v (u m_c + v m_u)
        const double half = sums.cd - 0.5 * sums.dd,
                     product = sums.cc - sums.cd;  // of the Gram matrix
        const double length = ::hypot(half, product);
        double u = 1, v = 0;  // of equal and orthogonal predictions
        if (half < 0) {
          v = ::copysign(::sqrt(0.5 * (1 - half / length)), product);
          u = product / (2 * length * v);
        } else if (length > 0) {
          u = ::sqrt(0.5 * (1 + half / length));
          v = product / (2 * length * u);
        } else if (length != length) {
          u = v = length;  // NaN
        }
        w = scale - beyond * u * v;
        gain = beyond * u * (u - v);
        break;
      }
    }
    stored[0] = w;
    stored[1] = gain;
  }
};

DC_KERNEL_NAMESPACE_END
