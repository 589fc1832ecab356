// The kernels of one instruction set. Compiled three times, with DIFFCORE_ISA_NAMESPACE = v2, v3,
// v4 and the matching -march. Includes core/, ops/ and drivers/ only: an inline function of a
// common header compiled here for a newer processor could be the copy the linker keeps for all.
#include "drivers/cpu.h"
#include "drivers/cpu_select.h"
#include "kernel_table.h"
#include "ops/all.h"

DC_KERNEL_NAMESPACE_BEGIN

template <class List>
struct Table;

template <class... Op>
struct Table<OpList<Op...>> {
  struct Row {
    CpuKernel by_dtype[kDtypes];
  };
  template <class O, class S>
  static constexpr CpuKernel kernel() {
    if constexpr (kSelects<O>)
      return {&CpuSelect<O, S>::run, nullptr, sizeof(typename CpuSelect<O, S>::Scratch)};
    else
      return {&CpuLoop<O, S>::run, &CpuLoop<O, S>::finish, 0};
  }
  template <class O>
  static constexpr Row row() {
    return {{kernel<O, float>(), kernel<O, double>(), kernel<O, Bf16>(), kernel<O, F16>()}};
  }
  static constexpr Row rows[sizeof...(Op)] = {row<Op>()...};
};

const CpuKernel* cpu_kernels() { return Table<AllOps>::rows[0].by_dtype; }

DC_KERNEL_NAMESPACE_END
