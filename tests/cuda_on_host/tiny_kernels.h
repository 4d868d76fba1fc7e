// Kernels of a few lines that show what a kernel on the host can rely on, and what ends the process: check_shim.py runs
// them.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <atomic>

#include "cuda_on_host.h"

namespace cuda_on_host {

constexpr unsigned kAll = 0xffffffff;

inline int thread() { return static_cast<int>(threadIdx.x); }
inline int last_thread() { return static_cast<int>(blockDim.x) - 1; }
inline int thread_of_grid() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

// Each writes to `out`, of one entry for each thread of the grid.
struct TinyKernel {
  const char* name;
  void (*kernel)(int64_t* out);
};

inline const TinyKernel kTinyKernels[] = {
    // What CUDA computes.
    {"ballot", [](int64_t* out) { out[thread_of_grid()] = __ballot_sync(kAll, thread() % 3 == 0); }},
    {"ballot_of_even_lanes",
     [](int64_t* out) {
       if (thread() % 2 == 0) {
         out[thread_of_grid()] = __ballot_sync(0x55555555, thread() % 3 == 0);
       }
     }},
    {"shuffle", [](int64_t* out) { out[thread_of_grid()] = __shfl_xor_sync(kAll, int64_t{thread()} << 40, 5); }},
    {"sum_of_warp",
     [](int64_t* out) {
       double sum = thread();
       for (int distance = 16; distance > 0; distance /= 2) {
         sum += __shfl_xor_sync(kAll, sum, distance);
       }
       out[thread_of_grid()] = static_cast<int64_t>(sum);
     }},
    {"two_counts",
     [](int64_t* out) {
       const int first = __syncthreads_count(thread() % 3 == 0);
       const int second = __syncthreads_count(thread() == 7);
       out[thread_of_grid()] = 1000 * first + second;
     }},
    {"mirrored",
     [](int64_t* out) {
       __shared__ int64_t mirror[256];
       mirror[thread()] = thread_of_grid();
       __syncthreads();
       out[thread_of_grid()] = mirror[last_thread() - thread()];
     }},
    {"turns",
     [](int64_t* out) {
       static std::atomic<int64_t> turn = 0;
       out[thread_of_grid()] = turn++;
     }},
    {"stores", [](int64_t* out) { __stwb(out + thread_of_grid(), int64_t{thread()}); }},
    // What is there before anybody writes it.
    {"shared_as_it_is",
     [](int64_t* out) {
       __shared__ int64_t found[256];
       out[thread_of_grid()] = found[thread()];
       found[thread()] = 1;
     }},
    {"local_as_it_is",
     [](int64_t* out) {
       int64_t found;
       asm volatile("" : "+m"(found));
       out[thread_of_grid()] = found;
     }},
    // What ends the process, in every build.
    {"lane_has_left",
     [](int64_t* out) {
       if (thread() != 5) {
         out[thread_of_grid()] = __ballot_sync(kAll, 1);
       }
     }},
    {"lane_is_not_named", [](int64_t* out) { out[thread_of_grid()] = __ballot_sync(0xfffffffe, 1); }},
    {"lane_asks_outside_of_mask",
     [](int64_t* out) {
       if (thread() % 2 == 0) {
         out[thread_of_grid()] = __shfl_xor_sync(0x55555555, thread(), 1);
       }
     }},
    {"two_masks", [](int64_t* out) { out[thread_of_grid()] = __ballot_sync(thread() < 16 ? kAll : 0xffff0000, 1); }},
    {"two_collectives",
     [](int64_t* out) {
       out[thread_of_grid()] = thread() < 16 ? __ballot_sync(kAll, 1) : __shfl_xor_sync(kAll, thread(), 1);
     }},
    {"two_barriers",
     [](int64_t* out) {
       if (thread() < 16) {
         __syncthreads();
       } else {
         out[thread_of_grid()] = __syncthreads_count(1);
       }
     }},
    {"barrier_without_one",
     [](int64_t*) {
       if (thread() != 5) {
         __syncthreads();
       }
     }},
    {"endless",
     [](int64_t* out) {
       if (thread() == 0) {
         out[thread_of_grid()] = __ballot_sync(kAll, 1);
       } else {
         __syncthreads();
       }
     }},
    {"stores_twice",
     [](int64_t* out) {
       __stwb(out + thread_of_grid(), int64_t{1});
       __stwb(out + thread_of_grid(), int64_t{2});
     }},
    // What a sanitizer finds.
    {"race_of_threads",
     [](int64_t* out) {
       __shared__ int64_t mirror[256];
       mirror[thread()] = thread();
       out[thread_of_grid()] = mirror[last_thread() - thread()];
     }},
    {"race_behind_a_barrier",
     [](int64_t* out) {
       __shared__ int64_t mirror[256];
       __syncthreads();
       mirror[thread()] = thread();
       out[thread_of_grid()] = mirror[last_thread() - thread()];
       __syncthreads();
     }},
    {"race_in_a_warp",
     [](int64_t* out) {
       __shared__ int64_t mirror[256];
       mirror[thread()] = thread();
       __ballot_sync(kAll, 1);
       out[thread_of_grid()] = mirror[thread() ^ 1];
     }},
    {"race_of_blocks", [](int64_t* out) { out[thread()] = thread(); }},
    {"race_of_blocks_before_a_barrier",
     [](int64_t* out) {
       out[thread()] = thread();
       __syncthreads();
     }},
    {"beyond_shared",
     [](int64_t* out) {
       __shared__ int64_t few[32];
       few[thread() + 1] = thread();
       out[thread_of_grid()] = few[thread()];
     }},
    {"beyond_out", [](int64_t* out) { out[thread_of_grid() + 1] = thread(); }},
    {"misaligned", [](int64_t* out) { __stwb(reinterpret_cast<uint4*>(out + 1), uint4{}); }},
};

inline void tiny(const at::Tensor& out, std::string_view name, int64_t blocks, int64_t threads) {
  for (const auto& [kernel_name, kernel] : kTinyKernels) {
    if (name == kernel_name) {
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(static_cast<unsigned>(blocks));
      config.blockDim = dim3(static_cast<unsigned>(threads));
      cudaLaunchKernelEx(&config, kernel, out.mutable_data_ptr<int64_t>());
      return;
    }
  }
  TORCH_CHECK(false, "no tiny kernel is called ", name);
}

}  // namespace cuda_on_host

TORCH_LIBRARY_FRAGMENT(cuda_on_host, m) {
  m.def("tiny(Tensor(a!) out, str name, int blocks, int threads) -> ()", &cuda_on_host::tiny);
}
