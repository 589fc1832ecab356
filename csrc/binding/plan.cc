#include "binding/plan.h"

#include "binding/tensor.h"
#include "cuda/kernels.h"

namespace diffcore {
namespace {

// With more runs than this, or in another memory order, noise is generated into a tensor first.
constexpr int64_t kMaxRuns = 64;
constexpr int64_t kNoiseBlocks = int64_t(1) << 32;  // of four elements, in a sample

class Planner {
 public:
  Planner(const OpInfo& op, const CallViews& views, Plan* plan)
      : op_(op), views_(views), plan_(*plan), args_(plan->args) {}

  Reason run() {
    if (views_.n_in != op_.n_in) return {Code::kCount, Argument::kInput, 0, views_.n_in};
    if (views_.n_out != op_.n_out + op_.n_sum)
      return {Code::kCount, Argument::kOutput, 0, views_.n_out};
    first_ = op_.n_in ? &views_.in[0] : &views_.out[0];
    plan_.device = first_->device;
    plan_.dtype = dtype_of(first_->dtype);
    if (first_->device.type != dlpack::kCpu && first_->device.type != dlpack::kCuda)
      return {Code::kDeviceKind};
    elements_ = plan_.elements = count(*first_);
    rows_ = first_->ndim ? first_->shape[0] : 1;
    row_ = rows_ ? elements_ / rows_ : 0;
    if (Reason reason = check_tensors()) return reason;
    if (Reason reason = read_coefs()) return reason;
    if (Reason reason = read_step()) return reason;
    if (Reason reason = read_noise()) return reason;
    if (op_.n_sum && !views_.reduce_all) by_row_ = true;
    if (op_.n_sum && views_.reduce_all && by_row_) return {Code::kReduceAll};
    if (Reason reason = read_layouts()) return reason;
    args_.rows = by_row_ ? rows_ : 1;
    args_.cols = by_row_ ? row_ : elements_;
    plan_.empty = args_.rows == 0 || (args_.cols == 0 && !op_.n_sum);
    if (Reason reason = read_sums()) return reason;
    if (Reason reason = check_fixed_step()) return reason;
    return check_overlap();
  }

 private:
  // Every elementwise tensor must match the first in all but its strides.
  Reason check_tensors() {
    for (int k = 0; k < op_.n_in; ++k)
      if (Reason reason = check_like_first(views_.in[k], Argument::kInput, k)) return reason;
    for (int k = 0; k < op_.n_out; ++k)
      if (Reason reason = check_like_first(views_.out[k], Argument::kOutput, k)) return reason;
    return {};
  }

  Reason check_like_first(const TensorView& x, Argument argument, int k) {
    const Dtype dtype = dtype_of(x.dtype);
    if (dtype == kNoDtype) return {Code::kDtype, argument, k};
    if (!same_shape(x, *first_)) return {Code::kShape, argument, k};
    if (dtype != plan_.dtype) return {Code::kOtherDtype, argument, k};
    if (!same_device(x, *first_)) return {Code::kOtherDevice, argument, k};
    if (hollow(x)) return {Code::kMemory, argument, k};
    return {};
  }

  Reason read_coefs() {
    int n = 0;
    for (int i = 0; i < views_.n_coef; ++i) {
      const CoefView& view = views_.coef[i];
      if (view.is_tensor) {
        if (Reason reason = read_coef_tensor(view.tensor, i, &n)) return reason;
      } else {
        if (n < op_.n_coef) args_.coef[n].value = view.value;
        ++n;
      }
    }
    return n == op_.n_coef ? Reason{} : Reason{Code::kCoefficients, Argument::kCoef, 0, n};
  }

