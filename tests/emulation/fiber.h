// A CUDA thread of the block that runs, as a fiber; for one source file.
#pragma once

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "cuda_runtime.h"

#ifdef __SANITIZE_THREAD__
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#define TSAN(...) __VA_ARGS__
#else
#define TSAN(...)
#endif
// What runs on behalf of no CUDA thread, or switches between two, is no access of a CUDA thread.
#define UNCHECKED __attribute__((no_sanitize("thread", "address")))

namespace emulation {

constexpr int kMaxThreads = 1024, kWarp = 32;
constexpr size_t kStack = 128 * 1024;

enum State { kReady, kAtBarrier, kAtShuffle, kAtCluster, kAtInbox, kDone };
constexpr const char* kStateNames[] = {
    "ready", "at a barrier", "at a shuffle", "at a barrier of the cluster", "waiting for bytes",
    "done"};

struct Fiber {
  char* stack = nullptr;
  void* sp = nullptr;
  State state = kDone;
  Place at{};
  unsigned mask = 0;
  unsigned barriers = 0, shuffles = 0;  // reached so far
  unsigned arrivals = 0, waits = 0;     // at barriers of the cluster
  bool fenced = false;
  const void* atomic = nullptr;  // of the last atomic operation
  TSAN(void* tsan = nullptr;)
};

// Makes the fiber begin at `enter`.
inline void prepare(Fiber& fiber, void (*enter)()) {
  if (!fiber.stack) {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, 4096, PROT_NONE)) {
      perror("emulation: no memory for a stack");
      abort();
    }
    fiber.stack = static_cast<char*>(memory);
    TSAN(fiber.tsan = __tsan_create_fiber(0);)
  }
  auto** sp = reinterpret_cast<void**>(fiber.stack + kStack);
  *--sp = nullptr;  // aligned as at the entry of a function
  *--sp = reinterpret_cast<void*>(enter);
  for (int saved = 0; saved < 6; ++saved) *--sp = nullptr;
  fiber.sp = sp;
  fiber.state = kReady;
  fiber.barriers = fiber.shuffles = fiber.arrivals = fiber.waits = 0;
  fiber.fenced = false;
  fiber.atomic = nullptr;
}

}  // namespace emulation
