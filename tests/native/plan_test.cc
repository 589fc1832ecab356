// plan_call without Python: what it answers to right and wrong calls, and random calls whose plans
// are checked element by element. Ends with a line and status 0, or says what failed.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "binding/plan.h"
#include "binding/tensor.h"
#include "ops/all.h"

using namespace diffcore;

#define CHECK(condition)                                                           \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);         \
      std::exit(1);                                                                \
    }                                                                              \
  } while (0)

namespace {

using Dims = std::vector<int64_t>;
const dlpack::DataType kFloat32{dlpack::kFloat, 32, 1}, kFloat64{dlpack::kFloat, 64, 1};
const dlpack::DataType kHalf{dlpack::kFloat, 16, 1}, kBrain{dlpack::kBfloat, 16, 1};
const dlpack::DataType kInt64{dlpack::kInt, 64, 1}, kInt32{dlpack::kInt, 32, 1};

alignas(64) char g_memory[1 << 20];  // plan_call compares addresses and reads no element

Dims row_major(const Dims& shape) {
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

// A call whose tensors live as long as it does.
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
    std::memset(static_cast<void*>(&views), 0x5a, sizeof(views));  // no field may matter unread
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
    views.first_element = first_element;
    views.reduce_all = reduce_all;
    return plan_call(*op, views, plan);
  }
  Reason plan() {
    Plan plan;
    return this->plan(&plan);
  }
};

const OpInfo* op_named(const std::string& name, bool draws = false) {
  const OpTable table = op_table();
  for (int k = 0; k < table.size; ++k)
    if (table.ops[k].name == name && table.ops[k].draws == draws) return &table.ops[k];
  std::fprintf(stderr, "no op %s\n", name.c_str());
  std::exit(1);
}

// Tensors of a shape 64 KiB apart, coefficients that are numbers.
TestCall plain_call(const OpInfo* op, const Dims& shape) {
  TestCall call;
  call.op = op;
  int64_t at = 0;
  for (int k = 0; k < op->n_in; ++k) call.in.emplace_back(shape, at += 65536);
  for (int k = 0; k < op->n_out; ++k) call.out.emplace_back(shape, at += 65536);
  for (int k = 0; k < op->n_sum; ++k) call.out.emplace_back(Dims{shape[0]}, at += 65536);
  for (int k = 0; k < op->n_coef; ++k) call.number(k);
  call.has_noise = op->draws;
  return call;
}

bool is(const Reason& reason, Code code, Argument argument = Argument::kNone, int index = 0) {
  if (reason.code == code && reason.argument == argument && reason.index == index) return true;
  std::fprintf(stderr, "got %s of %s %d, detail %lld\n", kCodeNames[int(reason.code)],
               kArgumentNames[int(reason.argument)], reason.index, (long long)reason.detail);
  return false;
}

// ---- calls that are right ------------------------------------------------------------------------

void test_plain_calls_of_every_op() {
  const OpTable table = op_table();
  for (int k = 0; k < table.size; ++k) {
    TestCall call = plain_call(&table.ops[k], {4, 3, 5});
    Plan plan;
    CHECK(is(call.plan(&plan), Code::kDone));
    const bool by_row = table.ops[k].n_sum || table.ops[k].draws;
    CHECK(plan.args.rows == (by_row ? 4 : 1) && plan.args.cols == (by_row ? 15 : 60));
    CHECK(plan.elements == 60 && plan.dtype == kF32 && !plan.empty);
    for (int c = 0; c < table.ops[k].n_coef; ++c) CHECK(plan.args.coef[c].value == c);
  }
}

