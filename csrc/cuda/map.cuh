// The CUDA loop, for every functor and storage type. A block covers kThreads / threads_x rows; a
// thread loads kUnroll packs of 16 bytes of each input before it computes. A block folds its sums
// by a fixed tree, and a second kernel combines the blocks of one row in double: without atomics,
// every run gives the same bits.
#pragma once

#include <cuda_runtime.h>

#include "core/coefficients.h"
#include "core/launch_args.h"
#include "core/number.h"
#include "core/op.h"
#include "noise/normal.h"

namespace diffcore {

constexpr int kThreads = 256;

// Packs of each input that a thread loads before it computes. With many inputs one pack of each
// keeps enough loads in flight, and fewer registers allow more threads to hide latency. Counts the
// noise as an input even if it is generated: the value determines the order of a sum, whose bits
// must not depend on the source of the noise.
template <class Op>
constexpr int kUnroll = Op::n_in <= 2 ? 2 : 1;
// Minimum resident blocks per multiprocessor, which limits the registers of a thread: 64; 80 with
// many tensors, with many coefficients and packs of eight (64 would spill), or if a thread
// generates eight normals; 128 if the storage or the formula is double, or with eight normals and
// many tensors.
template <class Op, class S>
constexpr int kBlocksPerSm = [] {
  const int tensors = Op::n_in + Op::n_out;
  const bool eight_normals = kGeneratesNoise<Op> && sizeof(S) == 2;
  if (sizeof(S) == 8 || Op::in_double || (eight_normals && tensors >= 5)) return 2;
  const int held = tensors + (sizeof(S) == 2 ? Op::n_coef / 4 : 0);
  return held >= 9 || eight_normals ? 3 : 4;
}();

// The mapping of blocks to [rows, cols].
struct BlockLayout {
  int threads_x;  // a power of two
  int rounds;     // groups of kUnroll packs per thread
  bool packed;    // 16-byte accesses instead of single elements
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

// The work of one thread on its elements of a row. Adds to `sums`.
template <class Op, class S, class Formula = Op>
struct RowWorker {
  using R = Compute<S>;
  static constexpr int kIn = kReads<Op>, kOut = Op::n_out, kSum = Op::n_sum, kU = kUnroll<Op>;

  const LaunchArgs& args;
  R* c;
  R* sums;
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
    for (int k = 0; k < kSum; ++k) sums[k] += y[kOut + k];
  }

