// Draws on CUDA.
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <c10/cuda/CUDAGuard.h>

#include "draw_fixed.cuh"
#include "launch.h"
#include "launcher.cuh"

namespace droppath_ext {
namespace {

// One entry of the mask for each thread. The first block also writes the scale.
template <typename T>
__global__ void __launch_bounds__(kDrawThreads)
    draw_keep_kernel(bool* keep, double* factor, const T* drop_prob, at::PhiloxCudaState philox, int64_t size,
                     bool scale_by_keep) {
  const double rate = clamped_rate(*drop_prob);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    *factor = scale_by_keep && rate < 1.0 ? 1.0 / (1.0 - rate) : 1.0;
  }
  const int64_t sample = static_cast<int64_t>(blockIdx.x) * kDrawThreads + threadIdx.x;
  if (sample < size) {
    const auto [seed, offset] = at::cuda::philox::unpack(philox);
    keep[sample] = draw_keep(seed, offset, sample, keep_threshold(rate));
  }
}

void draw_keep_cuda(const at::Tensor& keep, const at::Tensor& factor, const at::Tensor& drop_prob, bool scale_by_keep,
                    const std::optional<at::Generator>& generator) {
  const c10::cuda::CUDAGuard guard(keep.device());
  const auto run = [&](const auto* rate) {
    launch(draw_keep_kernel<std::decay_t<decltype(*rate)>>, std::max<int64_t>(ceil_div(keep.numel(), kDrawThreads), 1),
           kDrawThreads, keep.mutable_data_ptr<bool>(), factor.mutable_data_ptr<double>(), rate,
           next_philox_state(keep.device(), generator), keep.numel(), scale_by_keep);
  };
  drop_prob.scalar_type() == at::kDouble ? run(drop_prob.const_data_ptr<double>())
                                         : run(drop_prob.const_data_ptr<float>());
}

void draw_fixed_cuda(const at::Tensor& slots, const at::Tensor& kept, const std::optional<at::Generator>& generator) {
  const c10::cuda::CUDAGuard guard(slots.device());
  launch(draw_fixed_kernel, 1, kDrawThreads, slots.mutable_data_ptr<int64_t>(), kept.mutable_data_ptr<int64_t>(),
         next_philox_state(slots.device(), generator), slots.numel(), kept.numel());
}

const bool draw_keep_is_entered = (backend_of(at::DeviceType::CUDA).draw_keep = &draw_keep_cuda, true);
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
  if (sources.factor.defined()) {
    lookup.factor = sources.factor.const_data_ptr<double>();
  }
  return lookup;
}

}  // namespace droppath_ext
