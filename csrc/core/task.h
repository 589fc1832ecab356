// What a call hands to a kernel: pointers, sizes and where each coefficient comes from. Plain data,
// shared by both backends; on CUDA it is the kernel's parameter.
#pragma once

#include <stdint.h>

namespace diffcore {

constexpr int kMaxIn = 5;
constexpr int kMaxOut = 4;
constexpr int kMaxSum = 1;
constexpr int kMaxCoef = 9;
constexpr int kDtypes = 4;  // f32, f64, bf16, f16
enum Dtype : int { kF32 = 0, kF64 = 1, kBf16 = 2, kF16 = 3, kNoDtype = -1 };

struct Coef {
  const void* data = nullptr;  // null: `value` for every row
  int64_t stride = 0;          // in elements
  double value = 0;
  bool is_double = false;
  bool by_step = false;  // indexed by the row's step instead of by the row
};

struct Task {
  const void* in[kMaxIn] = {};  // [rows, cols], one storage type and layout for all
  void* out[kMaxOut] = {};      // [rows, cols]
  void* sum[kMaxSum] = {};      // [rows], compute type
  Coef coef[kMaxCoef] = {};
  const void* step = nullptr;  // [rows] or one counter for all (stride 0); null: `fixed_step`
  int64_t step_stride = 0;
  bool step_is_64 = true;
  int64_t fixed_step = 0;
  int64_t steps = 0;  // length of the coefficient table
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t chunk =
      1;  // columns handled as one unit; sums are formed per chunk, so it fixes their order
  int64_t chunks = 1;          // per row
  double* partials = nullptr;  // [n_sum, rows, chunks] when chunks > 1
};

}  // namespace diffcore
