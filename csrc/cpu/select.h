// The CPU loop of the ops with kSelect; a unit of work is a row. In a long row, keys are counted by
// their highest bits until the remaining candidates fit into a buffer of fixed size; the inputs of
// an image are read twice. The remaining bits are then determined one by one, which is cheaper for
// so few candidates than counting by many bits at once.
#pragma once

#include "core/selection.h"
#include "cpu/map.h"

DC_KERNEL_NAMESPACE_BEGIN

// The op with its summand as an output instead of a sum.
template <class Op>
struct Summand : Op {
  static constexpr int n_out = 1, n_sum = 0;
};

// The keys of a row, one tile at a time. Each pass computes them again, with the same result.
template <class Op, class S>
struct RowKeys {
  using R = Compute<S>;

  const LaunchArgs& args;
  const int64_t row;
  R c[Op::n_coef];
  Key<R> tile[kTile];

  RowKeys(const LaunchArgs& args, int64_t row) : args(args), row(row) {
    load_coefs<Op>(args, row, c);
  }

  // Calls use(n) for each tile of n keys.
  template <class Use>
  DC_HD void each_tile(Use use) {
    for (int64_t first = 0; first < args.cols; first += kTile) use(load(first));
  }

 private:
  __attribute__((noinline)) int load(int64_t first) {
    constexpr bool kConverted = !same<S, R>;
    alignas(64) R x[Op::n_in][kConverted ? kTile : 1];
    alignas(64) R values[kTile];
    const void* in[Op::n_in];
    void* const out[] = {values};
    const int n = args.cols - first < kTile ? int(args.cols - first) : kTile;
    DC_UNROLL
    for (int k = 0; k < Op::n_in; ++k) {
      const S* from = static_cast<const S*>(args.in[k]) + row * args.row_stride[k] + first;
      if constexpr (kConverted) {
        load_tile(from, n, x[k]);
        in[k] = x[k];
      } else {
        in[k] = from;
      }
    }
    map_numbers<Summand<Op>, R>(c, in, out, n, nullptr, false);
    for (int i = 0; i < n; ++i) tile[i] = key_of(values[i]);
    return n;
  }
};

template <class Op, class S>
struct CpuSelect {
  using R = Compute<S>;
  using K = Key<R>;
  static constexpr int kCapacity = 1 << 14;

  struct Scratch {
    int64_t counts[kBuckets];
    K candidates[kCapacity + kTile];
  };

  static void run(const LaunchArgs& args, int64_t begin, int64_t end, void* scratch) {
    for (int64_t row = begin; row < end; ++row) {
      double c[Op::n_coef];
      load_coefs<Op>(args, row, c);
      const double found = quantile(args, row, c[Op::ratio], *static_cast<Scratch*>(scratch));
      static_cast<R*>(args.sum[0])[row] = R(Op::selected(c, found));
    }
  }

 private:
  static double quantile(const LaunchArgs& args, int64_t row, double level, Scratch& scratch) {
    RowKeys<Op, S> keys(args, row);
    const K* tile = keys.tile;
    const Position position = position_of(level, args.cols);
    Search<R> search = Search<R>::of(position.rank, args.cols);

    while (search.open && search.count > kCapacity) {
      int64_t (&counts)[kBuckets] = scratch.counts;
      for (int64_t& count : counts) count = 0;
      keys.each_tile([&, search](int n) {
        for (int i = 0; i < n; ++i) counts[search.bucket(tile[i])] += search.holds(tile[i]);
      });
      search.narrow(bucket_of(search.rank, counts, kBuckets), search.rest());
    }

    K* const candidates = scratch.candidates;
    int kept = 0;
    K above = kNoKey<R>;
    bool nan = false;
    keys.each_tile([&, search](int n) {
      above = smaller(above, smallest_from(search.high() + 1, tile, n));
      nan |= smallest_from(kNanKey<R>, tile, n) == kNanKey<R>;
      for (int i = 0; search.open && i < n; ++i) {
        candidates[kept] = tile[i];
        kept += search.holds(tile[i]);
      }
      kept = kept < kCapacity ? kept : kCapacity;  // more only if another thread changes the inputs
    });
    if (nan) return bit_cast<R>(kNanKey<R>);

    while (search.open && search.count > 1) {
      const int rest = search.open - 1;
      K zeros = 0;
      for (int i = 0; i < kept; ++i) zeros += candidates[i] - search.low < K(1) << rest;
      const K counts[] = {zeros, K(search.count - zeros)};
      search.narrow(bucket_of(search.rank, counts, 2), rest);
    }
    const K key = search.open ? smallest_from(search.low, candidates, kept) : search.low;
    const bool again = search.rank + 1 < search.count;
    const K next = again ? key : smaller(above, smallest_from(key + 1, candidates, kept));
    return between<R>(key, next, position.weight);
  }

  DC_HD static K smaller(K a, K b) { return a < b ? a : b; }

  // The smallest key >= `from`. Keys below it wrap around in the subtraction and become largest.
  DC_HD static K smallest_from(K from, const K* keys, int n) {
    K least = kNoKey<R>;
    for (int i = 0; i < n; ++i) least = smaller(least, keys[i] - from);
    return least > kNanKey<R> ? kNoKey<R> : from + least;
  }
};

DC_KERNEL_NAMESPACE_END