  // kU packs of N elements, threads_x packs apart. `meanwhile` runs while the loads are in flight.
  template <int N, class Meanwhile>
  __device__ __forceinline__ void packs(int64_t row, int64_t first, int64_t count, int threads_x,
                                        Meanwhile meanwhile) const {
    Pack<S, N> in[kU][kIn + 1];
    DC_UNROLL
    for (int u = 0; u < kU; ++u) {
      const int64_t p = first + u * threads_x;
      if (p < count) {
        DC_UNROLL
        for (int k = 0; k < kIn; ++k)
          in[u][k] = reinterpret_cast<const Pack<S, N>*>(from(k, row))[p];
      }
    }
    meanwhile();
    DC_UNROLL
    for (int u = 0; u < kU; ++u) {
      const int64_t p = first + u * threads_x;
      if (p < count) {
        Pack<S, N> out[kOut + 1];
        float z[N] = {};
        if constexpr (kGeneratesNoise<Op>) generate(p * N, z);
        DC_UNROLL
        for (int i = 0; i < N; ++i) {
          S x[kIn + 1], stored[kOut + 1];
          DC_UNROLL
          for (int k = 0; k < kIn; ++k) x[k] = in[u][k].value[i];
          apply(x, z[i], stored);
          DC_UNROLL
          for (int k = 0; k < kOut; ++k) out[k].value[i] = stored[k];
        }
        DC_UNROLL
        for (int k = 0; k < kOut; ++k) reinterpret_cast<Pack<S, N>*>(to(k, row))[p] = out[k];
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
  __device__ __forceinline__ void generate(int64_t element, float (&z)[N]) const {
    if constexpr (N == 2) {
      normal_pair(key, uint64_t(element) / 2, z[0], z[1]);
    } else {
      DC_UNROLL
      for (int i = 0; i < N; i += 4) normals(key, uint32_t((element + i) / 4), z + i);
    }
  }
};

// The sum of `value` over the threads_x threads of a row, in its thread 0.
template <class T>
__device__ __forceinline__ T row_sum(T value, int threads_x, int x) {
  __shared__ T by_warp[kThreads / 32];
  const int width = threads_x < 32 ? threads_x : 32;
  for (int offset = width / 2; offset > 0; offset /= 2)
    value += __shfl_down_sync(~0u, value, offset, width);
  if (threads_x > 32) {
    const int warp = threadIdx.x / 32;
    __syncthreads();  // an earlier use of by_warp has been read
    if (threadIdx.x % 32 == 0) by_warp[warp] = value;
    __syncthreads();
    if (x == 0)
      for (int w = 1; w < threads_x / 32; ++w) value += by_warp[warp + w];
  }
  return value;
}

// One parameter and a short name: the binary contains a host function and several copies of the
// mangled name for each of about 400 kernels.
template <class Op, class S>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<Op, S>)
    map(const __grid_constant__ Launch launch) {
  const LaunchArgs& args = launch.args;
  const BlockLayout& layout = launch.layout;
  using R = Compute<S>;
  constexpr int kPack = 16 / sizeof(S);
  const int x = threadIdx.x % layout.threads_x, y = threadIdx.x / layout.threads_x;
  const int64_t row_block = int64_t(blockIdx.z) * gridDim.y + blockIdx.y;
  const int64_t row = row_block * (kThreads / layout.threads_x) + y;
  R c[Op::n_coef + 1];
  R sums[Op::n_sum + 1] = {};
  if (row < args.rows) {
    NoiseKey key{};
    if constexpr (kGeneratesNoise<Op>) key = noise_key(args.noise, row);
    const RowWorker<Op, S> worker{args, c, sums, key};
    const int64_t packs = layout.packed ? args.cols / kPack : 0;
    const auto load_c = [&] { share_coefs<Op>(args, row, layout.threads_x, c); };
    if constexpr (kMayIdle<Op>) {
      load_c();
      if (Op::idle(c) && args.in[0] == args.out[0]) return;
    }
    bool other = false;
    if constexpr (kSwitches<Op>) {
      load_c();
      other = Op::other(c);
    }
    if (other) {  // rows with Other are rare: single elements are fast enough
      if constexpr (kSwitches<Op>) {
        const RowWorker<Op, S, typename Op::Other> other_worker{args, c, sums, key};
        const int64_t begin = int64_t(blockIdx.x) * args.chunk;
        const int64_t end = begin + args.chunk < args.cols ? begin + args.chunk : args.cols;
#pragma unroll 1
        for (int64_t i = begin + x; i < end; i += layout.threads_x) other_worker.one(row, i);
      }
    } else if (layout.packed) {
      const int64_t step = int64_t(kUnroll<Op>) * layout.threads_x;
      const int rounds = Op::n_sum ? layout.rounds : 1;
#pragma unroll 1
      for (int round = 0; round < rounds; ++round) {
        const int64_t first = (int64_t(blockIdx.x) * rounds + round) * step + x;
        worker.template packs<kPack>(row, first, packs, layout.threads_x, [&] {
          if (round == 0 && !kSwitches<Op>) load_c();
        });
      }
    } else if (!kSwitches<Op>) {
      load_c();
    }
    // Single elements: all of them if unaligned, else those after the last full pack, in the last
    // block.
    if (!other && (!layout.packed || blockIdx.x == gridDim.x - 1)) {
      const int64_t begin = layout.packed ? packs * kPack : int64_t(blockIdx.x) * args.chunk;
      const int64_t end = begin + args.chunk < args.cols ? begin + args.chunk : args.cols;
#pragma unroll 1
      for (int64_t i = begin + x; i < end; i += layout.threads_x) worker.one(row, i);
    }
  }
  if constexpr (Op::n_sum > 0) {
    DC_UNROLL
    for (int k = 0; k < Op::n_sum; ++k) {
      const R total = row_sum(sums[k], layout.threads_x, x);
      if (x == 0 && row < args.rows) {
        if (args.chunks > 1)
          args.partials[(k * args.rows + row) * args.chunks + blockIdx.x] = double(total);
        else
          static_cast<R*>(args.sum[k])[row] =
              R(Op::finalize_sum(c, double(total), double(args.cols)));
      }
    }
  }
}

// Combines the partial sums of each row.
template <class Op, class S>
__global__ void __launch_bounds__(kThreads) fold(const __grid_constant__ LaunchArgs args) {
  using R = Compute<S>;
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    for (int k = 0; k < Op::n_sum; ++k) {
      const double* chunk = args.partials + (k * args.rows + row) * args.chunks;
      double total = 0;
      for (int64_t j = threadIdx.x; j < args.chunks; j += kThreads) total += chunk[j];
      total = row_sum(total, kThreads, int(threadIdx.x));
      if (threadIdx.x == 0) {
        R c[Op::n_coef + 1];
        load_coefs<Op>(args, row, c);
        static_cast<R*>(args.sum[k])[row] = R(Op::finalize_sum(c, total, double(args.cols)));
      }
    }
  }
}

template <class Op, class S>
struct CudaLaunch {
  static constexpr int kPack = 16 / sizeof(S);

