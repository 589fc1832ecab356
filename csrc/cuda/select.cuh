// The CUDA loop of the ops with kSelect. A pass over the inputs counts the candidates of each row
// by the next digit of their keys; the search then continues in the bucket that contains the rank.
// For a short row one block does all passes; for long rows each pass is a launch, whose blocks add
// their counts to those of the row. Counts are integers, so every run gives the same bits.
#pragma once

#include "core/selection.h"
#include "cuda/map.cuh"

namespace diffcore {

// A search and the counts of one pass. `above` is the smallest key above the candidates of the last
// pass: the successor of the result if it is the largest candidate. `nans` are those of the first.
template <class R, class Count>
struct Tally {
  Search<R> search;
  unsigned long long above;
  Count nans;
  Count counts[kBuckets];
};

// ---- Functions of a block -------------------------------------------------------------------

template <class Op, class R, class Count>
__device__ __forceinline__ void start(Tally<R, Count>& tally, const LaunchArgs& args, int64_t row) {
  if (threadIdx.x == 0) {
    double c[Op::n_coef];
    load_coefs<Op>(args, row, c);
    tally.search = Search<R>::of(position_of(c[Op::ratio], args.cols).rank, args.cols);
    tally.above = kNoKey<R>;
    tally.nans = 0;
  }
}

template <class R, class Count>
__device__ __forceinline__ void clear(Tally<R, Count>& tally) {
  for (int i = threadIdx.x; i < kBuckets; i += kThreads) tally.counts[i] = 0;
}

// Sets `above` to the minimum of itself and the value `mine` of each thread.
template <class K>
__device__ __forceinline__ void keep_smallest(unsigned long long& above, K mine) {
  for (int offset = 16; offset > 0; offset /= 2) {
    const K other = __shfl_down_sync(~0u, mine, offset);
    mine = other < mine ? other : mine;
  }
  if (threadIdx.x % 32 == 0) atomicMin(&above, mine);
}

// Continues the search in the bucket that contains the rank. All counts must be complete and
// visible before the call; the result is visible to every thread after it.
template <class R, class Count>
__device__ void narrow(Tally<R, Count>& tally) {
  constexpr int kMine = kBuckets / kThreads;
  static_assert(kBuckets % kThreads == 0, "every bucket must belong to a thread");
  // Prefix sums: the number of candidates up to the last bucket of each thread.
  __shared__ int64_t up_to[kThreads];
  const int x = int(threadIdx.x);
  const Count* mine = tally.counts + x * kMine;
  int64_t own = 0;
  for (int k = 0; k < kMine; ++k) own += int64_t(mine[k]);
  up_to[x] = own;
  __syncthreads();
  for (int step = 1; step < kThreads; step *= 2) {
    const int64_t left = x >= step ? up_to[x - step] : 0;
    __syncthreads();
    up_to[x] += left;
    __syncthreads();
  }
  Search<R> search = tally.search;
  // NaN has the largest key. If a row contains one, select the last rank, so the result is NaN.
  if (search.open == kKeyBits<R> && tally.nans > 0) search.rank = search.count - 1;
  const int rest = search.rest();
  __syncthreads();  // all threads have read the search
  const int64_t before = up_to[x] - own;
  if (before <= search.rank && search.rank < before + own) {
    Bucket bucket = bucket_of(search.rank - before, mine, kMine);
    bucket.index += x * kMine;
    bucket.before += before;
    search.narrow(bucket, rest);
    tally.search = search;
  }
  __syncthreads();
  search = tally.search;
  if (search.open == 0) {  // complete keys: the next one may be in a later bucket
    const int found = search.bucket(search.low);
    Key<R> next = kNoKey<R>;
    for (int k = kMine - 1; k >= 0; --k) {
      const int beyond = x * kMine + k - found;
      if (beyond > 0 && mine[k] > 0) next = search.low + unsigned(beyond);
    }
    keep_smallest(tally.above, next);
  }
  __syncthreads();
}

template <class Op, class R, class Count>
__device__ __forceinline__ void store(const Tally<R, Count>& tally, const LaunchArgs& args,
                                      int64_t row) {
  if (threadIdx.x == 0) {
    double c[Op::n_coef];
    load_coefs<Op>(args, row, c);
    const Search<R>& search = tally.search;
    const bool again = search.rank + 1 < search.count;
    const double found = args.cols
                             ? between<R>(search.low, again ? search.low : Key<R>(tally.above),
                                          position_of(c[Op::ratio], args.cols).weight)
                             : double(bit_cast<R>(kNanKey<R>));
    static_cast<R*>(args.sum[0])[row] = R(Op::selected(c, found));
  }
}

// Counts the candidates in columns [begin, end) of a row, in shared memory.
template <class Op, class S>
struct Counting {
  using R = Compute<S>;
  static constexpr int kIn = Op::n_in, kPack = diffcore::kPack<S>;

  const LaunchArgs& args;
  const Search<R> search;
  unsigned* counts;
  R c[Op::n_coef];
  Key<R> above = kNoKey<R>;
  unsigned nans = 0;

  __device__ __forceinline__ Counting(const LaunchArgs& args, int64_t row, const Search<R>& search,
                                      unsigned* counts)
      : args(args), search(search), counts(counts) {
    load_coefs<Op>(args, row, c);
  }

