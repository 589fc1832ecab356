#pragma once
#include "core/math.h"
DC_KERNEL_NAMESPACE_BEGIN
struct DiscretizedGaussianLogLikelihood {
  template <class R> DC_HD static void apply(const R*, const R* x, R* y) { y[0] = x[0]+x[1]+x[2]; }
};
template <bool kOfX> struct DiscretizedGradient {
  template <class R> DC_HD static void apply(R g, const R* x, R* y) { y[0] = g*x[0]; y[1]=g*x[1]; }
};
DC_KERNEL_NAMESPACE_END
