// Calls for the tests of plan_call: tensors with shapes and strides, whose data is never read.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "binding/plan.h"
#include "binding/tensor.h"

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (0)

namespace diffcore {

using Dims = std::vector<int64_t>;
inline const dlpack::DataType kFloat32{dlpack::kFloat, 32, 1}, kFloat64{dlpack::kFloat, 64, 1};
inline const dlpack::DataType kHalf{dlpack::kFloat, 16, 1}, kBrain{dlpack::kBfloat, 16, 1};
inline const dlpack::DataType kInt64{dlpack::kInt, 64, 1}, kInt32{dlpack::kInt, 32, 1};

alignas(64) inline char g_memory[1 << 20];  // plan_call compares addresses and reads no element

inline Dims row_major(const Dims& shape) {
  Dims strides(shape.size());
  int64_t n = 1;
  for (int d = int(shape.size()) - 1; d >= 0; --d) {
    strides[d] = n;
    n *= shape[d];
  }
  return strides;
}

// A tensor with its shape and strides.
struct Tensor {
  Dims shape, strides;
  dlpack::DataType dtype = kFloat32;
  dlpack::DeviceRef device{dlpack::kCpu, 0};
  void* data = nullptr;

  Tensor() = default;
  Tensor(Dims shape, int64_t at, dlpack::DataType dtype = kFloat32)
      : shape(shape), strides(row_major(shape)), dtype(dtype), data(g_memory + at) {}

  TensorView view() {
    return {data, device, int32_t(shape.size()), dtype, shape.data(), strides.data(), 0};
  }
};

// A call that owns its tensors.
struct TestCall {
  const OpInfo* op;
  std::vector<Tensor> in, out, coef_tensors;  // coef_tensors: empty shape and no data: the number
  std::vector<double> coef_numbers;
  bool has_step = false, has_noise = false, reduce_all = false;
  int64_t step_number = 0, first_element = 0;
  bool step_is_tensor = false;
  Tensor step;
  bool noise_is_tensor[kNoiseParts] = {};
  Tensor noise[kNoiseParts];
  std::vector<bool> coef_is_tensor;

  void number(double value) {
    coef_is_tensor.push_back(false);
    coef_numbers.push_back(value);
    coef_tensors.emplace_back();
  }
  void coef(Tensor x) {
    coef_is_tensor.push_back(true);
    coef_numbers.push_back(0);
    coef_tensors.push_back(x);
  }

  Reason plan(Plan* plan) {
    static CallViews views;
    std::memset(static_cast<void*>(&views), 0x5a,
                sizeof(views));  // uninitialized fields must not matter
    views.n_in = int(in.size());
    views.n_out = int(out.size());
    views.n_coef = int(coef_tensors.size());
    CHECK(views.n_in <= kMaxIn && views.n_out <= kMaxOut + kMaxSum && views.n_coef <= kMaxCoef);
    for (int k = 0; k < views.n_in; ++k) views.in[k] = in[k].view();
    for (int k = 0; k < views.n_out; ++k) views.out[k] = out[k].view();
    for (int k = 0; k < views.n_coef; ++k)
      views.coef[k] = {coef_is_tensor[k], coef_numbers[k], coef_tensors[k].view()};
    views.has_step = has_step;
    views.step = {step_is_tensor, step_number, step.view()};
    views.has_noise = has_noise;
    for (int k = 0; k < kNoiseParts; ++k) views.noise[k] = {noise_is_tensor[k], k, noise[k].view()};
    views.noise[kElementPart] = {noise_is_tensor[kElementPart], first_element,
                                 noise[kElementPart].view()};
    views.reduce_all = reduce_all;
    return plan_call(*op, views, plan);
  }
  Reason plan() {
    Plan plan;
    return this->plan(&plan);
  }
};

inline const OpInfo* op_named(const std::string& name, bool generates_noise = false) {
  const OpTable table = op_table();
  for (int k = 0; k < table.size; ++k)
    if (table.ops[k].name == name && table.ops[k].generates_noise == generates_noise)
      return &table.ops[k];
  std::fprintf(stderr, "no op %s\n", name.c_str());
  std::exit(1);
}

// A call with tensors of one shape, 64 KiB apart, and numbers as coefficients.
inline TestCall plain_call(const OpInfo* op, const Dims& shape) {
  TestCall call;
  call.op = op;
  int64_t at = 0;
  for (int k = 0; k < op->n_in; ++k) call.in.emplace_back(shape, at += 65536);
  for (int k = 0; k < op->n_out; ++k) call.out.emplace_back(shape, at += 65536);
  for (int k = 0; k < op->n_sum; ++k) call.out.emplace_back(Dims{shape[0]}, at += 65536);
  for (int k = 0; k < op->n_coef; ++k) call.number(k);
  call.has_noise = op->generates_noise;
  return call;
}

inline bool is(const Reason& reason, Code code, Argument argument = Argument::kNone,
               int index = 0) {
  if (reason.code == code && reason.argument == argument && reason.index == index) return true;
  std::fprintf(stderr, "got %s of %s %d, detail %lld\n", kCodeNames[int(reason.code)],
               kArgumentNames[int(reason.argument)], reason.index, (long long)reason.detail);
  return false;
}

// Runs random calls and checks their plans element by element. Prints the count of each code.
void fuzz_plans(int calls);

}  // namespace diffcore
