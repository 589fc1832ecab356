// Conversions of 16-bit types: of a vector in registers, and of a tile of elements in memory.
#pragma once

#include "core/number.h"
#include "cpu/lanes.h"

DC_KERNEL_NAMESPACE_BEGIN

template <class T, class U>
constexpr bool same = false;
template <class T>
constexpr bool same<T, T> = true;

// Loops convert what they read in registers, unless a processor takes many instructions for it: then
// tiles of float are converted before the loop, by code that all kernels share. f16 takes some twenty
// without F16C. Results in bf16 always go through tiles. Rounding takes five instructions that depend
// on the last step of a formula: next to a long one they fill the queue in which the processor finds
// independent work. vcvtneps2bf16 would be one, but flushes subnormals to zero.
#if defined(__F16C__) || defined(__aarch64__)
constexpr bool kVectorConversion = true;
#else
constexpr bool kVectorConversion = false;
#endif
template <class S>
constexpr bool kReadsTiles = (same<S, Bf16> || same<S, F16>) && !kVectorConversion;
template <class S>
constexpr bool kWritesTiles = kReadsTiles<S> || same<S, Bf16>;

// The vector at an address of numbers, which need not be aligned.
typedef float VectorAt __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
DC_HD VectorAt& vector_at(float* numbers) { return *reinterpret_cast<VectorAt*>(numbers); }
DC_HD const VectorAt& vector_at(const float* numbers) {
  return *reinterpret_cast<const VectorAt*>(numbers);
}

// A vector of elements to and from an array, which the compiler keeps in a register. The bits are
// those of load_value and Store; but f16 becomes quiet if it is a signaling NaN.
DC_HD void store_vector(const float* from, float* to) { vector_at(to) = vector_at(from); }

// Rounded to bf16; NaN quiet. Not for AVX-512, which has an instruction for NaN.
DC_HD VectorU bf16_in_upper_half(VectorF x) {
  const VectorU u = VectorU(x);
  return x != x ? u | 0x400000u : u + 0x7fffu + ((u >> 16) & 1u);
}

#if defined(__AVX512F__)
typedef uint16_t Words __attribute__((vector_size(64)));
DC_HD void load_vector(const Bf16* from, float* to) {
  Words halves;  // word i of a Bf16 vector becomes the upper half of number i
  DC_UNROLL
  for (int i = 0; i < 32; ++i) halves[i] = uint16_t(i / 2);
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  _mm512_storeu_ps(to, __m512(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, __m512i(halves),
                                                             _mm512_castsi256_si512(bits))));
}
DC_HD void load_vector(const F16* from, float* to) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  _mm512_storeu_ps(to, _mm512_maskz_cvtph_ps(__mmask16(-1), bits));
}
DC_HD void store_vector(const float* from, Bf16* to) {
  const __m512 x = _mm512_loadu_ps(from);
  const VectorU u = VectorU(x);
  const __mmask16 odd = _mm512_test_epi32_mask(__m512i(u), __m512i(VectorU{} + 0x10000));
  const __m512i rounded =
      _mm512_mask_add_epi32(__m512i(u + 0x7fff), odd, __m512i(u), __m512i(VectorU{} + 0x8000));
  // Rounding may make an infinity or a zero of a NaN. The table says 2, x itself made quiet, for
  // the tokens 0 and 1, quiet and signaling NaN; and 0, no change, for all others.
  const __m512 bits = _mm512_fixupimm_ps(__m512(rounded), x, __m512i(VectorU{} + 0x22), 0);
  Words upper;
  DC_UNROLL
  for (int i = 0; i < 32; ++i) upper[i] = uint16_t((2 * i + 1) % 32);
  const __m512i words =
      _mm512_maskz_permutexvar_epi16(__mmask32(-1), __m512i(upper), __m512i(bits));
  __builtin_memcpy(to, &words, 32);
}
DC_HD void store_vector(const float* from, F16* to) {
  _mm256_storeu_si256(
      reinterpret_cast<__m256i*>(to),
      _mm512_maskz_cvtps_ph(__mmask16(-1), _mm512_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
DC_HD void load_vector(const Bf16* from, float* to) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  _mm256_storeu_ps(to, __m256(VectorU(_mm256_cvtepu16_epi32(bits)) << 16));
}
DC_HD void load_vector(const F16* from, float* to) {
  _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
DC_HD void store_vector(const float* from, Bf16* to) {
  const __m256i bits = __m256i(bf16_in_upper_half(VectorF(_mm256_loadu_ps(from))) >> 16);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(to),
      _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1)));
}
DC_HD void store_vector(const float* from, F16* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__aarch64__)
DC_HD void load_vector(const Bf16* from, float* to) {
  vst1q_f32(to, vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&from->bits), 16)));
}
DC_HD void load_vector(const F16* from, float* to) {
  vst1q_f32(to, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&from->bits))));
}
DC_HD void store_vector(const float* from, Bf16* to) {
  vst1_u16(&to->bits, vshrn_n_u32(uint32x4_t(bf16_in_upper_half(VectorF(vld1q_f32(from)))), 16));
}
DC_HD void store_vector(const float* from, F16* to) {
  vst1_u16(&to->bits, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(from))));
}
#endif

constexpr int kTile = 512;  // elements converted at a time; a multiple of the lanes of a sum

// Not inlined, so that all kernels share one copy of each conversion. Where such a short loop begins
// changes its time by up to a third: 32 was better than 16 and 64 on an AMD EPYC.
template <class S>
__attribute__((noinline)) DC_OPTIMIZE("align-loops=32") void load_tile(const S* from, int64_t n,
                                                                       float* to) {
  int64_t i = 0;
  if constexpr (kVectorConversion)
    for (; i + kWidth <= n; i += kWidth) load_vector(from + i, to + i);
  for (; i < n; ++i) to[i] = load_value(from[i]);
}
template <class S>
__attribute__((noinline)) DC_OPTIMIZE("align-loops=32") void store_tile(const float* from,
                                                                        int64_t n, S* to) {
  int64_t i = 0;
  if constexpr (kVectorConversion)
    for (; i + kWidth <= n; i += kWidth) store_vector(from + i, to + i);
  for (; i < n; ++i) to[i] = Store<S>::from(from[i]);
}

// The noise of a tile as a tensor would store it.
template <class S>
__attribute__((noinline)) void store_noise(const float* from, int64_t n, void* to) {
  if constexpr (same<S, Bf16>) {  // noise is never NaN, so rounding the bits suffices
    for (int64_t i = 0; i < n; ++i)
      static_cast<Bf16*>(to)[i].bits = uint16_t(rounded_to_bf16(bit_cast<uint32_t>(from[i])) >> 16);
  } else if constexpr (same<S, double>) {
    for (int64_t i = 0; i < n; ++i) static_cast<double*>(to)[i] = from[i];
  } else {
    store_tile(from, n, static_cast<S*>(to));
  }
}

DC_KERNEL_NAMESPACE_END
