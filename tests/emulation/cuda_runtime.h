// Replaces CUDA's header where the kernels of csrc/cuda are compiled by a host compiler, to run on a
// CPU. The threads of a block are fibers of one OS thread: a fiber runs until it reaches a barrier or
// a shuffle, then another one runs. What CUDA leaves undefined ends the program with a message: a
// barrier or a shuffle that not all threads reach that have to, or a lane read outside of the mask.
//
// The blocks of a cluster run one after another too, the first one last. What they send to it arrives
// when it waits for that. It ends the program to send before the first barrier of the cluster, to end
// before all that was sent has arrived, and to reach another number of barriers than other threads.
//
// With -fsanitize=thread each CUDA thread is a thread of ThreadSanitizer, and only barriers, shuffles,
// fences with atomic operations and the ends of launches order them, so a race in shared or global
// memory is found in any order of
// execution. With -fsanitize=address accesses out of bounds are found.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <type_traits>

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#ifdef __CUDACC__
#define __noinline__ __attribute__((noinline))
#endif
// Blocks run one after another, so one copy is enough. shared.ld collects these variables in one
// section, which is filled with a pattern before each block.
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
struct cudaFuncAttributes {
  int ptxVersion;
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    uint3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

// Of the running fiber.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulation {

// Device 0 runs clusters, device 1 does not.
extern int device;

struct Place {  // in the source, of a barrier or a shuffle
  const char* file;
  int line;
};

void barrier(Place at);
void arrive_in_cluster(Place at);
void wait_for_cluster(Place at);
// Stores eight bytes for the other lanes of the warp and waits for all lanes in `mask`. Returns the
// values of the 32 lanes.
const uint64_t* exchange(unsigned mask, uint64_t mine, Place at);
// A fence, and what comes before an atomic operation: a fence and an atomic operation after it
// release what the thread wrote; an atomic operation and a fence after it acquire what was released
// there. Without fences, atomic operations order nothing.
void fence();
void at_atomic(const void* at);
cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& thread);
cudaError_t take_last_error();
[[noreturn]] void fail(const char* what, Place at);

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof(T));
  return value;
}

inline int lane() { return int(threadIdx.x % 32); }

template <class T>
T shuffled(unsigned mask, T mine, int from, Place at) {
  const uint64_t* values = exchange(mask, to_bits(mine), at);
  if (!(mask >> from & 1)) fail("a shuffle reads a lane that is not in its mask", at);
  return from_bits<T>(values[from]);
}

}  // namespace emulation

#define EMULATION_AT const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EMULATION_AT) { emulation::barrier({file, line}); }
inline void __cluster_barrier_arrive_relaxed(EMULATION_AT) {
  emulation::arrive_in_cluster({file, line});
}
inline void __cluster_barrier_wait(EMULATION_AT) { emulation::wait_for_cluster({file, line}); }

template <class T>
T __shfl_sync(unsigned mask, T mine, int from, int width = 32, EMULATION_AT) {
  const int first = emulation::lane() & ~(width - 1);
  return emulation::shuffled(mask, mine, first + (from & (width - 1)), {file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T mine, unsigned by, int width = 32, EMULATION_AT) {
  const int lane = emulation::lane(), last = lane | (width - 1), from = lane + int(by);
  return emulation::shuffled(mask, mine, from > last ? lane : from, {file, line});
}

template <class T>
T __shfl_up_sync(unsigned mask, T mine, unsigned by, int width = 32, EMULATION_AT) {
  const int lane = emulation::lane(), first = lane & ~(width - 1), from = lane - int(by);
  return emulation::shuffled(mask, mine, from < first ? lane : from, {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T mine, int with, int width = 32, EMULATION_AT) {
  const int lane = emulation::lane(), from = lane ^ with;
  return emulation::shuffled(mask, mine, from > (lane | (width - 1)) ? lane : from, {file, line});
}

inline int __any_sync(unsigned mask, int mine, EMULATION_AT) {
  const uint64_t* values = emulation::exchange(mask, uint64_t(mine), {file, line});
  int any = 0;
  for (int lane = 0; lane < 32; ++lane) any |= (mask >> lane & 1) && values[lane];
  return any;
}

inline void __threadfence() { emulation::fence(); }
template <class T, class V>
T atomicAdd(T* at, V more) {
  emulation::at_atomic(at);
  return __atomic_fetch_add(at, T(more), __ATOMIC_RELAXED);
}
inline unsigned atomicInc(unsigned* at, unsigned last) {
  emulation::at_atomic(at);
  unsigned now = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(at, &now, now >= last ? 0 : now + 1, true, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED)) {
  }
  return now;
}
template <class T, class V>
T atomicMin(T* at, V other) {
  emulation::at_atomic(at);
  T now = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (T(other) < now && !__atomic_compare_exchange_n(at, &now, T(other), true, __ATOMIC_RELAXED,
                                                        __ATOMIC_RELAXED)) {
  }
  return now;
}

template <class... Parameter, class... Argument>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameter...),
                               const Argument&... argument) {
  return emulation::run(*config, [&] { kernel(argument...); });
}

inline cudaError_t cudaGetLastError() { return emulation::take_last_error(); }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}
inline cudaError_t cudaGetDevice(int* device) { return *device = emulation::device, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) { return emulation::device = device, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 0, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  return attributes->ptxVersion = emulation::device == 1 ? 80 : 90, cudaSuccess;
}
inline cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*,
                                                  const cudaLaunchConfig_t*) {
  return *clusters = 1, cudaSuccess;
}