  // A 0-dim tensor, a vector with one entry per sample, or a table with one row per sample or step.
  // Columns beyond the op's coefficients are counted, not stored.
  Reason read_coef_tensor(const TensorView& x, int i, int* n) {
    const Dtype dtype = dtype_of(x.dtype);
    if (dtype != kF32 && dtype != kF64) return {Code::kDtype, Argument::kCoef, i};
    if (!same_device(x, *first_)) return {Code::kOtherDevice, Argument::kCoef, i};
    if (x.ndim > 2) return {Code::kDimensions, Argument::kCoef, i};
    if (hollow(x)) return {Code::kMemory, Argument::kCoef, i};
    small_tensors_ = true;
    const bool by_step = x.ndim == 2 && views_.has_step;
    const int64_t length = x.ndim ? x.shape[0] : 1, columns = x.ndim == 2 ? x.shape[1] : 1;
    if (by_step) {
      if (length == 0 || (args_.steps && length != args_.steps))
        return {Code::kTableLength, Argument::kCoef, i, args_.steps};
      args_.steps = length;
    } else if (length != 1) {
      if (length != rows_) return {Code::kLength, Argument::kCoef, i};
      by_row_ = true;
    }
    for (int64_t k = 0; k < columns && *n + k < op_.n_coef; ++k) {
      Coef& coef = args_.coef[*n + k];
      const int64_t offset = k ? k * x.strides[1] * item_size(dtype) : 0;
      coef.data = x.data ? static_cast<char*>(x.data) + offset : nullptr;
      coef.stride = by_step || length > 1 ? x.strides[0] : 0;
      coef.is_double = dtype == kF64;
      coef.by_step = by_step;
    }
    *n = int(std::min<int64_t>(*n + columns, INT32_MAX / 2));
    return {};
  }

  Reason read_step() {
    if (!views_.has_step) return {};
    if (!args_.steps) return {Code::kStepNotUsed, Argument::kStep};
    if (!views_.step.is_tensor) {
      args_.fixed_step = views_.step.value;
      return {};
    }
    const TensorView& x = views_.step.tensor;
    if (!is_int(x.dtype, 64) && !is_int(x.dtype, 32)) return {Code::kDtype, Argument::kStep};
    if (!same_device(x, *first_)) return {Code::kOtherDevice, Argument::kStep};
    if (x.ndim > 1) return {Code::kDimensions, Argument::kStep};
    const int64_t length = x.ndim ? x.shape[0] : 1;
    if (length != 1 && length != rows_) return {Code::kLength, Argument::kStep};
    if (hollow(x)) return {Code::kMemory, Argument::kStep};
    small_tensors_ = true;
    args_.step = x.data;
    args_.step_is_64 = x.dtype.bits == 64;
    args_.step_stride = length > 1 ? x.strides[0] : length == 0;  // no step to read: not a counter
    if (length != 1) by_row_ = true;
    return {};
  }

  Reason read_noise() {
    if (views_.has_noise != op_.generates_noise) return {Code::kNoise};
    if (!op_.generates_noise) return {};
    NoiseSource& source = args_.noise;
    if (Reason reason = read_seed(views_.noise[kSeedPart], &source)) return reason;
    if (Reason reason = read_ids(views_.noise[kIdsPart], &source)) return reason;
    if (Reason reason = read_stream(views_.noise[kStreamPart], &source)) return reason;
    if (Reason reason = read_first_element(views_.noise[kElementPart], &source)) return reason;
    by_row_ = true;
    return {};
  }

  // The first element of every row, or a tensor with one for each, which the caller has checked.
  Reason read_first_element(const IntView& view, NoiseSource* source) {
    if (view.is_tensor) {
      const TensorView& x = view.tensor;
      if (Reason reason = check_noise_tensor(x, Argument::kFirstElement)) return reason;
      if (x.ndim != 1 || x.shape[0] != rows_) return {Code::kLength, Argument::kFirstElement};
      source->first_element = static_cast<const int64_t*>(x.data);
      source->first_element_stride = x.strides[0];
      return {};
    }
    if (view.value < 0 || view.value % 4) return {Code::kNoiseElement};
    source->first_block = view.value / 4;
    if (rows_ &&
        (source->first_block > kNoiseBlocks || (row_ + 3) / 4 > kNoiseBlocks - source->first_block))
      return {Code::kNoiseRange, Argument::kNone, 0,
              int64_t(uint64_t(view.value) + uint64_t(row_))};
    return {};
  }

  // An int64 tensor with data, on the device of the samples.
  Reason check_noise_tensor(const TensorView& x, Argument argument) {
    if (!is_int(x.dtype, 64)) return {Code::kDtype, argument};
    if (!same_device(x, *first_)) return {Code::kOtherDevice, argument};
    if (x.ndim > 1) return {Code::kDimensions, argument};
    if (!x.data || hollow(x)) return {Code::kMemory, argument};
    small_tensors_ = true;
    return {};
  }

