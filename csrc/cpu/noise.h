// Generates the normals of consecutive columns, many at a time.
#pragma once

#include "cpu/lanes.h"
#include "noise/normal.h"

DC_KERNEL_NAMESPACE_BEGIN

// One call of BlockGenerator::generate: kBatchBlocks blocks of four elements.
constexpr int kBatchBlocks = kGroup * kWidth / 2;
constexpr int kBatch = 4 * kBatchBlocks;

// Interleaves within each 128-bit part: a0 b0 a1 b1 for kFrom 0, a2 b2 a3 b3 for kFrom 2.
template <int kFrom>
DC_HD VectorF interleaved(VectorF a, VectorF b) {
  VectorI from;
  DC_UNROLL
  for (int i = 0; i < kWidth; ++i) from[i] = i - i % 4 + kFrom + i % 4 / 2 + i % 2 * kWidth;
#if defined(__clang__)  // which makes one shuffle of it
  VectorF y;
  DC_UNROLL
  for (int i = 0; i < kWidth; ++i) y[i] = from[i] < kWidth ? a[from[i]] : b[from[i] - kWidth];
  return y;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

// The block in each 64-bit lane. BlockGenerator::generate interleaves the lanes into block order.
struct LaneBlocks {
  uint64_t at[kGroup][kWidth / 2] = {};
  constexpr LaneBlocks() {
    constexpr int kParts = kVectorBytes / 16;  // of 128 bits
    for (int i = 0; i < kGroup; ++i)
      for (int lane = 0; lane < kWidth / 2; ++lane)
        at[i][lane] = uint64_t(i * kWidth / 2 + lane % 2 * kParts + lane / 2);
  }
};
constexpr LaneBlocks kLaneBlocks;

class BlockGenerator {
 public:
  // Selects blocks 0, 1, ... of one sample.
  void set(const NoiseKey& key) {
    for (int i = 0; i < kGroup; ++i) {
      __builtin_memcpy(&block_.v[i], kLaneBlocks.at[i], sizeof(VectorU64));
      block_.v[i] += uint64_t(key.first_block);
    }
    for (int k = 0; k < 2; ++k) id_[k] = VectorLanes::word(key.id[k]);
    set_common(key);
  }
  // Selects the first `blocks` blocks of each row, from `row` on.
  void set(const NoiseSource& noise, int64_t row, int64_t rows, int blocks) {
    for (int i = 0; i < kGroup; ++i) {
      for (int lane = 0; lane < kWidth / 2; ++lane) {
        const int b = int(kLaneBlocks.at[i][lane]);
        const int64_t of = row + b / blocks;
        const NoiseKey key = noise_key(noise, of < rows ? of : rows - 1);
        block_.v[i][lane] = key.first_block + uint32_t(b % blocks);
        for (int k = 0; k < 2; ++k) id_[k].v[i][lane] = key.id[k];
      }
    }
    set_common(noise_key(noise, row));
  }

  // z[4 b + j] = normal j of selected block b, after adding `first` to its number
  DC_HD void generate(uint32_t first, float* z) const {
    using L = VectorLanes;
    L::Word c[4] = {block_ + uint64_t(first), L::word(stream_), id_[0], id_[1]};
    philox<L>(c, key_[0], key_[1]);
    // Words 0 and 2 of a block in one 64-bit lane, and words 1 and 3.
    const auto packed = [](VectorU64 low, VectorU64 high) {
      return VectorU((low & 0xffffffffu) | (high << 32));
    };
    L::U u, v;
    DC_UNROLL
    for (int i = 0; i < kGroup; ++i) {
      u.v[i] = packed(c[0].v[i], c[2].v[i]);
      v.v[i] = packed(c[1].v[i], c[3].v[i]);
    }
    L::F a, b;
    box_muller<L>(u, v, a, b);
    DC_UNROLL
    for (int i = 0; i < kGroup; ++i) {
      const VectorF out[2] = {interleaved<0>(a.v[i], b.v[i]), interleaved<2>(a.v[i], b.v[i])};
      __builtin_memcpy(z + i * 2 * kWidth, out, sizeof(out));
    }
  }

 private:
  void set_common(const NoiseKey& key) {
    for (int k = 0; k < 2; ++k) key_[k] = key.key[k];
    stream_ = key.stream;
  }

  VectorLanes::Word block_, id_[2];
  uint32_t stream_, key_[2];
};

// The noise of a row, kAtOnce columns at a time.
class RowNoise {
 public:
  static constexpr int kAtOnce = 1024;  // columns; more would not leave enough of the L1 cache

  explicit RowNoise(const LaunchArgs& args) : args_(args) {
    blocks_ = args.cols <= kBatch / 2 ? int((args.cols + 3) / 4) : 0;
  }

  // The tensors that are read or written next, prefetched while noise is generated: generation
  // alone leaves the memory system idle.
  struct Prefetch {
    const char* at[kMaxIn + kMaxOut];
    int count;
    int column_bytes;
  };

  // The noise of columns `first`, a multiple of kAtOnce, to the end of the row, at most kAtOnce.
  __attribute__((noinline)) const float* columns(int64_t row, int64_t first,
                                                 const Prefetch& prefetch) {
    if (blocks_ && args_.noise.inner == 1) {  // short rows: several per batch
      if (row < row_ || row >= row_ + kBatchBlocks / blocks_) {
        generator_.set(args_.noise, row, args_.rows, blocks_);
        generator_.generate(0, z_);
        row_ = row;
      }
      return z_ + (row - row_) * 4 * blocks_;
    }
    if (row != row_) generator_.set(noise_key(args_.noise, row));
    row_ = row;
    const int64_t left = args_.cols - first, n = left < kAtOnce ? left : kAtOnce;
    if (args_.noise.inner == 1) {
      for (int64_t i = 0; i < n; i += kBatch) {
        fetch(prefetch, i);
        generator_.generate(uint32_t((first + i) / 4), z_ + i);
      }
    } else {
      transposed(first, n);
    }
    return z_;
  }

 private:
  static void fetch(const Prefetch& prefetch, int64_t column) {
    constexpr int kLine = 64;
    for (int k = 0; k < prefetch.count; ++k)
      for (int b = 0; b < kBatch * prefetch.column_bytes; b += kLine)
        __builtin_prefetch(prefetch.at[k] + column * prefetch.column_bytes + b);
  }

  // Column p is element p % inner · outer + p / inner: every `inner`-th column belongs to one run.
  void transposed(int64_t first, int64_t n) {
    const int64_t inner = args_.noise.inner, outer = args_.cols / inner;
    alignas(64) float run[kAtOnce + 2 * kBatch];
    for (int64_t k = 0; k < inner; ++k) {
      int64_t p = first + (k - first % inner + inner) % inner;
      const int64_t element = k * outer + p / inner, skip = element % 4;
      const int64_t count = p < first + n ? (first + n - 1 - p) / inner + 1 : 0;
      for (int64_t i = 0; i < skip + count; i += kBatch)
        if (count) generator_.generate(uint32_t((element + i) / 4), run + i);
      for (int64_t i = 0; i < count; ++i, p += inner) z_[p - first] = run[skip + i];
    }
  }

  const LaunchArgs& args_;
  BlockGenerator generator_;
  int64_t row_ = INT64_MIN / 2;
  int blocks_;  // per row if rows are short, else 0
  // A generation may end up to a batch behind the last column.
  static_assert(kAtOnce % kBatch == 0 && 4 <= kBatch && kBatch / 2 <= kAtOnce,
                "z_ and `run` must hold full batches");
  alignas(64) float z_[kAtOnce + kBatch];
};

DC_KERNEL_NAMESPACE_END
