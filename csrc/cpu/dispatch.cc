// Chooses the instruction set once, and splits a call into units of work for the threads of torch's
// OpenMP runtime, so torch.set_num_threads applies.
#include <omp.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>
#include <memory>

#include "core/coefficients.h"
#include "cpu/kernels.h"

namespace diffcore {
namespace {

struct Isa {
  const char* name;
  bool (*supported)();  // by the build and by the processor
  const CpuKernel* (*kernels)();
};

#if defined(__aarch64__)
// Every aarch64 processor has its vectors and fused multiply-add.
constexpr Isa kIsas[] = {{"neon", [] { return true; }, neon::cpu_kernels}};
#else
// Features that clang's __builtin_cpu_supports does not know: these bits of ECX.
[[maybe_unused]] bool cpuid_has(unsigned leaf, unsigned bits) {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(leaf, &eax, &ebx, &ecx, &edx) && (ecx & bits) == bits;
}
// The processor must have every feature of -march=x86-64-v3, -v4.
[[maybe_unused]] bool has_v3() {
  constexpr unsigned kMovbe = 1u << 22, kF16c = 1u << 29, kLzcnt = 1u << 5;
  return __builtin_cpu_supports("avx") && __builtin_cpu_supports("avx2") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("fma") && cpuid_has(1, kMovbe | kF16c) &&
         cpuid_has(0x80000001u, kLzcnt);
}
[[maybe_unused]] bool has_v4() {
  return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
constexpr Isa kIsas[] = {
    {"v2", [] { return true; }, v2::cpu_kernels},
#ifndef DIFFCORE_WITHOUT_v3
    {"v3", has_v3, v3::cpu_kernels},
#endif
#ifndef DIFFCORE_WITHOUT_v4
    {"v4", has_v4, v4::cpu_kernels},
#endif
};
#endif

// The best set, or the one named; the first of the list, which all processors have, where that one
// is unknown or not supported.
const Isa& choose_isa(const char* named) {
  const Isa* chosen = kIsas;
  for (const Isa& isa : kIsas)
    if (isa.supported() && (!named || !*named || !std::strcmp(named, isa.name))) chosen = &isa;
  return *chosen;
}

const Isa& isa() {
  static const Isa& chosen = choose_isa(std::getenv("DIFFCORE_ISA"));
  return chosen;
}

// Elements. Below this, starting threads costs more than it saves.
constexpr int64_t kParallelFrom = 32 * 1024;

}  // namespace

const char* cpu_isa() { return isa().name; }
const char* best_cpu_isa() { return choose_isa(nullptr).name; }
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
  const CpuKernel& kernel = isa().kernels()[op * kDtypes + dtype];
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
