// Runs every kernel of csrc/cuda, emulated, on the same arguments as the CPU's kernel, and compares:
// outputs and quantiles bit by bit, sums to rounding. A sum must also keep its bits where the same
// row is alone, begins one element later in memory, or is summed on a device without clusters.
//
//   check_kernels [part of an op's name [a dtype: f32, f64, bf16 or f16]]
#include <cuda_runtime.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cuda/kernels.h"
#include "cuda/row_worker.cuh"
#include "ops/all.h"

namespace diffcore {
namespace {

struct OpTraits {
  const char* name;
  int n_in, n_out, n_sum, n_coef, unroll;
  bool generates, selects, in_double;
};
template <class... Op>
std::vector<OpTraits> traits_of(OpList<Op...>) {
  return {{Op::name, kReads<Op>, Op::n_out, kStored<Op>, Op::n_coef, kUnroll<Op>,
           kGeneratesNoise<Op>, kSelects<Op>, Op::in_double}...};
}

constexpr const char* kDtypeNames[kDtypes] = {"f32", "f64", "bf16", "f16"};
size_t item_size(Dtype dtype) { return dtype == kF64 ? 8 : dtype == kF32 ? 4 : 2; }
size_t sum_size(Dtype dtype) { return dtype == kF64 ? 8 : 4; }

// As long as it has to be, so a sanitizer sees accesses beyond it, and filled with NaN.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : memory_(new char[bytes]), bytes_(bytes) {
    memset(memory_.get(), 0xff, bytes);
  }
  char* data() const { return memory_.get(); }
  bool operator==(const Buffer& other) const {
    return bytes_ == other.bytes_ && !memcmp(data(), other.data(), bytes_);
  }

 private:
  std::unique_ptr<char[]> memory_;
  size_t bytes_;
};

void write(char* at, Dtype dtype, float value) {
  const double wide = value;
  const Bf16 bf16 = Store<Bf16>::from(value);
  const F16 f16 = Store<F16>::from(value);
  const void* const as[kDtypes] = {&value, &wide, &bf16, &f16};
  memcpy(at, as[dtype], item_size(dtype));
}

double read_sum(const Buffer& sums, Dtype dtype, int64_t row) {
  if (dtype == kF64) return reinterpret_cast<const double*>(sums.data())[row];
  return reinterpret_cast<const float*>(sums.data())[row];
}

struct Case {
  int op;
  OpTraits traits;
  Dtype dtype;
  int64_t rows, cols;
  int64_t offset;     // elements in memory before the first one
  int64_t gap;        // elements between the rows of the inputs
  int64_t inner = 1;  // runs of the noise, as in channels_last
};

struct Results {
  std::vector<Buffer> outs, sums;
  size_t allocations = 0;
};

// Of the emulation.
enum Where { kCpu, kClusters, kNoClusters };

// Rows `first` ... of the arguments that the seed determines.
struct Arguments {
  std::vector<std::vector<float>> values;  // of each input
  std::vector<std::vector<double>> coefs;  // a number per row

