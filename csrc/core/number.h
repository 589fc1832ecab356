// Storage types and their compute types: float for f32, bf16 and f16; double for f64.
#pragma once

#include "core/macros.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

DC_KERNEL_NAMESPACE_BEGIN

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

template <class S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

template <class To, class From>
DC_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

DC_HD float load_value(float x) { return x; }
DC_HD double load_value(double x) { return x; }

DC_HD float load_value(Bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

DC_HD float load_value(F16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(bit_cast<__half>(x.bits));
#else
  // Shift the fields into place, then let one exact multiplication correct the exponent; this is
  // exact for subnormals too. Branch-free integer code, because the compiler does not vectorize
  // loops with the scalar conversion instruction.
  uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  uint32_t special = magnitude | 0x7f800000u;  // inf and nan keep their payload
  return bit_cast<float>(sign | ((x.bits & 0x7c00u) == 0x7c00u ? special : finite));
#endif
}

template <class S>
struct Store;

template <>
struct Store<float> {
  DC_HD static float from(float x) { return x; }
};
template <>
struct Store<double> {
  DC_HD static double from(double x) { return x; }
};

// The bits of a float other than NaN, rounded to nearest (ties to even) at the last bit of a bf16.
DC_HD uint32_t rounded_to_bf16(uint32_t u) { return u + 0x7fffu + ((u >> 16) & 1u); }

template <>
struct Store<Bf16> {
  DC_HD static Bf16 from(float x) {
#ifdef __CUDA_ARCH__
    return bit_cast<Bf16>(__float2bfloat16_rn(x));
#else
    uint32_t u = bit_cast<uint32_t>(x), quiet_nan = u | 0x400000u;
    return {uint16_t((x != x ? quiet_nan : rounded_to_bf16(u)) >> 16)};
#endif
  }
};

template <>
struct Store<F16> {  // round to nearest, ties to even
  DC_HD static F16 from(float x) {
#ifdef __CUDA_ARCH__
    return bit_cast<F16>(__float2half_rn(x));
#else
    uint32_t u = bit_cast<uint32_t>(x);
    uint32_t sign = (u >> 16) & 0x8000u;
    uint32_t magnitude = u & 0x7fffffffu;
    // Normal halves: round the integer. The carry goes into the exponent, up to infinity.
    uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
    // Subnormal halves: adding 0.5 makes the hardware round to a multiple of 2^-24, which is then
    // in the low bits.
    uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above round to infinity
    half = magnitude > 0x7f800000u ? (0x7e00u | ((magnitude >> 13) & 0x3ffu)) : half;
    return {uint16_t(sign | half)};
#endif
  }
};

DC_KERNEL_NAMESPACE_END
