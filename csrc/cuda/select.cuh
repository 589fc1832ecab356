// The CUDA loop of the ops with kSelect. A thread holds up to kHeld keys in registers. A row that
// fits into the registers of a warp or of a block is read once; longer rows take one launch per
// digit, whose blocks add their counts to those of the row, and the last block of a row continues
// the search. Counts are integers, so every run gives the same bits.
#pragma once

#include "core/selection.h"
#include "cuda/map.cuh"

namespace diffcore {

// ---- Keys in registers ----------------------------------------------------------------------

// The keys that a thread holds of a row; kNoKey where there is no element.
template <class Op, class S>
struct HeldKeys {
  using R = Compute<S>;
  using K = Key<R>;
  static constexpr int kIn = Op::n_in, kPack = diffcore::kPack<S>;
  static constexpr int kHeld = 64 / sizeof(R), kPacks = kHeld / kPack;
  // Packs of each input that are loaded before the first use; two of three double inputs would spill.
  static constexpr int kFlying = sizeof(S) == 8 && kIn > 2 ? 1 : 2;

  K keys[kHeld];
  int used;  // packs up to the last that any of the threads has: the loops over keys end there

  // Of columns [begin, end) of a row, which `threads` threads hold together; x: this thread.
  // `begin` is a multiple of kPack.
  __device__ __forceinline__ HeldKeys(const LaunchArgs& args, int64_t row, int64_t begin,
                                      int64_t end, int threads, int x, bool packed) {
    const S* in[kIn];
    DC_UNROLL
    for (int k = 0; k < kIn; ++k)
      in[k] = static_cast<const S*>(args.in[k]) + row * args.row_stride[k] + begin;
    const int count = int(end - begin);
    used = (count + threads * kPack - 1) / (threads * kPack);
    R c[Op::n_coef];
    DC_UNROLL
    for (int first = 0; first < kPacks; first += kFlying) {
      if (first && first >= used) return;
      Pack<S> packs[kFlying][kIn];
      DC_UNROLL
      for (int u = 0; u < kFlying; ++u) {
        const int p = (first + u) * threads + x, at = p * kPack;
        if (packed && at + kPack <= count) {
          DC_UNROLL
          for (int k = 0; k < kIn; ++k) packs[u][k] = reinterpret_cast<const Pack<S>*>(in[k])[p];
        } else {
          DC_UNROLL
          for (int i = 0; i < kPack; ++i) {
            DC_UNROLL
            for (int k = 0; k < kIn; ++k) packs[u][k].set(i, at + i < count ? in[k][at + i] : S{});
          }
        }
      }
      if (first == 0) load_coefs<Op>(args, row, c);
      DC_UNROLL
      for (int u = 0; u < kFlying; ++u) {
        const int at = ((first + u) * threads + x) * kPack;
        DC_UNROLL
        for (int i = 0; i < kPack; ++i) {
          S element[kIn];
          DC_UNROLL
          for (int k = 0; k < kIn; ++k) element[k] = packs[u][k].get(i);
          const K key = key_of_element(c, element);
          keys[(first + u) * kPack + i] = at + i < count ? key : kNoKey<R>;
        }
      }
    }
  }

  // The number of keys from `from` on, in a range of this length.
  __device__ __forceinline__ unsigned number_in(K from, K length) const {
    unsigned n = 0;
    each([&](K key) { n += key - from < length; });
    return n;
  }
  __device__ __forceinline__ unsigned nans() const { return number_in(kNanKey<R>, 1); }

  // The smallest key from `from` on.
  __device__ __forceinline__ K smallest_from(K from) const {
    K least = kNoKey<R>;
    each([&](K key) { least = key >= from && key < least ? key : least; });
    return least;
  }

  // Counts the candidates by their next digit.
  __device__ __forceinline__ void count(const Search<R>& search, unsigned* counts) const {
    each([&](K key) {
      if (search.holds(key)) atomicAdd(&counts[search.bucket(key)], 1u);
    });
  }

 private:
  template <class Use>
  __device__ __forceinline__ void each(Use use) const {
    DC_UNROLL
    for (int p = 0; p < kPacks; ++p) {
      if (p >= used) return;
      DC_UNROLL
      for (int i = 0; i < kPack; ++i) use(keys[p * kPack + i]);
    }
  }

