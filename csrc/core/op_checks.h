// What must hold of an op, checked where the list of ops is compiled.
#pragma once

#include <type_traits>

#include "core/launch_args.h"
#include "core/op.h"

DC_KERNEL_NAMESPACE_BEGIN

constexpr unsigned kAllHooks = kPrepare | kIdle | kOther | kFinalizeSum | kSelect;

// Whether two addresses are of one function: by type, for not every compiler compares addresses
// while it compiles.
template <auto kFunction>
struct Address {};
template <auto kA, auto kB>
constexpr bool kSameFunction = std::is_same_v<Address<kA>, Address<kB>>;

// The hooks that an op defines itself.
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
      bit<&Op::selected, &OpBase::selected>(kSelect);
  static_assert(defined == Op::hooks,
                "`hooks` has to list exactly the hooks that the op defines (is one misspelt?)");
};

template <class Op>
constexpr bool check_signatures() {
  static_assert(std::is_same_v<decltype(&Op::template apply<float>),
                               void (*)(const float*, const float*, float*)>,
                "apply: static void apply(const R* c, const R* x, R* y)");
  static_assert(std::is_same_v<decltype(&Op::template prepare<float>), void (*)(float*)>,
                "prepare: static void prepare(R* c)");
  static_assert(std::is_same_v<decltype(&Op::template idle<float>), bool (*)(const float*)>,
                "idle: static bool idle(const R* c)");
  static_assert(std::is_same_v<decltype(&Op::template other<float>), bool (*)(const float*)>,
                "other: static bool other(const R* c)");
  static_assert(std::is_same_v<decltype(&Op::template finalize_sum<float>),
                               double (*)(const float*, double, double)>,
                "finalize_sum: static double finalize_sum(const R* c, double total, double n)");
  static_assert(std::is_same_v<decltype(&Op::selected), double (*)(const double*, double)>,
                "selected: static double selected(const double* c, double quantile)");
  static_assert(std::is_same_v<decltype(Op::in_double), const bool>, "in_double is a bool");
  return true;
}

// The numbers of tensors and coefficients, against the arrays of LaunchArgs.
template <class Op>
constexpr bool check_sizes() {
  static_assert(Op::n_in >= 1 && Op::n_in <= kMaxIn, "n_in: 1 ... kMaxIn of core/launch_args.h");
  static_assert(Op::n_out >= 0 && Op::n_out <= kMaxOut, "n_out: 0 ... kMaxOut");
  static_assert(Op::n_sum >= 0 && Op::n_sum <= kMaxSum, "n_sum: 0 ... kMaxSum");
  static_assert(Op::n_coef >= 0 && Op::n_coef <= kMaxCoef, "n_coef: 0 ... kMaxCoef");
  static_assert(Op::n_out + Op::n_sum >= 1, "an op has an output or a sum");
  return true;
}

// Which hooks go together: what the loops support.
template <class Op>
constexpr bool check_combinations() {
  static_assert((Op::hooks & ~kAllHooks) == 0, "`hooks` are values of the enum Hook");
  if constexpr (kMayIdle<Op>)
    static_assert(Op::n_sum == 0 && Op::n_out == 1 && kReads<Op> >= 1 && !kSwitches<Op>,
                  "an op that may leave a row as it is has one output and no sum: a CUDA block "
                  "returns before it would add up its row");
  if constexpr ((Op::hooks & kFinalizeSum) != 0)
    static_assert(Op::n_sum == 1 && !kSelects<Op>, "finalize_sum needs one sum");
  static_assert(kSelects<Op> == (Op::ratio >= 0) && Op::ratio < Op::n_coef,
                "kSelect, and a coefficient `ratio`: both or neither");
  if constexpr (kSelects<Op>)
    static_assert(Op::n_out == 0 && Op::n_sum == 1 && !kDraws<Op> && !kSwitches<Op>,
                  "an op that selects reads all its inputs and has one sum and no output");
  static_assert(kSwitches<Op> != std::is_void_v<typename Op::Other>,
                "kOther, and a formula `Other`: both or neither");
  if constexpr (kSwitches<Op>) {
    using Other = typename Op::Other;
    static_assert(std::is_base_of_v<OpBase, Other>, "Other derives from OpBase");
    static_assert(Other::n_in == Op::n_in && Other::n_out == Op::n_out &&
                      Other::n_sum == Op::n_sum && Other::n_coef == Op::n_coef,
                  "Other has the tensors, sums and coefficients of its op");
    static_assert(Other::in_double == Op::in_double, "Other shares the registers of its op");
    static_assert(Other::hooks == 0, "Other has no hooks: those of its op apply");
  }
  return true;
}

template <class Op>
constexpr bool check_op() {
  static_assert(std::is_base_of_v<OpBase, Op>, "an op derives from OpBase");
  return check_sizes<Op>() && check_signatures<Op>() && check_combinations<Op>() &&
         HookCheck<Op, float>::defined == Op::hooks && HookCheck<Op, double>::defined == Op::hooks;
}

DC_KERNEL_NAMESPACE_END