  Arguments(const OpTraits& op, int64_t rows, int64_t cols) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal(0, 0.5f);
    std::uniform_real_distribution<double> uniform(0.2, 1.2);
    for (int k = 0; k < op.n_in; ++k) {
      values.emplace_back(size_t(rows * cols));
      for (float& v : values.back()) v = normal(random);
    }
    for (int k = 0; k < op.n_coef; ++k) {
      coefs.emplace_back(size_t(rows));
      for (double& c : coefs.back()) c = uniform(random);
    }
    if (op.selects) {
      // The last two coefficients are the ratio and the largest result; the least is 1.
      for (double& ratio : coefs[size_t(op.n_coef) - 2]) ratio = fmin(ratio, 1);
      for (double& maximum : coefs[size_t(op.n_coef) - 1]) maximum = INFINITY;
      for (float& v : values[0]) v *= 100;
      for (int64_t row = 0; row < rows; ++row) make_special(int(row % 8), row * cols, cols);
    }
    // The kind of guidance, one of five.
    if (!strcmp(op.name, "guidance_weights"))
      for (size_t row = 0; row < size_t(rows); ++row) coefs[0][row] = double(row % 5);
    // Every other row uses the formula of a decoder row: column 9 of kVlbColumns.
    if (!strncmp(op.name, "vlb_term", 8))
      for (size_t row = 0; row < size_t(rows); ++row) coefs[9][row] = double(row % 2);
  }

 private:
  // Rows whose quantile is a special one. Where it could be less than 1, the least result, the
  // special numbers are only a part of the row, and change the ranks of the others.
  void make_special(int kind, int64_t first, int64_t cols) {
    for (size_t k = 0; k < values.size(); ++k) {
      float* const v = &values[k][size_t(first)];
      for (int64_t i = 0; i < cols; ++i) {
        if (kind == 3) v[i] = k ? 0.f : 77.f;                                   // all are equal
        if (kind == 4) v[i] = i % 3 ? v[i] : 0.f;                               // zeros
        if (kind == 5) v[i] *= i % 4 == 0 ? 1e-43f : i % 4 == 1 ? 1e-9f : 1.f;  // subnormal numbers
        if (kind == 6) v[i] = rintf(v[i] / 32) * 32;                            // many are equal
        if (kind == 7) v[i] = i % 5 && cols > 1 ? v[i] : k ? 0.f : INFINITY;
      }
    }
    // The quantile of a row with NaN is NaN, and infinity is the largest number.
    if (kind == 0 && cols > 1) values[0][size_t(first)] = INFINITY;
    if (kind == 2 && cols > 1) values[0][size_t(first + 1)] = NAN;
  }
};

Results run(const Case& c, const Arguments& given, Where where, int64_t first, int64_t rows,
            int64_t offset, int64_t gap) {
  const size_t size = item_size(c.dtype);
  const int64_t elements = rows * c.cols + offset, stride = c.cols + gap;
  std::vector<Buffer> ins;
  Results results;
  LaunchArgs args;
  args.rows = rows;
  args.cols = c.cols;
  for (int k = 0; k < c.traits.n_in; ++k) {
    ins.emplace_back(size_t((rows - 1) * stride + c.cols + offset) * size);
    char* begin = ins.back().data() + size_t(offset) * size;
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = 0; i < c.cols; ++i)
        write(begin + size_t(row * stride + i) * size, c.dtype,
              given.values[size_t(k)][size_t((first + row) * c.cols + i)]);
    args.in[k] = begin;
    args.row_stride[k] = stride;
  }
  for (int k = 0; k < c.traits.n_out; ++k) {
    results.outs.emplace_back(size_t(elements) * size);
    args.out[k] = results.outs.back().data() + size_t(offset) * size;
  }
  for (int k = 0; k < c.traits.n_sum; ++k) {
    results.sums.emplace_back(size_t(rows) * sum_size(c.dtype));
    args.sum[k] = results.sums.back().data();
  }
  for (int k = 0; k < c.traits.n_coef; ++k) {
    args.coef[k].data = given.coefs[size_t(k)].data() + first;
    args.coef[k].stride = 1;
    args.coef[k].is_double = true;
  }
  args.noise.seed_value = 12345;
  args.noise.stream_value = 9;
  args.noise.first_id = first;
  args.noise.inner = c.inner;
  if (where == kCpu) {
    run_on_cpu(c.op, c.dtype, args);
    return results;
  }
  std::vector<Buffer> workspace;
  const auto allocate = [](void* context, int64_t bytes) -> void* {
    auto& workspace = *static_cast<std::vector<Buffer>*>(context);
    workspace.emplace_back(size_t(bytes));
    return workspace.back().data();
  };
  const Device device{where == kNoClusters, nullptr};
  if (const char* error = run_on_cuda(c.op, c.dtype, args, device, allocate, &workspace)) {
    fprintf(stderr, "%s: %s\n", c.traits.name, error);
    exit(2);
  }
  results.allocations = workspace.size();
  return results;
}

int comparisons = 0, failures = 0;