  static bool aligned(const LaunchArgs& args) {
    if (args.rows > 1 && args.cols % kPack != 0) return false;
    if (kGeneratesNoise<Op> && args.noise.inner != 1) return false;
    uintptr_t low = 0;
    for (int k = 0; k < kReads<Op>; ++k) {
      low |= reinterpret_cast<uintptr_t>(args.in[k]);
      if (args.rows > 1) low |= uintptr_t(args.row_stride[k]) * sizeof(S);
    }
    for (int k = 0; k < Op::n_out; ++k) low |= reinterpret_cast<uintptr_t>(args.out[k]);
    return low % 16 == 0;
  }

  // Enqueues the work on the stream. `workspace(bytes)` allocates memory in stream order, and
  // returns null if it cannot.
  template <class Workspace>
  static const char* run(LaunchArgs& args, cudaStream_t stream, Workspace workspace) {
    BlockLayout layout{1, 1, aligned(args)};
    const int64_t threads = (args.cols + kPack - 1) / kPack;
    while (layout.threads_x < kThreads && layout.threads_x < threads) layout.threads_x *= 2;
    const int64_t per_round = int64_t(kUnroll<Op>) * kPack * layout.threads_x;
    // Sums: one block per row if eight rounds suffice, else enough blocks to fill the device with
    // few partial sums. The choice depends only on the length of a row, so the result does not
    // depend on the device.
    const int64_t rounds = (args.cols + per_round - 1) / per_round;
    if (Op::n_sum > 0)
      layout.rounds = rounds <= 1                      ? 1
                      : rounds <= 8                    ? int(rounds)
                      : args.cols < (int64_t(1) << 20) ? 2
                                                       : 8;
    const int64_t rows_per_block = kThreads / layout.threads_x;
    const int64_t blocks_y = (args.rows + rows_per_block - 1) / rows_per_block;
    args.chunk = per_round * layout.rounds;
    args.chunks = args.cols ? (args.cols + args.chunk - 1) / args.chunk : 1;
    if (args.chunks > INT32_MAX) return "too many elements for one launch";
    if (Op::n_sum > 0 && args.chunks > 1) {
      args.partials = static_cast<double*>(
          workspace(int64_t(sizeof(double)) * Op::n_sum * args.rows * args.chunks));
      if (!args.partials) return "out of memory for the partial sums";
    }
    constexpr int64_t kMaxGridY = 65535;
    const int64_t grid_y = blocks_y < kMaxGridY ? blocks_y : kMaxGridY;
    const dim3 grid(unsigned(args.chunks), unsigned(grid_y),
                    unsigned((blocks_y + grid_y - 1) / grid_y));
    map<Op, S><<<grid, kThreads, 0, stream>>>(Launch{args, layout});
    if constexpr (Op::n_sum > 0) {
      if (args.chunks > 1)
        fold<Op, S><<<unsigned(args.rows < 65535 ? args.rows : 65535), kThreads, 0, stream>>>(args);
    }
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  }

  static const char* load() {  // loads the kernels' code onto the current device
    cudaFuncAttributes attributes;
    cudaError_t error = cudaFuncGetAttributes(&attributes, map<Op, S>);
    if constexpr (Op::n_sum > 0)
      if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, fold<Op, S>);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  }
};

}  // namespace diffcore
