// The innermost loops: apply a functor to the columns of a row, in vectors.
#pragma once

#include "core/launch_args.h"
#include "core/op.h"
#include "cpu/convert.h"

DC_KERNEL_NAMESPACE_BEGIN

constexpr int kLanes = 64;
static_assert(kTile % kLanes == 0 && kLanes % kWidth == 0,
              "tiles and vectors start at whole lanes");

// y[i] = Op(x[i]) for i < n, on a row or a part of it; summands are added to acc[i % kLanes].
// `in_place`: an output may be the same memory as an input.
template <class R>
using Map = void (*)(const R* coefs, const void* const* from, void* const* to, int64_t n,
                     R (*acc)[kLanes], bool in_place);

// Tensors and sums of an op.
struct Counts {
  int in, out, sum;
};

// What the loop over vectors writes for tensors of type S.
template <class S, bool = kWritesTiles<S>>
struct WrittenAs {
  using type = S;
};
template <class S>
struct WrittenAs<S, true> {
  using type = float;
};
template <class S>
using Written = typename WrittenAs<S>::type;

// The last elements, fewer than a vector: computes the vector that ends with them, and keeps what
// is new of it; a row shorter than a vector is padded. Not inlined, so that all kernels share it,
// and none has a loop over single elements.
template <class S>
__attribute__((noinline)) void map_rest(Map<float> map, Counts count, const float* coefs,
                                        const void* const* from, void* const* to, int64_t first,
                                        int64_t n, float (*acc)[kLanes]) {
  const int left = int(n - first), old = first ? kWidth - left : 0;
  S x[kMaxIn][kWidth];
  Written<S> y[kMaxOut][kWidth];
  float sums[kMaxSum][kLanes];
  const void* in[kMaxIn] = {};
  void* out[kMaxOut] = {};
  for (int k = 0; k < count.in; ++k) {
    const S* const row = static_cast<const S*>(from[k]);
    in[k] = first ? row + n - kWidth : x[k];
    for (int i = 0; !first && i < kWidth; ++i) x[k][i] = row[i < left ? i : left - 1];
  }
  for (int k = 0; k < count.out; ++k) out[k] = y[k];
  for (int k = 0; k < count.sum; ++k)
    for (int i = 0; i < kLanes; ++i) sums[k][i] = 0;
  map(coefs, in, out, kWidth, sums, false);
  for (int k = 0; k < count.out; ++k)
    for (int i = 0; i < left; ++i) static_cast<Written<S>*>(to[k])[first + i] = y[k][old + i];
  for (int k = 0; k < count.sum; ++k)
    for (int i = 0; i < left; ++i) acc[k][first % kLanes + i] += sums[k][old + i];
}

// The accumulators of a sum in registers: those of the next vector are the first. In memory, an
// addition would wait for the one before to be stored, which takes longer than a short formula.
struct LaneSums {
  static constexpr int kCount = kLanes / kWidth;
  VectorF v[kCount];

  DC_HD void load(const float* acc) {
    DC_UNROLL
    for (int j = 0; j < kCount; ++j) v[j] = vector_at(acc + j * kWidth);
  }
  DC_HD void add(const float* summands) {
    const VectorF sum = v[0] + vector_at(summands);
    DC_UNROLL
    for (int j = 1; j < kCount; ++j) v[j - 1] = v[j];
    v[kCount - 1] = sum;
  }
  // After vectors up to column i.
  DC_HD void store(int64_t i, float* acc) const {
    DC_UNROLL
    for (int j = 0; j < kCount; ++j) vector_at(acc + (i + j * kWidth) % kLanes) = v[j];
  }
};

// More accumulators would take too many registers.
template <class Op>
constexpr bool kSumsInRegisters = Op::n_sum > 0 && LaneSums::kCount <= 4;
// Whether the loop is over as many vectors as there are accumulators: not of a formula of hundreds
// of instructions.
template <class Op>
constexpr bool kManyAtOnce = kSumsInRegisters<Op> && !Op::in_double;

