// Replaces cuda/device.cu in a build without CUDA.
#include "cuda/kernels.h"

namespace diffcore {

bool cuda_built() { return false; }
bool cuda_usable() { return false; }
const char* cuda_architectures() { return ""; }
int cuda_device_count() { return 0; }
int cuda_driver_version() { return 0; }
const char* run_on_cuda(int, Dtype, LaunchArgs&, Device, Allocate, void*) {
  return "built without CUDA";
}
const char* load_cuda_kernels(int) { return "built without CUDA"; }

}  // namespace diffcore
