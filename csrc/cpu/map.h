// The CPU loop, for every functor and storage type, in the instruction set that this file is
// compiled for.
//
// A unit of work is (row, chunk of columns). Each unit sums into kLanes accumulators, which are
// folded by a fixed tree; the units of a row are combined in double. So the result depends neither
// on the number of threads nor on the vector width.
#pragma once

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "core/coefficients.h"
#include "core/launch_args.h"
#include "core/number.h"
#include "core/op.h"
#include "cpu/kernels.h"
#include "cpu/noise.h"

DC_KERNEL_NAMESPACE_BEGIN

constexpr int kLanes = 64;
constexpr int kTile = 512;  // 16-bit elements converted at a time; a multiple of kLanes

static_assert(kTile % kLanes == 0, "a tile starts at lane 0 of the sums");

template <class T, class U>
constexpr bool same = false;
template <class T>
constexpr bool same<T, T> = true;

// Called once per tile. Not inlined, so that all kernels share one copy of each conversion.
template <class S>
__attribute__((noinline)) void load_tile(const S* from, int64_t n, float* to) {
  int64_t i = 0;
#if defined(__F16C__)
  if constexpr (same<S, F16>) {  // the portable conversion takes four times as long
    for (; i + 8 <= n; i += 8) {
      __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(half));
    }
  }
#endif
  for (; i < n; ++i) to[i] = load_value(from[i]);
}

template <class S>
__attribute__((noinline)) void store_tile(const float* from, int64_t n, S* to) {
  int64_t i = 0;
#if defined(__F16C__)
  if constexpr (same<S, F16>) {
    for (; i + 8 <= n; i += 8) {
      __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), half);
    }
  }
#endif
  for (; i < n; ++i) to[i] = Store<S>::from(from[i]);
}

// y[i] = Op(x[i]) for i < n, all in the compute type; summands are added to acc[i % kLanes]. float
// and the types that are converted to it share one instance.
template <class Op, class R>
__attribute__((noinline)) void map_columns(const R* coefs, const R* const* from, R* const* to,
                                           int64_t n, R (*acc)[kLanes]) {
  constexpr int kIn = Op::n_in, kOut = Op::n_out, kSum = Op::n_sum;
  // Local copies, so the compiler can prove that the stores of the loop do not change them.
  R c[Op::n_coef + 1];
  const R* in[kIn + 1];
  R* out[kOut + 1];
  DC_UNROLL
  for (int k = 0; k < Op::n_coef; ++k) c[k] = coefs[k];
  DC_UNROLL
  for (int k = 0; k < kIn; ++k) in[k] = from[k];
  DC_UNROLL
  for (int k = 0; k < kOut; ++k) out[k] = to[k];
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
  // ivdep: an output may be the same tensor as an input, but never overlaps one partly. The binding
  // checks this.
  if constexpr (kSum == 0) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) element(i, 0);
  } else {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
#pragma GCC ivdep
      for (int lane = 0; lane < kLanes; ++lane) element(i + lane, lane);
    }
#pragma GCC ivdep
    for (int lane = 0; i + lane < n; ++lane) element(i + lane, lane);
  }
}

