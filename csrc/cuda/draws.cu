// Draws on CUDA.
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <c10/cuda/CUDAGuard.h>

#include "draw_fixed.cuh"
#include "launch.h"
#include "launcher.cuh"

namespace droppath_ext {
namespace {

void draw_fixed_cuda(const at::Tensor& slots, const at::Tensor& kept, const std::optional<at::Generator>& generator) {
  const c10::cuda::CUDAGuard guard(slots.device());
  launch(draw_fixed_kernel, 1, kDrawThreads, slots.mutable_data_ptr<int64_t>(), kept.mutable_data_ptr<int64_t>(),
         next_philox_state(slots.device(), generator), slots.numel(), kept.numel());
}

const bool draw_fixed_is_entered = (backend_of(at::DeviceType::CUDA).draw_fixed = &draw_fixed_cuda, true);

}  // namespace

at::PhiloxCudaState next_philox_state(at::Device device, const std::optional<at::Generator>& generator) {
  auto* cuda_generator = at::get_generator_or_default<at::CUDAGeneratorImpl>(
      generator, at::cuda::detail::getDefaultCUDAGenerator(device.index()));
  const std::lock_guard<std::mutex> lock(cuda_generator->mutex_);
  return cuda_generator->philox_cuda_state(/*increment=*/4);
}

SourceLookup source_lookup(const Sources& sources, int64_t samples) {
  SourceLookup lookup{};
  if (sources.is_index()) {
    lookup.kind = SourceLookup::kIndex;
    lookup.index = sources.tensor.const_data_ptr<int64_t>();
    lookup.limit = samples;
  } else if (sources.is_drawn) {
    lookup.kind = SourceLookup::kDrawnMask;
    lookup.keep = sources.tensor.mutable_data_ptr<bool>();
    lookup.philox = next_philox_state(sources.tensor.device(), sources.generator);
    lookup.threshold = keep_threshold(sources.drop_prob);
  } else if (sources.entries() != 0) {
    lookup.kind = SourceLookup::kSavedMask;
    lookup.keep = const_cast<bool*>(sources.tensor.const_data_ptr<bool>());  // only a drawn mask is written
  }
  return lookup;
}

}  // namespace droppath_ext
