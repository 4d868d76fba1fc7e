// Draws on the CPU, from one number of the generator.
#include "../draws.h"

#include <ATen/CPUGeneratorImpl.h>

#include "../ops.h"
#include "operands.h"

namespace droppath_ext {
namespace {

uint64_t draw_seed(const std::optional<at::Generator>& generator) {
  auto* cpu_generator =
      at::get_generator_or_default<at::CPUGeneratorImpl>(generator, at::detail::getDefaultCPUGenerator());
  const std::lock_guard<std::mutex> lock(cpu_generator->mutex_);
  return cpu_generator->random64();
}

void draw_keep_cpu(const at::Tensor& keep, const at::Tensor& factor, const at::Tensor& drop_prob, bool scale_by_keep,
                   const std::optional<at::Generator>& generator) {
  const double rate = clamped_rate(drop_prob.item<double>());
  factor.fill_(keep_scale(rate, scale_by_keep));
  draw_keep_mask(keep, draw_seed(generator), /*offset=*/0, rate);
}

void draw_fixed_cpu(const at::Tensor& slots, const at::Tensor& kept, const std::optional<at::Generator>& generator) {
  draw_fixed(slots, kept, draw_seed(generator), /*offset=*/0);
}

const bool draw_keep_is_entered = (backend_of(at::kCPU).draw_keep = &draw_keep_cpu, true);
const bool draw_fixed_is_entered = (backend_of(at::kCPU).draw_fixed = &draw_fixed_cpu, true);

}  // namespace

void draw(const Sources& sources) {
  if (sources.is_drawn) {
    draw_keep_mask(sources.tensor, draw_seed(sources.generator), /*offset=*/0, sources.drop_prob);
  }
}

}  // namespace droppath_ext
