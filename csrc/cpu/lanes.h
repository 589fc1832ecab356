// The `Lanes` of noise/normal.h for vectors of the instruction set that this file is compiled for.
#pragma once

#if defined(__aarch64__)
#include <arm_neon.h>
#else
#include <immintrin.h>
#endif

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

// The 64-bit products of the lower halves. Compilers do not find this instruction in plain C++.
DC_HD VectorU64 products(VectorU64 a, VectorU64 b) {
#if defined(__AVX512F__)
  return VectorU64(_mm512_maskz_mul_epu32(__mmask8(-1), __m512i(a), __m512i(b)));
#elif defined(__AVX2__)
  return VectorU64(_mm256_mul_epu32(__m256i(a), __m256i(b)));
#elif defined(__aarch64__)
  return VectorU64(vmull_u32(vmovn_u64(uint64x2_t(a)), vmovn_u64(uint64x2_t(b))));
#else
  return VectorU64(_mm_mul_epu32(__m128i(a), __m128i(b)));
#endif
}

DC_HD VectorF roots(VectorF x) {
#if defined(__AVX512F__)
  return VectorF(_mm512_maskz_sqrt_ps(__mmask16(-1), __m512(x)));
#elif defined(__AVX2__)
  return VectorF(_mm256_sqrt_ps(__m256(x)));
#elif defined(__aarch64__)
  return VectorF(vsqrtq_f32(float32x4_t(x)));
#else
  return VectorF(_mm_sqrt_ps(__m128(x)));
#endif
}

// Independent vectors that are processed together, to hide latency: the chain of dependent
// operations from a counter to a normal takes about 250 cycles.
constexpr int kGroup = 4;

template <class V>
struct VectorGroup {
  V v[kGroup];
  VectorGroup() = default;
  template <class W>
  DC_HD explicit VectorGroup(const VectorGroup<W>& bits) {
    DC_UNROLL
    for (int i = 0; i < kGroup; ++i) v[i] = V(bits.v[i]);
  }
};

// Applies f to each vector.
template <class V, class F, class... A>
DC_HD VectorGroup<V> map(F f, const VectorGroup<A>&... a) {
  VectorGroup<V> y;
  DC_UNROLL
  for (int i = 0; i < kGroup; ++i) y.v[i] = f(a.v[i]...);
  return y;
}

template <class V>
DC_HD VectorGroup<V> operator^(const VectorGroup<V>& a, const VectorGroup<V>& b) {
  return map<V>([](const V& x, const V& y) { return x ^ y; }, a, b);
}
template <class V>
DC_HD VectorGroup<V> operator^(const VectorGroup<V>& a, uint32_t b) {
  return map<V>([b](const V& x) { return x ^ b; }, a);
}
template <class V, class C>
DC_HD VectorGroup<V> operator&(const VectorGroup<V>& a, C b) {
  return map<V>([b](const V& x) { return x & b; }, a);
}
template <class V, class C>
DC_HD VectorGroup<V> operator+(const VectorGroup<V>& a, C b) {
  return map<V>([b](const V& x) { return x + b; }, a);
}
template <class V>
DC_HD VectorGroup<V> operator-(const VectorGroup<V>& a, int32_t b) {
  return map<V>([b](const V& x) { return x - b; }, a);
}
template <class V>
DC_HD VectorGroup<V> operator<<(const VectorGroup<V>& a, int n) {
  return map<V>([n](const V& x) { return x << n; }, a);
}
template <class V>
DC_HD VectorGroup<V> operator>>(const VectorGroup<V>& a, int n) {
  return map<V>([n](const V& x) { return x >> n; }, a);
}
// The same number in all lanes.
template <class V, class C>
DC_HD VectorGroup<V> filled(C number) {
  return map<V>([number](const V&) { return V{} + number; }, VectorGroup<V>{});
}

struct VectorLanes {
  // A Philox word occupies a 64-bit lane, so products need no shuffling. The upper half of the lane
  // is never read.
  using Word = VectorGroup<VectorU64>;
  using U = VectorGroup<VectorU>;
  using I = VectorGroup<VectorI>;
  using F = VectorGroup<VectorF>;

  DC_HD static void multiply(const Word& a, uint32_t b, Word* high, Word* low) {
    *low = map<VectorU64>([b](const VectorU64& x) { return products(x, VectorU64{} + b); }, a);
    *high = *low >> 32;
  }
  DC_HD static Word word(uint32_t x) { return filled<VectorU64>(x); }
  DC_HD static F real(float x) { return filled<VectorF>(x); }
  DC_HD static F mul(const F& a, const F& b) {
    return map<VectorF>([](const VectorF& x, const VectorF& y) { return x * y; }, a, b);
  }
  DC_HD static F add(const F& a, const F& b) {
    return map<VectorF>([](const VectorF& x, const VectorF& y) { return x + y; }, a, b);
  }
  DC_HD static F multiply_add(const F& a, const F& b, const F& c) { return add(mul(a, b), c); }
  DC_HD static F sqrt(const F& a) {
    return map<VectorF>([](const VectorF& x) { return roots(x); }, a);
  }
  DC_HD static F to_real(const I& a) {
    return map<VectorF>([](const VectorI& x) { return __builtin_convertvector(x, VectorF); }, a);
  }
  DC_HD static F where_negative(const I& sign, const F& a, const F& b) {
    return map<VectorF>(
        [](const VectorI& s, const VectorF& x, const VectorF& y) { return s < 0 ? x : y; }, sign, a,
        b);
  }
};

DC_KERNEL_NAMESPACE_END
