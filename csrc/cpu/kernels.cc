// The kernels of one instruction set. Compiled three times on x86-64, with DIFFCORE_ISA_NAMESPACE =
// v2, v3, v4 and the matching -march, and once on aarch64, as neon. Includes core/, noise/, ops/ and
// cpu/ only: an inline function from a shared header, compiled here for a newer processor, could be
// the copy that the linker keeps.
#include "cpu/kernels.h"

#include "cpu/map.h"
#include "cpu/select.h"
#include "ops/kernel_matrix.h"

DC_KERNEL_NAMESPACE_BEGIN

struct CpuEntry {
  template <class Op, class S>
  static constexpr CpuKernel make() {
    if constexpr (kSelects<Op>)
      return {&CpuSelect<Op, S>::run, nullptr, sizeof(typename CpuSelect<Op, S>::Scratch)};
    else
      return {&run_loop<Op, S>, &CpuLoop<Op, Compute<S>>::combine, 0};
  }
};

const CpuKernel* cpu_kernels() {
  return KernelMatrix<CpuKernel, CpuEntry, AllOps>::rows[0].by_dtype;
}

DC_KERNEL_NAMESPACE_END
