// Runs kernels on a device, and queries of the CUDA runtime. cudart is linked statically, so the
// module can be imported on a machine without a GPU or driver.
#include <stdlib.h>
#include <string.h>

#include "cuda/launch.cuh"
#include "cuda/table.cuh"
#include "ops/all.h"

namespace diffcore {
namespace {

// In the order of the enum Dtype.
constexpr const CudaKernel* (*kColumns[kDtypes])() = {&cuda_kernels<float>, &cuda_kernels<double>,
                                                      &cuda_kernels<Bf16>, &cuda_kernels<F16>};

// This module has a separate copy of cudart, so torch's current device does not apply here.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = message_of(cudaGetDevice(&previous_));
    if (!error_ && previous_ != device) {
      error_ = message_of(cudaSetDevice(device));
      changed_ = !error_;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  const char* error() const { return error_; }

 private:
  int previous_ = 0;
  bool changed_ = false;
  const char* error_;
};

// To find out whether a wrong sum is the fault of clusters, which have not run on a GPU yet.
bool clusters_allowed() {
  const char* setting = getenv("DIFFCORE_CUDA_CLUSTERS");
  return !setting || strcmp(setting, "0") != 0;
}

// A new device may run code that was compiled for an older one, in which DC_CLUSTERS is not defined;
// a part of a device (MIG) may be too small for a cluster.
bool runs_in_clusters(const void* kernel) {
  cudaFuncAttributes code{};
  if (message_of(cudaFuncGetAttributes(&code, kernel)) || code.ptxVersion < 90) return false;
  const LaunchConfig config(Grid(dim3(kCluster), kCluster), nullptr);
  int clusters = 0;
  return !message_of(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config)) && clusters > 0;
}

}  // namespace

bool ClusterSupport::here(const void* kernel) {
  int device = 0;
  if (message_of(cudaGetDevice(&device))) return false;
  std::atomic<Answer>* known = device < kDevices ? &answers[device] : nullptr;
  Answer answer = known ? known->load(std::memory_order_relaxed) : kUnknown;
  if (answer == kUnknown) {
    answer = clusters_allowed() && runs_in_clusters(kernel) ? kYes : kNo;
    if (known) known->store(answer, std::memory_order_relaxed);
  }
  return answer == kYes;
}

bool cuda_built() { return true; }

bool cuda_usable() {
  static const bool usable = cuda_driver_version() >= kMinCudaDriver;
  return usable;
}

const char* cuda_architectures() { return DIFFCORE_CUDA_ARCHITECTURES; }

int cuda_device_count() {
  int count = 0;  // without a driver or a device too
  return message_of(cudaGetDeviceCount(&count)) ? 0 : count;
}

int cuda_driver_version() {
  int version = 0;
  return message_of(cudaDriverGetVersion(&version)) ? 0 : version;
}

const char* run_on_cuda(int op, Dtype dtype, LaunchArgs& args, Device device, Allocate allocate,
                        void* context) {
  DeviceGuard guard(device.id);
  if (guard.error()) return guard.error();
  return kColumns[dtype]()[op].run(args, static_cast<cudaStream_t>(device.stream),
                                   Workspace{allocate, context});
}

const char* load_cuda_kernels(int device) {
  DeviceGuard guard(device);
  if (guard.error()) return guard.error();
  for (const auto column : kColumns)
    for (int op = 0; op < AllOps::size; ++op)
      if (const CudaKernel& kernel = column()[op]; kernel.load)
        if (const char* error = kernel.load()) return error;
  return nullptr;
}

}  // namespace diffcore