void test_coefficients_by_row_and_step() {
  TestCall call = plain_call(op_named("linear_combination"), {4, 3});
  call.coef_tensors.clear(), call.coef_is_tensor.clear(), call.coef_numbers.clear();
  call.coef(Tensor({10, 2}, 0, kFloat64));
  call.has_step = true;
  call.step_number = 9;
  Plan plan;
  CHECK(is(call.plan(&plan), Code::kDone));
  CHECK(plan.args.rows == 1 && plan.args.steps == 10 && plan.args.fixed_step == 9);
  CHECK(plan.args.coef[1].data == g_memory + 8 && plan.args.coef[1].stride == 2);
  CHECK(plan.args.coef[1].by_step && plan.args.coef[1].is_double);
  call.step_is_tensor = true;
  call.step = Tensor({4}, 0, kInt32);
  Plan by_sample;
  CHECK(is(call.plan(&by_sample), Code::kDone));
  CHECK(by_sample.args.rows == 4 && by_sample.args.step_stride == 1 && !by_sample.args.step_is_64);
}

void test_layouts() {
  Tensor last({2, 3, 4, 5}, 0);  // channels_last
  last.strides = {60, 1, 15, 3};
  CHECK(layout_of(last.view()) == Layout::kDenseRows && runs_of_row(last.view()) == 3);
  Tensor swapped({2, 3}, 0);
  swapped.strides = {1, 2};
  CHECK(layout_of(swapped.view()) == Layout::kDense);
  Tensor part({2, 3}, 0);
  part.strides = {7, 1};
  CHECK(layout_of(part.view()) == Layout::kSpacedRows);
  Tensor expanded({2, 3}, 0);
  expanded.strides = {0, 1};
  CHECK(layout_of(expanded.view()) == Layout::kOther);
  CHECK(layout_of(Tensor({2, 0, 3}, 0).view()) == Layout::kEmpty);
  Tensor reversed({2, 3, 4, 5}, 0);
  reversed.strides = {60, 1, 3, 12};  // neither row-major nor begun elsewhere
  CHECK(runs_of_row(reversed.view()) == 0);
}

// More dimensions than the arrays of tensor.h hold: an answer, not a write past them.
void test_many_dimensions() {
  for (int n = 14; n <= 24; ++n) {
    Dims shape(n, 1), strides(n);
    for (int d = 0; d < n; ++d) shape[d] = d % 4 == 3 && d < 12 ? 1 : 2;
    Tensor x(shape, 0);
    std::swap(x.strides[n - 1], x.strides[n - 2]);
    int wide = 0;
    for (int64_t s : shape) wide += s > 1;
    // One more than the array holds is still known, as dense samples of the rest.
    const Layout expected = wide <= Dimensions::kMost       ? Layout::kDenseRows
                            : wide == Dimensions::kMost + 1 ? Layout::kSpacedRows
                                                            : Layout::kOther;
    CHECK(layout_of(x.view()) == expected);
    CHECK(runs_of_row(x.view()) == 0);
    TestCall call = plain_call(op_named("linear_combination", true), {2});
    for (Tensor& t : call.in) t.shape = x.shape, t.strides = x.strides;
    for (Tensor& t : call.out) t.shape = x.shape, t.strides = x.strides;
    CHECK(is(call.plan(), Code::kNoiseLayout));
  }
}

// ---- calls that are wrong ------------------------------------------------------------------------

template <class Change>
Reason changed(const char* op, bool draws, Change change) {
  TestCall call = plain_call(op_named(op, draws), {4, 3, 5});
  change(call);
  return call.plan();
}

