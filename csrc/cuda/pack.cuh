// Sixteen bytes of elements, in the registers of a thread.
#pragma once

#include <stdint.h>

#include "core/macros.h"
#include "core/number.h"

namespace diffcore {

template <class S>
constexpr int kPack = 16 / sizeof(S);
// Elements that a thread computes without a branch between them: the four of a block of noise, or a
// pack of two doubles.
template <class S>
constexpr int kFew = kPack<S> < 4 ? kPack<S> : 4;

template <class S>
class Few {
 public:
  __device__ __forceinline__ S get(int i) const { return element_[i]; }
  __device__ __forceinline__ void set(int i, S x) { element_[i] = x; }

 private:
  S element_[kFew<S>];
};

// In words of 32 bits: nvcc would keep each 16-bit element in a register of its own.
template <class S>
class FewHalves {
 public:
  __device__ __forceinline__ S get(int i) const { return {uint16_t(word_[i / 2] >> (i % 2 * 16))}; }
  // In the order of i.
  __device__ __forceinline__ void set(int i, S x) {
    word_[i / 2] = i % 2 ? word_[i / 2] | uint32_t(x.bits) << 16 : x.bits;
  }

 private:
  uint32_t word_[2];
};
template <>
class Few<Bf16> : public FewHalves<Bf16> {};
template <>
class Few<F16> : public FewHalves<F16> {};

template <class S>
struct alignas(16) Pack {
  static constexpr int kParts = kPack<S> / kFew<S>;
  Few<S> part[kParts];

  __device__ __forceinline__ S get(int i) const { return part[i / kFew<S>].get(i % kFew<S>); }
  // In the order of i.
  __device__ __forceinline__ void set(int i, S x) { part[i / kFew<S>].set(i % kFew<S>, x); }
  // Removes the first part and adds one at the end. Registers have no index, so a loop over parts
  // that is not unrolled takes the first and moves the others.
  __device__ __forceinline__ Few<S> shift(const Few<S>& last = {}) {
    const Few<S> first = part[0];
    DC_UNROLL
    for (int i = 1; i < kParts; ++i) part[i - 1] = part[i];
    part[kParts - 1] = last;
    return first;
  }
};

}  // namespace diffcore
