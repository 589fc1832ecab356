// The CUDA kernels of every op for the storage type DIFFCORE_STORAGE, and for DIFFCORE_STORAGE_TOO if
// it is defined: kernels that are alike compress to less if compiled together.
#include "cuda/map.cuh"
#include "cuda/select.cuh"
#include "cuda/table.cuh"
#include "ops/all.h"

namespace diffcore {
namespace {

template <class Op, class S>
constexpr CudaKernel kernel() {
  // plan.cc has the noise generated into a tensor first for these.
  if constexpr (sizeof(S) == 8 && kGeneratesNoise<Op> && kReads<Op> > 0) {
    return {};
  } else if constexpr (kSelects<Op>) {
    return {&CudaSelect<Op, S>::run, &CudaSelect<Op, S>::load};
  } else {
    return {&CudaMap<Op, S>::run, &CudaMap<Op, S>::load};
  }
}

template <class S, class... Op>
const CudaKernel* table_of(OpList<Op...>) {
  static constexpr CudaKernel kKernels[] = {kernel<Op, S>()...};
  return kKernels;
}

}  // namespace

template <class S>
const CudaKernel* cuda_kernels() {
  return table_of<S>(AllOps{});
}

template const CudaKernel* cuda_kernels<DIFFCORE_STORAGE>();
#ifdef DIFFCORE_STORAGE_TOO
template const CudaKernel* cuda_kernels<DIFFCORE_STORAGE_TOO>();
#endif

}  // namespace diffcore
