// Sums over the threads of a row, by a fixed tree.
#pragma once

#include <type_traits>

#include "core/macros.h"
#include "cuda/launch.cuh"

namespace diffcore {

// A sum in progress. Plain data, because it is stored in shared memory.
template <class T, bool kKeepsError = std::is_same_v<T, double>>
struct Total {
  T sum;

  __device__ __forceinline__ void add(T x) { sum += x; }
  __device__ __forceinline__ void add(Total other) { sum += other.sum; }
  __device__ __forceinline__ T value() const { return sum; }
  __device__ __forceinline__ Total from_lane(int below, int width) const {
    return {__shfl_down_sync(~0u, sum, below, width)};
  }
};

// There is no wider type than double to add doubles in, so the rounding errors are kept (Knuth's
// TwoSum).
template <>
struct Total<double, true> {
  double sum, error;

  __device__ __forceinline__ void add(double x) {
    const double next = sum + x, added = next - sum;
    error += (sum - (next - added)) + (x - added);
    sum = next;
  }
  __device__ __forceinline__ void add(Total other) {
    add(other.sum);
    error += other.error;
  }
  // If the sum is infinite the error is NaN.
  __device__ __forceinline__ double value() const { return sum - sum == 0 ? sum + error : sum; }
  __device__ __forceinline__ Total from_lane(int below, int width) const {
    return {__shfl_down_sync(~0u, sum, below, width), __shfl_down_sync(~0u, error, below, width)};
  }
};

// For a sum of partial sums, which are R.
template <class R>
using TotalOfPartials = Total<double, sizeof(R) == 8>;

// The sum over the threads_x threads of a row, in its thread 0. All threads of a block call it.
template <class T, bool kKeepsError>
__device__ __forceinline__ T row_sum(Total<T, kKeepsError> total, int threads_x, int x) {
  __shared__ Total<T, kKeepsError> by_warp[kThreads / 32];
  const int width = threads_x < 32 ? threads_x : 32;
#pragma unroll 1
  for (int below = width / 2; below > 0; below /= 2) total.add(total.from_lane(below, width));
  if (threads_x > 32) {
    const int warp = threadIdx.x / 32;
    __syncthreads();  // an earlier use of by_warp has been read
    if (threadIdx.x % 32 == 0) by_warp[warp] = total;
    __syncthreads();
    if (x == 0) {
#pragma unroll 1
      for (int w = 1; w < threads_x / 32; ++w) total.add(by_warp[warp + w]);
    }
  }
  return total.value();
}

}  // namespace diffcore
