// Takes the square root of every argument that the noise can give it (csrc/noise/normal.h): the
// radius of a pair of normals is a function of the upper 31 bits of a random word, so there are
// 2^31. The CPU's roots must be the correctly rounded ones. CUDA's must be those of __fsqrt_rn,
// and the radii, logarithm included, must have the bits of the CPU's.
//
//   nvcc -O3 -std=c++17 -Icsrc -Xcompiler -fopenmp,-ffp-contract=off tests/cuda/square_roots.cu
//   c++ -O3 -std=c++17 -Icsrc -fopenmp -ffp-contract=off -x c++ tests/cuda/square_roots.cu
//
// The second form has the CPU's part alone. An argument N checks every Nth block of 2^20 arguments.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <vector>

#include "noise/normal.h"

namespace {

using diffcore::ScalarLanes;

constexpr uint32_t kBlock = 1u << 20, kBlocks = 1u << 11;  // 2^31 arguments together

// The sum of these over a block, in any order, stands for all of its radii.
DC_HD uint64_t mixed(uint32_t i, float radius) {
  uint64_t z = (uint64_t(i) << 32 | diffcore::bit_cast<uint32_t>(radius)) * 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

struct Found {
  uint64_t sum;    // of the mixed radii
  uint32_t wrong;  // square roots
};

Found on_the_cpu(uint32_t block) {
  Found found = {};
  for (uint32_t i = block * kBlock; i < (block + 1) * kBlock; ++i) {
    const float x = diffcore::squared_radius<ScalarLanes>(2 * i);
    const float root = diffcore::radius<ScalarLanes>(2 * i);
    // A root in double, rounded to float, is correctly rounded: 53 >= 2 * 24 + 2 bits.
    found.wrong += root != float(sqrt(double(x)));
    found.sum += mixed(i, root);
  }
  return found;
}

#ifdef __CUDACC__
constexpr int kThreads = 256, kEach = 64;

__global__ void on_cuda(uint32_t block, Found* found) {
  const uint32_t first = block * kBlock + (blockIdx.x * kThreads + threadIdx.x) * kEach;
  uint64_t sum = 0;
  uint32_t wrong = 0;
  for (uint32_t i = first; i < first + kEach; ++i) {
#ifdef __CUDA_ARCH__
    const float x = diffcore::squared_radius<ScalarLanes>(2 * i);
    const float root = diffcore::radius<ScalarLanes>(2 * i);
    wrong += root != __fsqrt_rn(x);
    sum += mixed(i, root);
#endif
  }
  atomicAdd(reinterpret_cast<unsigned long long*>(&found[block].sum), sum);
  atomicAdd(&found[block].wrong, wrong);
}

__global__ void radii(uint32_t block, float* out) {
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  out[i] = diffcore::radius<ScalarLanes>(2 * (block * kBlock + i));
}

void must(cudaError_t error) {
  if (error == cudaSuccess) return;
  printf("CUDA: %s\n", cudaGetErrorString(error));
  exit(2);
}

// Prints the first argument of a block whose radius differs.
void show(uint32_t block) {
  float* memory;
  std::vector<float> out(kBlock);
  must(cudaMalloc(&memory, kBlock * sizeof(float)));
  radii<<<kBlock / kThreads, kThreads>>>(block, memory);
  must(cudaMemcpy(out.data(), memory, kBlock * sizeof(float), cudaMemcpyDeviceToHost));
  must(cudaFree(memory));
  for (uint32_t k = 0; k < kBlock; ++k) {
    const uint32_t word = 2 * (block * kBlock + k);
    const float wanted = diffcore::radius<ScalarLanes>(word);
    if (out[k] == wanted) continue;
    printf("the word %u: -2 ln u is %a, its root %a on the CPU and %a on CUDA\n", word,
           diffcore::squared_radius<ScalarLanes>(word), wanted, out[k]);
    return;
  }
}

std::vector<Found> all_on_cuda(uint32_t every) {
  Found* memory;
  std::vector<Found> found(kBlocks);
  must(cudaMalloc(&memory, kBlocks * sizeof(Found)));
  must(cudaMemset(memory, 0, kBlocks * sizeof(Found)));
  for (uint32_t b = 0; b < kBlocks; b += every)
    on_cuda<<<kBlock / (kThreads * kEach), kThreads>>>(b, memory);
  must(cudaGetLastError());
  must(cudaMemcpy(found.data(), memory, kBlocks * sizeof(Found), cudaMemcpyDeviceToHost));
  must(cudaFree(memory));
  return found;
}
#endif

}  // namespace

int main(int count, char** arguments) {
  const uint32_t every = count > 1 ? uint32_t(atoi(arguments[1])) : 1;
  if (every < 1 || every > kBlocks) {
    printf("the argument must be between 1 and %u, got %s\n", kBlocks, arguments[1]);
    return 2;
  }
  const uint64_t roots = uint64_t((kBlocks + every - 1) / every) * kBlock;
  std::vector<Found> cpu(kBlocks);
#pragma omp parallel for schedule(dynamic)
  for (int b = 0; b < int(kBlocks); b += int(every)) cpu[b] = on_the_cpu(uint32_t(b));
  uint64_t wrong = 0, sum = 0;
  for (const Found& found : cpu) wrong += found.wrong, sum += found.sum;
  bool bad = wrong != 0;
  printf("CPU: %llu square roots, %llu of them wrong, checksum %016llx\n",
         static_cast<unsigned long long>(roots), static_cast<unsigned long long>(wrong),
         static_cast<unsigned long long>(sum));
#ifdef __CUDACC__
  const std::vector<Found> cuda = all_on_cuda(every);
  int differ = 0;
  wrong = 0;
  for (uint32_t b = 0; b < kBlocks; b += every) {
    wrong += cuda[b].wrong;
    if (cuda[b].sum == cpu[b].sum) continue;
    if (!differ++) show(b);
  }
  printf("CUDA: %llu square roots, %llu of them wrong, %d blocks of radii not those of the CPU\n",
         static_cast<unsigned long long>(roots), static_cast<unsigned long long>(wrong), differ);
  bad |= wrong != 0 || differ != 0;
#endif
  return bad;
}
