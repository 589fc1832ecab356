// The CUDA kernels of every op and storage type, and queries of the CUDA runtime. cudart is linked
// statically, so the module can be imported on a machine without a GPU or driver.
#include <type_traits>

#include "cuda/kernels.h"
#include "cuda/map.cuh"
#include "cuda/select.cuh"
#include "ops/kernel_matrix.h"

namespace diffcore {
namespace {

struct Workspace {
  Allocate allocate;
  void* context;
  void* operator()(int64_t bytes) const { return allocate(context, bytes); }
};

struct CudaKernel {
  const char* (*run)(LaunchArgs&, cudaStream_t, Workspace);
  const char* (*load)();
};

struct CudaEntry {
  template <class Op, class S>
  static constexpr CudaKernel make() {
    // The engine has no such kernel: without the else, it would still be compiled.
    if constexpr (std::is_same_v<S, double> && kGeneratesNoise<Op> && kReads<Op> > 0) {
      return {};
    } else {
      using Launch = std::conditional_t<kSelects<Op>, CudaSelect<Op, S>, CudaLaunch<Op, S>>;
      return {&Launch::template run<Workspace>, &Launch::load};
    }
  }
};

using Kernels = KernelMatrix<CudaKernel, CudaEntry, AllOps>;

// This module has a separate copy of cudart, so torch's current device does not apply here.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&previous_);
    if (error_ == cudaSuccess && previous_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  const char* error() const { return error_ == cudaSuccess ? nullptr : cudaGetErrorString(error_); }

 private:
  int previous_ = 0;
  bool changed_ = false;
  cudaError_t error_;
};

}  // namespace

bool cuda_built() { return true; }

const char* cuda_architectures() { return DIFFCORE_CUDA_ARCHITECTURES; }

int cuda_device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // no driver or no device: clear the error
    return 0;
  }
  return count;
}

int cuda_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

const char* run_on_cuda(int op, Dtype dtype, LaunchArgs& args, Device device, Allocate allocate,
                        void* context) {
  DeviceGuard guard(device.id);
  if (guard.error()) return guard.error();
  const CudaKernel& kernel = Kernels::rows[op].by_dtype[dtype];
  return kernel.run(args, static_cast<cudaStream_t>(device.stream), Workspace{allocate, context});
}

const char* load_cuda_kernels(int device) {
  DeviceGuard guard(device);
  if (guard.error()) return guard.error();
  for (const auto& row : Kernels::rows)
    for (const CudaKernel& kernel : row.by_dtype)
      if (const char* error = kernel.load ? kernel.load() : nullptr) return error;
  return nullptr;
}

}  // namespace diffcore
