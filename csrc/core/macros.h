// What every functor and driver needs from the compiler.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define DC_HD __host__ __device__ __forceinline__
// What is long: called on CUDA, where a pack would hold eight copies of it; on the CPU a call would
// keep its loop from becoming one of vectors.
#define DC_OUTLINED __host__ __device__ __noinline__
#define DC_UNROLL _Pragma("unroll")
#else
#define DC_HD inline __attribute__((always_inline))
#define DC_OUTLINED DC_HD
#define DC_UNROLL _Pragma("GCC unroll 32")
#endif

// CPU kernels are compiled once per instruction set, each in a namespace of its own: no symbol
// compiled for a newer processor may be picked by the linker for an older one.
#ifdef DIFFCORE_ISA_NAMESPACE
#define DC_KERNEL_NAMESPACE_BEGIN namespace diffcore::DIFFCORE_ISA_NAMESPACE {
#else
#define DC_KERNEL_NAMESPACE_BEGIN namespace diffcore {
#endif
#define DC_KERNEL_NAMESPACE_END }