// The sum of the lanes, by a fixed tree. Not inlined, so that all kernels share it.
template <class R>
__attribute__((noinline)) R folded(R* lanes) {
  for (int width = kLanes / 2; width > 0; width /= 2) {
#pragma GCC ivdep
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

// The many coefficients of a row. Not inlined, so that kernels with as many share it: inlined into
// each of them, four dtypes and three instruction sets, it is a large part of the wheel. Up to the 13
// of a plain step it is inlined: rows may be short, and a call costs 2 ns for each.
constexpr int kInlinedCoefs = 13;
template <int kCount, class R>
__attribute__((noinline)) void load_row(const LaunchArgs& args, int64_t row, R* c) {
  const int64_t step = args.steps ? step_of(args, row) : 0;
  DC_UNROLL
  for (int k = 0; k < kCount; ++k) c[k] = load_coef<R>(args.coef[k], row, step);
}

// map_columns with the formula of the row: Op, or Op::Other.
template <class Op, class R>
void map_row(const R* c, const R* const* from, R* const* to, int64_t n, R (*acc)[kLanes]) {
  if constexpr (kSwitches<Op>)
    if (Op::other(c)) return map_columns<typename Op::Other, R>(c, from, to, n, acc);
  map_columns<Op, R>(c, from, to, n, acc);
}

// The generated noise of an op; empty if the op reads its noise or has none.
template <class Op, bool = kGeneratesNoise<Op>>
struct Noise {
  explicit Noise(const LaunchArgs&) {}
};
template <class Op>
struct Noise<Op, true> : RowNoise {
  using RowNoise::RowNoise;
  static_assert(kChunk % kAtOnce == 0 && kAtOnce % kTile == 0,
                "units and tiles must begin where noise does, and end within it");

  // The noise of columns [first, first + n), rounded to S as a tensor would store it; n <= kTile.
  // `prefetch`: the other tensors, from column `first` on.
  template <class S>
  const Compute<S>* tile(int64_t row, int64_t first, int64_t n, const Prefetch& prefetch) {
    const int64_t within = first % kAtOnce;
    if (within == 0) generated_ = columns(row, first, prefetch);
    const float* z = generated_ + within;
    if constexpr (same<S, float>) {
      return z;
    } else if constexpr (same<S, double>) {
      for (int64_t i = 0; i < n; ++i) doubles_[i] = z[i];
      return doubles_;
    } else if constexpr (same<S, Bf16>) {  // noise is never NaN, so rounding the bits suffices
      for (int64_t i = 0; i < n; ++i)
        rounded_[i] = bit_cast<float>(rounded_to_bf16(bit_cast<uint32_t>(z[i])) & 0xffff0000u);
      return rounded_;
    } else {
      S stored[kTile];
      store_tile(z, n, stored);
      load_tile(stored, n, rounded_);
      return rounded_;
    }
  }

 private:
  const float* generated_ = nullptr;
  union {
    alignas(64) double doubles_[kTile];
    alignas(64) float rounded_[kTile];
  };
};

template <class Op>
struct Formula {
  using type = Op;
};
template <class Op>
struct Formula<Generated<Op>> {
  using type = Op;
};

template <class Op, class S>
struct CpuLoop {
  using R = Compute<S>;
  static constexpr int kIn = kReads<Op>, kOut = Op::n_out, kSum = Op::n_sum;

  static void run(const LaunchArgs& args, int64_t begin, int64_t end, void*) {
    R c[Op::n_coef + 1] = {};
    Noise<Op> noise(args);
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
      columns(args, noise, c, row, first, left < args.chunk ? left : args.chunk, acc);
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

  static void columns(const LaunchArgs& args, Noise<Op>& noise, const R* c, int64_t row,
                      int64_t first, int64_t n, R (*acc)[kLanes]) {
    constexpr bool kConverted = !same<S, R>;
    const int64_t at = row * args.cols + first;
    const S* in[kIn + 1];
    S* out[kOut + 1];
    DC_UNROLL
    for (int k = 0; k < kIn; ++k)
      in[k] = static_cast<const S*>(args.in[k]) + row * args.row_stride[k] + first;
    DC_UNROLL
    for (int k = 0; k < kOut; ++k) out[k] = static_cast<S*>(args.out[k]) + at;
    if constexpr (!kConverted && !kGeneratesNoise<Op>) {
      map_row<typename Formula<Op>::type, R>(c, in, out, n, acc);
    } else {
      constexpr int kCapacity = kConverted ? kTile : 1;
      alignas(64) R x[kIn + 1][kCapacity];
      alignas(64) R y[kOut + 1][kCapacity];
      const R* xs[kIn + 1];
      R* ys[kOut + 1];
      for (int64_t i = 0; i < n; i += kTile) {
        int64_t m = n - i < kTile ? n - i : kTile;
        DC_UNROLL
        for (int k = 0; k < kIn; ++k) {
          if constexpr (kConverted) load_tile(in[k] + i, m, x[k]);
          xs[k] = pick<kConverted>(x[k], in[k] + i);
        }
        if constexpr (kGeneratesNoise<Op>) {
          RowNoise::Prefetch prefetch{{}, kIn + kOut, sizeof(S)};
          DC_UNROLL
          for (int k = 0; k < kIn; ++k) prefetch.at[k] = reinterpret_cast<const char*>(in[k] + i);
          DC_UNROLL
          for (int k = 0; k < kOut; ++k)
            prefetch.at[kIn + k] = reinterpret_cast<const char*>(out[k] + i);
          xs[kIn] = noise.template tile<S>(row, first + i, m, prefetch);
        }
        DC_UNROLL
        for (int k = 0; k < kOut; ++k) ys[k] = pick<kConverted>(y[k], out[k] + i);
        map_row<typename Formula<Op>::type, R>(c, xs, ys, m, acc);
        if constexpr (kConverted)
          for (int k = 0; k < kOut; ++k) store_tile(y[k], m, out[k] + i);
      }
    }
  }

  template <bool kFirst, class A, class B>
  DC_HD static auto pick(A a, B b) {
    if constexpr (kFirst)
      return a;
    else
      return b;
  }
};

DC_KERNEL_NAMESPACE_END