  static __device__ __forceinline__ K key_of_element(const R* c, const S* element) {
    R values[kIn], y[1];
    DC_UNROLL
    for (int k = 0; k < kIn; ++k) values[k] = load_value(element[k]);
    Op::template apply<R>(c, values, y);
    return key_of(y[0]);
  }
};

template <class Op>
__device__ __forceinline__ Position position_of_row(const LaunchArgs& args, int64_t row) {
  double c[Op::n_coef];
  load_coefs<Op>(args, row, c);
  return position_of(c[Op::ratio], args.cols);
}

// Stores the result of a row. `next` is the smallest key above `key`.
template <class Op, class R>
__device__ __forceinline__ void store(const LaunchArgs& args, int64_t row, const Search<R>& search,
                                      Key<R> key, Key<R> next) {
  double c[Op::n_coef];
  load_coefs<Op>(args, row, c);
  const bool again = search.rank + 1 < search.count;
  const double found =
      args.cols ? between<R>(key, again ? key : next, position_of(c[Op::ratio], args.cols).weight)
                : double(bit_cast<R>(kNanKey<R>));
  static_cast<R*>(args.sum[0])[row] = R(Op::selected(c, found));
}

// ---- A few elements: a row in a warp or a part of it ----------------------------------------

// Of the `width` threads of a row, in each of them. All threads of a warp call it.
__device__ __forceinline__ unsigned sum_of(unsigned mine, int width) {
  for (int offset = width / 2; offset > 0; offset /= 2) mine += __shfl_xor_sync(~0u, mine, offset);
  return mine;
}
template <class K>
__device__ __forceinline__ K smallest_of(K mine, int width) {
  for (int offset = width / 2; offset > 0; offset /= 2) {
    const K other = __shfl_xor_sync(~0u, mine, offset);
    mine = other < mine ? other : mine;
  }
  return mine;
}

// A row has 2^log_threads threads. Determines one bit after the other, until one candidate is left.
template <class Op, class S>
__global__ void __launch_bounds__(kThreads, 3)
    select_few_kernel(const __grid_constant__ LaunchArgs args, bool packed, int log_threads) {
  using R = Compute<S>;
  using K = Key<R>;
  const int threads = 1 << log_threads, x = int(threadIdx.x) & (threads - 1);
  const int64_t rows_of_block = kThreads >> log_threads;
  for (int64_t first = int64_t(blockIdx.x) * rows_of_block; first < args.rows;
       first += int64_t(gridDim.x) * rows_of_block) {
    const int64_t mine = first + (threadIdx.x >> log_threads);
    const int64_t row = mine < args.rows ? mine : args.rows - 1;  // the last one again
    const HeldKeys<Op, S> held(args, row, 0, args.cols, threads, x, packed);
    Search<R> search = Search<R>::of(position_of_row<Op>(args, row).rank, args.cols);
    // NaN has the largest key. If a row contains one, select the last rank, so the result is NaN.
    if (sum_of(held.nans(), threads)) search.rank = search.count - 1;
    const auto searches = [&] { return search.open && search.count > 1; };
#pragma unroll 1
    while (__any_sync(~0u, searches())) {  // the shuffles need all rows of the warp
      const int rest = search.open ? search.open - 1 : 0;
      const unsigned zeros = sum_of(held.number_in(search.low, K(1) << rest), threads);
      const unsigned counts[] = {zeros, unsigned(search.count) - zeros};
      if (searches()) search.narrow(bucket_of(search.rank, counts, 2), rest);
    }
    const K key = smallest_of(held.smallest_from(search.low), threads);
    const K next = smallest_of(held.smallest_from(key + 1), threads);
    if (x == 0 && mine == row) store<Op>(args, row, search, key, next);
  }
}

// ---- The search of a block ------------------------------------------------------------------

// A search and the counts of one pass. `above` is the smallest key above the candidates of the last
// pass: the successor of the result if it is the largest candidate. `nans` are those of the first.
template <class R, class Count>
struct Tally {
  Search<R> search;
  unsigned long long above;
  Count nans;
  Count counts[kBuckets];
};

template <class Op, class R, class Count>
__device__ __forceinline__ void start(Tally<R, Count>& tally, const LaunchArgs& args, int64_t row) {
  if (threadIdx.x == 0) {
    tally.search = Search<R>::of(position_of_row<Op>(args, row).rank, args.cols);
    tally.above = kNoKey<R>;
    tally.nans = 0;
  }
}

template <class Count>
__device__ __forceinline__ void clear(Count* counts) {
  for (int i = int(threadIdx.x); i < kBuckets; i += int(blockDim.x)) counts[i] = 0;
}

// Sets `above` to the minimum of itself and the value `mine` of each thread.
template <class K>
__device__ __forceinline__ void keep_smallest(unsigned long long& above, K mine) {
  mine = smallest_of(mine, 32);
  if (threadIdx.x % 32 == 0 && mine != K(~K(0))) atomicMin(&above, mine);
}

// Continues the search in the bucket that contains the rank. All counts must be complete and
// visible before the call; the result is visible to every thread after it.
template <class R, class Count>
__device__ void narrow(Tally<R, Count>& tally) {
  constexpr int kEach = kBuckets / kThreads, kWarps = kThreads / 32;
  static_assert(kBuckets % kThreads == 0, "every bucket must belong to a thread");
  __shared__ Count by_warp[kWarps];
  const bool reads = threadIdx.x < kThreads;  // enough for all buckets
  const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
  const int first = int(threadIdx.x) * kEach;
  const Count* const mine = tally.counts + first;
  Count own = 0, up_to = 0;  // candidates in the buckets of this thread, and up to its last bucket
  if (reads) {
    DC_UNROLL
    for (int k = 0; k < kEach; ++k) own += mine[k];
    up_to = own;
    for (int by = 1; by < 32; by *= 2) {
      const Count left = __shfl_up_sync(~0u, up_to, by);
      if (lane >= by) up_to += left;
    }
    if (lane == 31) by_warp[warp] = up_to;
  }
  Search<R> search = tally.search;
  // NaN has the largest key. If a row contains one, select the last rank, so the result is NaN.
  if (search.open == kKeyBits<R> && tally.nans > 0) search.rank = search.count - 1;
  const int rest = search.rest();
  __syncthreads();  // all threads have read the search
  if (reads) {
    for (int w = 0; w < warp; ++w) up_to += by_warp[w];
    const int64_t before = int64_t(up_to - own);
    if (before <= search.rank && search.rank < int64_t(up_to)) {
      Bucket bucket = bucket_of(search.rank - before, mine, kEach);
      bucket.index += first;
      bucket.before += before;
      search.narrow(bucket, rest);
      tally.search = search;
    }
  }
  __syncthreads();
  search = tally.search;
  if (reads && search.open == 0) {  // complete keys: the next one may be in a later bucket
    const int found = search.bucket(search.low);
    Key<R> next = kNoKey<R>;
#pragma unroll 1
    for (int k = kEach - 1; k >= 0; --k) {
      const int beyond = first + k - found;
      if (beyond > 0 && mine[k] > 0) next = search.low + unsigned(beyond);
    }
    keep_smallest(tally.above, next);
  }
  __syncthreads();
}

// ---- Short rows: a block per row ------------------------------------------------------------

template <class Op, class S>
__global__ void __launch_bounds__(kMaxThreads)
    select_kernel(const __grid_constant__ LaunchArgs args, bool packed) {
  using R = Compute<S>;
  __shared__ Tally<R, unsigned> tally;
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    const HeldKeys<Op, S> held(args, row, 0, args.cols, int(blockDim.x), int(threadIdx.x), packed);
    start<Op>(tally, args, row);
#pragma unroll 1
    for (int digit = 0; digit < kDigits<R>; ++digit) {
      clear(tally.counts);
      __syncthreads();
      const Search<R> search = tally.search;
      held.count(search, tally.counts);
      if (digit == 0) {
        if (const unsigned nans = held.nans()) atomicAdd(&tally.nans, nans);
      }
      if (digit == kDigits<R> - 1)
        keep_smallest(tally.above, held.smallest_from(search.high() + 1));
      __syncthreads();
      narrow(tally);
    }
    if (threadIdx.x == 0) store<Op>(args, row, tally.search, tally.search.low, Key<R>(tally.above));
  }
}