  // The seed; a tensor of two elements is (seed, offset of the stream).
  Reason read_seed(const IntView& view, NoiseSource* source) {
    source->seed_value = view.value;
    if (!view.is_tensor) return {};
    const TensorView& x = view.tensor;
    if (Reason reason = check_noise_tensor(x, Argument::kSeed)) return reason;
    const int64_t length = x.ndim ? x.shape[0] : 1;
    if (length != 1 && !(length == 2 && x.strides[0] == 1)) return {Code::kLength, Argument::kSeed};
    source->seed = static_cast<const int64_t*>(x.data);
    source->seed_has_offset = length == 2;
    return {};
  }

  // The id of the first sample, from which ids count up, or a tensor of one id per sample.
  Reason read_ids(const IntView& view, NoiseSource* source) {
    if (!rows_) {  // ids of no samples have no memory
      const bool none = !view.is_tensor || !view.tensor.ndim || view.tensor.shape[0] == 0;
      return none ? Reason{} : Reason{Code::kLength, Argument::kSampleIds};
    }
    source->first_id = view.value;
    if (!view.is_tensor) return {};
    const TensorView& x = view.tensor;
    if (Reason reason = check_noise_tensor(x, Argument::kSampleIds)) return reason;
    if (x.ndim && x.shape[0] != rows_) return {Code::kLength, Argument::kSampleIds};
    source->id = static_cast<const int64_t*>(x.data);
    source->id_stride = x.ndim ? x.strides[0] : 0;
    source->ids_count_up = x.ndim == 0;
    return {};
  }

  Reason read_stream(const IntView& view, NoiseSource* source) {
    source->stream_value = view.value;
    if (!view.is_tensor) return {};
    const TensorView& x = view.tensor;
    if (Reason reason = check_noise_tensor(x, Argument::kStream)) return reason;
    if (x.ndim && x.shape[0] != 1) return {Code::kLength, Argument::kStream};
    source->stream = static_cast<const int64_t*>(x.data);
    return {};
  }

  // The address and row stride of each tensor. All have the memory order of the first. The samples
  // of an input may be farther apart than their size; outputs are dense.
  Reason read_layouts() {
    if (op_.generates_noise) {
      const int64_t runs = args_.noise.inner = runs_of_row(*first_);
      if (!runs || runs > kMaxRuns) return {Code::kNoiseLayout};
      if (plan_.device.type == dlpack::kCuda || kCudaEmulated) {
        // float64 is not a hot path: generating noise into a tensor first saves these kernels and
        // their share of the binary. A CUDA thread generates four elements of one run at a time,
        // which would change the order of a sum.
        if (plan_.dtype == kF64 && (op_.n_in || runs > 1)) return {Code::kNoiseLayout};
        if (runs > 1 && (op_.n_sum || row_ % (4 * runs))) return {Code::kNoiseLayout};
      }
    }
    const Layout layout = layout_of(*first_);
    const bool spaced = layout == Layout::kSpacedRows && !views_.reduce_all;
    if (spaced) by_row_ = true;
    for (int k = 0; k < op_.n_in; ++k)
      if (Reason reason = read_input(k, layout, spaced)) return reason;
    for (int k = 0; k < op_.n_out; ++k)
      if (Reason reason = read_output(k, layout, spaced)) return reason;
    const bool readable = spaced || layout == Layout::kEmpty || layout == Layout::kDenseRows ||
                          (layout == Layout::kDense && !by_row_);
    return readable ? Reason{} : Reason{Code::kLayout, Argument::kInput, 0};
  }

  Reason read_input(int k, Layout layout, bool spaced) {
    const TensorView& x = views_.in[k];
    args_.in[k] = x.data;
    args_.row_stride[k] = spaced ? x.strides[0] : row_;
    if (k == 0 || layout == Layout::kEmpty || same_strides(x, *first_)) return {};
    if (views_.reduce_all || !same_strides(x, *first_, 1) || x.strides[0] < 0)
      return {Code::kLayout, Argument::kInput, k};
    args_.row_stride[k] = x.strides[0];
    by_row_ = true;
    return {};
  }

  Reason read_output(int k, Layout layout, bool spaced) {
    const TensorView& x = views_.out[k];
    args_.out[k] = x.data;
    if (layout == Layout::kEmpty) return {};
    if (!same_strides(x, *first_, spaced) || (spaced && x.strides[0] != row_))
      return {Code::kLayout, Argument::kOutput, k};
    return {};
  }

