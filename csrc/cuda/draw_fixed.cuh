// A random subset of a fixed size: the samples with the smallest keys.
#pragma once

#include <cstdint>

#include "operands.cuh"
#include "tiling.h"

namespace droppath_ext {

constexpr int kDrawThreads = 1024;

// One block. Bisects the range of keys until `count` of them are at or below the middle, which of random keys takes
// about log2(size) turns; then numbers these samples in order. slots: [size], kept: [count].
__global__ void __launch_bounds__(kDrawThreads)
    draw_fixed_kernel(int64_t* __restrict__ slots, int64_t* __restrict__ kept, at::PhiloxCudaState philox, int64_t size,
                      int64_t count) {
  __shared__ int kept_in_warp[kDrawThreads / kWarp];
  const auto [philox_seed, philox_offset] = at::cuda::philox::unpack(philox);
  const uint64_t seed = philox_seed;
  const uint64_t offset = philox_offset;
  const int thread = threadIdx.x;
  // Most batches need one turn of the block: its keys stay in registers.
  const uint64_t first_key = draw_key(seed, offset, thread, size);
  const auto is_in = [&](int64_t first, uint64_t last_key) {
    const int64_t sample = first + thread;
    return sample < size && (first == 0 ? first_key : draw_key(seed, offset, sample, size)) <= last_key;
  };

  uint64_t low = 0;
  uint64_t high = UINT64_MAX;
  while (low < high) {
    const uint64_t middle = low + (high - low) / 2;
    int64_t in = 0;
    for (int64_t first = 0; first < size; first += kDrawThreads) {
      in += __syncthreads_count(is_in(first, middle));
    }
    if (in < count) {
      low = middle + 1;
    } else {
      high = middle;
      if (in == count) {
        break;
      }
    }
  }

  int64_t slot = 0;  // of the first sample of this turn that is kept
  for (int64_t first = 0; first < size; first += kDrawThreads) {
    const bool is_kept = is_in(first, high);
    const unsigned ballot = __ballot_sync(0xffffffff, is_kept);
    if (thread % kWarp == 0) {
      kept_in_warp[thread / kWarp] = __popc(ballot);
    }
    __syncthreads();
    int before = __popc(ballot & ((1u << thread % kWarp) - 1));
    int all = 0;
    for (int warp = 0; warp < kDrawThreads / kWarp; ++warp) {
      before += warp < thread / kWarp ? kept_in_warp[warp] : 0;
      all += kept_in_warp[warp];
    }
    if (first + thread < size) {
      slots[first + thread] = is_kept ? slot + before : kDropped;
      if (is_kept) {
        kept[slot + before] = first + thread;
      }
    }
    slot += all;
    __syncthreads();
  }
}

}  // namespace droppath_ext
