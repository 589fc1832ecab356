// One call of a kernel: reads the torch tensors that Python hands over through DLPack's C exchange
// API, checks that a kernel may run on them, and runs it. It decides nothing and explains nothing:
// whatever is not right is answered by a status other than 0 before any memory is touched.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "binding/op_table.h"
#include "binding/tensor.h"
#include "cpu/kernels.h"
#include "cuda/kernels.h"

namespace diffcore {
namespace py = pybind11;

enum Status : int { kDone = 0, kBadArguments = 1, kLayout = 2, kDevice = 3, kStepRange = 4 };

constexpr int64_t kReleaseGilFrom =
    32 * 1024;  // elements; below, the call ends before another thread could use it

inline const dlpack::ExchangeApi* g_torch = nullptr;

// A borrowed view; valid while the caller's reference to the tensor is.
inline bool borrow(PyObject* object, dlpack::Tensor* out) {
  if (g_torch->borrow(object, out) != 0) throw py::error_already_set();
  if (out->byte_offset) out->data = static_cast<char*>(out->data) + out->byte_offset;
  return true;
}

class Call {
 public:
  Status parse(int op, py::tuple outs, py::tuple ins, py::tuple coefs, py::handle step, bool whole,
               py::handle noise) {
    info_ = &ops()[op];
    if (int(ins.size()) != info_->n_in || int(outs.size()) != info_->n_out + info_->n_sum)
      return kBadArguments;
    dlpack::Tensor first;
    borrow(info_->n_in ? ins[0].ptr() : outs[0].ptr(), &first);
    if (first.device.type != dlpack::kCpu && first.device.type != dlpack::kCuda) return kDevice;
    device_ = first.device;
    dtype_ = dtype_of(first.dtype);
    if (dtype_ == kNoDtype) return kBadArguments;
    elements_ = count(first);
    rows_ = first.ndim ? first.shape[0] : 1;
    if (Status status = read_coefs(coefs, step, first)) return status;
    if (info_->draws || !noise.is_none())
      if (Status status = read_noise(noise, first)) return status;
    if (info_->n_sum && !whole) by_row_ = true;
    if (info_->n_sum && whole && by_row_) return kBadArguments;
    if (Status status = read_tensors(outs, ins, first, whole)) return status;
    args_.rows = by_row_ ? rows_ : 1;
    args_.cols = by_row_ ? (rows_ ? elements_ / rows_ : 0) : elements_;
    return read_sums(outs, first);
  }

  Status run(int op) {
    if (args_.rows == 0 || (args_.cols == 0 && !info_->n_sum)) return kDone;
    if (device_.type == dlpack::kCpu) {
      bool done;
      if (elements_ >= kReleaseGilFrom) {
        py::gil_scoped_release release;
        done = run_on_cpu(op, dtype_, args_);
      } else {
        done = run_on_cpu(op, dtype_, args_);
      }
      return done ? kDone : kStepRange;
    }
    if (!cuda_built()) return kDevice;
    if (!args_.step && args_.steps && (args_.fixed_step < 0 || args_.fixed_step >= args_.steps))
      return kStepRange;
    Device device{device_.id, nullptr};
    if (g_torch->current_stream(dlpack::kCuda, device_.id, &device.stream) != 0)
      throw py::error_already_set();
    dlpack::ManagedTensor* workspace = nullptr;
    struct Context {
      dlpack::ManagedTensor** workspace;
      int32_t device;
    } context{&workspace, device_.id};
    auto allocate = [](void* opaque, int64_t bytes) -> void* {
      auto* context = static_cast<Context*>(opaque);
      int64_t doubles = (bytes + 7) / 8;
      dlpack::Tensor prototype{
          nullptr, {dlpack::kCuda, context->device}, 1, {dlpack::kFloat, 64, 1}, &doubles, nullptr,
          0};
      auto ignore = [](void*, const char*, const char*) {};
      if (g_torch->allocate(&prototype, context->workspace, nullptr, ignore) != 0) return nullptr;
      return (*context->workspace)->tensor.data;
    };
    const char* error = run_on_cuda(op, dtype_, args_, device, allocate, &context);
    // The launches are on the stream the allocator knows, so freeing now only lets later work on it
    // reuse the memory.
    if (workspace && workspace->deleter) workspace->deleter(workspace);
    if (error) throw std::runtime_error(std::string("diffcore: ") + info_->name + ": " + error);
    return kDone;
  }

