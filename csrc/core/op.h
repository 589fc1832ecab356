// What the drivers ask of an op.
#pragma once

#include "core/macros.h"

DC_KERNEL_NAMESPACE_BEGIN

// The same formula, whose last input, the noise, is drawn where it is used instead of read.
template <class Op>
struct Drawn : Op {};

template <class Op>
constexpr bool kDraws = false;
template <class Op>
constexpr bool kDraws<Drawn<Op>> = true;

// Inputs that are read from memory.
template <class Op>
constexpr int kReads = Op::n_in - kDraws<Op>;

// Some ops leave a row, written in place, as it is when their coefficients say so.
template <class Op, class = void>
constexpr bool kMayIdle = false;
template <class Op>
constexpr bool kMayIdle<Op, decltype(void(&Op::template idle<float>))> = true;

template <class Op, class R>
DC_HD bool is_idle(const R* c) {
  if constexpr (kMayIdle<Op>)
    return Op::idle(c);
  else
    return false;
}

// Some ops compute in double whatever the type: they need the registers of double.
template <class Op, class = void>
constexpr bool kInDouble = false;
template <class Op>
constexpr bool kInDouble<Op, decltype(void(Op::in_double))> = Op::in_double;

// What an op makes of its coefficients once, where they are loaded, and not for each element.
template <class Op, class = void>
constexpr bool kPrepares = false;
template <class Op>
constexpr bool kPrepares<Op, decltype(void(&Op::template prepare<float>))> = true;

// The sum of a row of n elements as it is stored: scaled, or whatever the op makes of it.
template <class Op, class = void>
constexpr bool kFinishes = false;
template <class Op>
constexpr bool kFinishes<Op, decltype(void(&Op::template finish<float>))> = true;

template <class Op, class R>
DC_HD R finished(const R* c, double total, int64_t n) {
  if constexpr (kFinishes<Op>)
    return R(Op::finish(c, total, double(n)));
  else
    return R(total * double(Op::template sum_scale<R>(c)));
}

// Some ops want a quantile of the magnitudes of a row instead of a sum: which one, says their
// coefficient `ratio`; what they make of it, `selected`.
template <class Op, class = void>
constexpr bool kSelects = false;
template <class Op>
constexpr bool kSelects<Op, decltype(void(&Op::selected))> = true;

// Some ops are one of two formulas, row by row: `Other` where the coefficients say so.
template <class Op, class = void>
constexpr bool kSwitches = false;
template <class Op>
constexpr bool kSwitches<Op, decltype(void(sizeof(typename Op::Other)))> = true;

DC_KERNEL_NAMESPACE_END
