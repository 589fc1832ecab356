// Reads the coefficients of one row, rounding float64 once to the compute type.
#pragma once

#include "core/macros.h"
#include "core/op.h"
#include "core/task.h"

DC_KERNEL_NAMESPACE_BEGIN

// The step of a row. Out-of-range steps are refused before the launch on the CPU; on CUDA the host
// cannot see them without waiting for the device, so they are clamped: never a wild read.
DC_HD int64_t step_of(const Task& task, int64_t row) {
  if (!task.step) return task.fixed_step;
  int64_t at = row * task.step_stride;
  int64_t step = task.step_is_64 ? static_cast<const int64_t*>(task.step)[at]
                                 : static_cast<const int32_t*>(task.step)[at];
  return step < 0 ? 0 : (step >= task.steps ? task.steps - 1 : step);
}

template <class R>
DC_HD R load_coef(const Coef& coef, int64_t row, int64_t step) {
  if (!coef.data) return R(coef.value);
  int64_t at = (coef.by_step ? step : row) * coef.stride;
  return coef.is_double ? R(static_cast<const double*>(coef.data)[at])
                        : R(static_cast<const float*>(coef.data)[at]);
}

template <class Op, class R>
DC_HD void prepare(R* c) {
  if constexpr (kPrepares<Op>) Op::prepare(c);
}

template <class Op, class R>
DC_HD void load_coefs(const Task& task, int64_t row, R* c) {
  int64_t step = task.steps ? step_of(task, row) : 0;
  DC_UNROLL
  for (int k = 0; k < Op::n_coef; ++k) c[k] = load_coef<R>(task.coef[k], row, step);
  prepare<Op>(c);
}

DC_KERNEL_NAMESPACE_END
