// CUDA as its kernels and launchers see it, on the host: included before the kernels' own files, which g++ then
// compiles as they are. cuda_on_host.cpp says how a kernel runs.
#pragma once

#include <cuda_runtime_api.h>
#include <math.h>
#include <vector_types.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// Thread-local storage of this library is one range of addresses, and nothing but shared memory lies there.
#define __shared__ static thread_local

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_host {

struct Settings {
  int multiprocessors = 3;  // few, so that blocks which walk over their input take several steps
  bool reversed = false;    // the last block and the last thread run first
  int shared_pattern = -1;  // the byte that shared memory is full of when a block begins, or -1: what was there before
  int64_t first_block = 0;  // blocks of a grid before this one are not run,
  int64_t last_block = INT64_MAX;  // nor those after this one
  bool records_stores = false;
};
extern Settings settings;

// Kernels store every element of an output by __stwb. The bytes that were written since this was switched on: where
// each run of them begins and ends.
void record_stores(bool records);
std::vector<int64_t> recorded_stores();
void record_store(uintptr_t begin, uintptr_t end);

constexpr int kWarp = 32;

// What a thread waits for.
enum class Wait { kNothing, kSyncthreads, kSyncthreadsCount, kBallot, kShuffle };

// Until all threads of the block are there; returns how many of them brought a true value.
int wait_for_block(Wait kind, bool value);

struct Lanes {
  uint64_t values[kWarp];  // what each lane brought; 0 if the mask does not name it
  int lane;                // that of the caller
};

// Until all lanes that the mask names are there.
Lanes wait_for_warp(Wait kind, uint32_t mask, uint64_t value);

[[noreturn]] void fail(const char* what);

void run_grid(const std::function<void()>& kernel, int64_t blocks, int threads);

}  // namespace cuda_on_host

// --- What a kernel calls ---

inline void __syncthreads() { cuda_on_host::wait_for_block(cuda_on_host::Wait::kSyncthreads, false); }

inline int __syncthreads_count(int value) {
  return cuda_on_host::wait_for_block(cuda_on_host::Wait::kSyncthreadsCount, value != 0);
}

inline unsigned __ballot_sync(unsigned mask, int value) {
  const auto lanes = cuda_on_host::wait_for_warp(cuda_on_host::Wait::kBallot, mask, value != 0);
  unsigned ballot = 0;
  for (int lane = 0; lane < cuda_on_host::kWarp; ++lane) {
    ballot |= static_cast<unsigned>(lanes.values[lane]) << lane;
  }
  return ballot;
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  uint64_t bits = 0;
  static_assert(sizeof(T) <= sizeof(bits));
  memcpy(&bits, &value, sizeof(T));
  const auto lanes = cuda_on_host::wait_for_warp(cuda_on_host::Wait::kShuffle, mask, bits);
  const int other = lanes.lane ^ distance;
  if ((mask >> other & 1) == 0) {
    cuda_on_host::fail("a lane asks for the value of one that the mask does not name");
  }
  memcpy(&value, &lanes.values[other], sizeof(T));
  return value;
}

inline int __popc(unsigned value) { return __builtin_popcount(value); }

template <typename T>
void __stwb(T* to, T value) {
  if (cuda_on_host::settings.records_stores) {
    cuda_on_host::record_store(reinterpret_cast<uintptr_t>(to), reinterpret_cast<uintptr_t>(to + 1));
  }
  *to = value;
}

// --- What a launcher calls; the functions of CUDA's runtime are in cuda_on_host.cpp ---

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  cuda_on_host::run_grid([&] { kernel(arguments...); }, config->gridDim.x, static_cast<int>(config->blockDim.x));
  return cudaSuccess;
}
