// How a kernel runs on the host.
//
// 1. A grid runs one block at a time, and the threads of a block take turns. Each is a fiber: it has a stack of its own
//    and runs until it has to wait for others, or ends.
// 2. Whoever waits goes on when all are there who have to be. What would hang on a GPU, or what CUDA leaves undefined,
//    ends the process with a sentence.
// 3. Under ThreadSanitizer each fiber counts as a thread, and only two things order them: the barriers of a block, and
//    the beginning and the end of a launch. It reports a race as if all threads of the grid ran at once.
//
// No sanitizer looks at this file: what is written here is not the kernels'.
#include "cuda_on_host.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <map>
#include <mutex>
#include <thread>

#if !defined(__x86_64__) || !defined(__linux__)
#error "cuda_on_host switches stacks by hand, on x86-64 Linux only"
#endif

// The sanitizers' own functions; null where their library is not loaded.
extern "C" {
#define WEAK __attribute__((weak))
WEAK void __sanitizer_start_switch_fiber(void** fake_stack_save, const void* bottom, size_t size);
WEAK void __sanitizer_finish_switch_fiber(void* fake_stack_save, const void** bottom_old, size_t* size_old);
WEAK void* __tsan_get_current_fiber();
WEAK void* __tsan_create_fiber(unsigned flags);
WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
WEAK void __tsan_acquire(void* token);
WEAK void __tsan_release(void* token);
}

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_host {

Settings settings;

void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_host: %s\n", what);
  std::abort();
}

// That of all shared memory; in the file that the kernels are in.
std::pair<char*, size_t> shared_memory();

namespace {

constexpr size_t kStackBytes = 256 * 1024;

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;   // AddressSanitizer's
  void* tsan_thread = nullptr;  // ThreadSanitizer's
};

struct Thread {
  Fiber* fiber;
  bool is_done;
  Wait wait;  // what it waits for, with
  uint32_t mask;
  uint64_t value;
  Lanes received;
};

// Under ThreadSanitizer each thread of a grid takes the next fiber, lest the threads of neighbouring blocks be one and
// the same. A prime: when the fibers come round again, thread i of a block is another one.
constexpr int kFibers = 1031;
constexpr int kMaxThreads = 1024;

Fiber fibers[kFibers];
int64_t next_fiber = 0;
Fiber scheduler;
Thread threads[kMaxThreads];
int block_threads = 0;
int current = 0;      // the thread that runs
int barrier_sum = 0;  // true values that were brought to the last barrier
const std::function<void()>* run_kernel = nullptr;
std::mutex launch_mutex;  // all this is the state of one grid

// What ThreadSanitizer orders threads by. Each barrier has a token of its own: whoever goes on behind it must not learn
// from it what another thread did after it. The tokens come round again, as the fibers do.
uint64_t begin_token, end_token, barrier_tokens[256];
int64_t barriers = 0;

void release(void* token) {
  if (__tsan_release != nullptr) {
    __tsan_release(token);
  }
}

void acquire(void* token) {
  if (__tsan_acquire != nullptr) {
    __tsan_acquire(token);
  }
}

// Saves the registers that a function has to keep, swaps the stacks, and returns on the other one.
extern "C" void cuda_on_host_swap_stacks(void** from, void* to);
asm(R"(
.hidden cuda_on_host_swap_stacks
.globl cuda_on_host_swap_stacks
.type cuda_on_host_swap_stacks,@function
cuda_on_host_swap_stacks:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size cuda_on_host_swap_stacks,.-cuda_on_host_swap_stacks
)");

void arrive(Fiber& fiber) {
  if (__sanitizer_finish_switch_fiber != nullptr) {
    const void* bottom = nullptr;
    size_t bytes = 0;
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &bottom, &bytes);
    if (&fiber != &scheduler) {
      scheduler.stack = const_cast<char*>(static_cast<const char*>(bottom));
      scheduler.stack_bytes = bytes;
    }
  }
}

void switch_to(Fiber& from, Fiber& to) {
  if (__sanitizer_start_switch_fiber != nullptr) {
    __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
  }
  if (__tsan_switch_to_fiber != nullptr) {
    constexpr unsigned kNoSync = 1;
    __tsan_switch_to_fiber(to.tsan_thread, kNoSync);
  }
  cuda_on_host_swap_stacks(&from.stack_pointer, to.stack_pointer);
  arrive(from);
}