  Reason check_overlap() {
    if (Reason reason = check_elementwise_overlap()) return reason;
    if (!small_tensors_ && !op_.n_sum) return {};
    for (int o = 0; o < op_.n_out + op_.n_sum; ++o)
      if (Reason reason = check_output_overlap(o)) return reason;
    return {};
  }

  // Coefficients, steps and noise keys are read row by row while outputs are written, inputs and
  // outputs while sums are.
  Reason check_output_overlap(int o) {
    const Span out(views_.out[o]);
    const auto read = [&](const TensorView& x) { return Span(x).overlaps(out); };
    for (int i = 0; i < views_.n_coef; ++i)
      if (views_.coef[i].is_tensor && read(views_.coef[i].tensor))
        return {Code::kOverlap, Argument::kCoef, i, o};
    if (views_.has_step && views_.step.is_tensor && read(views_.step.tensor))
      return {Code::kOverlap, Argument::kStep, 0, o};
    constexpr Argument kParts[] = {Argument::kSeed, Argument::kSampleIds, Argument::kStream,
                                   Argument::kFirstElement};
    for (int k = 0; views_.has_noise && k < kNoiseParts; ++k)
      if (views_.noise[k].is_tensor && read(views_.noise[k].tensor))
        return {Code::kOverlap, kParts[k], 0, o};
    if (o < op_.n_out) return {};
    for (int k = 0; k < op_.n_in; ++k)
      if (read(views_.in[k])) return {Code::kOverlap, Argument::kInput, k, o};
    for (int other = 0; other < o; ++other)
      if (read(views_.out[other])) return {Code::kOutputsOverlap, Argument::kOutput, o, other};
    return {};
  }

  // An output may be the same memory as an input, or disjoint from it. Outputs are disjoint.
  Reason check_elementwise_overlap() {
    const int64_t item = item_size(plan_.dtype), bytes = elements_ * item;
    const auto overlap = [&](const void* a, const void* b, int64_t bytes_of_b) {
      const auto at_a = reinterpret_cast<uintptr_t>(a), at_b = reinterpret_cast<uintptr_t>(b);
      return at_a < at_b + uintptr_t(bytes_of_b) && at_b < at_a + uintptr_t(bytes);
    };
    for (int o = 0; o < op_.n_out; ++o) {
      for (int k = 0; k < op_.n_in; ++k) {
        const int64_t apart = args_.row_stride[k] - row_;
        if (args_.out[o] == args_.in[k] && (!apart || rows_ == 1)) continue;
        if (overlap(args_.out[o], args_.in[k], bytes + (rows_ - 1) * apart * item))
          return {Code::kOverlap, Argument::kInput, k, o};
      }
      for (int other = 0; other < o; ++other)
        if (overlap(args_.out[o], args_.out[other], bytes))
          return {Code::kOutputsOverlap, Argument::kOutput, o, other};
    }
    return {};
  }

  Reason read_sums() {
    const Dtype compute = plan_.dtype == kF64 ? kF64 : kF32;
    for (int k = 0; k < op_.n_sum; ++k) {
      const TensorView& x = views_.out[op_.n_out + k];
      if (dtype_of(x.dtype) != compute) return {Code::kDtype, Argument::kSum, k};
      if (!same_device(x, *first_)) return {Code::kOtherDevice, Argument::kSum, k};
      if (count(x) != args_.rows || !contiguous(x)) return {Code::kShape, Argument::kSum, k};
      if (hollow(x)) return {Code::kMemory, Argument::kSum, k};
      args_.sum[k] = x.data;
    }
    return {};
  }

  Reason check_fixed_step() {
    if (args_.step || !args_.steps) return {};
    if (args_.fixed_step >= 0 && args_.fixed_step < args_.steps) return {};
    return {Code::kStepRange, Argument::kStep, 0, args_.fixed_step};
  }

  const OpInfo& op_;
  const CallViews& views_;
  Plan& plan_;
  LaunchArgs& args_;
  const TensorView* first_ = nullptr;
  int64_t elements_ = 0, rows_ = 0, row_ = 0;  // row_: elements per sample
  bool by_row_ = false;                        // samples are separate rows of the kernel
  bool small_tensors_ = false;                 // a coefficient, step or part of a key is a tensor
};

}  // namespace

Reason plan_call(const OpInfo& op, const CallViews& views, Plan* plan) {
  return Planner(op, views, plan).run();
}

}  // namespace diffcore
