// The CUDA loop, for every functor and storage type. A block covers kThreads / threads_x rows; a
// thread loads kUnroll groups of elements, 16 bytes each, of every input before it computes. Which
// elements a thread adds depends on the length of a row only, not on alignment. A block folds its
// sums by a fixed tree. The blocks of one row are combined in double, without atomics: by the first
// of them if they are a cluster, else by a second kernel, with the same bits. So a sample's sum has
// the same bits in every run and in any batch.
#pragma once

#include "cuda/cluster.cuh"
#include "cuda/launch.cuh"
#include "cuda/row_worker.cuh"
#include "cuda/table.cuh"

namespace diffcore {

// Minimum resident blocks per multiprocessor, which limits the registers of a thread: 64; 80 with
// many tensors or coefficients, or if a thread sums in 16 bits two packs or generated noise (64 would
// spill); 128 if the storage or the formula is double.
template <class Op, class S>
constexpr int kBlocksPerSm = [] {
  if (sizeof(S) == 8 || Op::in_double) return 2;
  const bool half = sizeof(S) == 2;
  const int held =
      Op::n_in + Op::n_out + kGeneratesNoise<Op> + (half ? (Op::n_coef - Op::n_uncounted) / 4 : 0);
  const bool sums = Op::n_sum && half && (kUnroll<Op> == 2 || kGeneratesNoise<Op>);
  return held >= 9 || sums ? 3 : 4;
}();

// The mapping of blocks to [rows, cols].
struct BlockLayout {
  int log_threads_x;  // of the threads in a row, a power of two
  int rounds;         // of kUnroll packs each, per thread
  bool packed;        // 16-byte accesses instead of single elements
  bool cluster;       // the blocks of a row are a cluster

  DC_HD int threads_x() const { return 1 << log_threads_x; }
};

struct Launch {
  LaunchArgs args;
  BlockLayout layout;
};

template <class Op, class R>
__device__ __forceinline__ void store_sums(const LaunchArgs& args, int64_t row, const R* c,
                                           const double* totals) {
  double stored[kStored<Op>];
  finalize<Op>(c, totals, double(args.cols), stored);
  DC_UNROLL
  for (int k = 0; k < kStored<Op>; ++k) static_cast<R*>(args.sum[k])[row] = R(stored[k]);
}

// One parameter and a short name: the binary contains a host function and several copies of the
// mangled name for each of about 400 kernels.
template <class Op, class S>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<Op, S>)
    map(const __grid_constant__ Launch launch) {
  const LaunchArgs& args = launch.args;
  const BlockLayout& layout = launch.layout;
  using R = Compute<S>;
  constexpr int kPack = diffcore::kPack<S>;
  const int threads_x = layout.threads_x();
  const int x = threadIdx.x & (threads_x - 1), y = threadIdx.x >> layout.log_threads_x;
  const int64_t row_block = int64_t(blockIdx.z) * gridDim.y + blockIdx.y;
  const int64_t row = row_block * (kThreads >> layout.log_threads_x) + y;
#ifdef DC_CLUSTERS
  if constexpr (Op::n_sum > 0)
    if (layout.cluster) enter_cluster<Op::n_sum>();
#endif
  R c[Op::n_coef + 1];
  Total<R> sums[Op::n_sum + 1] = {};
  if (row < args.rows) {
    NoiseKey key{};
    if constexpr (kGeneratesNoise<Op>) key = noise_key(args.noise, row);
    const auto load_c = [&] { share_coefs<Op>(args, row, threads_x, c); };
    if constexpr (kMayIdle<Op>) {
      load_c();
      if (Op::idle(c) && args.in[0] == args.out[0]) return;
    }
    bool other = false;
    if constexpr (kSwitches<Op>) {
      load_c();
      other = Op::other(c);
      if (other) {  // rows with Other are rare: single elements are fast enough
        const RowWorker<Op, S, typename Op::Other> worker{args, c, sums, key};
        const int64_t begin = int64_t(blockIdx.x) * args.chunk;
        const int64_t end = begin + args.chunk < args.cols ? begin + args.chunk : args.cols;
#pragma unroll 1
        for (int64_t i = begin + x; i < end; i += threads_x) worker.one(row, i);
      }
    }
    if (!other) {
      const RowWorker<Op, S> worker{args, c, sums, key};
      const int64_t packs = args.cols / kPack;
      const int rounds = Op::n_sum ? layout.rounds : 1, turns = rounds * kUnroll<Op>;
      int64_t first = (int64_t(blockIdx.x) * turns << layout.log_threads_x) + x;
      if (layout.packed) {
#pragma unroll 1
        for (int round = 0; round < rounds; ++round, first += kUnroll<Op> * threads_x)
          worker.packs(row, first, packs, threads_x, [&] {
            if (round == 0 && !kSwitches<Op>) load_c();
          });
      } else if (!kSwitches<Op>) {
        load_c();
      }
      // Single elements: all of them if unaligned, else those after the last pack, by the thread
      // whose turn it is. In the last block; with sums, in the one whose chunk they are in, as later
      // ones may be empty.
      const int64_t after = packs * kPack - int64_t(blockIdx.x) * args.chunk;
      const bool here = Op::n_sum ? 0 <= after && after < args.chunk : blockIdx.x == gridDim.x - 1;
      const bool last = here && x == (packs & (threads_x - 1));
      const int singly = layout.packed ? int(last) : turns;
#pragma unroll 1
      for (int turn = 0; turn < singly; ++turn)
        worker.singly(row, layout.packed ? packs : first + turn * threads_x, x, threads_x,
                      layout.packed);
    }
  }
  if constexpr (Op::n_sum > 0) {
    double totals[Op::n_sum];
    DC_UNROLL
    for (int k = 0; k < Op::n_sum; ++k) totals[k] = double(row_sum(sums[k], threads_x, x));
    bool complete = args.chunks == 1;
#ifdef DC_CLUSTERS
    if (layout.cluster) {
      cluster_sums<R, Op::n_sum>(totals);
      if (blockIdx.x != 0) return;
      complete = true;
    }
#endif
    if (x == 0 && row < args.rows) {
      if (complete) {
        store_sums<Op>(args, row, c, totals);
      } else {
        DC_UNROLL
        for (int k = 0; k < Op::n_sum; ++k)
          args.partials[(k * args.rows + row) * args.chunks + blockIdx.x] = totals[k];
      }
    }
  }
}