// ---- Long rows: the tally of each row is in the workspace -----------------------------------

template <class R>
struct RowTally : Tally<R, unsigned long long> {
  unsigned done;  // blocks that have added their counts
};

template <class Op, class R>
__global__ void __launch_bounds__(kThreads)
    select_begin_kernel(const __grid_constant__ LaunchArgs args, RowTally<R>* tallies) {
  RowTally<R>& tally = tallies[blockIdx.x];
  start<Op>(tally, args, blockIdx.x);
  clear(tally.counts);
  if (threadIdx.x == 0) tally.done = 0;
}

// Whether this block is the last of a row that gets here, for all its threads. What the others wrote
// before is then visible to it.
__device__ __forceinline__ bool is_last(unsigned& done, unsigned blocks) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // after the barrier: for the writes of the whole block
    last = atomicInc(&done, blocks - 1) == blocks - 1;  // then it is 0 for the next digit
    __threadfence();
  }
  __syncthreads();
  return last;
}

template <class Op, class S>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<Op, S>)
    select_count_kernel(const __grid_constant__ LaunchArgs args, RowTally<Compute<S>>* tallies,
                        bool packed, int digit) {
  using R = Compute<S>;
  __shared__ unsigned counts[kBuckets];
  const int64_t row = blockIdx.x / args.chunks, begin = blockIdx.x % args.chunks * args.chunk;
  const int64_t end = begin + args.chunk < args.cols ? begin + args.chunk : args.cols;
  RowTally<R>& tally = tallies[row];
  clear(counts);
  const HeldKeys<Op, S> held(args, row, begin, end, kThreads, int(threadIdx.x), packed);
  __syncthreads();
  const Search<R> search = tally.search;
  held.count(search, counts);
  if (digit == 0) {
    if (const unsigned nans = held.nans()) atomicAdd(&tally.nans, nans);
  }
  const bool ends = digit == kDigits<R> - 1;
  if (ends) keep_smallest(tally.above, held.smallest_from(search.high() + 1));
  __syncthreads();
  for (int i = int(threadIdx.x); i < kBuckets; i += kThreads)
    if (counts[i]) atomicAdd(&tally.counts[i], counts[i]);
  if (!is_last(tally.done, unsigned(args.chunks))) return;
  narrow(tally);
  clear(tally.counts);
  if (ends && threadIdx.x == 0)
    store<Op>(args, row, tally.search, tally.search.low, Key<R>(tally.above));
}

