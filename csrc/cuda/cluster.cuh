// The sum of a row over the blocks of a cluster: blocks that run at the same time and can write to
// each other's shared memory. Devices from sm_90 on have clusters.
#pragma once

#include <stdint.h>

#include "cuda/sum.cuh"

// As CUDA's header declares the functions of clusters. Without a device: the host, or the emulation.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define DC_CLUSTERS

namespace diffcore {

// The partial sums of a row, kSums of each block, in the shared memory of the first block of its cluster. `arrived` is an
// mbarrier, which counts bytes: so no thread has to wait until the outputs of its block are visible
// to others, as a barrier of the cluster with release semantics would make all of them do.
template <int kSums>
struct Inbox {
  double partials[kSums][kCluster];
  uint64_t arrived;
};

#ifdef __NVCC__
__device__ __forceinline__ unsigned shared_address(const void* p) {
  return unsigned(__cvta_generic_to_shared(p));
}
// One thread of the first block calls it before its barrier of the cluster.
__device__ __forceinline__ void expect_bytes(uint64_t* arrived, unsigned bytes) {
  const unsigned at = shared_address(arrived);
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes)
               : "memory");
}
// Stores into the first block of the cluster, where `arrived` then counts the bytes. The pointers are
// those that the first block has.
__device__ __forceinline__ void send_to_first(double* at, double value, uint64_t* arrived) {
  asm volatile(
      "{\n\t.reg .u32 at, arrived;\n\tmapa.shared::cluster.u32 at, %0, 0;\n\t"
      "mapa.shared::cluster.u32 arrived, %2, 0;\n\t"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f64 [at], %1, [arrived];\n\t}" ::
          "r"(shared_address(at)),
      "d"(value), "r"(shared_address(arrived))
      : "memory");
}
// Returns when all bytes have arrived and are visible.
__device__ __forceinline__ void wait_for_bytes(uint64_t* arrived) {
  asm volatile(
      "{\n\t.reg .pred done;\n\t"
      "AGAIN: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n\t"
      "@!done bra AGAIN;\n\t}" ::"r"(shared_address(arrived))
      : "memory");
}
#else  // tests/emulation
void expect_bytes(uint64_t* arrived, unsigned bytes);
void send_to_first(double* at, double value, uint64_t* arrived);
void wait_for_bytes(uint64_t* arrived);
#endif

template <int kSums>
__device__ __forceinline__ Inbox<kSums>& inbox() {
  __shared__ Inbox<kSums> only;
  return only;
}

// All threads of the cluster call it at their start.
template <int kSums>
__device__ __forceinline__ void enter_cluster() {
  Inbox<kSums>& box = inbox<kSums>();
  if (blockIdx.x == 0 && threadIdx.x == 0)
    expect_bytes(&box.arrived, unsigned(sizeof(box.partials)));
  __cluster_barrier_arrive_relaxed();  // expect_bytes has a fence
}

// Makes the partial sums in thread 0 of each block the sums of the row, in thread 0 of the first block.
// Adds as the kernel `fold`, whose further threads add zeros: with the same bits. All threads of the
// cluster call it, once. The first block stays until all have sent.
template <class R, int kSums>
__device__ __forceinline__ void cluster_sums(double* totals) {
  Inbox<kSums>& box = inbox<kSums>();
  __cluster_barrier_wait();  // the first block has started, and expects bytes
  if (threadIdx.x == 0) {
    DC_UNROLL
    for (int k = 0; k < kSums; ++k)
      send_to_first(&box.partials[k][blockIdx.x], totals[k], &box.arrived);
  }
  if (blockIdx.x != 0) return;
  if (threadIdx.x == 0) wait_for_bytes(&box.arrived);
  __syncthreads();
  DC_UNROLL
  for (int k = 0; k < kSums; ++k) {
    TotalOfPartials<R> mine = {};
    if (threadIdx.x < kCluster) mine.add(box.partials[k][threadIdx.x]);
    totals[k] = row_sum(mine, kCluster, int(threadIdx.x));
  }
}

}  // namespace diffcore
#endif
