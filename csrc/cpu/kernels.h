// The CPU kernels: one table per instruction set, and the function that runs a kernel from the
// table of the instruction set in use.
#pragma once

#include "core/launch_args.h"

namespace diffcore {

constexpr int64_t kChunk = 8192;  // columns per unit of work

struct CpuKernel {
  void (*run)(const LaunchArgs&, int64_t unit_begin, int64_t unit_end, void* scratch);
  void (*combine)(const LaunchArgs&);  // combines the chunks of every row; null for kSelect
  int64_t scratch;  // bytes per thread; if not 0, a unit of work is a complete row
};

// kernels.cc: rows in the order of AllOps, kDtypes entries a row. v2, v3 and v4 are x86-64's, neon
// is aarch64's.
namespace v2 {
const CpuKernel* cpu_kernels();
}
namespace v3 {
const CpuKernel* cpu_kernels();
}
namespace v4 {
const CpuKernel* cpu_kernels();
}
namespace neon {
const CpuKernel* cpu_kernels();
}

// dispatch.cc
const char* cpu_isa();       // the instruction set in use
const char* best_cpu_isa();  // the best one that the processor supports
int cpu_threads();
// Whether all steps are in range of the table; if not, `wrong` is one that is not.
bool cpu_steps_in_range(const LaunchArgs& args, int64_t* wrong);
// The steps must be in range.
void run_on_cpu(int op, Dtype dtype, LaunchArgs& args);

}  // namespace diffcore
