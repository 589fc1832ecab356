// Philox4x32-10: maps a 128-bit counter to 128 random bits under a 64-bit key (Salmon et al. 2011,
// "Parallel random numbers: as easy as 1, 2, 3"). `Lanes` defines the type of a word: one number,
// or a vector of numbers.
#pragma once

#include "core/launch_args.h"
#include "core/number.h"

DC_KERNEL_NAMESPACE_BEGIN

#ifdef __CUDA_ARCH__
// Two instructions for which CUDA has no function. From uint64_t(a) * b nvcc makes two additions of
// zero more, and from rsqrtf three instructions for numbers below 2^-126.
#ifdef __NVCC__
__device__ __forceinline__ void wide_product(uint32_t a, uint32_t b, uint32_t* high,
                                             uint32_t* low) {
  asm("{\n\t.reg .u64 p;\n\tmul.wide.u32 p, %2, %3;\n\tmov.b64 {%0, %1}, p;\n\t}"
      : "=r"(*low), "=r"(*high)
      : "r"(a), "r"(b));
}
__device__ __forceinline__ float approximate_rsqrt(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#else
void wide_product(uint32_t a, uint32_t b, uint32_t* high, uint32_t* low);  // tests/emulation
float approximate_rsqrt(float x);
#endif

// The square root of ±0 or of a number between 2^-100 and 2^100, correctly rounded: the steps of
// __fsqrt_rn, without its call for all other numbers.
__device__ __forceinline__ float short_sqrt(float x) {
  const float y = approximate_rsqrt(x), root = __fmul_rn(x, y);
  const float half = __fmul_rn(y, 0.5f), rest = __fmaf_rn(-root, root, x);
  return x > 0 ? __fmaf_rn(rest, half, root) : x;
}
#endif

// One number per word, for CUDA threads and single elements on the CPU. nvcc would contract
// a * b + c; noise must have the same bits everywhere, so each operation is an intrinsic that
// rounds separately.
struct ScalarLanes {
  using Word = uint32_t;
  using U = uint32_t;
  using I = int32_t;
  using F = float;

  DC_HD static void multiply(Word a, uint32_t b, Word* high, Word* low) {
#ifdef __CUDA_ARCH__
    wide_product(a, b, high, low);
#else
    const uint64_t product = uint64_t(a) * b;
    *high = uint32_t(product >> 32);
    *low = uint32_t(product);
#endif
  }
  DC_HD static F real(float x) { return x; }
  DC_HD static F multiply_add(F a, F b, F c) { return add(mul(a, b), c); }
  DC_HD static F where_negative(I i, F a, F b) { return i < 0 ? a : b; }
#ifdef __CUDA_ARCH__
  DC_HD static F mul(F a, F b) { return __fmul_rn(a, b); }
  DC_HD static F add(F a, F b) { return __fadd_rn(a, b); }
  DC_HD static F sqrt(F x) { return short_sqrt(x); }
  DC_HD static F to_real(I i) { return __int2float_rn(i); }
#else
  DC_HD static F mul(F a, F b) { return a * b; }
  DC_HD static F add(F a, F b) { return a + b; }
  DC_HD static F sqrt(F x) { return __builtin_sqrtf(x); }
  DC_HD static F to_real(I i) { return F(i); }
#endif
};

template <class Lanes>
DC_HD void philox(typename Lanes::Word (&c)[4], uint32_t key0, uint32_t key1) {
  DC_UNROLL
  for (int round = 0; round < 10; ++round) {
    typename Lanes::Word high0, low0, high1, low1;
    Lanes::multiply(c[0], 0xD2511F53u, &high0, &low0);
    Lanes::multiply(c[2], 0xCD9E8D57u, &high1, &low1);
    c[0] = high1 ^ c[1] ^ key0;
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ key1;
    c[3] = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// The Philox key of one sample, and its counter except the block number.
struct NoiseKey {
  uint32_t key[2];
  uint32_t id[2];
  uint32_t stream;
  uint32_t first_block;  // a block is four elements
};

DC_HD NoiseKey noise_key(const NoiseSource& noise, int64_t row) {
  const uint64_t seed = uint64_t(noise.seed ? noise.seed[0] : noise.seed_value);
  const uint64_t id = uint64_t(noise.id ? noise.id[row * noise.id_stride] : noise.first_id) +
                      (noise.ids_count_up ? uint64_t(row) : 0);
  uint64_t stream = uint64_t(noise.stream ? *noise.stream : noise.stream_value);
  if (noise.seed_has_offset) stream += uint64_t(noise.seed[1]);
  const int64_t block = noise.first_element
                            ? noise.first_element[row * noise.first_element_stride] / 4
                            : noise.first_block;
  return {{uint32_t(seed), uint32_t(seed >> 32)},
          {uint32_t(id), uint32_t(id >> 32)},
          uint32_t(stream),
          uint32_t(block)};
}

DC_KERNEL_NAMESPACE_END