void expect(bool right, const Case& c, const char* what) {
  ++comparisons;
  if (right) return;
  if (++failures > 20) return;  // enough to read
  printf("FAILED: %s%s %s, %lld x %lld, offset %lld, gap %lld, %lld runs: %s\n", c.traits.name,
         c.traits.generates ? " (generated noise)" : "", kDtypeNames[c.dtype],
         static_cast<long long>(c.rows), static_cast<long long>(c.cols),
         static_cast<long long>(c.offset), static_cast<long long>(c.gap),
         static_cast<long long>(c.inner), what);
}

// Within the error of adding `cols` numbers in any order, of a sum without cancellation.
bool close(double a, double b, const Case& c) {
  if (a == b || (a != a && b != b)) return true;
  const double ulp = c.dtype == kF64 ? 0x1p-53 : 0x1p-24;
  return fabs(a - b) <= 8 * sqrt(double(c.cols)) * ulp * fmax(fmax(fabs(a), fabs(b)), 1);
}

// The rounds of a block that add the elements of a row.
int64_t rounds_of(const Case& c) {
  const int64_t per_round = c.traits.unroll * int64_t(16 / item_size(c.dtype)) * kThreads;
  return (c.cols + per_round - 1) / per_round;
}

void check(const Case& c, const Arguments& arguments) {
  const Results cpu = run(c, arguments, kCpu, 0, c.rows, c.offset, c.gap);
  const Results cuda = run(c, arguments, kClusters, 0, c.rows, c.offset, c.gap);
  expect(cpu.outs == cuda.outs, c, "outputs differ from the CPU's");
  if (!c.traits.n_sum) return;
  bool near = true;
  for (int64_t row = 0; row < c.rows; ++row) {
    const double a = read_sum(cpu.sums[0], c.dtype, row), b = read_sum(cuda.sums[0], c.dtype, row);
    near &= c.traits.selects ? a == b || (a != a && b != b) : close(a, b, c);
  }
  expect(near, c, "sums differ from the CPU's");
  const int64_t last = c.rows - 1;
  const Results moved = run(c, arguments, kClusters, 0, c.rows, c.offset ? 0 : 1, 0);
  expect(moved.sums == cuda.sums, c, "sums depend on the address");
  const Results alone = run(c, arguments, kClusters, last, 1, 0, 0);
  const auto at = size_t(last) * sum_size(c.dtype);
  expect(!memcmp(alone.sums[0].data(), cuda.sums[0].data() + at, sum_size(c.dtype)), c,
         "the sum of a row depends on the batch");
  if (c.traits.selects || rounds_of(c) <= 8) return;
  const Results folded = run(c, arguments, kNoClusters, 0, c.rows, c.offset, c.gap);
  expect(folded.sums == cuda.sums && folded.outs == cuda.outs, c, "results depend on the device");
  expect(folded.allocations == 1 && cuda.allocations == (rounds_of(c) > 64), c,
         "partial sums are in memory where they should not be, or the other way around");
}

void check(const Case& c) { check(c, Arguments(c.traits, c.rows, c.cols)); }

struct Shape {
  int64_t rows, cols, inner;
};
// Fewer columns than a pack; whole packs; more rows than a block has; an incomplete last pack; one
// row, so packs with a tail; several rounds; several blocks to a row; channels_last.
constexpr Shape kShapes[] = {{5, 3, 1},    {3, 1024, 1},  {37, 20, 1},       {2, 4099, 1},
                             {1, 9001, 1}, {3, 16384, 1}, {2, 40004, 1},     {300, 1, 1},
                             {3, 48, 3},   {2, 3072, 3},  {1, 5 * 4 * 33, 5}};
// Rows of each kernel of a selection, and on both sides of where the next one begins: parts of a warp,
// 256 to 1,024 threads of a block, several blocks. Lengths that are odd, and multiples of four.
constexpr int64_t kSelected[] = {1,    2,    5,    16,    31,    32,    33,    128,
                                 132,  255,  256,  257,   512,   513,   1024,  4095,
                                 4096, 4097, 8193, 12288, 16384, 16385, 65536, 196608};