 private:
  Status read_coefs(py::tuple coefs, py::handle step, const dlpack::Tensor& first) {
    int n = 0;
    bool table = false;
    for (py::handle item : coefs) {
      if (n >= info_->n_coef) return kBadArguments;
      if (PyFloat_CheckExact(item.ptr())) {
        args_.coef[n++].value = PyFloat_AS_DOUBLE(item.ptr());
        continue;
      }
      dlpack::Tensor x;
      borrow(item.ptr(), &x);
      Dtype dtype = dtype_of(x.dtype);
      if ((dtype != kF32 && dtype != kF64) || !same_device(x, first) || x.ndim > 2)
        return kBadArguments;
      int columns = x.ndim == 2 ? int(x.shape[1]) : 1;
      if ((!x.data && count(x)) || n + columns > info_->n_coef) return kBadArguments;
      bool by_step = x.ndim == 2 && !step.is_none();
      int64_t length = x.ndim ? x.shape[0] : 1;
      if (by_step) {
        if (length == 0 || (table && length != args_.steps)) return kBadArguments;
        table = true;
        args_.steps = length;
      } else if (length != 1) {
        if (length != rows_) return kBadArguments;
        by_row_ = true;
      }
      for (int k = 0; k < columns; ++k) {
        Coef& coef = args_.coef[n++];
        coef.data = static_cast<char*>(x.data) + (k ? k * x.strides[1] : 0) * item_size(dtype);
        coef.stride = by_step || length > 1 ? x.strides[0] : 0;
        coef.is_double = dtype == kF64;
        coef.by_step = by_step;
      }
    }
    if (n != info_->n_coef) return kBadArguments;
    return step.is_none() ? kDone : table ? read_step(step, first) : kBadArguments;
  }

  Status read_step(py::handle step, const dlpack::Tensor& first) {
    if (PyLong_CheckExact(step.ptr())) {
      args_.fixed_step = PyLong_AsLongLong(step.ptr());
      if (args_.fixed_step == -1 && PyErr_Occurred()) {
        PyErr_Clear();
        return kStepRange;
      }
      return kDone;
    }
    dlpack::Tensor x;
    borrow(step.ptr(), &x);
    bool is_integer = x.dtype.code == dlpack::kInt && x.dtype.lanes == 1 &&
                      (x.dtype.bits == 64 || x.dtype.bits == 32);
    if (!is_integer || !same_device(x, first) || x.ndim > 1) return kBadArguments;
    int64_t length = x.ndim ? x.shape[0] : 1;
    if (length != 1 && length != rows_) return kBadArguments;
    if (!x.data && length) return kBadArguments;
    args_.step = x.data;
    args_.step_is_64 = x.dtype.bits == 64;
    args_.step_stride = length > 1 ? x.strides[0] : 0;
    if (length != 1) by_row_ = true;
    return kDone;
  }

  // (seed, sample ids, stream, first element): ints, or int64 tensors beside the samples.
  Status read_noise(py::handle noise, const dlpack::Tensor& first) {
    if (!info_->draws || !PyTuple_CheckExact(noise.ptr()) || PyTuple_GET_SIZE(noise.ptr()) != 4)
      return kBadArguments;
    NoiseSource& source = args_.noise;
    int64_t length, stride, element;
    bool scalar;
    const int64_t* unused = nullptr;
    const auto part = [&](int i, const int64_t** data, int64_t* value) {
      length = 1;
      stride = 0;
      scalar = true;
      PyObject* item = PyTuple_GET_ITEM(noise.ptr(), i);
      if (PyLong_CheckExact(item)) {
        *value = int64_t(PyLong_AsUnsignedLongLongMask(item));
        return true;
      }
      dlpack::Tensor x;
      borrow(item, &x);
      if (x.dtype.code != dlpack::kInt || x.dtype.bits != 64 || x.dtype.lanes != 1 ||
          !same_device(x, first) || x.ndim > 1 || !x.data)
        return false;
      scalar = x.ndim == 0;
      if (!scalar) {
        length = x.shape[0];
        stride = x.strides[0];
      }
      *data = static_cast<const int64_t*>(x.data);
      return data != &unused && length > 0;
    };
    if (!part(0, &source.seed, &source.seed_value) || length > 2 || (length == 2 && stride != 1))
      return kBadArguments;
    source.seed_has_offset = length == 2;
    if (rows_ && !part(1, &source.id, &source.first_id)) return kBadArguments;
    if (rows_ && !scalar && length != rows_) return kBadArguments;
    source.id_stride = stride;
    source.ids_count_up = scalar;
    if (!part(2, &source.stream, &source.stream_value) || length != 1) return kBadArguments;
    if (!part(3, &unused, &element) || element < 0 || element % 4) return kBadArguments;
    source.first_block = element / 4;
    by_row_ = true;
    return kDone;
  }

