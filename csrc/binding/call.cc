#include "binding/call.h"

#include <pybind11/pybind11.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "binding/tensor.h"
#include "binding/torch_api.h"
#include "cpu/kernels.h"
#include "cuda/kernels.h"
#include "noise/philox.h"

namespace diffcore {
namespace {

namespace py = pybind11;

// Elements. Below this, the call ends before another thread could use the interpreter.
constexpr int64_t kReleaseGilFrom = 32 * 1024;

void run_cpu(int op, Plan* plan) {
  std::optional<py::gil_scoped_release> release;
  if (plan->elements >= kReleaseGilFrom) release.emplace();
  run_on_cpu(op, plan->dtype, plan->args);
}

// Memory of torch's allocator on the device of the kernel, freed in stream order: only work that is
// enqueued later can use it again.
class Workspace {
 public:
  explicit Workspace(dlpack::DeviceRef device) : device_(device) {}
  ~Workspace() {
    if (memory_ && memory_->deleter) memory_->deleter(memory_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // An `Allocate` of cuda/kernels.h whose context is a Workspace.
  static void* allocate(void* context, int64_t bytes) {
    auto* self = static_cast<Workspace*>(context);
    int64_t doubles = (bytes + 7) / 8;
    dlpack::Tensor prototype{nullptr,  self->device_, 1, {dlpack::kFloat, 64, 1},
                             &doubles, nullptr,       0};
    const auto ignore = [](void*, const char*, const char*) {};
    if (g_torch.exchange->allocate(&prototype, &self->memory_, nullptr, ignore) != 0)
      return nullptr;
    return self->memory_->tensor.data;
  }

 private:
  dlpack::DeviceRef device_;
  dlpack::ManagedTensor* memory_ = nullptr;
};

void run_cuda(int op, Plan* plan) {
  Device device{plan->device.id, nullptr};
  if (!kCudaEmulated &&
      g_torch.exchange->current_stream(dlpack::kCuda, device.id, &device.stream) != 0)
    throw py::error_already_set();
  const char* error;
  {
    Workspace workspace(plan->device);
    error = run_on_cuda(op, plan->dtype, plan->args, device, &Workspace::allocate, &workspace);
  }
  if (error)
    throw std::runtime_error(std::string("diffcore: ") + op_table().ops[op].name + ": " + error);
}

}  // namespace

Reason run_plan(int op, Plan* plan) {
  const bool cpu = plan->device.type == dlpack::kCpu;
  if (int64_t wrong; cpu && !cpu_steps_in_range(plan->args, &wrong))
    return {Code::kStepRange, Argument::kStep, 0, wrong};
  if (plan->empty) return {};
  if (cpu && !kCudaEmulated)
    run_cpu(op, plan);
  else if (cuda_usable())
    run_cuda(op, plan);
  else
    return {Code::kDeviceKind};
  return {};
}

Reason fill_words(CallViews* views, uint64_t salt) {
  constexpr OpInfo kWords{"words", 0, 1, 0, 0, true};
  TensorView& out = views->out[0];
  if (views->n_out != 1) return {Code::kCount, Argument::kOutput, 0, views->n_out};
  if (!is_int(out.dtype, 64)) return {Code::kDtype, Argument::kOutput};
  if (out.ndim != 2 || out.shape[1] % 4 || !contiguous(out))
    return {Code::kShape, Argument::kOutput};
  out.dtype = {dlpack::kFloat, 64, 1};  // of the same size: the checks of noise are for samples
  Plan plan;
  if (Reason reason = plan_call(kWords, *views, &plan)) return reason;
  if (plan.device.type != dlpack::kCpu) return {Code::kDeviceKind};
  std::optional<py::gil_scoped_release> release;
  if (plan.elements >= kReleaseGilFrom) release.emplace();
  auto* word = static_cast<int64_t*>(out.data);
  for (int64_t row = 0; !plan.empty && row < out.shape[0]; ++row) {
    const NoiseKey key = noise_key(plan.args.noise, row);
    const uint32_t low = key.key[0] ^ uint32_t(salt), high = key.key[1] ^ uint32_t(salt >> 32);
    for (int64_t block = 0; block < out.shape[1] / 4; ++block) {
      uint32_t c[4] = {key.first_block + uint32_t(block), key.stream, key.id[0], key.id[1]};
      philox<ScalarLanes>(c, low, high);
      for (const uint32_t w : c) *word++ = w;
    }
  }
  return {};
}

}  // namespace diffcore
