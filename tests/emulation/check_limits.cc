// Indices beyond 2^31 and grids beyond 65535 blocks, emulated. Memory of huge tensors is reserved but
// touched at a few places only; with the argument `ends` only the blocks at the ends of a grid run.
//
//   EMULATION_BLOCKS=ends check_limits ends    (a second)
//   check_limits rows                          (minutes)
//   check_limits quantiles                     (half a minute)
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <string>
#include <vector>

#include "cuda/kernels.h"
#include "noise/normal.h"
#include "ops/all.h"

namespace diffcore {
namespace {

template <class... Op>
int index_of(const char* name, bool generates, OpList<Op...>) {
  const char* const names[] = {Op::name...};
  const bool generated[] = {kGeneratesNoise<Op>...};
  for (int op = 0; op < int(sizeof...(Op)); ++op)
    if (!strcmp(names[op], name) && generated[op] == generates) return op;
  fprintf(stderr, "no op named %s\n", name);
  exit(2);
}

void* reserve(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p != MAP_FAILED) return p;
  perror("mmap");
  exit(2);
}
template <class T>
T* reserved(int64_t elements) {
  return static_cast<T*>(reserve(size_t(elements) * sizeof(T)));
}

void run(const char* name, bool generates, Dtype dtype, LaunchArgs args, int device = 0) {
  const auto workspace = [](void*, int64_t bytes) { return reserve(size_t(bytes)); };
  const char* error = run_on_cuda(index_of(name, generates, AllOps{}), dtype, args,
                                  Device{device, nullptr}, workspace, nullptr);
  if (!error) return;
  fprintf(stderr, "%s: %s\n", name, error);
  exit(2);
}

int failures = 0;
void expect(bool right, const char* what) {
  if (right) return;
  ++failures;
  printf("FAILED: %s\n", what);
}

void one_long_row() {
  for (const int64_t cols : {(int64_t(1) << 33) + 4, (int64_t(1) << 33) + 5}) {
    LaunchArgs args;
    args.rows = 1;
    args.cols = args.row_stride[0] = cols;
    float *x = reserved<float>(cols), *y = reserved<float>(cols);
    args.in[0] = x;
    args.out[0] = y;
    args.coef[0].value = 2;
    args.coef[1].value = 1;
    args.noise.seed_value = 5;
    const std::vector<int64_t> places{0, 1, 4095, cols - 1500, cols - 6, cols - 1};
    for (const int64_t i : places) x[i] = float(i % 1000);
    run("linear_combination", true, kF32, args);
    const NoiseKey key = noise_key(args.noise, 0);
    for (const int64_t i : places)
      expect(y[i] == fmaf(2, float(i % 1000), normal(key, uint64_t(i))), "a row of 2^33 elements");
  }
}

void rows_far_apart() {
  const int64_t rows = 5, cols = int64_t(1) << 31, stride = cols + (int64_t(1) << 30);
  LaunchArgs args;
  args.rows = rows;
  args.cols = cols;
  auto* y = reserved<float>(rows * cols);
  args.out[0] = y;
  float* x[2];
  for (int k = 0; k < 2; ++k) {
    args.in[k] = x[k] = reserved<float>(rows * stride);
    args.row_stride[k] = stride;
  }
  for (int64_t r = 0; r < rows; ++r) {
    x[0][r * stride + cols - 1] = float(r + 1);
    x[1][r * stride + cols - 1] = 1;
  }
  args.coef[0].value = 2;
  args.coef[1].value = 3;
  run("linear_combination", false, kF32, args);
  for (const int64_t r : {0, 1, 3, 4})
    expect(y[r * cols + cols - 1] == float(2 * (r + 1) + 3), "rows of 2^31, 3 * 2^30 apart");
}

void blocks_in_three_dimensions() {
  const int64_t rows = int64_t(65535) * 129 * 2, cols = 260;
  LaunchArgs args;
  args.rows = rows;
  args.cols = cols;
  float *x = reserved<float>(rows * cols), *y = reserved<float>(rows * cols);
  args.in[0] = args.in[1] = x;
  args.row_stride[0] = args.row_stride[1] = cols;
  args.out[0] = y;
  x[rows * cols - 1] = 4;
  x[0] = 3;
  args.coef[0].value = 2;
  args.coef[1].value = 3;
  run("linear_combination", false, kF32, args);
  expect(y[rows * cols - 1] == 20 && y[0] == 15, "2^24 rows");
}

void one_long_sum() {
  const int64_t cols = (int64_t(1) << 33) + 3;
  LaunchArgs args;
  args.rows = 1;
  args.cols = cols;
  for (int k = 0; k < 2; ++k) {
    args.in[k] = reserved<uint16_t>(cols);
    args.row_stride[k] = cols;
  }
  float sum = -1;
  args.sum[0] = &sum;
  args.coef[0].value = 1;
  static_cast<uint16_t*>(const_cast<void*>(args.in[0]))[cols - 1] = 0x4000;  // 2 in bfloat16
  run("standard_normal_kl_sum", false, kBf16, args);
  expect(sum == 2, "a sum of 2^33 elements");
}

// More rows than a grid has in y, a cluster each. `ends` runs the clusters at the ends of y, so it
// sums the rows at the ends of both z.
void medium_sums_in_three_dimensions() {
  const int64_t rows = 65537, cols = 8 * 1024 + 1;  // nine rounds, so three blocks are empty
  LaunchArgs args;
  args.rows = rows;
  args.cols = cols;
  std::vector<float> x(size_t(cols), 1.f), zero(size_t(cols), 0.f), sums(size_t(rows), -1.f);
  std::vector<double> scale(size_t(rows), 0.0);
  args.in[0] = x.data();
  for (int k = 1; k < 4; ++k) args.in[k] = zero.data();
  for (size_t r = 0; r < scale.size(); ++r) scale[r] = double(r % 7);
  args.coef[0].data = scale.data();
  args.coef[0].stride = 1;
  args.coef[0].is_double = true;
  args.sum[0] = sums.data();
  run("normal_kl_sum", false, kF32, args);
  for (const size_t r : {0, 1, 65533, 65534, 65535, 65536})
    expect(sums[r] == 0.5f * float(cols) * float(scale[r]), "medium sums of more than 65535 rows");
  expect(sums[8] == -1, "a second launch, which has written other rows");
}

// More rows than blocks of `fold`, so that its loop runs twice: the barrier at its end is needed.
void many_sums_of_several_blocks() {
  const int64_t rows = 65539, cols = 8200;
  LaunchArgs args;
  args.rows = rows;
  args.cols = cols;
  std::vector<float> x(size_t(cols), 0.f), zero(size_t(cols), 0.f), sums(size_t(rows), -1.f);
  std::vector<double> scale(size_t(rows), 0.0);
  args.in[0] = x.data();
  for (int k = 1; k < 4; ++k) args.in[k] = zero.data();
  double expected = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = float(i % 3);
    expected += 0.5 * x[i] * x[i];
  }
  for (size_t r = 0; r < scale.size(); ++r) scale[r] = double(r % 7);
  args.coef[0].data = scale.data();
  args.coef[0].stride = 1;
  args.coef[0].is_double = true;
  args.sum[0] = sums.data();
  run("normal_kl_sum", false, kF32, args, 1);  // without clusters
  bool right = true;
  for (size_t r = 0; r < sums.size(); ++r)
    right &= fabs(sums[r] - expected * scale[r]) <= 1e-6 * expected * 7;
  expect(right, "65539 sums of several blocks");
}

