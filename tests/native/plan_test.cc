// Tests of plan_call without Python: the plans of valid calls and the reasons of invalid ones. Exits
// with status 0, or prints the failed check.
#include <iterator>
#include <utility>

#include "calls.h"
#include "ops/all.h"

using namespace diffcore;

namespace {

// ---- valid calls -----------------------------------------------------------------------

void test_plain_calls_of_every_op() {
  const OpTable table = op_table();
  for (int k = 0; k < table.size; ++k) {
    TestCall call = plain_call(&table.ops[k], {4, 3, 5});
    Plan plan;
    CHECK(is(call.plan(&plan), Code::kDone));
    const bool by_row = table.ops[k].n_sum || table.ops[k].generates_noise;
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
  reversed.strides = {60, 1, 3, 12};  // neither row-major nor a rotation of it
  CHECK(runs_of_row(reversed.view()) == 0);
}

// More dimensions than the arrays of tensor.h hold must not write past their end.
void test_many_dimensions() {
  for (int n = 14; n <= 24; ++n) {
    Dims shape(n, 1), strides(n);
    for (int d = 0; d < n; ++d) shape[d] = d % 4 == 3 && d < 12 ? 1 : 2;
    Tensor x(shape, 0);
    std::swap(x.strides[n - 1], x.strides[n - 2]);
    int wide = 0;
    for (int64_t s : shape) wide += s > 1;
    // With one dimension more than fits, dense samples are still recognized.
    const Layout expected = wide <= Dimensions::kMaxDims       ? Layout::kDenseRows
                            : wide == Dimensions::kMaxDims + 1 ? Layout::kSpacedRows
                                                               : Layout::kOther;
    CHECK(layout_of(x.view()) == expected);
    CHECK(runs_of_row(x.view()) == 0);
    TestCall call = plain_call(op_named("linear_combination", true), {2});
    for (Tensor& t : call.in) t.shape = x.shape, t.strides = x.strides;
    for (Tensor& t : call.out) t.shape = x.shape, t.strides = x.strides;
    CHECK(is(call.plan(), Code::kNoiseLayout));
  }
}

// ---- invalid calls -----------------------------------------------------------------------

template <class Change>
Reason changed(const char* op, bool generates_noise, Change change) {
  TestCall call = plain_call(op_named(op, generates_noise), {4, 3, 5});
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
  CHECK(is(part(kElementPart, Tensor({4}, 0, kInt64)), Code::kDone));
  CHECK(is(part(kElementPart, Tensor({5}, 0, kInt64)), Code::kLength, A::kFirstElement));
  CHECK(is(part(kElementPart, Tensor({}, 0, kInt64)), Code::kLength, A::kFirstElement));
  CHECK(is(part(kElementPart, Tensor({4, 1}, 0, kInt64)), Code::kDimensions, A::kFirstElement));
  CHECK(is(part(kElementPart, Tensor({4}, 0, kInt32)), Code::kDtype, A::kFirstElement));

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

  // A freed tensor that began inside its storage.
  CHECK(is(add([](TestCall& c) { c.in[1].data = reinterpret_cast<void*>(40); }), Code::kMemory,
           A::kInput, 1));
  CHECK(is(add([](TestCall& c) { c.in[1].data = reinterpret_cast<void*>(kLowestAddress - 1); }),
           Code::kMemory, A::kInput, 1));

  // An output over whatever else is read or written.
  const auto out_at = [](TestCall& c, int o) { return static_cast<char*>(c.out[o].data); };
  const auto over = [&](TestCall& c, Tensor x) {
    x.data = out_at(c, 0) + 4;
    return x;
  };
  CHECK(is(coefs(Tensor({4}, 0), [&](TestCall& c) { c.coef_tensors[1] = over(c, Tensor({4}, 0)); }),
           Code::kOverlap, A::kCoef, 1));
  CHECK(is(coefs(Tensor({4}, 0, kFloat64),
                 [&](TestCall& c) {  // ends where the output begins
                   c.coef_tensors[1].data = out_at(c, 0) - 32;
                 }),
           Code::kDone));
  CHECK(is(coefs(Tensor({10, 1}, 0),
                 [&](TestCall& c) {
                   c.has_step = c.step_is_tensor = true;
                   c.step = over(c, Tensor({4}, 0, kInt64));
                 }),
           Code::kOverlap, A::kStep));
  for (int k = 0; k < kNoiseParts; ++k)
    CHECK(is(generated([&](TestCall& c) {
               c.noise_is_tensor[k] = true;
               c.noise[k] =
                   over(c, Tensor({k == kIdsPart || k == kElementPart ? 4 : 1}, 0, kInt64));
             }),
             Code::kOverlap, Argument(int(A::kSeed) + k)));
  CHECK(
      is(sum([&](TestCall& c) { c.in[1].data = out_at(c, 0) - 4; }), Code::kOverlap, A::kInput, 1));
  CHECK(is(changed("reparameterize_kl", false, [&](TestCall& c) { c.out[1].data = c.out[0].data; }),
           Code::kOutputsOverlap, A::kOutput, 1));

  // Without elements: the step is checked all the same, and no order of memory is impossible.
  const auto no_samples = [&](const char* name, auto change) {
    TestCall call = plain_call(op_named(name), {0, 3});
    change(call);
    return call.plan();
  };
  CHECK(is(no_samples("linear_combination",
                      [](TestCall& c) {
                        c.coef_is_tensor[0] = true;
                        c.coef_tensors[0] = Tensor({10, 1}, 0);
                        c.has_step = true;
                        c.step_number = 10;
                      }),
           Code::kStepRange, A::kStep));
  for (const Dims& shape : {Dims{2, 3, 0}, Dims{2, 3, 0, 5}, Dims{0, 3}, Dims{0}})
    CHECK(is(plain_call(op_named("randn", true), shape).plan(), Code::kDone));
}

// ---- columns by name -----------------------------------------------------------------------------

void test_columns_are_in_the_order_of_their_names() {
  double c[32];
  for (int k = 0; k < 32; ++k) c[k] = k;
  const StepRow<double> s(c);
  const std::pair<const char*, double> step[] = {{"guidance", s.guidance()},
                                                 {"gain", s.gain()},
                                                 {"c_u", s.c_u()},
                                                 {"e_u", s.e_u()},
                                                 {"threshold", s.threshold()},
                                                 {"c_x", s.c_x()},
                                                 {"c_m", s.c_m()},
                                                 {"c_0", s.c_0()},
                                                 {"c_z", s.c_z()},
                                                 {"a_x", s.a_x()},
                                                 {"a_m", s.a_m()},
                                                 {"clip_min", s.clip_min()},
                                                 {"clip_max", s.clip_max()},
                                                 {"e_x", s.e_x()},
                                                 {"e_m", s.e_m()},
                                                 {"e_0", s.e_0()},
                                                 {"c_1", s.c_k(0)},
                                                 {"c_2", s.c_k(1)},
                                                 {"c_3", s.c_k(2)}};
  CHECK(step_columns().size == int(std::size(step)));
  for (int k = 0; k < step_columns().size; ++k)
    CHECK(!std::strcmp(step_columns().first[k], step[k].first) && step[k].second == k);
  const VlbRow<double> v(c);
  const std::pair<const char*, double> vlb[] = {
      {"scale", v.scale()},       {"b_0", v.b_0()},
      {"b_g", v.b_g()},           {"b_m", v.b_m()},
      {"b_0_low", v.b_0_low()},   {"b_g_low", v.b_g_low()},
      {"b_m_low", v.b_m_low()},   {"clip_min", v.clip_min()},
      {"clip_max", v.clip_max()}, {"decoder", v.decoder()},
      {"factor", v.factor()},     {"offset", v.offset()},
      {"d_0", v.d_0()},           {"d_low", v.d_low()},
      {"d_v", v.d_v()},           {"kl", v.kl()}};
  CHECK(vlb_columns().size == int(std::size(vlb)));
  for (int k = 0; k < vlb_columns().size; ++k)
    CHECK(!std::strcmp(vlb_columns().first[k], vlb[k].first) && vlb[k].second == k);
}

}  // namespace

int main(int argc, char** argv) {
  const int calls = argc > 1 ? std::atoi(argv[1]) : 100000;
  test_plain_calls_of_every_op();
  test_coefficients_by_row_and_step();
  test_layouts();
  test_many_dimensions();
  test_reasons();
  test_columns_are_in_the_order_of_their_names();
  fuzz_plans(calls);
  return 0;
}
