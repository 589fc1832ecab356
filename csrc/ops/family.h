// The kernels that derive from one elementwise term: the term, its sum over each row, and the
// gradients of both. A gradient has a `Term` and a `variant`, a suffix that names the inputs it is
// the gradient of.
#pragma once

#include "core/op.h"

DC_KERNEL_NAMESPACE_BEGIN

// A term summed over each row, times the coefficient `scale`: the same inputs, one sum instead of
// the output.
template <class Term>
struct SumOf : OpBase {
  static constexpr KernelName kName{Term::name, "_sum"};
  static constexpr const char* name = kName.text;
  static constexpr int n_in = Term::n_in, n_sum = 1, n_coef = 1;
  static constexpr bool in_double = Term::in_double;
  static constexpr unsigned hooks = kFinalizeSum;
  template <class R>
  DC_HD static void apply(const R*, const R* x, R* y) {
    Term::template apply<R>(nullptr, x, y);
  }
  template <class R>
  DC_HD static double finalize_sum(const R* c, double total, double) {
    return total * double(c[0]);
  }
};

// The gradient of the elementwise op. The upstream gradient is the last input.
template <class Gradient>
struct GradientOf : OpBase {
  static constexpr KernelName kName{Gradient::Term::name, "_backward", Gradient::variant};
  static constexpr const char* name = kName.text;
  static constexpr int n_in = Gradient::n_in + 1, n_out = Gradient::n_out;
  static constexpr bool in_double = Gradient::Term::in_double;
  template <class R>
  DC_HD static void apply(const R*, const R* x, R* y) {
    Gradient::template apply<R>(x[Gradient::n_in], x, y);
  }
};
// The gradient of the sum. The upstream gradient is a number per row, times `scale`.
template <class Gradient>
struct SumGradientOf : OpBase {
  static constexpr KernelName kName{Gradient::Term::name, "_sum_backward", Gradient::variant};
  static constexpr const char* name = kName.text;
  static constexpr int n_in = Gradient::n_in, n_out = Gradient::n_out, n_coef = 2;
  static constexpr bool in_double = Gradient::Term::in_double;
  template <class R>
  DC_HD static void apply(const R* c, const R* x, R* y) {
    Gradient::template apply<R>(c[0] * c[1], x, y);
  }
};

DC_KERNEL_NAMESPACE_END
