// Compiler-specific attributes and pragmas, for functors and loops.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define DC_HD __host__ __device__ __forceinline__
// For long functions. On CUDA they are called, because inlining would put up to eight copies into
// each kernel. On the CPU they are inlined, because a call would prevent vectorization of the loop.
#define DC_OUTLINED __host__ __device__ __noinline__
#define DC_UNROLL _Pragma("unroll")
#else
#define DC_HD inline __attribute__((always_inline))
#define DC_OUTLINED DC_HD
#define DC_UNROLL _Pragma("GCC unroll 32")
#endif

// Before a loop on the CPU whose iterations do not depend on each other through memory.
#if defined(__clang__)
#define DC_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define DC_INDEPENDENT _Pragma("GCC ivdep")
#endif

// Options of GCC for one function on the CPU.
#if defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#define DC_OPTIMIZE(...) __attribute__((optimize(__VA_ARGS__)))
#else
#define DC_OPTIMIZE(...)
#endif

// CPU kernels are compiled once per instruction set, each in a separate namespace, so the linker
// cannot pick a symbol compiled for a newer processor to run on an older one.
#ifdef DIFFCORE_ISA_NAMESPACE
#define DC_KERNEL_NAMESPACE_BEGIN namespace diffcore::DIFFCORE_ISA_NAMESPACE {
#else
#define DC_KERNEL_NAMESPACE_BEGIN namespace diffcore {
#endif
#define DC_KERNEL_NAMESPACE_END }
