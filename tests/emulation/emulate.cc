// Runs the threads of a block as fibers: the functions that cuda_runtime.h declares.
//
// EMULATION_ORDER: the order of threads between two barriers, and of blocks: `forward` (default),
// `backward`, or a number, the seed of a random order.
// EMULATION_BLOCKS=ends: only the first two and the last two blocks of each dimension of a grid.
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "cuda_runtime.h"
#include "fiber.h"
#include "order.h"
#include "switch.h"

// shared.ld: the variables declared __shared__.
extern "C" __attribute__((visibility("hidden"))) char emulated_shared_begin[];
extern "C" __attribute__((visibility("hidden"))) char emulated_shared_end[];

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulation {

int device = 0;

namespace {

#ifdef __SANITIZE_THREAD__
// What orders accesses. Blocks take one of two sets in turn, and of two sets of fibers: a block does
// not come before the next.
struct Clocks {
  char begin, barrier[2], warp[2][kMaxThreads / kWarp];
} clocks[2], *clock_of_block = clocks;
char end_clock;
void* scheduler;
#endif

Fiber all_fibers[2][kMaxThreads], *fibers = all_fibers[0];
uint64_t exchanged[2][kMaxThreads];
int current, threads;
void* scheduler_sp;
const std::function<void()>* body;
cudaError_t last_error = cudaSuccess;

// What the blocks of a cluster send to the first one, which runs last.
struct Inbox {
  struct {
    double* at;
    double value;
  } sent[64];
  unsigned count, at;        // sent; of these, arrived
  uint64_t* arrived;         // the mbarrier that counts, by its address
  unsigned expected, bytes;  // to arrive; arrived
} inbox_of_first;
unsigned cluster, cluster_barriers;  // blocks of a cluster; the barriers that each must reach

Order order;

void enter();

UNCHECKED void leave(State state) {
  Fiber& me = fibers[current];
  me.state = state;
  TSAN(__tsan_switch_to_fiber(scheduler, 1);)  // 1: the switch does not order the two
  emulation_switch(&me.sp, scheduler_sp);
}

UNCHECKED void resume(int thread) {
  current = thread;
  threadIdx = {unsigned(thread), 0, 0};
  TSAN(__tsan_switch_to_fiber(fibers[thread].tsan, 1);)
  emulation_switch(&scheduler_sp, fibers[thread].sp);
}

UNCHECKED void enter() {
  TSAN(__tsan_acquire(&clock_of_block->begin);) (*body)();
  TSAN(__tsan_release(&end_clock);)
  leave(kDone);
  abort();
}

UNCHECKED void print_states() {
  for (int t = 0; t < threads; ++t) {
    const Fiber& f = fibers[t];
    if (t && f.state == fibers[t - 1].state && f.at.line == fibers[t - 1].at.line) continue;
    fprintf(stderr, "  from thread %d on: %s, %s:%d\n", t, kStateNames[f.state],
            f.at.file ? f.at.file : "", f.at.line);
  }
}

// Releases each group of lanes that have all reached a shuffle.
UNCHECKED bool release_shuffles() {
  bool any = false;
  for (int t = 0; t < threads; ++t) {
    if (fibers[t].state != kAtShuffle) continue;
    const int warp = t / kWarp * kWarp;
    const unsigned mask = fibers[t].mask;
    const auto each_lane = [&](auto visit) {
      for (int lane = 0; lane < kWarp; ++lane)
        if (mask >> lane & 1) visit(warp + lane);
    };
    bool all = true;
    each_lane([&](int other) { all &= other < threads && fibers[other].state == kAtShuffle; });
    if (!all) continue;
    each_lane([&](int other) {
      Fiber& f = fibers[other];
      if (f.mask != mask || f.at.line != fibers[t].at.line)
        fail("lanes of a warp are at shuffles with different masks or at different lines", f.at);
    });
    each_lane([&](int other) { fibers[other].state = kReady; });
    any = true;
  }
  return any;
}

// Releases the barrier if all threads that have not ended have reached it.
UNCHECKED bool release_barrier() {
  const Fiber* first = nullptr;
  for (int t = 0; t < threads; ++t) {
    const Fiber& f = fibers[t];
    if (f.state == kDone) continue;
    if (f.state != kAtBarrier) return false;
    if (first && f.at.line != first->at.line)
      fail("threads of a block are at different barriers", f.at);
    if (!first) first = &f;
  }
  for (int t = 0; t < threads; ++t)
    if (fibers[t].state == kAtBarrier) fibers[t].state = kReady;
  return first != nullptr;
}

// Releases each thread that waits for a barrier of the cluster at which all threads of the block that
// have not ended have arrived. The other blocks are at their ends or have yet to run.
UNCHECKED bool release_cluster() {
  unsigned reached = ~0u;
  for (int t = 0; t < threads; ++t)
    if (fibers[t].state != kDone) reached = std::min(reached, fibers[t].arrivals);
  bool any = false;
  for (int t = 0; t < threads; ++t) {
    if (fibers[t].state != kAtCluster || fibers[t].arrivals > reached) continue;
    fibers[t].state = kReady;
    any = true;
  }
  return any;
}

// Releases the threads that wait for bytes, if as many have come as are expected.
UNCHECKED bool release_inbox() {
  Inbox& box = inbox_of_first;
  bool any = false;
  for (int t = 0; t < threads; ++t) any |= fibers[t].state == kAtInbox;
  if (!any) return false;
  for (; box.bytes < box.expected && box.at < box.count; ++box.at, box.bytes += sizeof(double))
    *box.sent[box.at].at = box.sent[box.at].value;
  if (box.bytes < box.expected) return false;
  for (int t = 0; t < threads; ++t)
    if (fibers[t].state == kAtInbox) fibers[t].state = kReady;
  return true;
}

// At the end of a block.
UNCHECKED void check_cluster(bool first_to_run, bool last_to_run) {
  if (first_to_run) cluster_barriers = fibers[0].waits;
  for (int t = 0; t < threads; ++t)
    if (fibers[t].arrivals != cluster_barriers || fibers[t].waits != cluster_barriers)
      fail("threads of a cluster ended after different numbers of its barriers", fibers[t].at);
  const Inbox& box = inbox_of_first;
  if (last_to_run && (box.bytes < box.expected || box.at < box.count))
    fail("the first block of a cluster ended before all that was sent to it came", fibers[0].at);
}

UNCHECKED void run_block(uint3 index, std::vector<int>& turn) {
  blockIdx = index;
#ifdef __SANITIZE_THREAD__
  const bool other = clock_of_block == clocks;
  clock_of_block = clocks + other;
  fibers = all_fibers[other];
  // The shared memory of the block is new memory: no race with another block's accesses.
  const size_t size = size_t(emulated_shared_end - emulated_shared_begin);
  if (mmap(emulated_shared_begin, size, PROT_READ | PROT_WRITE,
           MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
    abort();
  __tsan_release(&clock_of_block->begin);
#endif
  for (char* p = emulated_shared_begin; p < emulated_shared_end; ++p) *p = char(0xa5);
  for (int t = 0; t < threads; ++t) prepare(fibers[t], &enter);
  for (;;) {
    order.arrange(turn);
    for (int t : turn)
      if (fibers[t].state == kReady) resume(t);
    if (std::all_of(fibers, fibers + threads, [](const Fiber& f) { return f.state == kDone; }))
      return;
    bool released = release_shuffles();
    released |= release_cluster() | release_inbox();
    if (!release_barrier() && !released)
      fail("threads wait at a barrier or a shuffle that others do not reach", fibers[turn[0]].at);
  }
}

// The first block last, as it reads what the others store.
void run_cluster(uint3 first, std::vector<int>& turn) {
  std::vector<unsigned> ranks(cluster - 1);
  std::iota(ranks.begin(), ranks.end(), 1u);
  order.arrange(ranks);
  ranks.push_back(0);
  inbox_of_first = {};
  for (const unsigned& rank : ranks) {
    run_block({first.x + rank, first.y, first.z}, turn);
    check_cluster(&rank == ranks.data(), rank == 0);
  }
}

// Whether a block is one of the first two or the last two of a dimension.
bool at_an_end(unsigned index, unsigned size) { return index < 2 || index + 2 >= size; }

}  // namespace

void fail(const char* what, Place at) {
  fprintf(stderr, "emulation: block (%u, %u, %u): %s (%s:%d)\n", blockIdx.x, blockIdx.y, blockIdx.z,
          what, at.file ? at.file : "", at.line);
  print_states();
  abort();
}

UNCHECKED void barrier(Place at) {
  Fiber& me = fibers[current];
  me.at = at;
  // Two clocks in turn: a thread at the next barrier does not come before one that still leaves
  // this one.
  [[maybe_unused]] const unsigned which = me.barriers++ % 2;
  TSAN(__tsan_release(&clock_of_block->barrier[which]);)
  leave(kAtBarrier);
  TSAN(__tsan_acquire(&clock_of_block->barrier[which]);)
}

UNCHECKED void arrive_in_cluster(Place at) {
  Fiber& me = fibers[current];
  me.at = at;
  if (me.arrivals++ != me.waits) fail("a thread arrives at a cluster's barrier twice", at);
}

UNCHECKED void wait_for_cluster(Place at) {
  Fiber& me = fibers[current];
  me.at = at;
  if (me.arrivals != ++me.waits)
    fail("a thread waits for a cluster's barrier but has not arrived", at);
  leave(kAtCluster);
}

// The first block of a cluster runs last, so what it expects is known after the others have sent.
UNCHECKED void expect_bytes(uint64_t* arrived, unsigned bytes) {
  const Fiber& me = fibers[current];
  if (blockIdx.x % cluster != 0 || me.arrivals != 0)
    fail("bytes are expected by another block than the first, or after its first barrier", me.at);
  if (inbox_of_first.expected) fail("an mbarrier is initialized again", me.at);
  if (inbox_of_first.count && arrived != inbox_of_first.arrived)
    fail("the bytes that were sent count at another mbarrier", me.at);
  inbox_of_first.arrived = arrived;
  inbox_of_first.expected = bytes;
}

UNCHECKED void send_to_first(double* at, double value, uint64_t* arrived) {
  Inbox& box = inbox_of_first;
  const Fiber& me = fibers[current];
  for (const char* p : {reinterpret_cast<char*>(at), reinterpret_cast<char*>(arrived)})
    if (p < emulated_shared_begin || p >= emulated_shared_end)
      fail("what is sent to a block does not go to shared memory", me.at);
  if (me.waits == 0) fail("a thread sends to a block that may not have started", me.at);
  if (box.arrived && box.arrived != arrived) fail("bytes count at another mbarrier", me.at);
  if (box.count == sizeof(box.sent) / sizeof(*box.sent)) fail("too much is sent to a block", me.at);
  box.arrived = arrived;
  box.sent[box.count++] = {at, value};
}

UNCHECKED void wait_for_bytes(uint64_t* arrived) {
  const Inbox& box = inbox_of_first;
  if (!box.expected || box.arrived != arrived)
    fail("a thread waits for bytes that nobody expects", fibers[current].at);
  leave(kAtInbox);
}

UNCHECKED const uint64_t* exchange(unsigned mask, uint64_t mine, Place at) {
  Fiber& me = fibers[current];
  const int thread = current, warp = thread / kWarp;
  if (!(mask >> thread % kWarp & 1)) fail("a lane shuffles that is not in the mask", at);
  // No lane reaches the shuffle after the next one before all lanes have read the values of this.
  const unsigned which = me.shuffles++ % 2;
  exchanged[which][thread] = mine;
  me.at = at;
  me.mask = mask;
  TSAN(__tsan_release(&clock_of_block->warp[which][warp]);)
  leave(kAtShuffle);
  TSAN(__tsan_acquire(&clock_of_block->warp[which][warp]);)
  return exchanged[which] + warp * kWarp;
}

UNCHECKED void fence() {
  Fiber& me = fibers[current];
  me.fenced = true;
  TSAN(if (me.atomic) __tsan_acquire(const_cast<void*>(me.atomic));)
}

UNCHECKED void at_atomic(const void* at) {
  Fiber& me = fibers[current];
  me.atomic = at;
  TSAN(if (me.fenced) __tsan_release(const_cast<void*>(at));)
}

UNCHECKED cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  cluster = config.numAttrs ? config.attrs->val.clusterDim.x : 1;
  const bool valid = cluster && cluster <= (device == 1 ? 1u : 8u) && grid.x % cluster == 0 &&
                     grid.x && grid.y && grid.z && grid.x <= 0x7fffffff && grid.y <= 65535 &&
                     grid.z <= 65535 && block.y == 1 && block.z == 1 && block.x &&
                     block.x <= unsigned(kMaxThreads);
  if (!valid) return last_error = cudaErrorInvalidConfiguration;
  TSAN(scheduler = __tsan_get_current_fiber();)
  body = &thread;
  gridDim = grid;
  blockDim = block;
  threads = int(block.x);
  std::vector<int> turn(static_cast<size_t>(threads));
  std::iota(turn.begin(), turn.end(), 0);
  const char* which = getenv("EMULATION_BLOCKS");
  const bool ends = which && !strcmp(which, "ends");
  const unsigned across = grid.x / cluster;
  const uint64_t clusters = uint64_t(across) * grid.y * grid.z;
  if (ends) {
    const auto next = [](unsigned i, unsigned n) {
      return at_an_end(i + 1, n) || i + 1 >= n ? i + 1 : n - 2;
    };
    for (unsigned z = 0; z < grid.z; z = next(z, grid.z))
      for (unsigned y = 0; y < grid.y; y = next(y, grid.y))
        for (unsigned x = 0; x < across; x = next(x, across))
          run_cluster({x * cluster, y, z}, turn);
  } else {
    std::vector<uint64_t> sequence;
    if (!order.forward() && clusters < 100000) {
      sequence.resize(clusters);
      std::iota(sequence.begin(), sequence.end(), uint64_t(0));
      order.arrange(sequence);
    }
    for (uint64_t c = 0; c < clusters; ++c) {
      const uint64_t at = sequence.empty() ? c : sequence[c];
      const auto x = unsigned(at % across), y = unsigned(at / across % grid.y);
      run_cluster({x * cluster, y, unsigned(at / across / grid.y)}, turn);
    }
  }
  TSAN(__tsan_acquire(&end_clock);)
  return cudaSuccess;
}

cudaError_t take_last_error() {
  const cudaError_t found = last_error;
  last_error = cudaSuccess;
  return found;
}

}  // namespace emulation

namespace diffcore {  // declared in csrc/cuda/cluster.cuh
void expect_bytes(uint64_t* arrived, unsigned bytes) { emulation::expect_bytes(arrived, bytes); }
void send_to_first(double* at, double value, uint64_t* arrived) {
  emulation::send_to_first(at, value, arrived);
}
void wait_for_bytes(uint64_t* arrived) { emulation::wait_for_bytes(arrived); }
}  // namespace diffcore
