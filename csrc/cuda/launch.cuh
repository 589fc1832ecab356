// Launches as function calls, and the errors of the CUDA runtime as messages.
#pragma once

#include <cuda_runtime.h>

namespace diffcore {

constexpr int kThreads = 256;
constexpr int kMaxThreads = 1024;  // of a block

// Null for success. Clears the error, which the runtime would report again after the next launch.
inline const char* message_of(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

// kernel<<<grid, threads, 0, stream>>>(argument...), without the syntax that only nvcc knows.
template <class... Parameter, class... Argument>
const char* launch_with(int threads, void (*kernel)(Parameter...), dim3 grid, cudaStream_t stream,
                        const Argument&... argument) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(unsigned(threads));
  config.stream = stream;
  return message_of(cudaLaunchKernelEx(&config, kernel, argument...));
}

template <class... Parameter, class... Argument>
const char* launch(void (*kernel)(Parameter...), dim3 grid, cudaStream_t stream,
                   const Argument&... argument) {
  return launch_with(kThreads, kernel, grid, stream, argument...);
}

// Loads the code of a kernel onto the current device.
template <class... Parameter>
const char* load_code(void (*kernel)(Parameter...)) {
  cudaFuncAttributes attributes;
  return message_of(cudaFuncGetAttributes(&attributes, kernel));
}

}  // namespace diffcore
