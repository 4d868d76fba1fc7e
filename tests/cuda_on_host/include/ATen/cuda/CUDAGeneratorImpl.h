// A CPU generator in the place of CUDA's: one 64-bit seed a call, offset 0, as the CPU's kernels draw.
#pragma once
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/cuda/PhiloxCudaState.h>
namespace at {
struct CUDAGeneratorImpl : CPUGeneratorImpl {
  PhiloxCudaState philox_cuda_state(uint64_t /*increment*/) { return {random64(), uint64_t{0}}; }
};
namespace cuda::detail {
inline const Generator& getDefaultCUDAGenerator(int /*device*/) { return at::detail::getDefaultCPUGenerator(); }
}  // namespace cuda::detail
template <>
inline CUDAGeneratorImpl* get_generator_or_default<CUDAGeneratorImpl>(const std::optional<Generator>& generator,
                                                                      const Generator& default_generator) {
  return static_cast<CUDAGeneratorImpl*>(get_generator_or_default<CPUGeneratorImpl>(generator, default_generator));
}
}  // namespace at
