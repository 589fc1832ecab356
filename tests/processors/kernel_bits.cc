// Runs every CPU kernel, on every storage type, on inputs that are the same on all machines, and
// prints a hash of each result: programs for two processors must print the same lines. A comment
// first names the instruction set, which DIFFCORE_ISA chooses.
//
//   kernel_bits [part of an op's name]
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <memory>
#include <random>
#include <vector>

#include "cpu/kernels.h"
#include "ops/all.h"

namespace diffcore {
namespace {

struct OpTraits {
  const char* name;
  int n_in, n_out, n_sum, n_coef;
  bool generates, selects;
};
template <class... Op>
std::vector<OpTraits> traits_of(OpList<Op...>) {
  return {{Op::name, kReads<Op>, Op::n_out, kStored<Op>, Op::n_coef, kGeneratesNoise<Op>,
           kSelects<Op>}...};
}

struct Shape {
  int64_t rows, cols;
  int64_t inner = 1;     // runs of the noise, as in channels_last
  bool special = false;  // infinities, NaN and other numbers at the ends of formulas
};
// Rows shorter than a vector, than a batch of noise and than a tile; with a tail; of two chunks.
constexpr Shape kShapes[] = {
    {300, 1},  {5, 3},     {37, 20},           {3, 1024},    {2, 4099},
    {1, 9001}, {3, 48, 3}, {1, 5 * 4 * 33, 5}, {2, 3072, 3}, {11, 403, 1, true}};
// More keys than a selection keeps candidates.
constexpr Shape kSelected = {3, 20001};

constexpr const char* kDtypeNames[kDtypes] = {"f32", "f64", "bf16", "f16"};

constexpr float kSpecial[] = {0.f,     -0.f,    INFINITY, -INFINITY, NAN,    1e-43f,
                              -1e-39f, 1e-30f,  -1e-10f,  3e-6f,     1.f,    -1.f,
                              0.5f,    88.5f,   -88.5f,   89.5f,     -104.f, 20.f,
                              -30.f,   65519.f, 65520.f,  -1e30f,    3e38f,  -3e38f};

// Only integers and exact conversions, and no function of a library, which machines round apart.
class Random {
 public:
  double uniform() { return double(random_()) * 0x1p-32 + double(random_()) * 0x1p-64; }
  double around_zero() { return (uniform() - uniform()) + (uniform() - uniform()); }

 private:
  std::mt19937 random_{7};
};

template <class S>
class Run {
 public:
  Run(int op, Dtype dtype, const OpTraits& traits, const Shape& shape)
      : op_(op), dtype_(dtype), traits_(traits), shape_(shape) {
    args_.rows = shape.rows;
    args_.cols = shape.cols;
    make_inputs();
    make_coefficients();
    const size_t elements = size_t(shape.rows * shape.cols);
    for (int k = 0; k < traits.n_out; ++k)
      args_.out[k] = outs_.emplace_back(new S[elements]()).get();
    for (int k = 0; k < traits.n_sum; ++k)
      args_.sum[k] = sums_.emplace_back(new Compute<S>[size_t(shape.rows)]()).get();
    args_.noise.seed_value = 0x123456789abcdef;
    args_.noise.stream_value = 0xfedcba98;
    args_.noise.first_id = -3;
    args_.noise.first_block = 0xfffffff0;  // so the number of a block wraps around
    args_.noise.inner = shape.inner;
  }

  void print() {
    run_on_cpu(op_, dtype_, args_);
    for (int k = 0; k < traits_.n_out; ++k)
      print("output", k, outs_[size_t(k)].get(), shape_.rows * shape_.cols);
    for (int k = 0; k < traits_.n_sum; ++k) print("sum", k, sums_[size_t(k)].get(), shape_.rows);
  }

 private:
  using R = Compute<S>;

