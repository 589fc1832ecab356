// The CPU loop, for every functor and storage type, in the instruction set that this file is
// compiled for.
//
// A unit of work is (row, chunk of columns). Each unit sums into kLanes accumulators, which are
// folded by a fixed tree; the units of a row are combined in double. So the result depends neither
// on the number of threads nor on the vector width.
#pragma once

#include "core/coefficients.h"
#include "core/launch_args.h"
#include "core/op.h"
#include "cpu/columns.h"
#include "cpu/kernels.h"
#include "cpu/noise.h"

DC_KERNEL_NAMESPACE_BEGIN

// The sum of the lanes, by a fixed tree. Not inlined, so that all kernels share it.
template <class R>
__attribute__((noinline)) R folded(R* lanes) {
  for (int width = kLanes / 2; width > 0; width /= 2) {
    DC_INDEPENDENT
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

// The many coefficients of a row. Not inlined, so that kernels with as many share it: inlined into
// each of them, two compute types and three instruction sets, it is a large part of the wheel. Up
// to the 13 of a plain step it is inlined: rows may be short, and a call costs 2 ns for each.
constexpr int kInlinedCoefs = 13;
template <int kCount, class R>
__attribute__((noinline)) void load_row(const LaunchArgs& args, int64_t row, R* c) {
  const int64_t step = args.steps ? step_of(args, row) : 0;
  DC_UNROLL
  for (int k = 0; k < kCount; ++k) c[k] = load_coef<R>(args.coef[k], row, step);
}

using StoreNoise = void (*)(const float* from, int64_t n, void* to);

// The generated noise of an op; empty if the op reads its noise or has none.
template <class Op, class R, bool = kGeneratesNoise<Op>>
struct Noise {
  explicit Noise(const LaunchArgs&) {}
};
template <class Op, class R>
struct Noise<Op, R, true> : RowNoise {
  using RowNoise::RowNoise;
  static_assert(kChunk % kAtOnce == 0 && kAtOnce % kTile == 0,
                "units and tiles must begin where noise does, and end within it");

  // The noise of columns [first, first + n), stored as `store` does; n <= kTile. `prefetch`: the
  // other tensors, from column `first` on.
  const void* tile(int64_t row, int64_t first, int64_t n, StoreNoise store,
                   const Prefetch& prefetch) {
    const int64_t within = first % kAtOnce;
    if (within == 0) generated_ = columns(row, first, prefetch);
    if (!store) return generated_ + within;
    store(generated_ + within, n, stored_);
    return stored_;
  }

 private:
  const float* generated_ = nullptr;
  alignas(64) char stored_[kTile * sizeof(R)];
};

template <class Op>
struct Formula {
  using type = Op;
};
template <class Op>
struct Formula<Generated<Op>> {
  using type = Op;
};

// The loop of an op over rows, for all storage types that compute in R.
template <class Op, class R>
struct CpuLoop {
  static constexpr int kIn = kReads<Op>, kOut = Op::n_out, kSum = Op::n_sum;

  // What differs between storage types. `store`: null for float.
  struct Storage {
    int bytes;
    Map<R> map;
    StoreNoise store;
    bool in_place = false;
  };

  static void run(const LaunchArgs& args, int64_t begin, int64_t end, Storage storage) {
    for (int k = 0; k < kIn * kOut; ++k) storage.in_place |= args.in[k % kIn] == args.out[k / kIn];
    R c[Op::n_coef + 1] = {};
    Noise<Op, R> noise(args);
    int64_t loaded = -1;
    for (int64_t unit = begin; unit < end; ++unit) {
      int64_t row = unit / args.chunks, first = (unit - row * args.chunks) * args.chunk;
      int64_t left = args.cols - first;
      if (row != loaded) load(args, row, c);
      loaded = row;
      if (Op::idle(c) && args.in[0] == args.out[0]) continue;
      R acc[kSum + 1][kLanes];
      for (int k = 0; k < kSum; ++k)
        for (int lane = 0; lane < kLanes; ++lane) acc[k][lane] = R(0);
      columns(args, storage, noise, c, row, first, left < args.chunk ? left : args.chunk, acc);
      if constexpr (kSum > 0) {
        double totals[kSum];
        for (int k = 0; k < kSum; ++k) {
          totals[k] = folded(acc[k]);
          if (args.chunks > 1)
            args.partials[(k * args.rows + row) * args.chunks + unit % args.chunks] = totals[k];
        }
        if (args.chunks <= 1) store(args, row, c, totals);
      }
    }
  }

  // Combines the chunks of every row.
  static void combine(const LaunchArgs& args) {
    if constexpr (kSum > 0) {
      for (int64_t row = 0; row < args.rows; ++row) {
        double totals[kSum];
        for (int k = 0; k < kSum; ++k) {
          const double* chunk = args.partials + (k * args.rows + row) * args.chunks;
          totals[k] = 0;
          for (int64_t j = 0; j < args.chunks; ++j) totals[k] += chunk[j];
        }
        R c[Op::n_coef + 1] = {};
        load(args, row, c);
        store(args, row, c, totals);
      }
    }
  }

 private:
  static void load(const LaunchArgs& args, int64_t row, R* c) {
    if constexpr (Op::n_coef <= kInlinedCoefs) {
      load_coefs<Op>(args, row, c);
    } else {
      load_row<Op::n_coef>(args, row, c);
      Op::prepare(c);
    }
  }

  static void store(const LaunchArgs& args, int64_t row, const R* c, const double* totals) {
    double stored[kStored<Op> + 1];
    finalize<Op>(c, totals, double(args.cols), stored);
    for (int k = 0; k < kStored<Op>; ++k) static_cast<R*>(args.sum[k])[row] = R(stored[k]);
  }

  static void columns(const LaunchArgs& args, const Storage& storage, Noise<Op, R>& noise,
                      const R* c, int64_t row, int64_t first, int64_t n, R (*acc)[kLanes]) {
    const void* in[kIn + 2];
    void* out[kOut + 1];
    const auto seek = [&](int64_t column) __attribute__((always_inline)) {
      DC_UNROLL
      for (int k = 0; k < kIn; ++k)
        in[k] = static_cast<const char*>(args.in[k]) +
                (row * args.row_stride[k] + column) * storage.bytes;
      DC_UNROLL
      for (int k = 0; k < kOut; ++k)
        out[k] = static_cast<char*>(args.out[k]) + (row * args.cols + column) * storage.bytes;
    };
    if constexpr (kGeneratesNoise<Op>) {
      for (int64_t i = 0; i < n; i += kTile) {
        const int64_t m = n - i < kTile ? n - i : kTile;
        seek(first + i);
        RowNoise::Prefetch prefetch{{}, kIn + kOut, storage.bytes};
        DC_UNROLL
        for (int k = 0; k < kIn; ++k) prefetch.at[k] = static_cast<const char*>(in[k]);
        DC_UNROLL
        for (int k = 0; k < kOut; ++k) prefetch.at[kIn + k] = static_cast<const char*>(out[k]);
        in[kIn] = noise.tile(row, first + i, m, storage.store, prefetch);
        storage.map(c, in, out, m, acc, storage.in_place);
      }
    } else {
      seek(first);
      storage.map(c, in, out, n, acc, storage.in_place);
    }
  }
};

// The loop with one storage type.
template <class Op, class S>
void run_loop(const LaunchArgs& args, int64_t begin, int64_t end, void*) {
  CpuLoop<Op, Compute<S>>::run(
      args, begin, end,
      {sizeof(S), &map_row<typename Formula<Op>::type, S>,
       kGeneratesNoise<Op> && !same<S, float> ? StoreNoise(&store_noise<S>) : nullptr});
}

DC_KERNEL_NAMESPACE_END
