// The interface of the CUDA kernels: device.cu, or absent.cc in a build without CUDA.
#pragma once

#include "core/launch_args.h"

namespace diffcore {

struct Device {
  int id;
  void* stream;
};
using Allocate = void* (*)(void* context, int64_t bytes);

// With DIFFCORE_EMULATED the CUDA kernels are compiled for the CPU (tests/emulation), and run in
// place of the kernels of the CPU.
#ifdef DIFFCORE_EMULATED
constexpr bool kCudaEmulated = true;
#else
constexpr bool kCudaEmulated = false;
#endif

constexpr int kMinCudaDriver = 13000;  // of the static runtime, CUDA 13: R580

bool cuda_built();
bool cuda_usable();  // the driver is not too old
const char* cuda_architectures();
int cuda_device_count();
int cuda_driver_version();
// Both return null, or an error message.
const char* run_on_cuda(int op, Dtype dtype, LaunchArgs& args, Device device, Allocate allocate,
                        void* context);
const char* load_cuda_kernels(int device);

}  // namespace diffcore