// More partial sums than a thread block reads at a time, in float64.
constexpr Shape kManyPartials = {1, 4300001, 1};

// Sums around the limits between one block, a cluster and many blocks: 8 and 64 rounds. Where a row
// has 9 rounds, a block of the cluster has two, so three are empty.
void check_medium_sums(int op, const OpTraits& traits, Dtype dtype) {
  const int64_t per_round = traits.unroll * int64_t(16 / item_size(dtype)) * kThreads;
  const auto check_at = [&](int64_t rows, int64_t cols, int64_t offset, int64_t gap) {
    check({op, traits, dtype, rows, cols, offset, gap});
  };
  check_at(1, 8 * per_round, 0, 0);
  check_at(1, 8 * per_round + 1, 0, 0);
  check_at(3, 8 * per_round + 1, 1, 0);
  check_at(3, 9 * per_round, 0, 3);
  check_at(1, 16 * per_round + 3, 0, 0);
  check_at(1, 64 * per_round, 0, 0);
  check_at(1, 64 * per_round + 1, 0, 0);
}

// The three elements after the last pack count only if they are added to the partial sum of another
// block than their own. In it a 2 of their thread absorbs each of them.
void check_single_elements(int op, const OpTraits& traits) {
  const int64_t cols = 9 * 4 * kThreads + 3;  // ten rounds of packs of four, two of them in a block
  Arguments arguments(traits, 1, cols);
  for (auto& values : arguments.values) std::fill(values.begin(), values.end(), 0.f);
  arguments.values[0][8 * 4 * kThreads] = 2;  // sqrt(2 * 2)
  for (int i = 1; i <= 3; ++i) arguments.values[0][size_t(cols - i)] = 0.95f * 0x1p-11f;
  check({op, traits, kF32, 1, cols, 0, 0}, arguments);
}

void check_op(int op, const OpTraits& traits, const char* only) {
  for (int dtype = 0; dtype < kDtypes; ++dtype) {
    if (only && strcmp(only, kDtypeNames[dtype])) continue;
    if (traits.generates && dtype == kF64 && traits.n_in) continue;  // plan.cc generates first
    for (const Shape& shape : kShapes) {
      const bool runs = traits.generates && !traits.n_sum && dtype != kF64;  // as in plan.cc
      if (shape.inner > 1 && !runs) continue;
      const auto check_at = [&](int64_t offset, int64_t gap) {
        check({op, traits, Dtype(dtype), shape.rows, shape.cols, offset, gap, shape.inner});
      };
      check_at(0, 0);
      if (shape.cols > 17000) continue;
      check_at(1, 0);
      if (shape.rows > 1 && traits.n_in) check_at(0, 3);
    }
    if (traits.n_sum && !traits.selects) check_medium_sums(op, traits, Dtype(dtype));
    if (dtype == kF32 && !strcmp(traits.name, "normal_kl_sum")) check_single_elements(op, traits);
    for (const int64_t cols : kSelected) {
      if (!traits.selects) break;
      const auto check_at = [&](int64_t offset, int64_t gap) {
        check({op, traits, Dtype(dtype),
               cols > 70000   ? 1
               : cols > 20000 ? 3
                              : 8,
               cols, offset, gap});
      };
      check_at(0, 0);
      if (cols > 1100) continue;
      check_at(1, 0);
      check_at(0, 8);
    }
    if (dtype == kF64 && !strcmp(traits.name, "normal_kl_sum"))
      check({op, traits, kF64, kManyPartials.rows, kManyPartials.cols, 0, 0, kManyPartials.inner});
  }
}

}  // namespace
}  // namespace diffcore

int main(int argc, char** argv) {
  using namespace diffcore;
  const std::vector<OpTraits> ops = traits_of(AllOps{});
  const char *part = argc > 1 ? argv[1] : "", *dtype = argc > 2 ? argv[2] : nullptr;
  for (size_t op = 0; op < ops.size(); ++op)
    if (strstr(ops[op].name, part)) check_op(int(op), ops[op], dtype);
  printf("%d comparisons, %d failures\n", comparisons, failures);
  return failures != 0;
}
