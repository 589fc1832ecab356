// The arguments of a kernel: pointers, sizes and the source of each coefficient. Plain data, shared
// by both backends; on CUDA it is the kernel's parameter.
#pragma once

#include <stdint.h>

namespace diffcore {

constexpr int kMaxIn = 7;
constexpr int kMaxOut = 4;
constexpr int kMaxSum = 5;
constexpr int kMaxCoef = 19;
constexpr int kDtypes = 4;  // f32, f64, bf16, f16
enum Dtype : int { kF32 = 0, kF64 = 1, kBf16 = 2, kF16 = 3, kNoDtype = -1 };

struct Coef {
  const void* data = nullptr;  // null: `value` for every row
  int64_t stride = 0;          // in elements
  double value = 0;
  bool is_double = false;
  bool by_step = false;  // indexed by the row's step instead of by the row
};

// The noise key of a call: z = normal(seed, sample id, stream, element).
struct NoiseSource {
  const int64_t* seed = nullptr;    // null: `seed_value`
  const int64_t* id = nullptr;      // null: `first_id`
  const int64_t* stream = nullptr;  // null: `stream_value`
  int64_t seed_value = 0;
  int64_t first_id = 0;
  int64_t stream_value = 0;
  int64_t id_stride = 0;
  bool ids_count_up = true;  // the id of a row is the first id + row
  int64_t first_block = 0;
  const int64_t* first_element = nullptr;  // of each row, a multiple of 4; null: 4 `first_block`
  int64_t first_element_stride = 0;
  bool seed_has_offset = false;  // seed[1] is added to the stream
  // Neighbors in memory belong to `inner` separate runs of the logical order (channels_last: the
  // channels). 1 where both orders agree.
  int64_t inner = 1;
};

struct LaunchArgs {
  const void* in[kMaxIn] = {};      // [rows, cols], all of one storage type and row layout
  int64_t row_stride[kMaxIn] = {};  // elements from row to row, per input
  void* out[kMaxOut] = {};          // [rows, cols]
  void* sum[kMaxSum] = {};          // [rows], compute type
  Coef coef[kMaxCoef] = {};
  NoiseSource noise;
  const void* step = nullptr;  // [rows] or one counter for all (stride 0); null: `fixed_step`
  int64_t step_stride = 0;
  bool step_is_64 = true;
  int64_t fixed_step = 0;
  int64_t steps = 0;  // length of the coefficient table
  int64_t rows = 0;
  int64_t cols = 0;
  // Columns per unit of work. Sums are formed per chunk, so this determines their order.
  int64_t chunk = 1;
  int64_t chunks = 1;          // per row
  double* partials = nullptr;  // [n_sum, rows, chunks] if a second kernel adds them
};

}  // namespace diffcore