void fiber_main() {
  Thread& thread = threads[current];
  arrive(*thread.fiber);
  acquire(&begin_token);
  (*run_kernel)();
  release(&end_token);
  thread.is_done = true;
  switch_to(*thread.fiber, scheduler);
}

void start(int i) {
  Fiber& fiber = fibers[__tsan_create_fiber != nullptr ? next_fiber++ % kFibers : i];
  if (fiber.stack == nullptr) {
    fiber.stack = static_cast<char*>(std::aligned_alloc(64, kStackBytes));
    fiber.stack_bytes = kStackBytes;
    fiber.tsan_thread = __tsan_create_fiber != nullptr ? __tsan_create_fiber(0) : nullptr;
  }
  fiber.fake_stack = nullptr;
  // As if fiber_main had been called and had swapped: six registers to pop, and where to return to.
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes) - 1;
  *top-- = nullptr;
  *top = reinterpret_cast<void*>(&fiber_main);
  fiber.stack_pointer = top - 6;
  threads[i] = {&fiber, false, Wait::kNothing, 0, 0, {}};
}

bool is_at_barrier(const Thread& thread) {
  return thread.wait == Wait::kSyncthreads || thread.wait == Wait::kSyncthreadsCount;
}

bool is_in_warp(const Thread& thread) { return thread.wait == Wait::kBallot || thread.wait == Wait::kShuffle; }

void wait(Wait kind, uint32_t mask, uint64_t value) {
  Thread& thread = threads[current];
  thread.wait = kind;
  thread.mask = mask;
  thread.value = value;
  switch_to(*thread.fiber, scheduler);
}

// Lets those lanes of a warp go on that wait for nobody any more. Whether there were any.
bool wake_lanes(Thread* warp, int lanes) {
  bool woke = false;
  for (int lane = 0; lane < lanes; ++lane) {
    if (!is_in_warp(warp[lane])) {
      continue;
    }
    const auto [kind, mask] = std::pair(warp[lane].wait, warp[lane].mask);
    if ((mask >> lane & 1) == 0) {
      fail("a lane calls a warp collective whose mask does not name it");
    }
    Lanes brought{};
    bool all_there = true;
    for (int other = 0; other < kWarp; ++other) {
      if ((mask >> other & 1) == 0) {
        continue;
      }
      if (other >= lanes || warp[other].is_done) {
        fail("a mask names a lane that has left, or that the block does not have");
      }
      if (is_in_warp(warp[other]) && (warp[other].wait != kind || warp[other].mask != mask)) {
        fail("lanes that wait for each other call two kinds of warp collective, or give two masks");
      }
      all_there = all_there && is_in_warp(warp[other]);
      brought.values[other] = warp[other].value;
    }
    for (int other = 0; all_there && other < lanes; ++other) {
      if (mask >> other & 1) {
        warp[other].wait = Wait::kNothing;
        warp[other].received = brought;
        warp[other].received.lane = other;
        woke = true;
      }
    }
  }
  return woke;
}

bool wake_warps() {
  bool woke = false;
  for (int first = 0; first < block_threads; first += kWarp) {
    woke |= wake_lanes(threads + first, std::min(kWarp, block_threads - first));
  }
  return woke;
}

// Lets the block go on if all its threads have come to the barrier. Whether they had.
bool wake_block() {
  int waiting = 0, done = 0, sum = 0;
  Wait kind = Wait::kNothing;
  for (int i = 0; i < block_threads; ++i) {
    const Thread& thread = threads[i];
    done += thread.is_done;
    if (is_at_barrier(thread)) {
      if (waiting++ > 0 && thread.wait != kind) {
        fail("threads of a block wait at two kinds of barrier");
      }
      kind = thread.wait;
      sum += thread.value != 0;
    }
  }
  if (waiting > 0 && done > 0) {
    fail("a thread waits at a barrier for one that has left");
  }
  if (waiting < block_threads) {
    return false;
  }
  barrier_sum = sum;
  ++barriers;
  for (int i = 0; i < block_threads; ++i) {
    threads[i].wait = Wait::kNothing;
  }
  return true;
}

