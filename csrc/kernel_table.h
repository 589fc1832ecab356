// The tables through which the binding reaches the kernels, one row per op and one column per
// storage type.
#pragma once

#include "core/task.h"

namespace diffcore {

struct CpuKernel {
  void (*run)(const Task&, int64_t unit_begin, int64_t unit_end, void* scratch);
  void (*finish)(const Task&);
  int64_t scratch;  // bytes for each thread; a kernel that wants any is given whole rows
};

namespace v2 {
const CpuKernel* cpu_kernels();
}
namespace v3 {
const CpuKernel* cpu_kernels();
}
namespace v4 {
const CpuKernel* cpu_kernels();
}

// What the binding must know of an op.
struct OpInfo {
  const char* name;
  int n_in, n_out, n_sum, n_coef;  // n_in: that are read
  bool draws;                      // a noise of its own
};

// cpu_dispatch.cc
const char* cpu_isa();       // in use
const char* best_cpu_isa();  // that the processor has
bool run_on_cpu(int op, Dtype dtype,
                Task& task);  // false: a step is out of range, nothing was done
int cpu_threads();

// cuda_kernels.cu, or its stand-in in a build without CUDA
struct Device {
  int id;
  void* stream;
};
using Allocate = void* (*)(void* context, int64_t bytes);
bool cuda_built();
const char* cuda_architectures();
int cuda_device_count();
int cuda_driver_version();
const char* run_on_cuda(int op, Dtype dtype, Task& task, Device device, Allocate allocate,
                        void* context);
const char* load_cuda_kernels(int device);

}  // namespace diffcore
