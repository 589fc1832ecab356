// The CPU kernels: one table per instruction set, and the function that picks a table and runs a
// kernel of it.
#pragma once

#include "core/launch_args.h"

namespace diffcore {

struct CpuKernel {
  void (*run)(const LaunchArgs&, int64_t unit_begin, int64_t unit_end, void* scratch);
  void (*finish)(const LaunchArgs&);
  int64_t scratch;  // bytes for each thread; a kernel that needs any is given complete rows
};

// kernels.cc: rows in the order of AllOps, kDtypes entries a row.
namespace v2 {
const CpuKernel* cpu_kernels();
}
namespace v3 {
const CpuKernel* cpu_kernels();
}
namespace v4 {
const CpuKernel* cpu_kernels();
}

// dispatch.cc
const char* cpu_isa();       // in use
const char* best_cpu_isa();  // that the processor has
int cpu_threads();
// false: `wrong_step` is out of range, and nothing was done
bool run_on_cpu(int op, Dtype dtype, LaunchArgs& args, int64_t* wrong_step);

}  // namespace diffcore
