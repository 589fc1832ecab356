// The normals of a span of columns, drawn many at a time.
#pragma once

#include "core/normal.h"
#include "drivers/cpu_lanes.h"

DC_KERNEL_NAMESPACE_BEGIN

// One draw: so many blocks, of four elements each. Two vectors of words make one of numbers.
constexpr int kDrawBlocks = kSide / 2 * kWidth;
constexpr int kDraw = 4 * kDrawBlocks;

// In each 128-bit part, runs of kRun numbers of a and of b in turn, from number kFrom on.
template <int kFrom, int kRun>
DC_HD VectorF interleave(VectorF a, VectorF b) {
  VectorI from;
  DC_UNROLL
  for (int i = 0; i < kWidth; ++i) {
    const int at = i % 4, of_b = at / kRun % 2;
    from[i] = i - at + kFrom + at / (2 * kRun) * kRun + at % kRun + of_b * kWidth;
  }
  return __builtin_shuffle(a, b, from);
}

class Drawer {
 public:
  // Blocks 0, 1, ... of one sample.
  void set(const NoiseKey& key) {
    for (int b = 0; b < kDrawBlocks; ++b) put(b, key, uint32_t(b));
  }
  // `blocks` blocks of each row from `row` on.
  void set(const NoiseSource& noise, int64_t row, int64_t rows, int blocks) {
    for (int b = 0; b < kDrawBlocks; ++b) {
      const int64_t of = row + b / blocks;
      put(b, noise_key(noise, of < rows ? of : rows - 1), uint32_t(b % blocks));
    }
  }

  // z[4 b + j] = normal j of block b, after adding `first` to the number of every block
  DC_HD void draw(uint32_t first, float* z) const {
    using L = VectorLanes;
    L::Word c[4] = {block_ + uint64_t(first), L::word(stream_), id_[0], id_[1]};
    philox<L>(c, key_[0], key_[1]);
    VectorU w[4][kSide / 2];
    DC_UNROLL
    for (int k = 0; k < 4; ++k)
      DC_UNROLL
      for (int g = 0; g < kSide / 2; ++g)
        w[k][g] = VectorU((c[k].v[2 * g] & 0xffffffffu) | (c[k].v[2 * g + 1] << 32));
    L::U u, v;
    DC_UNROLL
    for (int i = 0; i < kSide; ++i) {
      u.v[i] = w[i % 2 * 2][i / 2];
      v.v[i] = w[i % 2 * 2 + 1][i / 2];
    }
    L::F a, b;
    box_muller<L>(u, v, a, b);
    DC_UNROLL
    for (int g = 0; g < kSide / 2; ++g) {
      // Four by four, in each 128-bit part.
      const VectorF low = interleave<0, 1>(a.v[2 * g], b.v[2 * g]);
      const VectorF high = interleave<2, 1>(a.v[2 * g], b.v[2 * g]);
      const VectorF low2 = interleave<0, 1>(a.v[2 * g + 1], b.v[2 * g + 1]);
      const VectorF high2 = interleave<2, 1>(a.v[2 * g + 1], b.v[2 * g + 1]);
      const VectorF out[4] = {interleave<0, 2>(low, low2), interleave<2, 2>(low, low2),
                              interleave<0, 2>(high, high2), interleave<2, 2>(high, high2)};
      __builtin_memcpy(z + g * 4 * kWidth, out, sizeof(out));
    }
  }

 private:
  // Puts a block into the lane where `draw` packs and transposes it into its place.
  void put(int b, const NoiseKey& key, uint32_t block) {
    constexpr int kParts = kVectorBytes / 16;  // of 128 bits
    const int in_group = b % kWidth, lane = in_group % kParts * 4 + in_group / kParts;
    const int vector = b / kWidth * 2 + lane % 2;
    block_.v[vector][lane / 2] = key.first_block + block;
    for (int k = 0; k < 2; ++k) id_[k].v[vector][lane / 2] = key.id[k];
    for (int k = 0; k < 2; ++k) key_[k] = key.key[k];
    stream_ = key.stream;
  }

  VectorLanes::Word block_, id_[2];
  uint32_t stream_, key_[2];
};

// The noise of some columns of a row.
class RowNoise {
 public:
  static constexpr int kAtOnce = 2048;  // columns, at most

  explicit RowNoise(const Task& task) : task_(task) {
    blocks_ = task.cols <= kDraw / 2 ? int((task.cols + 3) / 4) : 0;
  }

  // Memory that will be wanted for the columns about to be drawn: fetched meanwhile, because drawing
  // leaves the memory idle otherwise.
  struct Ahead {
    const char* at[kMaxIn + kMaxOut];
    int count;
    int column_bytes;
  };

  // `first` is a multiple of kAtOnce. So many columns from there as the row has, up to kAtOnce.
  __attribute__((noinline)) const float* columns(int64_t row, int64_t first,
                                                 const Ahead& ahead) {
    if (blocks_ && task_.noise.inner == 1) {  // short rows: several in a draw
      if (row < row_ || row >= row_ + kDrawBlocks / blocks_) {
        drawer_.set(task_.noise, row, task_.rows, blocks_);
        drawer_.draw(0, z_);
        row_ = row;
      }
      return z_ + (row - row_) * 4 * blocks_;
    }
    if (row != row_) drawer_.set(noise_key(task_.noise, row));
    row_ = row;
    const int64_t left = task_.cols - first, n = left < kAtOnce ? left : kAtOnce;
    if (task_.noise.inner == 1) {
      for (int64_t i = 0; i < n; i += kDraw) {
        fetch(ahead, i);
        drawer_.draw(uint32_t((first + i) / 4), z_ + i);
      }
    } else {
      transposed(first, n);
    }
    return z_;
  }

 private:
  static void fetch(const Ahead& ahead, int64_t column) {
    constexpr int kLine = 64;
    for (int k = 0; k < ahead.count; ++k)
      for (int b = 0; b < kDraw * ahead.column_bytes; b += kLine)
        __builtin_prefetch(ahead.at[k] + column * ahead.column_bytes + b);
  }

  // Column p is element p % inner · outer + p / inner: every `inner`-th column is one run.
  void transposed(int64_t first, int64_t n) {
    const int64_t inner = task_.noise.inner, outer = task_.cols / inner;
    alignas(64) float run[kAtOnce + 2 * kDraw];
    for (int64_t k = 0; k < inner; ++k) {
      int64_t p = first + (k - first % inner + inner) % inner;
      const int64_t element = k * outer + p / inner, skip = element % 4;
      const int64_t count = p < first + n ? (first + n - 1 - p) / inner + 1 : 0;
      for (int64_t i = 0; i < skip + count; i += kDraw)
        if (count) drawer_.draw(uint32_t((element + i) / 4), run + i);
      for (int64_t i = 0; i < count; ++i, p += inner) z_[p - first] = run[skip + i];
    }
  }

  const Task& task_;
  Drawer drawer_;
  int64_t row_ = INT64_MIN / 2;
  int blocks_;  // of a row, where rows are short
  alignas(64) float z_[kAtOnce + kDraw];
};

DC_KERNEL_NAMESPACE_END