void test_reasons() {
  const auto add = [](auto change) { return changed("linear_combination", false, change); };
  const auto generated = [](auto change) { return changed("linear_combination", true, change); };
  const auto sum = [](auto change) { return changed("normal_kl_sum", false, change); };
  using A = Argument;

  CHECK(is(add([](TestCall& c) { c.in.pop_back(); }), Code::kCount, A::kInput));
  CHECK(is(add([](TestCall& c) { c.out.pop_back(); }), Code::kCount, A::kOutput));
  CHECK(is(add([](TestCall& c) { c.in[0].device.type = 8; }), Code::kDeviceKind));
  CHECK(is(add([](TestCall& c) { c.in[0].dtype = kInt64; }), Code::kDtype, A::kInput, 0));
  CHECK(is(add([](TestCall& c) { c.in[1].dtype = kInt64; }), Code::kDtype, A::kInput, 1));
  CHECK(is(add([](TestCall& c) { c.in[1].data = nullptr; }), Code::kMemory, A::kInput, 1));
  CHECK(is(add([](TestCall& c) { c.out[0].data = nullptr; }), Code::kMemory, A::kOutput, 0));
  CHECK(is(add([](TestCall& c) { c.in[1] = Tensor({4, 3}, 0); }), Code::kShape, A::kInput, 1));
  CHECK(is(add([](TestCall& c) { c.out[0].dtype = kHalf; }), Code::kOtherDtype, A::kOutput, 0));
  CHECK(is(add([](TestCall& c) { c.in[1].device = {dlpack::kCuda, 0}; }), Code::kOtherDevice,
           A::kInput, 1));

  const auto coefs = [&](Tensor x, auto change) {
    return add([&](TestCall& c) {
      c.coef_is_tensor[1] = true;
      c.coef_tensors[1] = x;
      change(c);
    });
  };
  const auto nothing = [](TestCall&) {};
  const auto at_step = [](TestCall& c) { c.has_step = true; };
  CHECK(is(coefs(Tensor({4}, 0, kHalf), nothing), Code::kDtype, A::kCoef, 1));
  CHECK(is(coefs(Tensor({1, 1, 1}, 0), nothing), Code::kDimensions, A::kCoef, 1));
  CHECK(is(coefs(Tensor({3}, 0), nothing), Code::kLength, A::kCoef, 1));
  CHECK(is(coefs(Tensor({0, 1}, 0), at_step), Code::kTableLength, A::kCoef, 1));
  CHECK(is(coefs(Tensor({4, 2}, 0), nothing), Code::kCoefficients, A::kCoef));
  CHECK(is(coefs(Tensor({4, 1 << 20}, 0), nothing), Code::kCoefficients, A::kCoef));
  CHECK(is(add([](TestCall& c) { c.number(1); }), Code::kCoefficients, A::kCoef));
  Tensor away({4}, 0);
  away.device = {dlpack::kCuda, 1};
  CHECK(is(coefs(away, nothing), Code::kOtherDevice, A::kCoef, 1));
  Tensor freed({4}, 0);
  freed.data = nullptr;
  CHECK(is(coefs(freed, nothing), Code::kMemory, A::kCoef, 1));

  const auto step = [&](Tensor x) {
    return coefs(Tensor({10, 1}, 0), [&](TestCall& c) {
      c.has_step = c.step_is_tensor = true;
      c.step = x;
    });
  };
  const auto number = [&](int64_t value) {
    return coefs(Tensor({10, 1}, 0), [&](TestCall& c) {
      c.has_step = true;
      c.step_number = value;
    });
  };
  CHECK(is(add(at_step), Code::kStepNotUsed, A::kStep));
  CHECK(is(number(9), Code::kDone));
  CHECK(is(number(10), Code::kStepRange, A::kStep) && number(10).detail == 10);
  CHECK(is(number(-1), Code::kStepRange, A::kStep));
  CHECK(is(step(Tensor({4}, 0, kFloat32)), Code::kDtype, A::kStep));
  CHECK(is(step(Tensor({4, 1}, 0, kInt64)), Code::kDimensions, A::kStep));
  CHECK(is(step(Tensor({3}, 0, kInt64)), Code::kLength, A::kStep));

  CHECK(is(add([](TestCall& c) { c.has_noise = true; }), Code::kNoise));
  CHECK(is(generated([](TestCall& c) { c.has_noise = false; }), Code::kNoise));
  CHECK(is(generated([](TestCall& c) { c.first_element = 6; }), Code::kNoiseElement));
  CHECK(is(generated([](TestCall& c) { c.first_element = -4; }), Code::kNoiseElement));
  CHECK(is(generated([](TestCall& c) { c.first_element = (int64_t(1) << 34) - 16; }), Code::kDone));
  CHECK(is(generated([](TestCall& c) { c.first_element = (int64_t(1) << 34) - 12; }),
           Code::kNoiseRange));
  CHECK(is(generated([](TestCall& c) { c.first_element = INT64_MAX - 3; }), Code::kNoiseRange));
  const auto part = [&](int k, Tensor x) {
    return generated([&](TestCall& c) {
      c.noise_is_tensor[k] = true;
      c.noise[k] = x;
    });
  };
  CHECK(is(part(kSeedPart, Tensor({2}, 0, kInt64)), Code::kDone));
  CHECK(is(part(kSeedPart, Tensor({3}, 0, kInt64)), Code::kLength, A::kSeed));
  CHECK(is(part(kSeedPart, Tensor({}, 0, kInt32)), Code::kDtype, A::kSeed));
  CHECK(is(part(kIdsPart, Tensor({4}, 0, kInt64)), Code::kDone));
  CHECK(is(part(kIdsPart, Tensor({5}, 0, kInt64)), Code::kLength, A::kSampleIds));
  CHECK(is(part(kIdsPart, Tensor({4, 1}, 0, kInt64)), Code::kDimensions, A::kSampleIds));
  CHECK(is(part(kStreamPart, Tensor({2}, 0, kInt64)), Code::kLength, A::kStream));

  CHECK(is(sum([](TestCall& c) { c.reduce_all = true; }), Code::kShape, A::kSum));
  CHECK(is(sum([](TestCall& c) {
          c.reduce_all = true;
          c.out[0] = Tensor({}, 0);
        }),
        Code::kDone));
  CHECK(is(sum([](TestCall& c) {
          c.reduce_all = true;
          c.coef_is_tensor[0] = true;
          c.coef_tensors[0] = Tensor({4}, 0);
        }),
        Code::kReduceAll));
  CHECK(is(sum([](TestCall& c) { c.out[0].dtype = kFloat64; }), Code::kDtype, A::kSum));

  CHECK(is(add([](TestCall& c) { c.in[1].strides = {15, 1, 3}; }), Code::kLayout, A::kInput, 1));
  CHECK(is(add([](TestCall& c) { c.out[0].strides = {15, 1, 3}; }), Code::kLayout, A::kOutput, 0));
  CHECK(is(add([](TestCall& c) { c.out[0].data = c.in[1].data; }), Code::kDone));
  CHECK(is(add([](TestCall& c) { c.out[0].data = static_cast<char*>(c.in[1].data) + 4; }),
           Code::kOverlap, A::kInput, 1));
  CHECK(is(changed("linear_pair", false, [](TestCall& c) { c.out[1].data = c.out[0].data; }),
           Code::kOutputsOverlap, A::kOutput, 1));
}

