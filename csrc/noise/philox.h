// Philox4x32-10: maps a 128-bit counter to 128 random bits under a 64-bit key (Salmon et al. 2011,
// "Parallel random numbers: as easy as 1, 2, 3"). `Lanes` defines the type of a word: one number,
// or a vector of numbers.
#pragma once

#include "core/launch_args.h"
#include "core/number.h"

DC_KERNEL_NAMESPACE_BEGIN

// One number per word, for CUDA threads and single elements on the CPU. nvcc would contract
// a * b + c; noise must have the same bits everywhere, so each operation is an intrinsic that
// rounds separately.
struct ScalarLanes {
  using Word = uint32_t;
  using U = uint32_t;
  using I = int32_t;
  using F = float;

  DC_HD static void multiply(Word a, uint32_t b, Word* high, Word* low) {
    const uint64_t product = uint64_t(a) * b;
    *high = uint32_t(product >> 32);
    *low = uint32_t(product);
  }
  DC_HD static F real(float x) { return x; }
  DC_HD static F multiply_add(F a, F b, F c) { return add(mul(a, b), c); }
  DC_HD static F where_negative(I i, F a, F b) { return i < 0 ? a : b; }
#ifdef __CUDA_ARCH__
  DC_HD static F mul(F a, F b) { return __fmul_rn(a, b); }
  DC_HD static F add(F a, F b) { return __fadd_rn(a, b); }
  DC_HD static F sqrt(F x) { return __fsqrt_rn(x); }
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
  return {{uint32_t(seed), uint32_t(seed >> 32)},
          {uint32_t(id), uint32_t(id >> 32)},
          uint32_t(stream),
          uint32_t(noise.first_block)};
}

DC_KERNEL_NAMESPACE_END
