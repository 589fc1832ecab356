// The work of one CUDA thread on the elements of a row that it is given.
#pragma once

#include "core/coefficients.h"
#include "core/launch_args.h"
#include "core/number.h"
#include "core/op.h"
#include "cuda/pack.cuh"
#include "cuda/sum.cuh"
#include "noise/normal.h"

namespace diffcore {

// Packs of each input that a thread loads before it computes. With many inputs one pack of each
// keeps enough loads in flight, and fewer registers allow more threads to hide latency. Counts the
// noise as an input even if it is generated: the value determines the order of a sum, whose bits
// must not depend on the source of the noise.
template <class Op>
constexpr int kUnroll = Op::n_in <= 2 ? 2 : 1;

// Packs that a turn of the loop over them computes: one with noise, whose code is long.
template <class Op>
constexpr int kUnrolledPacks = kGeneratesNoise<Op> ? 1 : kUnroll<Op>;

// load_coefs; if all threads of a warp have the same row, each lane loads one coefficient.
template <class Op, class R>
__device__ __forceinline__ void share_coefs(const LaunchArgs& args, int64_t row, int threads_x,
                                            R* c) {
  if (Op::n_coef > 1 && threads_x >= 32) {
    static_assert(Op::n_coef <= 32, "each lane of a warp fetches one coefficient");
    const int lane = threadIdx.x % 32;
    R mine = R(0);
    if (lane < Op::n_coef)
      mine = load_coef<R>(args.coef[lane], row, args.steps ? step_of(args, row) : 0);
    DC_UNROLL
    for (int k = 0; k < Op::n_coef; ++k) c[k] = __shfl_sync(~0u, mine, k);
    Op::prepare(c);
  } else {
    load_coefs<Op>(args, row, c);
  }
}

// Elements of a row that a thread computes together if accesses are single: in memory, `count` of
// them from `begin` on, `stride` apart. With noise they are the block `block` of Philox.
struct Place {
  int64_t begin, stride, block;
  int count;
};

// The work of one thread on its elements of a row. Adds to `sums`.
template <class Op, class S, class Formula = Op>
struct RowWorker {
  using R = Compute<S>;
  static constexpr int kIn = kReads<Op>, kOut = Op::n_out, kSum = Op::n_sum, kU = kUnroll<Op>;
  static constexpr int kPack = diffcore::kPack<S>, kFew = diffcore::kFew<S>, kParts = kPack / kFew;
  // With more inputs the formula is long.
  static constexpr int kUnrolledParts = kU == 2 ? kParts : 1;

  const LaunchArgs& args;
  R* c;
  Total<R>* sums;
  const NoiseKey& key;

  __device__ __forceinline__ void apply(const S* x, float z, S* stored) const {
    R values[Op::n_in], y[kOut + kSum];
    DC_UNROLL
    for (int k = 0; k < kIn; ++k) values[k] = load_value(x[k]);
    // Rounded to S, as a tensor would store it.
    if constexpr (kGeneratesNoise<Op>) values[kIn] = load_value(Store<S>::from(z));
    Formula::template apply<R>(c, values, y);
    DC_UNROLL
    for (int k = 0; k < kOut; ++k) stored[k] = Store<S>::from(y[k]);
    DC_UNROLL
    for (int k = 0; k < kSum; ++k) sums[k].add(y[kOut + k]);
  }

  // kU packs, threads_x apart. `meanwhile` runs while the loads are in flight.
  template <class Meanwhile>
  __device__ __forceinline__ void packs(int64_t row, int64_t first, int64_t count, int threads_x,
                                        Meanwhile meanwhile) const {
    Pack<S> in[kU][kIn + 1];
    const auto load = [&](int u) {
      DC_UNROLL
      for (int k = 0; k < kIn; ++k) in[u][k] = pack(from(k, row))[first + u * threads_x];
    };
    if (first + (kU - 1) * threads_x < count) {  // no branch between the loads: all in flight
      DC_UNROLL
      for (int u = 0; u < kU; ++u) load(u);
    } else {
      DC_UNROLL
      for (int u = 0; u < kU; ++u)
        if (first + u * threads_x < count) load(u);
    }
    meanwhile();
#pragma unroll kUnrolledPacks < Op>
    for (int u = 0; u < kU; ++u) {
      const int64_t p = first + u * threads_x;
      if (p >= count) return;
      Pack<S> out[kOut + 1] = {};
#pragma unroll kUnrolledParts
      for (int part = 0; part < kParts; ++part) {
        Few<S> values[kIn + 1], results[kOut + 1];
        DC_UNROLL
        for (int k = 0; k < kIn; ++k) values[k] = in[0][k].shift();
        float z[kFew] = {};
        if constexpr (kGeneratesNoise<Op>) generate(p * kParts + part, z);
        DC_UNROLL
        for (int i = 0; i < kFew; ++i) {
          S x[kIn + 1], stored[kOut + 1];
          DC_UNROLL
          for (int k = 0; k < kIn; ++k) x[k] = values[k].get(i);
          apply(x, z[i], stored);
          DC_UNROLL
          for (int k = 0; k < kOut; ++k) results[k].set(i, stored[k]);
        }
        DC_UNROLL
        for (int k = 0; k < kOut; ++k) out[k].shift(results[k]);
      }
      DC_UNROLL
      for (int k = 0; k < kOut; ++k) pack(to(k, row))[p] = out[k];
      DC_UNROLL
      for (int v = 1; v < kU; ++v) {
        DC_UNROLL
        for (int k = 0; k < kIn; ++k) in[v - 1][k] = in[v][k];
      }
    }
  }

