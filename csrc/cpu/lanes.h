// Vectors of the instruction set this unit is compiled for, as noise/normal.h wants its numbers.
#pragma once

#include <immintrin.h>

#include "noise/philox.h"

DC_KERNEL_NAMESPACE_BEGIN

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kWidth = kVectorBytes / 4;  // numbers in a vector

typedef uint64_t VectorU64 __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VectorU __attribute__((vector_size(kVectorBytes)));
typedef int32_t VectorI __attribute__((vector_size(kVectorBytes)));
typedef float VectorF __attribute__((vector_size(kVectorBytes)));

// The 64-bit products of the lower halves, which no compiler finds by itself.
DC_HD VectorU64 products(VectorU64 a, VectorU64 b) {
#if defined(__AVX512F__)
  return VectorU64(_mm512_maskz_mul_epu32(__mmask8(-1), __m512i(a), __m512i(b)));
#elif defined(__AVX2__)
  return VectorU64(_mm256_mul_epu32(__m256i(a), __m256i(b)));
#else
  return VectorU64(_mm_mul_epu32(__m128i(a), __m128i(b)));
#endif
}

DC_HD VectorF roots(VectorF x) {
#if defined(__AVX512F__)
  return VectorF(_mm512_maskz_sqrt_ps(__mmask16(-1), __m512(x)));
#elif defined(__AVX2__)
  return VectorF(_mm256_sqrt_ps(__m256(x)));
#else
  return VectorF(_mm_sqrt_ps(__m128(x)));
#endif
}

// Vectors that go through the same arithmetic side by side. One alone would wait for its own
// results most of the time: the chain from a counter to a normal is some 250 cycles long.
constexpr int kSide = 4;

template <class V>
struct Side {
  V v[kSide];
  Side() = default;
  template <class W>
  DC_HD explicit Side(const Side<W>& bits) {
    DC_UNROLL
    for (int i = 0; i < kSide; ++i) v[i] = V(bits.v[i]);
  }
};

template <class V, class F>
DC_HD Side<V> each(F f) {
  Side<V> y;
  DC_UNROLL
  for (int i = 0; i < kSide; ++i) y.v[i] = f(i);
  return y;
}
#define DC_EACH(...) \
  each<V>([&]([[maybe_unused]] int i) __attribute__((always_inline)) { return __VA_ARGS__; })
template <class V>
DC_HD Side<V> operator^(const Side<V>& a, const Side<V>& b) {
  return DC_EACH(a.v[i] ^ b.v[i]);
}
template <class V>
DC_HD Side<V> operator^(const Side<V>& a, uint32_t b) {
  return DC_EACH(a.v[i] ^ b);
}
template <class V, class C>
DC_HD Side<V> operator&(const Side<V>& a, C b) {
  return DC_EACH(a.v[i] & b);
}
template <class V, class C>
DC_HD Side<V> operator+(const Side<V>& a, C b) {
  return DC_EACH(a.v[i] + b);
}
template <class V>
DC_HD Side<V> operator-(const Side<V>& a, int32_t b) {
  return DC_EACH(a.v[i] - b);
}
template <class V>
DC_HD Side<V> operator<<(const Side<V>& a, int n) {
  return DC_EACH(a.v[i] << n);
}
template <class V>
DC_HD Side<V> operator>>(const Side<V>& a, int n) {
  return DC_EACH(a.v[i] >> n);
}

struct VectorLanes {
  // A word of Philox fills 64 bits: a product is there without shuffling, and what is left in the
  // upper half is never read.
  using Word = Side<VectorU64>;
  using U = Side<VectorU>;
  using I = Side<VectorI>;
  using F = Side<VectorF>;
  using V = VectorF;

  DC_HD static void multiply(const Word& a, uint32_t b, Word* high, Word* low) {
    using V = VectorU64;
    *low = DC_EACH(products(a.v[i], V{} + b));
    *high = *low >> 32;
  }
  DC_HD static Word word(uint32_t x) {
    using V = VectorU64;
    return DC_EACH(V{} + x);
  }
  DC_HD static F real(float x) { return DC_EACH(V{} + x); }
  DC_HD static F mul(const F& a, const F& b) { return DC_EACH(a.v[i] * b.v[i]); }
  DC_HD static F add(const F& a, const F& b) { return DC_EACH(a.v[i] + b.v[i]); }
  DC_HD static F sqrt(const F& a) { return DC_EACH(roots(a.v[i])); }
  DC_HD static F to_real(const I& a) { return DC_EACH(__builtin_convertvector(a.v[i], V)); }
  DC_HD static F where_negative(const I& sign, const F& a, const F& b) {
    return DC_EACH(sign.v[i] < 0 ? a.v[i] : b.v[i]);
  }
};
#undef DC_EACH

DC_KERNEL_NAMESPACE_END
