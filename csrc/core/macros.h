// What every functor and driver needs from the compiler.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define DC_HD __host__ __device__ __forceinline__
#define DC_UNROLL _Pragma("unroll")
#else
#define DC_HD inline __attribute__((always_inline))
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