  // As many elements as a pack, by single accesses: those of pack p, or other elements of the packs
  // of all threads (`place`). x: the thread of the row.
  __device__ __forceinline__ void singly(int64_t row, int64_t p, int x, int threads_x,
                                         bool neighbors) const {
#pragma unroll 1
    for (int part = 0; part < kParts; ++part) few(row, place(p, part, x, threads_x, neighbors));
  }

  // Column i of the row.
  __device__ __forceinline__ void one(int64_t row, int64_t i) const {
    S x[kIn + 1], stored[kOut + 1];
    DC_UNROLL
    for (int k = 0; k < kIn; ++k) x[k] = from(k, row)[i];
    float z = 0;
    if constexpr (kGeneratesNoise<Op>) {
      const int64_t runs = args.noise.inner;
      z = normal(key, runs == 1 ? i : i % runs * (args.cols / runs) + i / runs);
    }
    apply(x, z, stored);
    DC_UNROLL
    for (int k = 0; k < kOut; ++k) to(k, row)[i] = stored[k];
  }

 private:
  __device__ __forceinline__ const S* from(int k, int64_t row) const {
    return static_cast<const S*>(args.in[k]) + row * args.row_stride[k];
  }
  __device__ __forceinline__ S* to(int k, int64_t row) const {
    return static_cast<S*>(args.out[k]) + row * args.cols;
  }
  static __device__ __forceinline__ const Pack<S>* pack(const S* x) {
    return reinterpret_cast<const Pack<S>*>(x);
  }
  static __device__ __forceinline__ Pack<S>* pack(S* x) { return reinterpret_cast<Pack<S>*>(x); }

  __device__ __forceinline__ Place place(int64_t p, int part, int x, int threads_x,
                                         bool neighbors) const {
    if (kGeneratesNoise<Op> && !kSum && args.noise.inner > 1) {
      // Neighbors in the order of the noise are `inner` apart in memory, where the threads of a
      // warp access neighbors. plan.cc: the runs have a multiple of four elements.
      const int64_t inner = args.noise.inner, run = args.cols / inner;
      const int64_t four = (p - x) * kParts + part * threads_x + x;
      const int64_t along = four / inner, which = four % inner, begin = along * 4 * inner + which;
      return {begin, inner, which * (run / 4) + along, begin < args.cols ? kFew : 0};
    }
    // A sum must not depend on the kind of access, and a block of Philox has neighbors. Else the
    // threads of a warp access neighbors.
    const bool own = kSum || kGeneratesNoise<Op> || neighbors;
    const int64_t stride = own ? 1 : threads_x;
    const int64_t begin =
        own ? p * kPack + part * kFew : (p - x) * kPack + part * kFew * stride + x;
    const int64_t left = args.cols - begin;
    const int count = left <= 0                    ? 0
                      : left > (kFew - 1) * stride ? kFew
                                                   : int((left - 1) / stride) + 1;
    return {begin, stride, p * kParts + part, count};
  }

  __device__ __forceinline__ void few(int64_t row, const Place& at) const {
    if (at.count == 0) return;
    S x[kFew][kIn + 1];
    DC_UNROLL
    for (int i = 0; i < kFew; ++i) {
      if (i >= at.count) continue;
      DC_UNROLL
      for (int k = 0; k < kIn; ++k) x[i][k] = from(k, row)[at.begin + i * at.stride];
    }
    float z[kFew] = {};
    if constexpr (kGeneratesNoise<Op>) generate(at.block, z);
    // One copy of the formula, as it is long; x and z move up because registers have no index.
#pragma unroll 1
    for (int i = 0; i < at.count; ++i) {
      S stored[kOut + 1];
      apply(x[0], z[0], stored);
      DC_UNROLL
      for (int k = 0; k < kOut; ++k) to(k, row)[at.begin + i * at.stride] = stored[k];
      DC_UNROLL
      for (int j = 1; j < kFew; ++j) {
        z[j - 1] = z[j];
        DC_UNROLL
        for (int k = 0; k < kIn; ++k) x[j - 1][k] = x[j][k];
      }
    }
  }

  // The kFew normals of a block; of a pack of doubles, half a block.
  __device__ __forceinline__ void generate(int64_t block, float* z) const {
    if constexpr (kFew == 2)
      normal_pair(key, uint64_t(block), z[0], z[1]);
    else
      normals(key, uint32_t(block), z);
  }
};

}  // namespace diffcore
