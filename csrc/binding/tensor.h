// What the binding asks of a borrowed tensor: its dtype, and how it lies in memory.
#pragma once

#include <algorithm>

#include "binding/dlpack_abi.h"
#include "core/launch_args.h"

namespace diffcore {

inline Dtype dtype_of(const dlpack::DataType& type) {
  if (type.lanes != 1) return kNoDtype;
  if (type.code == dlpack::kFloat && type.bits == 32) return kF32;
  if (type.code == dlpack::kFloat && type.bits == 64) return kF64;
  if (type.code == dlpack::kFloat && type.bits == 16) return kF16;
  if (type.code == dlpack::kBfloat && type.bits == 16) return kBf16;
  return kNoDtype;
}
inline int64_t item_size(Dtype dtype) { return dtype == kF64 ? 8 : dtype == kF32 ? 4 : 2; }

inline int64_t count(const dlpack::Tensor& x) {
  int64_t n = 1;
  for (int d = 0; d < x.ndim; ++d) n *= x.shape[d];
  return n;
}

inline bool contiguous(const dlpack::Tensor& x) {
  int64_t expected = 1;
  for (int d = x.ndim - 1; d >= 0; --d) {
    if (x.shape[d] != 1 && x.strides[d] != expected) return false;
    expected *= x.shape[d];
  }
  return true;
}

// Every element of the tensor once, in some order, without gaps; with `by_row`, sample after
// sample.
inline bool dense(const dlpack::Tensor& x, bool by_row) {
  if (contiguous(x) || count(x) == 0) return true;  // an empty tensor's strides mean nothing
  constexpr int kMaxDims = 16;
  if (x.ndim > kMaxDims) return false;
  int order[kMaxDims], dims = 0;
  for (int d = 0; d < x.ndim; ++d)
    if (x.shape[d] != 1) order[dims++] = d;
  std::sort(order, order + dims, [&](int a, int b) { return x.strides[a] < x.strides[b]; });
  int64_t expected = 1;
  for (int i = 0; i < dims; ++i) {
    if (x.strides[order[i]] != expected) return false;
    expected *= x.shape[order[i]];
  }
  return !by_row || x.shape[0] == 1 || order[dims - 1] == 0;
}

// The same of every sample by itself, where the samples lie farther apart than their size.
inline bool dense_rows(const dlpack::Tensor& x) {
  int64_t row = 1;
  for (int d = 1; d < x.ndim; ++d) row *= x.shape[d];
  if (x.ndim < 2 || x.strides[0] < row) return false;
  dlpack::Tensor sample = x;
  sample.ndim -= 1;
  sample.shape += 1;
  sample.strides += 1;
  return dense(sample, false);
}

// How a row of a dense tensor lies in memory: 1 in row-major order, n where neighbours are elements
// of n equal runs of that order in turn (channels_last: the channels), 0 in any other order.
inline int64_t runs_of_row(const dlpack::Tensor& x) {
  if (contiguous(x)) return 1;
  constexpr int kMaxDims = 16;
  int order[kMaxDims], dims = 0;  // from the last dimension to the first
  for (int d = x.ndim - 1; d > 0; --d)
    if (x.shape[d] != 1) order[dims++] = d;
  if (!dims) return 1;
  int fastest = 0;
  for (int i = 1; i < dims; ++i)
    if (x.strides[order[i]] < x.strides[order[fastest]]) fastest = i;
  int64_t runs = 1, expected = 1;
  for (int i = 0; i < dims; ++i) {  // row-major order, begun elsewhere
    const int at = (fastest + i) % dims;
    if (x.strides[order[at]] != expected) return 0;
    expected *= x.shape[order[at]];
    if (fastest && at >= fastest) runs = expected;
  }
  return runs;
}

inline bool same_shape(const dlpack::Tensor& a, const dlpack::Tensor& b) {
  return a.ndim == b.ndim && std::equal(a.shape, a.shape + a.ndim, b.shape);
}
inline bool same_strides(const dlpack::Tensor& a, const dlpack::Tensor& b, int from = 0) {
  for (int d = from; d < a.ndim; ++d)
    if (a.shape[d] != 1 && a.strides[d] != b.strides[d]) return false;
  return true;
}
inline bool same_device(const dlpack::Tensor& a, const dlpack::Tensor& b) {
  return a.device.type == b.device.type && a.device.id == b.device.id;
}

}  // namespace diffcore