template <class Op, class S>
struct CudaSelect {
  using R = Compute<S>;
  static constexpr int kHeld = HeldKeys<Op, S>::kHeld;

  // As CudaMap::run.
  static const char* run(LaunchArgs& args, cudaStream_t stream, Workspace workspace) {
    const bool packed = CudaMap<Op, S>::aligned(args);
    constexpr int64_t kMaxBlocks =
        4096;  // fill every device; a block takes several rows if need be
    const auto blocks_for = [](int64_t n) { return unsigned(n < kMaxBlocks ? n : kMaxBlocks); };
    if (args.cols <= 32 * kHeld) {
      int log_threads = 0;
      while (log_threads < 5 && (kPack<S> << log_threads) < args.cols) ++log_threads;
      const int64_t rows_of_block = kThreads >> log_threads;
      const unsigned blocks = blocks_for((args.rows + rows_of_block - 1) / rows_of_block);
      return launch(select_few_kernel<Op, S>, blocks, stream, args, packed, log_threads);
    }
    if (args.cols <= kMaxThreads * kHeld) {
      int threads = kThreads;
      while (threads * kHeld < args.cols) threads *= 2;
      return launch(select_kernel<Op, S>, Grid(blocks_for(args.rows), unsigned(threads)), stream,
                    args, packed);
    }
    args.chunk = kThreads * kHeld;
    args.chunks = (args.cols + args.chunk - 1) / args.chunk;
    if (args.rows > INT32_MAX / args.chunks) return "too many elements for one launch";
    auto* tallies = static_cast<RowTally<R>*>(workspace(int64_t(sizeof(RowTally<R>)) * args.rows));
    if (!tallies) return "out of memory for the counts";
    const unsigned all = unsigned(args.rows * args.chunks);
    const char* error =
        launch(select_begin_kernel<Op, R>, unsigned(args.rows), stream, args, tallies);
    for (int digit = 0; digit < kDigits<R> && !error; ++digit)
      error = launch(select_count_kernel<Op, S>, all, stream, args, tallies, packed, digit);
    return error;
  }

  static const char* load() {
    const char* error = load_code(select_few_kernel<Op, S>);
    if (!error) error = load_code(select_kernel<Op, S>);
    if (!error) error = load_code(select_begin_kernel<Op, R>);
    if (!error) error = load_code(select_count_kernel<Op, S>);
    return error;
  }
};

}  // namespace diffcore