  void make_inputs() {
    const int64_t elements = shape_.rows * shape_.cols;
    constexpr int64_t kCount = sizeof(kSpecial) / sizeof(float);
    for (int k = 0; k < traits_.n_in; ++k) {
      S* const x = ins_.emplace_back(new S[size_t(elements)]).get();
      for (int64_t i = 0; i < elements; ++i) {
        double value = random_.around_zero() * (traits_.selects ? 100 : 1);
        // Each input in another order, so that many pairs meet.
        if (shape_.special && i % 3) value = kSpecial[i * (5 + 2 * k) / (1 + k) % kCount];
        x[i] = Store<S>::from(R(value));
      }
      args_.in[k] = x;
      args_.row_stride[k] = shape_.cols;
    }
  }

  void make_coefficients() {
    for (int k = 0; k < traits_.n_coef; ++k) {
      double* const c = coefs_.emplace_back(new double[size_t(shape_.rows)]).get();
      for (int64_t row = 0; row < shape_.rows; ++row) {
        c[row] = 0.2 + random_.uniform();
        if (traits_.selects && k == traits_.n_coef - 2) c[row] = fmin(c[row], 1);  // the ratio
        if (traits_.selects && k == traits_.n_coef - 1) c[row] = INFINITY;         // its maximum
        if (k == 0 && !strcmp(traits_.name, "guidance_weights")) c[row] = double(row % 5);
        if (k == 9 && !strncmp(traits_.name, "vlb_term", 8)) c[row] = double(row % 2);  // a decoder
      }
      args_.coef[k].data = c;
      args_.coef[k].stride = 1;
      args_.coef[k].is_double = true;
    }
  }

  // FNV-1a. Every NaN counts as the same: its sign and payload are a processor's own.
  template <class T>
  void print(const char* what, int k, const T* values, int64_t n) {
    uint64_t hash = 0xcbf29ce484222325;
    for (int64_t i = 0; i < n; ++i) {
      uint64_t bits = 0;
      const auto value = load_value(values[i]);
      memcpy(&bits, &values[i], sizeof(T));
      if (value != value) bits = ~uint64_t(0);
      for (int byte = 0; byte < 8; ++byte)
        hash = (hash ^ (bits >> 8 * byte & 0xff)) * 0x100000001b3;
    }
    printf("%s%s %s %lldx%lld%s%s %s %d: %016llx\n", traits_.name,
           traits_.generates ? " (generated noise)" : "", kDtypeNames[dtype_],
           static_cast<long long>(shape_.rows), static_cast<long long>(shape_.cols),
           shape_.inner > 1 ? " in runs" : "", shape_.special ? " special" : "", what, k,
           static_cast<unsigned long long>(hash));
  }

  const int op_;
  const Dtype dtype_;
  const OpTraits& traits_;
  const Shape& shape_;
  Random random_;
  LaunchArgs args_;
  std::vector<std::unique_ptr<S[]>> ins_, outs_;
  std::vector<std::unique_ptr<R[]>> sums_;
  std::vector<std::unique_ptr<double[]>> coefs_;
};

template <class S>
void print_op(int op, Dtype dtype, const OpTraits& traits) {
  if (traits.generates && dtype == kF64 && traits.n_in) return;          // plan.cc generates first
  const bool runs = traits.generates && !traits.n_sum && dtype != kF64;  // as in plan.cc
  for (const Shape& shape : kShapes)
    if (shape.inner == 1 || runs) Run<S>(op, dtype, traits, shape).print();
  if (traits.selects) Run<S>(op, dtype, traits, kSelected).print();
}

}  // namespace
}  // namespace diffcore

int main(int argc, char** argv) {
  using namespace diffcore;
  printf("# %s\n", cpu_isa());
  const std::vector<OpTraits> ops = traits_of(AllOps{});
  for (size_t op = 0; op < ops.size(); ++op) {
    if (argc > 1 && !strstr(ops[op].name, argv[1])) continue;
    print_op<float>(int(op), kF32, ops[op]);
    print_op<double>(int(op), kF64, ops[op]);
    print_op<Bf16>(int(op), kBf16, ops[op]);
    print_op<F16>(int(op), kF16, ops[op]);
  }
}
