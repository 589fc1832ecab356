// A table of kernels: one row per op of a list, one column per storage type. `Entry::make<Op, S>()`
// returns the kernel of each cell.
#pragma once

#include "core/launch_args.h"
#include "core/number.h"
#include "ops/all.h"

DC_KERNEL_NAMESPACE_BEGIN

template <class Kernel, class Entry, class List>
struct KernelMatrix;

template <class Kernel, class Entry, class... Op>
struct KernelMatrix<Kernel, Entry, OpList<Op...>> {
  struct Row {
    Kernel by_dtype[kDtypes];  // in the order of the enum Dtype
  };
  template <class O>
  static constexpr Row row() {
    return {{Entry::template make<O, float>(), Entry::template make<O, double>(),
             Entry::template make<O, Bf16>(), Entry::template make<O, F16>()}};
  }
  static constexpr Row rows[sizeof...(Op)] = {row<Op>()...};
};

DC_KERNEL_NAMESPACE_END
