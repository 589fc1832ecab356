// Reads the coefficients of one row, rounding float64 once to the compute type.
#pragma once

#include "core/launch_args.h"
#include "core/macros.h"
#include "core/op.h"

DC_KERNEL_NAMESPACE_BEGIN

// The step of a row as passed: it may be out of range.
DC_HD int64_t given_step(const LaunchArgs& args, int64_t row) {
  if (!args.step) return args.fixed_step;
  int64_t at = row * args.step_stride;
  return args.step_is_64 ? static_cast<const int64_t*>(args.step)[at]
                         : static_cast<const int32_t*>(args.step)[at];
}

// The step of a row, within the table. The CPU rejects steps out of range before it runs anything.
// On CUDA the host cannot read them without waiting for the device, so the kernel clamps them and
// never reads outside the table.
DC_HD int64_t step_of(const LaunchArgs& args, int64_t row) {
  const int64_t step = given_step(args, row);
  if (!args.step) return step;  // checked on the host
  return step < 0 ? 0 : (step >= args.steps ? args.steps - 1 : step);
}

template <class R>
DC_HD R load_coef(const Coef& coef, int64_t row, int64_t step) {
  if (!coef.data) return R(coef.value);
  int64_t at = (coef.by_step ? step : row) * coef.stride;
  return coef.is_double ? R(static_cast<const double*>(coef.data)[at])
                        : R(static_cast<const float*>(coef.data)[at]);
}

template <class Op, class R>
DC_HD void load_coefs(const LaunchArgs& args, int64_t row, R* c) {
  int64_t step = args.steps ? step_of(args, row) : 0;
  DC_UNROLL
  for (int k = 0; k < Op::n_coef; ++k) c[k] = load_coef<R>(args.coef[k], row, step);
  Op::prepare(c);
}

DC_KERNEL_NAMESPACE_END