// Runs every thread that waits for nothing. Whether some are not done.
bool run_threads() {
  bool are_left = false;
  for (int i = 0; i < block_threads; ++i) {
    current = settings.reversed ? block_threads - 1 - i : i;
    Thread& thread = threads[current];
    if (!thread.is_done && thread.wait == Wait::kNothing) {
      threadIdx = dim3(current, 0, 0);
      switch_to(scheduler, *thread.fiber);
    }
    are_left |= !thread.is_done;
  }
  return are_left;
}

void run_block() {
  scheduler.tsan_thread = __tsan_get_current_fiber != nullptr ? __tsan_get_current_fiber() : nullptr;
  if (settings.shared_pattern >= 0) {
    const auto [begin, bytes] = shared_memory();
    std::memset(begin, settings.shared_pattern, bytes);
  }
  ++barriers;
  for (int i = 0; i < block_threads; ++i) {
    start(i);
  }
  while (run_threads()) {
    if (!wake_warps() && !wake_block()) {
      fail("threads wait for each other without an end");
    }
  }
}

std::map<uintptr_t, uintptr_t> stores;  // begin -> end

}  // namespace

void record_stores(bool records) {
  settings.records_stores = records;
  stores.clear();
}

std::vector<int64_t> recorded_stores() {
  std::vector<int64_t> result;
  for (const auto& [begin, end] : stores) {
    result.insert(result.end(), {static_cast<int64_t>(begin), static_cast<int64_t>(end)});
  }
  return result;
}

void record_store(uintptr_t begin, uintptr_t end) {
  auto next = stores.lower_bound(begin);
  if ((next != stores.end() && next->first < end) || (next != stores.begin() && std::prev(next)->second > begin)) {
    fail("an element of an output is written twice");
  }
  if (next != stores.end() && next->first == end) {
    end = next->second;
    next = stores.erase(next);
  }
  if (next != stores.begin() && std::prev(next)->second == begin) {
    std::prev(next)->second = end;
  } else {
    stores.emplace_hint(next, begin, end);
  }
}

int wait_for_block(Wait kind, bool value) {
  void* token = &barrier_tokens[barriers % std::size(barrier_tokens)];
  release(token);
  wait(kind, 0, value);
  acquire(token);
  return barrier_sum;
}

// Orders no memory, as on a GPU.
Lanes wait_for_warp(Wait kind, uint32_t mask, uint64_t value) {
  wait(kind, mask, value);
  return threads[current].received;
}

void run_grid(const std::function<void()>& kernel, int64_t blocks, int threads) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  if (threads > kMaxThreads) {
    fail("a block has at most 1024 threads");
  }
  run_kernel = &kernel;
  block_threads = threads;
  blockDim = dim3(threads);
  gridDim = dim3(static_cast<unsigned>(blocks));
  const int64_t first = settings.first_block;
  const int64_t last = std::min(settings.last_block, blocks - 1);
  next_fiber = 0;
  release(&begin_token);
  for (int64_t i = first; i <= last; ++i) {
    blockIdx = dim3(static_cast<unsigned>(settings.reversed ? last - (i - first) : i));
    if (__tsan_create_fiber == nullptr) {
      run_block();
    } else {
      // On a thread of the host that is new: the shared memory of two blocks would be one if it had one address.
      std::thread(run_block).join();
    }
  }
  acquire(&end_token);
}

}  // namespace cuda_on_host

// Those functions of CUDA's runtime that a launcher calls. Hidden: a torch that was built for CUDA brings its own.
#define RUNTIME extern "C" __attribute__((visibility("hidden"))) cudaError_t

RUNTIME cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

RUNTIME cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int /*device*/) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? cuda_on_host::settings.multiprocessors : 0;
  return cudaSuccess;
}

RUNTIME cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* /*kernel*/, int threads,
                                                      size_t /*shared_bytes*/) {
  *blocks = 512 / threads;
  return cudaSuccess;
}

// Whatever was compiled for the host starts its kernels in order.
RUNTIME cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* /*kernel*/) {
  *attributes = {};
  return cudaSuccess;
}
