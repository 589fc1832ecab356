// Launches as function calls, and the errors of the CUDA runtime as messages.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

namespace diffcore {

constexpr int kThreads = 256;
constexpr int kCluster = 8;        // blocks: the most that all devices with clusters can run
constexpr int kMaxThreads = 1024;  // of a block

// Null for success. Clears the error, which the runtime would report again after the next launch.
inline const char* message_of(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

struct Grid {
  dim3 blocks;
  unsigned cluster;  // of so many blocks in x; 1: no clusters
  unsigned threads;  // of a block

  Grid(unsigned blocks, unsigned threads = kThreads)
      : blocks(blocks), cluster(1), threads(threads) {}
  Grid(dim3 blocks, unsigned cluster) : blocks(blocks), cluster(cluster), threads(kThreads) {}
};

// The configuration of a launch. Not copied: it points into itself.
struct LaunchConfig : cudaLaunchConfig_t {
  cudaLaunchAttribute in_clusters{};

  LaunchConfig(Grid grid, cudaStream_t on_stream) : cudaLaunchConfig_t{} {
    gridDim = grid.blocks;
    blockDim = dim3(grid.threads);
    stream = on_stream;
    if (grid.cluster == 1) return;
    in_clusters.id = cudaLaunchAttributeClusterDimension;
    in_clusters.val.clusterDim.x = grid.cluster;
    in_clusters.val.clusterDim.y = in_clusters.val.clusterDim.z = 1;
    attrs = &in_clusters;
    numAttrs = 1;
  }
  LaunchConfig(const LaunchConfig&) = delete;
  LaunchConfig& operator=(const LaunchConfig&) = delete;
};

// kernel<<<grid, grid.threads, 0, stream>>>(argument...), without the syntax that only nvcc knows. Not
// inlined, as some 400 kernels have few types of parameters.
template <class... Parameter, class... Argument>
__attribute__((noinline)) const char* launch(void (*kernel)(Parameter...), Grid grid,
                                             cudaStream_t stream, const Argument&... argument) {
  const LaunchConfig config(grid, stream);
  return message_of(cudaLaunchKernelEx(&config, kernel, argument...));
}

// Loads the code of a kernel onto the current device.
template <class... Parameter>
const char* load_code(void (*kernel)(Parameter...)) {
  cudaFuncAttributes attributes;
  return message_of(cudaFuncGetAttributes(&attributes, kernel));
}

// What is known of a kernel on each device: whether it can run in clusters of kCluster blocks.
struct ClusterSupport {
  enum Answer : char { kUnknown, kNo, kYes };
  static constexpr int kDevices = 16;  // further ones are asked in each call
  std::atomic<Answer> answers[kDevices];

  bool here(const void* kernel);  // on the current device; device.cu
};

}  // namespace diffcore
