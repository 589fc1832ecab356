// Metadata of a tensor with any number of dimensions: dtype and memory layout.
#pragma once

#ifdef __linux__
#include <sys/auxv.h>
#endif

#include <algorithm>

#include "binding/views.h"

namespace diffcore {

inline Dtype dtype_of(const dlpack::DataType& type) {
  if (type.lanes != 1) return kNoDtype;
  if (type.code == dlpack::kFloat && type.bits == 32) return kF32;
  if (type.code == dlpack::kFloat && type.bits == 64) return kF64;
  if (type.code == dlpack::kFloat && type.bits == 16) return kF16;
  if (type.code == dlpack::kBfloat && type.bits == 16) return kBf16;
  return kNoDtype;
}
inline bool is_int(const dlpack::DataType& type, int bits) {
  return type.code == dlpack::kInt && type.lanes == 1 && type.bits == bits;
}
inline int64_t item_size(Dtype dtype) { return dtype == kF64 ? 8 : dtype == kF32 ? 4 : 2; }

inline int64_t count(const TensorView& x) {
  int64_t n = 1;
  for (int d = 0; d < x.ndim; ++d) n *= x.shape[d];
  return n;
}

inline bool contiguous(const TensorView& x) {
  int64_t expected = 1;
  bool in_order = true;
  for (int d = x.ndim - 1; d >= 0; --d) {
    if (x.shape[d] == 0) return true;
    in_order &= x.shape[d] == 1 || x.strides[d] == expected;
    expected *= x.shape[d];
  }
  return in_order;
}

// No tensor begins below this address: the program lies above it, and so do heap and mappings. The
// data of a freed tensor is the null pointer plus the tensor's offset in its storage.
inline uintptr_t lowest_address() {
  constexpr uintptr_t kMost = uintptr_t(1) << 30, kPage = 4096;
#ifdef __linux__
  const uintptr_t program = getauxval(AT_PHDR);  // the program's headers, at its beginning
  if (program) return std::max(kPage, std::min(kMost, program / kPage * kPage));
#endif
  return kPage;
}
inline const uintptr_t kLowestAddress = lowest_address();

// Whether a tensor has elements but no memory. Does not notice a freed tensor that began farther
// than `kLowestAddress` into its storage: the exchange API does not tell where a storage begins.
inline bool hollow(const TensorView& x) {
  return reinterpret_cast<uintptr_t>(x.data) < kLowestAddress && count(x) != 0;
}

// The addresses from the first to the last element; none without elements.
struct Span {
  uintptr_t begin = 0, end = 0;

  explicit Span(const TensorView& x) {
    const uintptr_t item = x.dtype.bits / 8;
    uintptr_t last = 0;
    for (int d = 0; d < x.ndim; ++d) {
      if (x.shape[d] == 0) return;
      last += uintptr_t(x.shape[d] - 1) * uintptr_t(x.strides[d]) * item;
    }
    begin = reinterpret_cast<uintptr_t>(x.data);
    end = begin + last + item;
  }
  bool overlaps(const Span& other) const { return begin < other.end && other.begin < end; }
};

// The dimensions with more than one element, from the last to the first. With more of them than
// `kMaxDims` the memory order counts as unknown, and the tensor is copied.
struct Dimensions {
  static constexpr int kMaxDims = 16;
  int at[kMaxDims];
  int n = 0;
  bool known = true;

  Dimensions(const TensorView& x, int from) {
    for (int d = x.ndim - 1; d >= from; --d) {
      if (x.shape[d] == 1) continue;
      if (n == kMaxDims) {
        known = false;
        return;
      }
      at[n++] = d;
    }
  }
};

// The memory layout of a tensor.
enum class Layout {
  kEmpty,       // no elements; strides have no meaning
  kDenseRows,   // no gaps or repeated elements; one sample after another
  kDense,       // no gaps or repeated elements; samples interleaved
  kSpacedRows,  // dense samples with gaps between them: a slice of a larger tensor
  kOther
};

// kDenseRows, kDense or kOther, for the dimensions from `from` on.
inline Layout density(const TensorView& x, int from) {
  Dimensions dims(x, from);
  if (!dims.known) return Layout::kOther;
  std::sort(dims.at, dims.at + dims.n, [&](int a, int b) { return x.strides[a] < x.strides[b]; });
  int64_t expected = 1;
  for (int i = 0; i < dims.n; ++i) {
    if (x.strides[dims.at[i]] != expected) return Layout::kOther;
    expected *= x.shape[dims.at[i]];
  }
  const bool rows = from > 0 || dims.n == 0 || x.shape[0] == 1 || dims.at[dims.n - 1] == 0;
  return rows ? Layout::kDenseRows : Layout::kDense;
}

inline Layout layout_of(const TensorView& x) {
  const int64_t elements = count(x);
  if (elements == 0) return Layout::kEmpty;
  if (contiguous(x)) return Layout::kDenseRows;
  const Layout all = density(x, 0);
  if (all != Layout::kOther) return all;
  if (x.ndim < 2 || x.strides[0] < elements / x.shape[0]) return Layout::kOther;
  return density(x, 1) == Layout::kOther ? Layout::kOther : Layout::kSpacedRows;
}

// The memory order of a row of a dense tensor: 1 if row-major; n if it interleaves n runs of equal
// length of that order (channels_last: the channels); 0 for any other order.
inline int64_t runs_of_row(const TensorView& x) {
  if (contiguous(x)) return 1;
  const Dimensions dims(x, 1);
  if (!dims.known) return 0;
  if (!dims.n) return 1;
  int fastest = 0;
  for (int i = 1; i < dims.n; ++i)
    if (x.strides[dims.at[i]] < x.strides[dims.at[fastest]]) fastest = i;
  int64_t runs = 1, expected = 1;
  for (int i = 0; i < dims.n; ++i) {  // row-major order, rotated
    const int at = (fastest + i) % dims.n;
    if (x.strides[dims.at[at]] != expected) return 0;
    expected *= x.shape[dims.at[at]];
    if (fastest && at >= fastest) runs = expected;
  }
  return runs;
}

inline bool same_shape(const TensorView& a, const TensorView& b) {
  return a.ndim == b.ndim && std::equal(a.shape, a.shape + a.ndim, b.shape);
}
inline bool same_strides(const TensorView& a, const TensorView& b, int from = 0) {
  for (int d = from; d < a.ndim; ++d)
    if (a.shape[d] != 1 && a.strides[d] != b.strides[d]) return false;
  return true;
}
inline bool same_device(const TensorView& a, const TensorView& b) {
  return a.device.type == b.device.type && a.device.id == b.device.id;
}

}  // namespace diffcore
