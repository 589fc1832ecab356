// The table of CUDA kernels: one column per storage type, from two compilations of kernels.cu.
#pragma once

#include <cuda_runtime.h>

#include "cuda/kernels.h"

namespace diffcore {

// Memory for one call, freed in stream order after it. Null if there is none.
struct Workspace {
  Allocate allocate;
  void* context;
  void* operator()(int64_t bytes) const { return allocate(context, bytes); }
};

// Both return null, or an error message. Null pointers where there is no kernel.
struct CudaKernel {
  const char* (*run)(LaunchArgs&, cudaStream_t, Workspace);
  const char* (*load)();  // loads the code onto the current device
};

// One kernel per op of AllOps.
template <class S>
const CudaKernel* cuda_kernels();

}  // namespace diffcore