// ---- columns by name -----------------------------------------------------------------------------

void test_columns_are_in_the_order_of_their_names() {
  double c[32];
  for (int k = 0; k < 32; ++k) c[k] = k;
  const StepRow<double> s(c);
  const std::pair<const char*, double> step[] = {
      {"guidance", s.guidance()}, {"threshold", s.threshold()}, {"c_x", s.c_x()},
      {"c_m", s.c_m()},           {"c_0", s.c_0()},             {"c_z", s.c_z()},
      {"a_x", s.a_x()},           {"a_m", s.a_m()},             {"clip_min", s.clip_min()},
      {"clip_max", s.clip_max()}, {"e_x", s.e_x()},             {"e_m", s.e_m()},
      {"e_0", s.e_0()},           {"c_1", s.c_k(0)},            {"c_2", s.c_k(1)},
      {"c_3", s.c_k(2)}};
  CHECK(step_columns().size == int(std::size(step)));
  for (int k = 0; k < step_columns().size; ++k)
    CHECK(!std::strcmp(step_columns().first[k], step[k].first) && step[k].second == k);
  const VlbRow<double> v(c);
  const std::pair<const char*, double> vlb[] = {
      {"scale", v.scale()},       {"b_0", v.b_0()},           {"b_g", v.b_g()},
      {"b_m", v.b_m()},           {"b_0_low", v.b_0_low()},   {"b_g_low", v.b_g_low()},
      {"b_m_low", v.b_m_low()},   {"clip_min", v.clip_min()}, {"clip_max", v.clip_max()},
      {"decoder", v.decoder()},   {"factor", v.factor()},     {"offset", v.offset()},
      {"d_0", v.d_0()},           {"d_low", v.d_low()},       {"d_v", v.d_v()},
      {"kl", v.kl()}};
  CHECK(vlb_columns().size == int(std::size(vlb)));
  for (int k = 0; k < vlb_columns().size; ++k)
    CHECK(!std::strcmp(vlb_columns().first[k], vlb[k].first) && vlb[k].second == k);
}

