// The traits of an op: what a functor of csrc/ops states about itself and the loops of csrc/cpu and
// csrc/cuda read. core/op_checks.h checks every op of the list.
#pragma once

#include "core/macros.h"
#include "core/math.h"

DC_KERNEL_NAMESPACE_BEGIN

// Optional functions of an op. An op lists those it defines in `hooks`, and a function that is
// listed but not defined (a misspelt one), defined but not listed, or of another signature does not
// compile.
enum Hook : unsigned {
  kPrepare = 1,      // prepare
  kIdle = 2,         // idle
  kOther = 4,        // Other and other
  kFinalizeSum = 8,  // finalize_sum
  kSelect = 16,      // ratio and selected
};

// Every op derives from OpBase and hides the defaults that do not hold for it. R is float, or
// double for float64 tensors.
struct OpBase {
  // Tensors read, tensors written, sums over each row, and coefficients. An op also has a `name`,
  // and apply(c, x, y): y[0 .. n_out) are the outputs at one element, y[n_out ...] its summands.
  static constexpr int n_in = 0, n_out = 0, n_sum = 0, n_coef = 0;

  static constexpr unsigned hooks = 0;

  // Whether the formula computes in double even where R is float: CUDA gives it the registers.
  static constexpr bool in_double = false;

  // kPrepare: changes the coefficients of a row once, where they are loaded.
  template <class R>
  DC_HD static void prepare(R*) {}

  // kIdle: whether a row that is written in place stays as it is.
  template <class R>
  DC_HD static bool idle(const R*) {
    return false;
  }

  // kOther: whether a row takes the formula `Other`, an op of the same tensors and sums, instead.
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

  // kSelect: instead of the sum of a row the loop finds a quantile of the magnitudes of its
  // summands. c[ratio] is the quantile's share, in [0, 1]; the row stores selected(c, quantile).
  static constexpr int ratio = -1;
  DC_HD static double selected(const double*, double quantile) { return quantile; }
};

template <class Op>
constexpr bool kMayIdle = (Op::hooks & kIdle) != 0;
template <class Op>
constexpr bool kSwitches = (Op::hooks & kOther) != 0;
template <class Op>
constexpr bool kSelects = (Op::hooks & kSelect) != 0;

// The same formula, whose last input, the noise, is generated where it is used instead of read.
template <class Op>
struct Drawn : Op {};

template <class Op>
constexpr bool kDraws = false;
template <class Op>
constexpr bool kDraws<Drawn<Op>> = true;

// Inputs read from memory.
template <class Op>
constexpr int kReads = Op::n_in - kDraws<Op>;

// The name of a kernel, made of that of its family and its variants.
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
