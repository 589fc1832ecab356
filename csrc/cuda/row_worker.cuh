// The work of one CUDA thread on the elements of a row that it is given.
#pragma once

#include "core/coefficients.h"
#include "core/launch_args.h"
#include "core/number.h"
#include "core/op.h"
#include "cuda/sum.cuh"
#include "noise/normal.h"

namespace diffcore {

// Packs of each input that a thread loads before it computes. With many inputs one pack of each
// keeps enough loads in flight, and fewer registers allow more threads to hide latency. Counts the
// noise as an input even if it is generated: the value determines the order of a sum, whose bits
// must not depend on the source of the noise.
template <class Op>
constexpr int kUnroll = Op::n_in <= 2 ? 2 : 1;
// The mapping of blocks to [rows, cols].
struct BlockLayout {
  int log_threads_x;  // of the threads in a row, a power of two
  int rounds;         // kUnroll groups each, per thread
  bool packed;        // 16-byte accesses instead of single elements

  DC_HD int threads_x() const { return 1 << log_threads_x; }
};

struct Launch {
  LaunchArgs args;
  BlockLayout layout;
};

template <class S, int N>
struct alignas(sizeof(S) * N) Pack {
  S value[N];
};

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

// The places in a row of the N elements of a group that are accessed singly.
template <class Op, int N>
struct Places {
  static constexpr int kFours = (N + 3) / 4;
  int64_t begin[kFours];  // of every four elements
  int64_t stride;         // between the four
  int64_t block[kFours];  // of Philox, which generates four elements

  __device__ __forceinline__ Places(const LaunchArgs& args, const BlockLayout& layout,
                                    int64_t group, int x) {
    const int threads_x = layout.threads_x();
    if (kGeneratesNoise<Op> && !Op::n_sum && args.noise.inner > 1) {
      // Four neighbors in the order of the noise are `inner` apart in memory; the threads of a warp
      // access neighbors in memory.
      const int64_t inner = args.noise.inner, run = args.cols / inner;
      stride = inner;
      DC_UNROLL
      for (int j = 0; j < kFours; ++j) {
        const int64_t four = (group - x) * kFours + j * threads_x + x;
        const int64_t along = four / inner, which = four % inner;
        begin[j] = along * 4 * inner + which;
        block[j] = which * (run / 4) + along;
      }
      return;
    }
    // As in packs where sums or noise depend on it; else the threads of a warp access neighbors.
    const bool neighbors = Op::n_sum || kGeneratesNoise<Op> || layout.packed;
    stride = neighbors ? 1 : threads_x;
    const int64_t first = neighbors ? group * N : (group - x) * N + x;
    DC_UNROLL
    for (int j = 0; j < kFours; ++j) {
      begin[j] = first + 4 * j * stride;
      block[j] = group * N / 4 + j;
    }
  }
  __device__ __forceinline__ int64_t at(int i) const { return begin[i / 4] + i % 4 * stride; }
  // An incomplete group has no part here if there are sums: `map` adds it last.
  __device__ __forceinline__ bool any(int64_t cols) const {
    return Op::n_sum ? begin[0] + N <= cols : begin[0] < cols;
  }
  __device__ __forceinline__ bool has(int i, int64_t cols) const {
    return Op::n_sum ? true : at(i) < cols;
  }
};

// The work of one thread on its elements of a row. Adds to `sums`.
template <class Op, class S, class Formula = Op>
struct RowWorker {
  using R = Compute<S>;
  static constexpr int kIn = kReads<Op>, kOut = Op::n_out, kSum = Op::n_sum, kU = kUnroll<Op>;

  const LaunchArgs& args;
  const BlockLayout& layout;
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

  // kU groups of N elements, threads_x apart. `meanwhile` runs while the loads are in flight.
  template <int N, class Meanwhile>
  __device__ __forceinline__ void groups(int64_t row, int64_t first, int x,
                                         Meanwhile meanwhile) const {
    const int threads_x = layout.threads_x();
    const int64_t packs = layout.packed ? args.cols / N : 0;
    Pack<S, N> in[kU][kIn + 1];
    bool active[kU];
    if (first + (kU - 1) * threads_x < packs) {  // no branch between the loads: all in flight
      DC_UNROLL
      for (int u = 0; u < kU; ++u) {
        load_pack(row, first + u * threads_x, in[u]);
        active[u] = true;
      }
    } else {
      DC_UNROLL
      for (int u = 0; u < kU; ++u) {
        const int64_t group = first + u * threads_x;
        active[u] = group < packs;
        if (active[u])
          load_pack(row, group, in[u]);
        else
          active[u] = load_singly(row, Places<Op, N>(args, layout, group, x), in[u]);
      }
    }
    meanwhile();
    DC_UNROLL
    for (int u = 0; u < kU; ++u) {
      if (!active[u]) continue;
      const int64_t group = first + u * threads_x;
      Pack<S, N> out[kOut + 1];
      float z[N] = {};
      if constexpr (kGeneratesNoise<Op>) generate(group, x, z);
      DC_UNROLL
      for (int i = 0; i < N; ++i) {
        S values[kIn + 1], stored[kOut + 1];
        DC_UNROLL
        for (int k = 0; k < kIn; ++k) values[k] = in[u][k].value[i];
        apply(values, z[i], stored);
        DC_UNROLL
        for (int k = 0; k < kOut; ++k) out[k].value[i] = stored[k];
      }
      if constexpr (kOut > 0) {
        if (group < packs)
          store_pack(row, group, out);
        else
          store_singly(row, Places<Op, N>(args, layout, group, x), out);
      }
    }
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

  template <int N>
  __device__ __forceinline__ void load_pack(int64_t row, int64_t at, Pack<S, N>* in) const {
    DC_UNROLL
    for (int k = 0; k < kIn; ++k) in[k] = reinterpret_cast<const Pack<S, N>*>(from(k, row))[at];
  }
  template <int N>
  __device__ __forceinline__ void store_pack(int64_t row, int64_t at, const Pack<S, N>* out) const {
    DC_UNROLL
    for (int k = 0; k < kOut; ++k) reinterpret_cast<Pack<S, N>*>(to(k, row))[at] = out[k];
  }
  // Returns whether there was anything to load.
  template <int N>
  __device__ __forceinline__ bool load_singly(int64_t row, const Places<Op, N>& places,
                                              Pack<S, N>* in) const {
    if (!places.any(args.cols)) return false;
    DC_UNROLL
    for (int i = 0; i < N; ++i) {
      if (!places.has(i, args.cols)) continue;
      DC_UNROLL
      for (int k = 0; k < kIn; ++k) in[k].value[i] = from(k, row)[places.at(i)];
    }
    return true;
  }
  template <int N>
  __device__ __forceinline__ void store_singly(int64_t row, const Places<Op, N>& places,
                                               const Pack<S, N>* out) const {
    DC_UNROLL
    for (int i = 0; i < N; ++i) {
      if (!places.has(i, args.cols)) continue;
      DC_UNROLL
      for (int k = 0; k < kOut; ++k) to(k, row)[places.at(i)] = out[k].value[i];
    }
  }

  template <int N>
  __device__ __forceinline__ void generate(int64_t group, int x, float (&z)[N]) const {
    if constexpr (N == 2) {
      normal_pair(key, uint64_t(group), z[0], z[1]);
    } else {
      const Places<Op, N> places(args, layout, group, x);
      DC_UNROLL
      for (int j = 0; j < N / 4; ++j) normals(key, uint32_t(places.block[j]), z + 4 * j);
    }
  }
};

}  // namespace diffcore