// ---- random calls --------------------------------------------------------------------------------

class Fuzzer {
 public:
  explicit Fuzzer(uint64_t seed) : random_(seed) {}

  void one() {
    const OpTable table = op_table();
    TestCall call;
    call.op = &table.ops[below(table.size)];
    shape_ = random_shape();
    dtype_ = pick({kFloat32, kFloat32, kFloat64, kHalf, kBrain});
    base_ = random_layout(shape_);
    const int n_in = call.op->n_in + rarely(60), n_out = call.op->n_out + call.op->n_sum;
    for (int k = 0; k < n_in && k < kMaxIn; ++k) call.in.push_back(tensor());
    for (int k = 0; k < n_out; ++k) call.out.push_back(k < call.op->n_out ? tensor() : sum());
    if (!call.out.empty() && !call.in.empty() && rarely(4)) call.out[0] = call.in[0];
    call.reduce_all = rarely(5);
    while (int(call.coef_tensors.size()) < kMaxCoef && columns(call) < call.op->n_coef)
      random_coef(call);
    call.has_step = rarely(2);
    call.step_number = below(12) - 1;
    call.step_is_tensor = rarely(2);
    call.step = small({rows()}, kInt64);
    if (rarely(8)) call.step = small({}, kInt32);
    call.has_noise = call.op->draws != rarely(50);
    for (int k = 0; k < kNoiseParts; ++k) {
      call.noise_is_tensor[k] = rarely(3);
      call.noise[k] = small(k == kIdsPart ? Dims{rows()} : Dims{}, kInt64);
    }
    call.first_element = rarely(20) ? int64_t(random_()) : 4 * below(100);

    Plan plan;
    const Reason reason = call.plan(&plan);
    ++counts[int(reason.code)];
    CHECK(int(reason.code) < int(std::size(kCodeNames)));
    if (!reason && !plan.empty) check(call, plan);
  }

  long counts[std::size(kCodeNames)] = {};

 private:
  int below(int n) { return int(random_() % uint64_t(n)); }
  bool rarely(int n) { return below(n) == 0; }
  template <class T>
  T pick(std::initializer_list<T> items) {
    return items.begin()[below(int(items.size()))];
  }
  int64_t rows() { return shape_.empty() ? 1 : shape_[0]; }

  Dims random_shape() {
    if (rarely(40)) return Dims(pick({12, 16, 17, 18, 20}), rarely(2) ? 1 : 2);
    Dims shape(below(6));
    int64_t n = 1;
    for (int64_t& s : shape) {
      s = pick({0, 1, 1, 2, 2, 3, 4, 5, 7, 2, 3, 4});
      if (n * s > 2000) s = 1;
      n *= s;
    }
    return shape;
  }

