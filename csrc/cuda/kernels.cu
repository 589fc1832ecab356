// The CUDA kernels of every op for the storage type DIFFCORE_STORAGE, or for all if it is not defined.
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

#ifdef DIFFCORE_STORAGE
template const CudaKernel* cuda_kernels<DIFFCORE_STORAGE>();
#else
template const CudaKernel* cuda_kernels<float>();
template const CudaKernel* cuda_kernels<double>();
template const CudaKernel* cuda_kernels<Bf16>();
template const CudaKernel* cuda_kernels<F16>();
#endif

}  // namespace diffcore