// More rows than the 4096 blocks of a selection take at once.
void many_quantiles(int64_t rows, int64_t cols) {
  LaunchArgs args;
  args.rows = rows;
  args.cols = cols;
  std::vector<float> x(size_t(rows * cols)), zero(size_t(cols), 0.f), sums(size_t(rows), -1.f);
  for (size_t i = 0; i < x.size(); ++i) x[i] = float(i % 8191) * (i % 2 ? 1 : -1);
  args.in[0] = x.data();
  args.row_stride[0] = cols;
  args.in[1] = zero.data();
  // x_0 = x; the largest element; no upper limit
  double c[kStepCoefs + 2] = {};
  StepRow<double>(c).a_x() = 1;
  c[kStepCoefs] = 1;
  c[kStepCoefs + 1] = 1e9;
  for (int k = 0; k < kStepCoefs + 2; ++k) args.coef[k].value = c[k];
  args.sum[0] = sums.data();
  run("x0_quantile", false, kF32, args);
  bool right = true;
  for (size_t r = 0; r < sums.size(); ++r) {
    float most = 1;
    for (size_t i = 0; i < size_t(cols); ++i) most = std::max(most, fabsf(x[r * size_t(cols) + i]));
    right &= sums[r] == most;
  }
  expect(right, "the quantiles of many rows");
}

}  // namespace
}  // namespace diffcore

int main(int argc, char** argv) {
  using namespace diffcore;
  const std::string which = argc > 1 ? argv[1] : "";
  if (which == "ends") {
    one_long_row();
    rows_far_apart();
    blocks_in_three_dimensions();
    one_long_sum();
    medium_sums_in_three_dimensions();
  } else if (which == "rows") {
    many_sums_of_several_blocks();
  } else if (which == "quantiles") {
    many_quantiles(4096 * 256 + 5, 3);  // a thread to a row
    many_quantiles(4096 * 8 + 5, 100);  // a warp
    many_quantiles(4096 + 5, 513);      // a block
  } else {
    fprintf(stderr, "usage: check_limits ends | rows | quantiles\n");
    return 2;
  }
  printf("%d failures\n", failures);
  return failures != 0;
}