  Dims random_layout(const Dims& shape) {
    std::vector<int> order(shape.size());
    for (size_t d = 0; d < order.size(); ++d) order[d] = int(d);
    if (rarely(3)) std::shuffle(order.begin(), order.end(), random_);
    if (rarely(4) && order.size() > 2) {  // channels_last
      order.erase(order.begin() + 1);
      order.push_back(1);
    }
    Dims strides(shape.size());
    int64_t n = 1;
    for (int i = int(order.size()) - 1; i >= 0; --i) {
      strides[order[i]] = shape[order[i]] == 1 && rarely(2) ? below(100) : n;
      n *= shape[order[i]] + (rarely(12) ? below(3) : 0);
      if (rarely(40)) strides[order[i]] = 0;
    }
    return strides;
  }

  Tensor tensor() {
    Tensor x(shape_, 16 * below(rarely(4) ? 40 : 60000), dtype_);
    x.strides = base_;
    if (!x.strides.empty() && rarely(8)) x.strides[0] = pick<int64_t>({0, 1, 2000, 3});
    if (rarely(25)) x.strides = random_layout(shape_);
    damage(x);
    return x;
  }
  Tensor sum() {
    Tensor x(rarely(3) ? Dims{} : Dims{rows()}, 8 * below(60000),
             dtype_.bits == 64 ? kFloat64 : kFloat32);
    damage(x);
    return x;
  }
  Tensor small(Dims shape, dlpack::DataType dtype) {
    Tensor x(shape, 8 * below(60000), dtype);
    if (!shape.empty() && rarely(6)) x.shape[0] = below(5);
    if (!shape.empty() && rarely(6)) x.strides[0] = below(5);
    damage(x);
    return x;
  }
  void damage(Tensor& x) {
    if (rarely(200)) x.dtype = pick({kFloat32, kFloat64, kHalf, kInt64, kInt32});
    if (rarely(200)) x.data = nullptr;
    if (rarely(200)) x.device = {pick({1, 2, 8, 13}), below(2)};
    if (rarely(200)) x.shape.push_back(1), x.strides.push_back(1);
  }
  static int64_t columns(const TestCall& call) {
    int64_t n = 0;
    for (const Tensor& x : call.coef_tensors) n += x.shape.size() == 2 ? x.shape[1] : 1;
    return n;
  }
  void random_coef(TestCall& call) {
    const auto dtype = pick({kFloat32, kFloat64});
    const int left = int(call.op->n_coef - columns(call));
    switch (below(4)) {
      case 0: return call.number(below(5));
      case 1: return call.coef(small({rarely(2) ? 1 : rows()}, dtype));
      case 2: return call.coef(small({}, dtype));
      default: return call.coef(small({rarely(3) ? rows() : 10, 1 + below(left + rarely(9))}, dtype));
    }
  }

  // ---- what a plan promises

  static int64_t offset(const TensorView& x, int64_t i) {
    int64_t at = 0;
    for (int d = x.ndim - 1; d >= 0; --d) {
      at += i % x.shape[d] * x.strides[d];
      i /= x.shape[d];
    }
    return at;
  }

  // Position (row, column) of the plan is the same element of every tensor, and the loop visits each
  // element once.
  void check(TestCall& call, const Plan& plan) {
    const OpInfo& op = *call.op;
    const LaunchArgs& args = plan.args;
    const TensorView first = (op.n_in ? call.in[0] : call.out[0]).view();
    const int64_t elements = count(first), sample = rows() ? elements / rows() : 0;
    CHECK(args.rows * args.cols == elements && (args.rows == 1 || args.rows == rows()));
    std::vector<bool> visited(elements);
    for (int64_t i = 0; i < elements; ++i) {
      const int64_t row = args.rows == 1 ? 0 : i / sample;
      const int64_t column = offset(first, i) - row * (op.n_in ? args.row_stride[0] : args.cols);
      CHECK(column >= 0 && column < args.cols && !visited[row * args.cols + column]);
      visited[row * args.cols + column] = true;
      for (int k = 0; k < op.n_in; ++k)
        CHECK(offset(call.in[k].view(), i) == row * args.row_stride[k] + column);
      for (int k = 0; k < op.n_out; ++k)
        CHECK(offset(call.out[k].view(), i) == row * args.cols + column);
      if (op.draws) check_noise_order(args, i % (sample ? sample : 1), column);
    }
    for (int k = 0; k < op.n_in; ++k) CHECK(args.in[k] == call.in[k].data);
    for (int k = 0; k < op.n_out; ++k) CHECK(args.out[k] == call.out[k].data);
    check_outputs_apart(call, plan);
    check_coefs(call, args);
    for (int k = 0; k < op.n_sum; ++k) CHECK(count(call.out[op.n_out + k].view()) == args.rows);
  }

