// Chooses the instruction set once, and splits a call into units of work for the threads of torch's
// OpenMP runtime, so torch.set_num_threads applies.
#include <omp.h>

#include <cstdlib>
#include <cstring>
#include <memory>

#include "core/coefficients.h"
#include "cpu/kernels.h"

namespace diffcore {
#ifdef DIFFCORE_WITHOUT_v3
constexpr bool kWithV3 = false;
const CpuKernel* v3::cpu_kernels() { return nullptr; }
#else
constexpr bool kWithV3 = true;
#endif
#ifdef DIFFCORE_WITHOUT_v4
constexpr bool kWithV4 = false;
const CpuKernel* v4::cpu_kernels() { return nullptr; }
#else
constexpr bool kWithV4 = true;
#endif
namespace {

struct Isa {
  const char* name;
  const CpuKernel* kernels;
};

// Whether the build has kernels of a set, and the processor every feature of -march=x86-64-v3, -v4.
bool has_v3() {
  return kWithV3 && __builtin_cpu_supports("avx") && __builtin_cpu_supports("avx2") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("lzcnt") && __builtin_cpu_supports("movbe");
}
bool has_v4() {
  return kWithV4 && has_v3() && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

Isa choose_isa() {
  const char* forced = std::getenv("DIFFCORE_ISA");
  auto allowed = [&](const char* name) {
    return !forced || !*forced || !std::strcmp(forced, name);
  };
  if (has_v4() && allowed("v4")) return {"v4", v4::cpu_kernels()};
  if (has_v3() && allowed("v3")) return {"v3", v3::cpu_kernels()};
  return {"v2", v2::cpu_kernels()};
}

const Isa& isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

// Elements. Below this, starting threads costs more than it saves.
constexpr int64_t kParallelFrom = 32 * 1024;

}  // namespace

const char* cpu_isa() { return isa().name; }
const char* best_cpu_isa() { return has_v4() ? "v4" : has_v3() ? "v3" : "v2"; }
int cpu_threads() { return omp_get_max_threads(); }

bool cpu_steps_in_range(const LaunchArgs& args, int64_t* wrong) {
  const int64_t rows = args.steps ? (args.step_stride ? args.rows : 1) : 0;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t step = given_step(args, row);
    if (step >= 0 && step < args.steps) continue;
    *wrong = step;
    return false;
  }
  return true;
}

void run_on_cpu(int op, Dtype dtype, LaunchArgs& args) {
  const CpuKernel& kernel = isa().kernels[op * kDtypes + dtype];
  args.chunk = kChunk;
  args.chunks = kernel.scratch || args.cols <= kChunk ? 1 : (args.cols + kChunk - 1) / kChunk;
  int64_t units = args.rows * args.chunks;
  std::unique_ptr<double[]> partials;
  if (args.sum[0] && args.chunks > 1) {
    partials.reset(new double[kMaxSum * units]);
    args.partials = partials.get();
  }
  int64_t elements = args.rows * args.cols;
  int threads = elements < kParallelFrom || omp_in_parallel() ? 1 : cpu_threads();
  if (threads > units) threads = int(units);
  std::unique_ptr<char[]> scratch(kernel.scratch ? new char[kernel.scratch * threads] : nullptr);
  if (threads == 1) {
    kernel.run(args, 0, units, scratch.get());
  } else {
#pragma omp parallel num_threads(threads)
    {
      int64_t share = units / omp_get_num_threads(), extra = units % omp_get_num_threads();
      int64_t me = omp_get_thread_num();
      int64_t begin = me * share + (me < extra ? me : extra);
      kernel.run(args, begin, begin + share + (me < extra ? 1 : 0),
                 scratch.get() + me * kernel.scratch);
    }
  }
  if (args.partials) kernel.combine(args);
}

}  // namespace diffcore
