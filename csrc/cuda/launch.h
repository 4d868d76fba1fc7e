// How a kernel is started, and how many of its blocks a device holds at once.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/Exception.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <limits>

namespace droppath_ext {

// kInOrder: after the kernel before it in the stream has ended. kEarly, from sm_90 on: its blocks are set up while that
// kernel still runs; it calls wait_for_previous_kernel() before it reads what that kernel wrote.
enum class Start { kInOrder, kEarly };

// Whether the kernel was compiled for an architecture that has kEarly; of a device of that kind, one that was compiled
// for an older one does not wait.
inline bool can_start_early(const void* kernel) {
  cudaFuncAttributes attributes{};
  C10_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  return attributes.ptxVersion >= 90;
}

// On the current stream; nothing for no blocks. The arguments convert to the kernel's parameters.
template <Start kStart = Start::kInOrder, typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, const Arguments&... arguments) {
  TORCH_CHECK_VALUE(blocks <= std::numeric_limits<int32_t>::max(), "x is too large for one launch: ", blocks,
                    " blocks, at most ", std::numeric_limits<int32_t>::max());
  if (blocks == 0) {
    return;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = c10::cuda::getCurrentCUDAStream();
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  if (kStart == Start::kEarly && can_start_early(reinterpret_cast<const void*>(kernel))) {
    config.attrs = &early;
    config.numAttrs = 1;
  }
  C10_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
}

// Blocks of this kernel, as it was compiled, that all multiprocessors of the current device hold together: one wave.
template <typename... Parameters>
int64_t blocks_of_a_wave(void (*kernel)(Parameters...), int threads) {
  int device = 0;
  int multiprocessors = 0;
  int blocks = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  C10_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, reinterpret_cast<const void*>(kernel), threads,
                                                               /*dynamicSMemSize=*/0));
  return std::max<int64_t>(int64_t{blocks} * multiprocessors, 1);
}

}  // namespace droppath_ext
