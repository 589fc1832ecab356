// Random calls of plan_call. For each plan, checks the position of every element that the loops
// would read and write in each tensor.
#include <algorithm>
#include <iterator>
#include <random>
#include <set>

#include "calls.h"

namespace diffcore {
namespace {

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
    call.has_noise = call.op->generates_noise != rarely(50);
    for (int k = 0; k < kNoiseParts; ++k) {
      call.noise_is_tensor[k] = rarely(3);
      call.noise[k] = small(k == kIdsPart || k == kElementPart ? Dims{rows()} : Dims{}, kInt64);
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
    if (shape.size() == 2 && rarely(4)) x.strides = {1, x.shape[0] + below(3)};
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
      case 0:
        return call.number(below(5));
      case 1:
        return call.coef(small({rarely(2) ? 1 : rows()}, dtype));
      case 2:
        return call.coef(small({}, dtype));
      default:
        return call.coef(small({rarely(3) ? rows() : 10, 1 + below(left + rarely(9))}, dtype));
    }
  }

  // ---- properties of a plan

  static int64_t offset(const TensorView& x, int64_t i) {
    int64_t at = 0;
    for (int d = x.ndim - 1; d >= 0; --d) {
      at += i % x.shape[d] * x.strides[d];
      i /= x.shape[d];
    }
    return at;
  }

  // Position (row, column) of the plan is the same element in every tensor, and the loop visits each
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
      if (op.generates_noise) check_noise_order(args, i % (sample ? sample : 1), column);
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
        const bool in_place =
            in == out && (plan.args.rows == 1 || plan.args.row_stride[k] == plan.args.cols);
        for (int64_t i = 0; !in_place && i < plan.elements; ++i)
          CHECK(!written.count(const_cast<char*>(in) + offset(call.in[k].view(), i) * item));
      }
      for (int other = 0; other < o; ++other)
        CHECK(!written.count(static_cast<char*>(plan.args.out[other])));
      check_not_written(written, call, plan);
    }
  }

  // Nothing that is read while a row is written.
  static void check_not_written(const std::set<char*>& written, TestCall& call, const Plan& plan) {
    const auto apart = [&](const Tensor& tensor) {
      Tensor x = tensor;
      const TensorView view = x.view();
      for (int64_t i = 0; i < count(view); ++i)
        CHECK(
            !written.count(static_cast<char*>(view.data) + offset(view, i) * view.dtype.bits / 8));
    };
    for (size_t k = 0; k < call.coef_tensors.size(); ++k)
      if (call.coef_is_tensor[k]) apart(call.coef_tensors[k]);
    if (plan.args.step) apart(call.step);
    for (int k = 0; call.has_noise && k < kNoiseParts; ++k)
      if (call.noise_is_tensor[k]) apart(call.noise[k]);
    for (int k = 0; k < call.op->n_sum; ++k) apart(call.out[call.op->n_out + k]);
  }

  // Each coefficient of each row is an element of the tensor that was passed for it.
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
          const int64_t at =
              (x.ndim ? row * x.strides[0] : 0) + (x.ndim == 2 ? c * x.strides[1] : 0);
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

void fuzz_plans(int calls) {
  Fuzzer fuzzer(20240229);
  for (int i = 0; i < calls; ++i) fuzzer.one();
  for (size_t k = 0; k < std::size(kCodeNames); ++k)
    std::printf("%s %ld\n", kCodeNames[k], fuzzer.counts[k]);
}

}  // namespace diffcore
