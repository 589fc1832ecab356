#include "binding/call.h"

#include <pybind11/pybind11.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "binding/torch_api.h"
#include "cpu/kernels.h"
#include "cuda/kernels.h"

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
    dlpack::Tensor prototype{
        nullptr, self->device_, 1, {dlpack::kFloat, 64, 1}, &doubles, nullptr, 0};
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
  else if (cuda_built())
    run_cuda(op, plan);
  else
    return {Code::kDeviceKind};
  return {};
}

}  // namespace diffcore