// Combines the partial sums of each row.
template <class Op, class S>
__global__ void __launch_bounds__(kThreads) fold(const __grid_constant__ LaunchArgs args) {
  using R = Compute<S>;
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    double totals[Op::n_sum];
    DC_UNROLL
    for (int k = 0; k < Op::n_sum; ++k) {
      const double* chunk = args.partials + (k * args.rows + row) * args.chunks;
      TotalOfPartials<R> mine = {};
#pragma unroll 1
      for (int64_t j = threadIdx.x; j < args.chunks; j += 4 * kThreads) {
        double part[4];  // all in flight
        DC_UNROLL
        for (int u = 0; u < 4; ++u)
          part[u] = j + u * kThreads < args.chunks ? chunk[j + u * kThreads] : 0;
        DC_UNROLL
        for (int u = 0; u < 4; ++u) mine.add(part[u]);
      }
      totals[k] = row_sum(mine, kThreads, int(threadIdx.x));
    }
    if (threadIdx.x == 0) {
      R c[Op::n_coef + 1];
      load_coefs<Op>(args, row, c);
      store_sums<Op>(args, row, c, totals);
    }
  }
}

template <class Op, class S>
struct CudaMap {
  static constexpr int kPack = diffcore::kPack<S>;

  static bool aligned(const LaunchArgs& args) {
    if (args.rows > 1 && args.cols % kPack != 0) return false;
    if (kGeneratesNoise<Op> && args.noise.inner > 1) return false;
    uintptr_t low = 0;
    for (int k = 0; k < kReads<Op>; ++k) {
      low |= reinterpret_cast<uintptr_t>(args.in[k]);
      if (args.rows > 1) low |= uintptr_t(args.row_stride[k]) * sizeof(S);
    }
    for (int k = 0; k < Op::n_out; ++k) low |= reinterpret_cast<uintptr_t>(args.out[k]);
    return low % 16 == 0;
  }

  // Enqueues the work on the stream.
  static const char* run(LaunchArgs& args, cudaStream_t stream, Workspace workspace) {
    BlockLayout layout{0, 1, aligned(args), false};
    const int64_t threads = (args.cols + kPack - 1) / kPack;
    while (layout.threads_x() < kThreads && layout.threads_x() < threads) ++layout.log_threads_x;
    const int64_t per_round = int64_t(kUnroll<Op>) * kPack * layout.threads_x();
    // Sums: one block per row if eight rounds suffice, then the blocks of one cluster (the last of
    // them may be empty), else enough blocks to fill the device with few partial sums. The choice
    // depends only on the length of a row, so the result does not depend on the device.
    const int64_t rounds = (args.cols + per_round - 1) / per_round;
    const bool medium = Op::n_sum > 0 && rounds > 8 && rounds <= 64;
    if (Op::n_sum > 0)
      layout.rounds = rounds <= 1                      ? 1
                      : rounds <= 8                    ? int(rounds)
                      : medium                         ? int((rounds + kCluster - 1) / kCluster)
                      : args.cols < (int64_t(1) << 20) ? 2
                                                       : 8;
    const int64_t rows_per_block = kThreads / layout.threads_x();
    const int64_t blocks_y = (args.rows + rows_per_block - 1) / rows_per_block;
    args.chunk = per_round * layout.rounds;
    args.chunks = medium ? kCluster : args.cols ? (args.cols + args.chunk - 1) / args.chunk : 1;
    if (args.chunks > INT32_MAX) return "too many elements for one launch";
    layout.cluster = medium && clusters();
    const bool folds = Op::n_sum > 0 && args.chunks > 1 && !layout.cluster;
    if (folds) {
      args.partials = static_cast<double*>(
          workspace(int64_t(sizeof(double)) * Op::n_sum * args.rows * args.chunks));
      if (!args.partials) return "out of memory for the partial sums";
    }
    constexpr int64_t kMaxGridY = 65535;
    const int64_t grid_y = blocks_y < kMaxGridY ? blocks_y : kMaxGridY;
    const dim3 grid(unsigned(args.chunks), unsigned(grid_y),
                    unsigned((blocks_y + grid_y - 1) / grid_y));
    const char* error =
        launch(map<Op, S>, Grid(grid, layout.cluster ? kCluster : 1), stream, Launch{args, layout});
    if constexpr (Op::n_sum > 0) {
      if (!error && folds)
        error = launch(fold<Op, S>, unsigned(args.rows < 65535 ? args.rows : 65535), stream, args);
    }
    return error;
  }

  static const char* load() {
    const char* error = load_code(map<Op, S>);
    if constexpr (Op::n_sum > 0) {
      if (!error) error = load_code(fold<Op, S>);
      if (!error) clusters();  // asks now, not while a stream is captured
    }
    return error;
  }

 private:
  // Whether the current device runs `map` in clusters.
  static bool clusters() { return support_.here(reinterpret_cast<const void*>(map<Op, S>)); }

  static inline ClusterSupport support_;
};

}  // namespace diffcore