// A Map of one formula, in the compute type.
template <class Op, class R>
__attribute__((noinline)) void map_numbers(const R* coefs, const void* const* from, void* const* to,
                                           int64_t n, R (*acc)[kLanes], bool) {
  constexpr int kIn = Op::n_in, kOut = Op::n_out, kSum = Op::n_sum;
  // Local copies, so the compiler can prove that the stores of the loop do not change them.
  R c[Op::n_coef + 1];
  const R* in[kIn + 1];
  R* out[kOut + 1];
  DC_UNROLL
  for (int k = 0; k < Op::n_coef; ++k) c[k] = coefs[k];
  DC_UNROLL
  for (int k = 0; k < kIn; ++k) in[k] = static_cast<const R*>(from[k]);
  DC_UNROLL
  for (int k = 0; k < kOut; ++k) out[k] = static_cast<R*>(to[k]);
  auto element = [&](int64_t i, int64_t lane) __attribute__((always_inline)) {
    R x[kIn + 1], y[kOut + kSum];
    DC_UNROLL
    for (int k = 0; k < kIn; ++k) x[k] = in[k][i];
    Op::template apply<R>(c, x, y);
    DC_UNROLL
    for (int k = 0; k < kOut; ++k) out[k][i] = y[k];
    DC_UNROLL
    for (int k = 0; k < kSum; ++k) acc[k][lane] += y[kOut + k];
  };
  // An output may be the same tensor as an input, but never overlaps one partly. The binding
  // checks this.
  if constexpr (kSum == 0) {
    DC_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) element(i, 0);
  } else {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      DC_INDEPENDENT
      for (int lane = 0; lane < kLanes; ++lane) element(i + lane, lane);
    }
    DC_INDEPENDENT
    for (int lane = 0; i + lane < n; ++lane) element(i + lane, lane);
  }
}

// Computes the vector at column i. y: the outputs, which are also stored, and the summands.
template <class Op, class S>
DC_HD void apply_vector(const float* c, const S* const* in, Written<S>* const* out, int64_t i,
                        float (&y)[Op::n_out + Op::n_sum][kWidth]) {
  // The compiler vectorizes the loop over the lanes, and then keeps these arrays in registers. Not
  // if it unrolls the loop first, which it would with eight lanes and a condition.
  float x[Op::n_in + 1][kWidth];
  DC_UNROLL
  for (int k = 0; k < Op::n_in; ++k) load_vector(in[k] + i, x[k]);
  DC_INDEPENDENT
#if !defined(__AVX512F__)
#pragma GCC unroll 1
#endif
  for (int lane = 0; lane < kWidth; ++lane) {
    float arguments[Op::n_in + 1], results[Op::n_out + Op::n_sum];
    DC_UNROLL
    for (int k = 0; k < Op::n_in; ++k) arguments[k] = x[k][lane];
    Op::template apply<float>(c, arguments, results);
    DC_UNROLL
    for (int k = 0; k < Op::n_out + Op::n_sum; ++k) y[k][lane] = results[k];
  }
  DC_UNROLL
  for (int k = 0; k < Op::n_out; ++k) store_vector(y[k], out[k] + i);
}

