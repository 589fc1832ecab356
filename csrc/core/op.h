// The traits of an op. Functors in csrc/ops define them, the loops in csrc/cpu and csrc/cuda read
// them, and core/op_checks.h checks them for every op of the list.
#pragma once

#include "core/macros.h"
#include "core/math.h"

DC_KERNEL_NAMESPACE_BEGIN

// Optional functions of an op. An op lists those it defines in `hooks`. A function that is listed
// but not defined (for example misspelled), defined but not listed, or has another signature is a
// compile error.
enum Hook : unsigned {
  kPrepare = 1,       // prepare
  kIdle = 2,          // idle
  kOther = 4,         // Other and other
  kFinalizeSum = 8,   // finalize_sum
  kSelect = 16,       // ratio and selected
  kFinalizeSums = 32  // n_stored and finalize_sums
};

// Every op derives from OpBase and redefines the defaults that do not apply to it. R is float, or
// double for float64 tensors.
struct OpBase {
  // Tensors read, tensors written, sums over each row, and coefficients. An op also has a `name`,
  // and apply(c, x, y): y[0 .. n_out) are the outputs at one element, y[n_out ...] its summands.
  static constexpr int n_in = 0, n_out = 0, n_sum = 0, n_coef = 0;

  // Coefficients that hold registers, but too few for a limit on resident blocks to count them.
  static constexpr int n_uncounted = 0;

  static constexpr unsigned hooks = 0;

  // Whether the formula computes in double even where R is float. CUDA then allows it more
  // registers.
  static constexpr bool in_double = false;

  // kPrepare: transforms the coefficients of a row once, after loading them.
  template <class R>
  DC_HD static void prepare(R*) {}

  // kIdle: whether a row that is written in place does not change, so the loop can skip it.
  template <class R>
  DC_HD static bool idle(const R*) {
    return false;
  }

  // kOther: whether a row uses the formula `Other` instead, an op with the same tensors and sums.
  using Other = void;
  template <class R>
  DC_HD static bool other(const R*) {
    return false;
  }

  // kFinalizeSum: the stored sum of a row of n elements, from the total of its summands.
  template <class R>
  DC_HD static double finalize_sum(const R*, double total, double) {
    return total;
  }

  // kFinalizeSums: the n_stored numbers that are stored instead of the n_sum sums of a row.
  static constexpr int n_stored = 0;
  template <class R>
  DC_HD static void finalize_sums(const R*, const double*, double, double*) {}

  // kSelect: instead of the sum of a row, the loop computes a quantile of the magnitudes of its
  // summands. c[ratio] is the quantile's level, in [0, 1]; the result is selected(c, quantile).
  static constexpr int ratio = -1;
  DC_HD static double selected(const double*, double quantile) { return quantile; }
};

template <class Op>
constexpr bool kMayIdle = (Op::hooks & kIdle) != 0;
template <class Op>
constexpr bool kSwitches = (Op::hooks & kOther) != 0;
template <class Op>
constexpr bool kSelects = (Op::hooks & kSelect) != 0;

// The results of a row, beside its elements: one of each sum, unless kFinalizeSums.
template <class Op>
constexpr int kStored = Op::hooks & kFinalizeSums ? Op::n_stored : Op::n_sum;

// What is stored for a row of n elements with these sums.
template <class Op, class R>
DC_HD void finalize(const R* c, const double* totals, double n, double* stored) {
  if constexpr ((Op::hooks & kFinalizeSums) != 0)
    Op::finalize_sums(c, totals, n, stored);
  else
    for (int k = 0; k < Op::n_sum; ++k) stored[k] = Op::finalize_sum(c, totals[k], n);
}

// The same formula, whose last input, the noise, is generated in the kernel instead of read.
template <class Op>
struct Generated : Op {};

template <class Op>
constexpr bool kGeneratesNoise = false;
template <class Op>
constexpr bool kGeneratesNoise<Generated<Op>> = true;

// Inputs read from memory.
template <class Op>
constexpr int kReads = Op::n_in - kGeneratesNoise<Op>;

// The name of a kernel, concatenated from its family and its variants.
struct KernelName {
  char text[72] = {};
  template <class... Part>
  constexpr explicit KernelName(const Part*... parts) {
    const char* const all[] = {parts...};
    int n = 0;
    for (const char* part : all)
      for (; *part; ++part) text[n++] = *part;
  }
};

DC_KERNEL_NAMESPACE_END