  // Column p holds element p % inner · outer + p / inner of a sample, as the loops assume.
  static void check_noise_order(const LaunchArgs& args, int64_t element, int64_t column) {
    const int64_t inner = args.noise.inner;
    CHECK(inner >= 1 && args.cols % inner == 0);
    CHECK(column % inner * (args.cols / inner) + column / inner == element);
  }

  static void check_outputs_apart(TestCall& call, const Plan& plan) {
    const OpInfo& op = *call.op;
    const int64_t item = item_size(plan.dtype);
    for (int o = 0; o < op.n_out; ++o) {
      std::set<char*> written;
      char* out = static_cast<char*>(plan.args.out[o]);
      for (int64_t i = 0; i < plan.elements * item; ++i) written.insert(out + i);
      for (int k = 0; k < op.n_in; ++k) {
        const char* in = static_cast<const char*>(plan.args.in[k]);
        const bool in_place = in == out && (plan.args.rows == 1 || plan.args.row_stride[k] == plan.args.cols);
        for (int64_t i = 0; !in_place && i < plan.elements; ++i)
          CHECK(!written.count(const_cast<char*>(in) + offset(call.in[k].view(), i) * item));
      }
      for (int other = 0; other < o; ++other)
        CHECK(!written.count(static_cast<char*>(plan.args.out[other])));
    }
  }

  // Each coefficient of each row is an element of the tensor that it was given in.
  void check_coefs(TestCall& call, const LaunchArgs& args) {
    int n = 0;
    for (size_t k = 0; k < call.coef_tensors.size(); ++k) {
      const TensorView x = call.coef_tensors[k].view();
      if (!call.coef_is_tensor[k]) {
        CHECK(!args.coef[n].data && args.coef[n].value == call.coef_numbers[k]);
        ++n;
        continue;
      }
      const int64_t length = x.ndim ? x.shape[0] : 1, columns = x.ndim == 2 ? x.shape[1] : 1;
      for (int64_t c = 0; c < columns; ++c, ++n) {
        const Coef& coef = args.coef[n];
        const int64_t item = x.dtype.bits / 8, reach = coef.by_step ? args.steps : args.rows;
        for (int64_t r = 0; r < reach; ++r) {
          const int64_t row = length == 1 ? 0 : r;
          CHECK(row < length);
          const int64_t at = (x.ndim ? row * x.strides[0] : 0) + (x.ndim == 2 ? c * x.strides[1] : 0);
          CHECK(static_cast<const char*>(coef.data) + r * coef.stride * item ==
                static_cast<const char*>(x.data) + at * item);
        }
      }
    }
    CHECK(n == call.op->n_coef);
  }

  std::mt19937_64 random_;
  Dims shape_, base_;
  dlpack::DataType dtype_{};
};

}  // namespace

int main(int argc, char** argv) {
  const int calls = argc > 1 ? std::atoi(argv[1]) : 100000;
  test_plain_calls_of_every_op();
  test_coefficients_by_row_and_step();
  test_layouts();
  test_many_dimensions();
  test_reasons();
  test_columns_are_in_the_order_of_their_names();
  Fuzzer fuzzer(20240229);
  for (int i = 0; i < calls; ++i) fuzzer.one();
  for (size_t k = 0; k < std::size(kCodeNames); ++k)
    std::printf("%s %ld\n", kCodeNames[k], fuzzer.counts[k]);
  return 0;
}
