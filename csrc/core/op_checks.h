// Requirements on an op, checked where the list of ops is compiled.
#pragma once

#include <type_traits>

#include "core/launch_args.h"
#include "core/op.h"

DC_KERNEL_NAMESPACE_BEGIN

constexpr unsigned kAllHooks = kPrepare | kIdle | kOther | kFinalizeSum | kSelect | kFinalizeSums;

// Whether two addresses are those of one function. Compared as types, because not every compiler
// compares function addresses in constant expressions.
template <auto kFunction>
struct Address {};
template <auto kA, auto kB>
constexpr bool kSameFunction = std::is_same_v<Address<kA>, Address<kB>>;

// The hooks that an op defines, as opposed to inherits.
template <class Op, class R>
struct HookCheck {
  template <auto kOfOp, auto kOfBase>
  static constexpr unsigned bit(Hook hook) {
    return kSameFunction<kOfOp, kOfBase> ? 0u : unsigned(hook);
  }
  static constexpr unsigned defined =
      bit<&Op::template prepare<R>, &OpBase::template prepare<R>>(kPrepare) |
      bit<&Op::template idle<R>, &OpBase::template idle<R>>(kIdle) |
      bit<&Op::template other<R>, &OpBase::template other<R>>(kOther) |
      bit<&Op::template finalize_sum<R>, &OpBase::template finalize_sum<R>>(kFinalizeSum) |
      bit<&Op::template finalize_sums<R>, &OpBase::template finalize_sums<R>>(kFinalizeSums) |
      bit<&Op::selected, &OpBase::selected>(kSelect);
  static_assert(defined == Op::hooks,
                "`hooks` must list exactly the hooks that the op defines (is one misspelled?)");
};

template <class Op>
constexpr bool check_signatures() {
  static_assert(std::is_same_v<decltype(&Op::template apply<float>),
                               void (*)(const float*, const float*, float*)>,
                "apply must be static void apply(const R* c, const R* x, R* y)");
  static_assert(std::is_same_v<decltype(&Op::template prepare<float>), void (*)(float*)>,
                "prepare must be static void prepare(R* c)");
  static_assert(std::is_same_v<decltype(&Op::template idle<float>), bool (*)(const float*)>,
                "idle must be static bool idle(const R* c)");
  static_assert(std::is_same_v<decltype(&Op::template other<float>), bool (*)(const float*)>,
                "other must be static bool other(const R* c)");
  static_assert(
      std::is_same_v<decltype(&Op::template finalize_sum<float>),
                     double (*)(const float*, double, double)>,
      "finalize_sum must be static double finalize_sum(const R* c, double total, double n)");
  static_assert(std::is_same_v<decltype(&Op::template finalize_sums<float>),
                               void (*)(const float*, const double*, double, double*)>,
                "finalize_sums must be static void finalize_sums(const R* c, const double* totals, "
                "double n, double* stored)");
  static_assert(std::is_same_v<decltype(&Op::selected), double (*)(const double*, double)>,
                "selected must be static double selected(const double* c, double quantile)");
  static_assert(std::is_same_v<decltype(Op::in_double), const bool>, "in_double must be a bool");
  return true;
}

// The numbers of tensors and coefficients must fit the arrays of LaunchArgs.
template <class Op>
constexpr bool check_sizes() {
  static_assert(Op::n_in >= 1 && Op::n_in <= kMaxIn,
                "n_in must be in 1 ... kMaxIn of core/launch_args.h");
  static_assert(Op::n_out >= 0 && Op::n_out <= kMaxOut, "n_out must be in 0 ... kMaxOut");
  static_assert(Op::n_sum >= 0 && Op::n_sum <= kMaxSum, "n_sum must be in 0 ... kMaxSum");
  static_assert(Op::n_coef >= 0 && Op::n_coef <= kMaxCoef, "n_coef must be in 0 ... kMaxCoef");
  static_assert(Op::n_out + Op::n_sum >= 1, "an op must have an output or a sum");
  return true;
}

// The combinations of hooks that the loops support.
template <class Op>
constexpr bool check_combinations() {
  static_assert((Op::hooks & ~kAllHooks) == 0, "`hooks` must be values of the enum Hook");
  if constexpr (kMayIdle<Op>)
    static_assert(
        Op::n_sum == 0 && Op::n_out == 1 && kReads<Op> >= 1 && !kSwitches<Op>,
        "an op with kIdle must have one output and no sum: a CUDA block returns before it "
        "sums an idle row");
  if constexpr ((Op::hooks & kFinalizeSum) != 0)
    static_assert(Op::n_sum == 1 && !kSelects<Op>, "finalize_sum needs one sum");
  if constexpr ((Op::hooks & kFinalizeSums) != 0)
    static_assert(Op::n_sum > 0 && Op::n_stored > 0 && Op::n_stored <= Op::n_sum && !kSelects<Op>,
                  "finalize_sums needs sums, and stores one number or up to as many");
  static_assert(kSelects<Op> == (Op::ratio >= 0) && Op::ratio < Op::n_coef,
                "kSelect requires a coefficient `ratio`, and `ratio` requires kSelect");
  if constexpr (kSelects<Op>)
    static_assert(Op::n_out == 0 && Op::n_sum == 1 && !kGeneratesNoise<Op> && !kSwitches<Op>,
                  "an op with kSelect must read all its inputs and have one sum and no output");
  static_assert(kSwitches<Op> != std::is_void_v<typename Op::Other>,
                "kOther requires a formula `Other`, and `Other` requires kOther");
  if constexpr (kSwitches<Op>) {
    using Other = typename Op::Other;
    static_assert(std::is_base_of_v<OpBase, Other>, "Other must derive from OpBase");
    static_assert(Other::n_in == Op::n_in && Other::n_out == Op::n_out &&
                      Other::n_sum == Op::n_sum && Other::n_coef == Op::n_coef,
                  "Other must have the tensors, sums and coefficients of its op");
    static_assert(Other::in_double == Op::in_double,
                  "Other must have the same in_double as its op: they share registers");
    static_assert(Other::hooks == 0, "Other must have no hooks: those of its op apply");
  }
  return true;
}

template <class Op>
constexpr bool check_op() {
  static_assert(std::is_base_of_v<OpBase, Op>, "an op must derive from OpBase");
  return check_sizes<Op>() && check_signatures<Op>() && check_combinations<Op>() &&
         HookCheck<Op, float>::defined == Op::hooks && HookCheck<Op, double>::defined == Op::hooks;
}

DC_KERNEL_NAMESPACE_END