// A Map of one formula from 16-bit tensors of type S to those of Written<S>, a vector at a time.
// `self`: this Map.
template <class Op, class S>
DC_HD void apply_vectors(const float* coefs, const void* const* from, void* const* to, int64_t n,
                         float (*acc)[kLanes], bool in_place, Map<float> self) {
  constexpr int kIn = Op::n_in, kOut = Op::n_out, kSum = Op::n_sum;
  float c[Op::n_coef + 1];
  const S* in[kIn + 1];
  Written<S>* out[kOut + 1];
  DC_UNROLL
  for (int k = 0; k < Op::n_coef; ++k) c[k] = coefs[k];
  DC_UNROLL
  for (int k = 0; k < kIn; ++k) in[k] = static_cast<const S*>(from[k]);
  DC_UNROLL
  for (int k = 0; k < kOut; ++k) out[k] = static_cast<Written<S>*>(to[k]);
  LaneSums sums[kSum + 1];
  if constexpr (kSumsInRegisters<Op>)
    for (int k = 0; k < kSum; ++k) sums[k].load(acc[k]);
  int64_t i = 0;
  if constexpr (kManyAtOnce<Op>)
    for (; i + kLanes <= n; i += kLanes) {
      DC_UNROLL
      for (int j = 0; j < LaneSums::kCount; ++j) {
        float y[kOut + kSum][kWidth];
        apply_vector<Op>(c, in, out, i + j * kWidth, y);
        DC_UNROLL
        for (int k = 0; k < kSum; ++k) sums[k].v[j] += vector_at(y[kOut + k]);
      }
    }
whole:
  for (; i + kWidth <= n; i += kWidth) {
    float y[kOut + kSum][kWidth];
    apply_vector<Op>(c, in, out, i, y);
    DC_UNROLL
    for (int k = 0; k < kSum; ++k) {
      if constexpr (kSumsInRegisters<Op>)
        sums[k].add(y[kOut + k]);
      else
        vector_at(acc[k] + i % kLanes) += vector_at(y[kOut + k]);
    }
  }
  // The last vector overlaps the one before, unless that has changed the inputs.
  if (kSum == 0 && i < n && i > 0 && !in_place) {
    i = n - kWidth;
    goto whole;
  }
  if constexpr (kSumsInRegisters<Op>)
    for (int k = 0; k < kSum; ++k) sums[k].store(i, acc[k]);
  if (i < n) map_rest<S>(self, {kIn, kOut, kSum}, coefs, from, to, i, n, acc);
}
template <class Op, class S>
__attribute__((noinline)) void map_vectors(const float* coefs, const void* const* from,
                                           void* const* to, int64_t n, float (*acc)[kLanes],
                                           bool in_place) {
  apply_vectors<Op, S>(coefs, from, to, n, acc, in_place, &map_vectors<Op, S>);
}
// Of several vectors at a time the compiler should compute in turn: the steps of one depend on each
// other.
template <class Op, class S>
__attribute__((noinline)) DC_OPTIMIZE("schedule-insns", "sched-pressure") void sum_vectors(
    const float* coefs, const void* const* from, void* const* to, int64_t n, float (*acc)[kLanes],
    bool in_place) {
  apply_vectors<Op, S>(coefs, from, to, n, acc, in_place, &sum_vectors<Op, S>);
}

template <class Op, class S>
constexpr Map<Compute<S>> map_columns() {
  if constexpr (same<S, Compute<S>>)
    return &map_numbers<Op, S>;
  else if constexpr (kSumsInRegisters<Op>)
    return &sum_vectors<Op, S>;
  else
    return &map_vectors<Op, S>;
}

// map_columns with the formula of the row: Op, or Op::Other.
template <class Op, class S>
void map_formula(const Compute<S>* c, const void* const* from, void* const* to, int64_t n,
                 Compute<S> (*acc)[kLanes], bool in_place) {
  if constexpr (kSwitches<Op>)
    if (Op::other(c)) return map_columns<typename Op::Other, S>()(c, from, to, n, acc, in_place);
  map_columns<Op, S>()(c, from, to, n, acc, in_place);
}

// A Map that converts tiles before or after another one.
template <class S>
__attribute__((noinline)) void map_tiles(Map<float> map, Counts count, const float* c,
                                         const void* const* from, void* const* to, int64_t n,
                                         float (*acc)[kLanes]) {
  alignas(kVectorBytes) float x[kReadsTiles<S> ? kMaxIn : 1][kTile], y[kMaxOut][kTile];
  const void* in[kMaxIn] = {};
  void* out[kMaxOut] = {};
  for (int k = 0; k < count.out; ++k) out[k] = y[k];
  for (int64_t i = 0; i < n; i += kTile) {
    const int64_t m = n - i < kTile ? n - i : kTile;
    for (int k = 0; k < count.in; ++k) {
      const S* part = static_cast<const S*>(from[k]) + i;
      in[k] = part;
      if constexpr (kReadsTiles<S>) {
        load_tile(part, m, x[k]);
        in[k] = x[k];
      }
    }
    map(c, in, out, m, acc, false);
    for (int k = 0; k < count.out; ++k) store_tile(y[k], m, static_cast<S*>(to[k]) + i);
  }
}

// The Map of an op for tensors of type S.
template <class Op, class S>
void map_row(const Compute<S>* c, const void* const* from, void* const* to, int64_t n,
             Compute<S> (*acc)[kLanes], bool in_place) {
  constexpr Counts kCount{Op::n_in, Op::n_out, Op::n_sum};
  if constexpr (kReadsTiles<S>)
    map_tiles<S>(&map_formula<Op, float>, kCount, c, from, to, n, acc);
  else if constexpr (kWritesTiles<S> && Op::n_out > 0)
    map_tiles<S>(&map_formula<Op, S>, kCount, c, from, to, n, acc);
  else
    map_formula<Op, S>(c, from, to, n, acc, in_place);
}

DC_KERNEL_NAMESPACE_END
