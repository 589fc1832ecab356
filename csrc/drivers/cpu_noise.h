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

// Stores four vectors four by four, transposed: the first number of each, the second of each, ...
// in every 128-bit part.
DC_HD void store_transposed(VectorF a, VectorF b, VectorF c, VectorF d, float* z) {
  const VectorF ab = interleave<0, 1>(a, b), ab2 = interleave<2, 1>(a, b);
  const VectorF cd = interleave<0, 1>(c, d), cd2 = interleave<2, 1>(c, d);
  const VectorF out[4] = {interleave<0, 2>(ab, cd), interleave<2, 2>(ab, cd),
                          interleave<0, 2>(ab2, cd2), interleave<2, 2>(ab2, cd2)};
  __builtin_memcpy(z, out, sizeof(out));
}

// The block in each 64-bit lane, such that Drawer::draw packs and transposes it into its place.
struct LaneBlocks {
  uint64_t at[kSide][kWidth / 2] = {};
  constexpr LaneBlocks() {
    constexpr int kParts = kVectorBytes / 16;  // of 128 bits
    for (int b = 0; b < kDrawBlocks; ++b) {
      const int in_group = b % kWidth, lane = in_group % kParts * 4 + in_group / kParts;
      at[b / kWidth * 2 + lane % 2][lane / 2] = uint64_t(b);
    }
  }
};
constexpr LaneBlocks kLaneBlocks;

class Drawer {
 public:
  // Blocks 0, 1, ... of one sample.
  void set(const NoiseKey& key) {
    for (int i = 0; i < kSide; ++i) {
      __builtin_memcpy(&block_.v[i], kLaneBlocks.at[i], sizeof(VectorU64));
      block_.v[i] += uint64_t(key.first_block);
    }
    for (int k = 0; k < 2; ++k) id_[k] = VectorLanes::word(key.id[k]);
    set_common(key);
  }
  // `blocks` blocks of each row from `row` on.
  void set(const NoiseSource& noise, int64_t row, int64_t rows, int blocks) {
    for (int i = 0; i < kSide; ++i) {
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

  // z[4 b + j] = normal j of block b, after adding `first` to the number of every block
  DC_HD void draw(uint32_t first, float* z) const {
    using L = VectorLanes;
    L::Word c[4] = {block_ + uint64_t(first), L::word(stream_), id_[0], id_[1]};
    philox<L>(c, key_[0], key_[1]);
    // Each group of two vectors of words makes two pairs of vectors for box_muller.
    L::U u, v;
    DC_UNROLL
    for (int g = 0; g < kSide; g += 2) {
      const auto packed = [&](int k) {
        return VectorU((c[k].v[g] & 0xffffffffu) | (c[k].v[g + 1] << 32));
      };
      u.v[g] = packed(0);
      v.v[g] = packed(1);
      u.v[g + 1] = packed(2);
      v.v[g + 1] = packed(3);
    }
    L::F a, b;
    box_muller<L>(u, v, a, b);
    DC_UNROLL
    for (int g = 0; g < kSide; g += 2)
      store_transposed(a.v[g], b.v[g], a.v[g + 1], b.v[g + 1], z + g / 2 * 4 * kWidth);
  }

 private:
  void set_common(const NoiseKey& key) {
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

  // Memory that will be wanted for the columns about to be drawn: fetched meanwhile, because
  // drawing leaves the memory idle otherwise.
  struct Ahead {
    const char* at[kMaxIn + kMaxOut];
    int count;
    int column_bytes;
  };

  // `first` is a multiple of kAtOnce. So many columns from there as the row has, up to kAtOnce.
  __attribute__((noinline)) const float* columns(int64_t row, int64_t first, const Ahead& ahead) {
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