  __device__ __forceinline__ void count(const S* x) {
    R values[kIn], y[1];
    DC_UNROLL
    for (int k = 0; k < kIn; ++k) values[k] = load_value(x[k]);
    Op::template apply<R>(c, values, y);
    const Key<R> key = key_of(y[0]);
    nans += key == kNanKey<R>;
    if (search.holds(key))
      atomicAdd(&counts[search.bucket(key)], 1u);
    else if (key > search.low && key < above)
      above = key;
  }

  // `begin` is a multiple of kPack.
  __device__ __forceinline__ void columns(int64_t row, int64_t begin, int64_t end, bool packed) {
    const S* in[kIn];
    DC_UNROLL
    for (int k = 0; k < kIn; ++k)
      in[k] = static_cast<const S*>(args.in[k]) + row * args.row_stride[k];
    const int64_t packs = packed ? end / kPack : 0;
#pragma unroll 1
    for (int64_t p = begin / kPack + threadIdx.x; p < packs; p += kThreads) {
      Pack<S> x[kIn];
      DC_UNROLL
      for (int k = 0; k < kIn; ++k) x[k] = reinterpret_cast<const Pack<S>*>(in[k])[p];
      DC_UNROLL
      for (int i = 0; i < kPack; ++i) {
        S element[kIn];
        DC_UNROLL
        for (int k = 0; k < kIn; ++k) element[k] = x[k].get(i);
        count(element);
      }
    }
    // Single elements: all of them if unaligned, else those after the last full pack.
#pragma unroll 1
    for (int64_t i = (packed ? packs * kPack : begin) + threadIdx.x; i < end; i += kThreads) {
      S element[kIn];
      DC_UNROLL
      for (int k = 0; k < kIn; ++k) element[k] = in[k][i];
      count(element);
    }
  }
};

// ---- Short rows -----------------------------------------------------------------------------

template <class Op, class S>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<Op, S>)
    select_kernel(const __grid_constant__ LaunchArgs args, bool packed) {
  using R = Compute<S>;
  __shared__ Tally<R, unsigned> tally;
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    start<Op>(tally, args, row);
    for (int digit = 0; digit < kDigits<R>; ++digit) {
      clear(tally);
      __syncthreads();
      Counting<Op, S> counting(args, row, tally.search, tally.counts);
      counting.columns(row, 0, args.cols, packed);
      if (digit == 0 && counting.nans) atomicAdd(&tally.nans, counting.nans);
      if (digit == kDigits<R> - 1) keep_smallest(tally.above, counting.above);
      __syncthreads();
      narrow(tally);
    }
    store<Op>(tally, args, row);
  }
}

// ---- Long rows: the tally of each row is in the workspace -----------------------------------

template <class R>
using RowTally = Tally<R, unsigned long long>;

template <class Op, class R>
__global__ void __launch_bounds__(kThreads)
    select_begin_kernel(const __grid_constant__ LaunchArgs args, RowTally<R>* tallies) {
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    start<Op>(tallies[row], args, row);
    clear(tallies[row]);
  }
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
  for (int i = threadIdx.x; i < kBuckets; i += kThreads) counts[i] = 0;
  __syncthreads();
  Counting<Op, S> counting(args, row, tally.search, counts);
  counting.columns(row, begin, end, packed);
  if (digit == 0 && counting.nans) atomicAdd(&tally.nans, counting.nans);
  if (digit == kDigits<R> - 1) keep_smallest(tally.above, counting.above);
  __syncthreads();
  for (int i = threadIdx.x; i < kBuckets; i += kThreads)
    if (counts[i]) atomicAdd(&tally.counts[i], counts[i]);
}

template <class Op, class R>
__global__ void __launch_bounds__(kThreads)
    select_narrow_kernel(const __grid_constant__ LaunchArgs args, RowTally<R>* tallies, bool last) {
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    RowTally<R>& tally = tallies[row];
    narrow(tally);
    clear(tally);
    if (last) store<Op>(tally, args, row);
  }
}

template <class Op, class S>
struct CudaSelect {
  using R = Compute<S>;

  // As CudaMap::run.
  static const char* run(LaunchArgs& args, cudaStream_t stream, Workspace workspace) {
    const bool packed = CudaMap<Op, S>::aligned(args);
    const unsigned blocks = unsigned(args.rows < 65535 ? args.rows : 65535);
    args.chunk = 16384;
    args.chunks = (args.cols + args.chunk - 1) / args.chunk;
    if (args.chunks <= 1) return launch(select_kernel<Op, S>, blocks, stream, args, packed);
    if (args.rows > INT32_MAX / args.chunks) return "too many elements for one launch";
    auto* tallies = static_cast<RowTally<R>*>(workspace(int64_t(sizeof(RowTally<R>)) * args.rows));
    if (!tallies) return "out of memory for the counts";
    const unsigned all = unsigned(args.rows * args.chunks);
    const char* error = launch(select_begin_kernel<Op, R>, blocks, stream, args, tallies);
    for (int digit = 0; digit < kDigits<R> && !error; ++digit) {
      error = launch(select_count_kernel<Op, S>, all, stream, args, tallies, packed, digit);
      const bool last = digit == kDigits<R> - 1;
      if (!error) error = launch(select_narrow_kernel<Op, R>, blocks, stream, args, tallies, last);
    }
    return error;
  }

  static const char* load() {
    const char* error = load_code(select_kernel<Op, S>);
    if (!error) error = load_code(select_begin_kernel<Op, R>);
    if (!error) error = load_code(select_count_kernel<Op, S>);
    if (!error) error = load_code(select_narrow_kernel<Op, R>);
    return error;
  }
};

}  // namespace diffcore