  Status read_tensors(py::tuple outs, py::tuple ins, const dlpack::Tensor& first, bool whole) {
    if (info_->draws) {
      // Nobody is in a hurry in double on CUDA: kernels read there what randn draws.
      if (device_.type == dlpack::kCuda && dtype_ == kF64 && info_->n_in) return kLayout;
      constexpr int64_t kBlocks = int64_t(1) << 32;
      if (rows_ && args_.noise.first_block + (elements_ / rows_ + 3) / 4 > kBlocks)
        return kBadArguments;
      // Long runs draw well; short ones do not, nor does an order of another kind.
      constexpr int64_t kMostRuns = 64;
      args_.noise.inner = runs_of_row(first);
      if (!args_.noise.inner || args_.noise.inner > kMostRuns) return kLayout;
    }
    const int64_t bytes = elements_ * item_size(dtype_), row = rows_ ? elements_ / rows_ : 0;
    int maps = info_->n_out;
    // A part of every sample of a larger tensor is read where it is: the same rows, farther apart.
    const bool part = elements_ && !whole && !dense(first, false) && dense_rows(first);
    if (part) by_row_ = true;
    for (int k = 0; k < info_->n_in + maps; ++k) {
      dlpack::Tensor x = first;
      if (k != 0) borrow(k < info_->n_in ? ins[k].ptr() : outs[k - info_->n_in].ptr(), &x);
      if (dtype_of(x.dtype) != dtype_ || !same_device(x, first) || !same_shape(x, first))
        return kBadArguments;
      if (!x.data && elements_) return kBadArguments;
      if (k >= info_->n_in) {
        args_.out[k - info_->n_in] = x.data;
        if (elements_ && !same_strides(x, first, part)) return kLayout;
        if (part && x.strides[0] != row) return kLayout;
        continue;
      }
      args_.in[k] = x.data;
      args_.row_stride[k] = part ? x.strides[0] : row;
      if (k == 0 || !elements_ || same_strides(x, first)) continue;
      if (whole || !same_strides(x, first, 1) || x.strides[0] < 0) return kLayout;
      args_.row_stride[k] = x.strides[0];
      by_row_ = true;
    }
    if (!part && !dense(first, by_row_)) return kLayout;
    auto overlap = [&](const void* a, const void* b, int64_t bytes_of_b) {
      auto lo = reinterpret_cast<uintptr_t>(a), hi = reinterpret_cast<uintptr_t>(b);
      return lo < hi + uintptr_t(bytes_of_b) && hi < lo + uintptr_t(bytes);
    };
    for (int o = 0; o < maps; ++o) {
      for (int k = 0; k < info_->n_in; ++k) {
        const int64_t apart = args_.row_stride[k] - row;
        const bool in_place = args_.out[o] == args_.in[k] && (!apart || rows_ == 1);
        const int64_t span = bytes + (rows_ - 1) * apart * item_size(dtype_);
        if (!in_place && overlap(args_.out[o], args_.in[k], span)) return kLayout;
      }
      for (int other = 0; other < o; ++other)
        if (overlap(args_.out[o], args_.out[other], bytes)) return kBadArguments;
    }
    return kDone;
  }

  Status read_sums(py::tuple outs, const dlpack::Tensor& first) {
    Dtype compute = dtype_ == kF64 ? kF64 : kF32;
    for (int k = 0; k < info_->n_sum; ++k) {
      dlpack::Tensor x;
      borrow(outs[info_->n_out + k].ptr(), &x);
      if (dtype_of(x.dtype) != compute || !same_device(x, first) || count(x) != args_.rows ||
          !contiguous(x))
        return kBadArguments;
      if (!x.data && args_.rows) return kBadArguments;
      args_.sum[k] = x.data;
    }
    return kDone;
  }

  const OpInfo* info_ = nullptr;
  LaunchArgs args_;
  dlpack::DeviceRef device_{};
  Dtype dtype_ = kNoDtype;
  int64_t elements_ = 0, rows_ = 0;
  bool by_row_ = false;
};

}  // namespace diffcore
