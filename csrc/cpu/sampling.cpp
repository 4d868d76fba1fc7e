#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../keep_mask.h"
#include "../ops.h"
#include "parallel_rows.h"

namespace droppath_ext {
namespace {

uint64_t draw_seed(const std::optional<at::Generator>& generator) {
  auto* cpu_generator =
      at::get_generator_or_default<at::CPUGeneratorImpl>(generator, at::detail::getDefaultCPUGenerator());
  const std::lock_guard<std::mutex> lock(cpu_generator->mutex_);
  return cpu_generator->random64();
}

// Numbers the samples for which is_kept, in ascending order. kept may hold as many as there are.
template <typename IsKept>
void fill_slots(int64_t size, int64_t* slots, int64_t* kept, const IsKept& is_kept) {
  int64_t slot = 0;
  for (int64_t sample = 0; sample < size; ++sample) {
    slots[sample] = is_kept(sample) ? slot : -1;
    if (slots[sample] >= 0) {
      kept[slot++] = sample;
    }
  }
}

std::tuple<at::Tensor, at::Tensor> draw_fixed_cpu(const at::Tensor& x, c10::SymInt count,
                                                  const std::optional<at::Generator>& generator) {
  check_count(x, count);
  return fixed_samples(draw_seed(generator), /*offset=*/0, x.size(0), count.expect_int());
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> fixed_samples(uint64_t seed, uint64_t offset, int64_t size, int64_t count) {
  std::tuple<at::Tensor, at::Tensor> result{at::detail::empty_cpu({size}, at::kLong),
                                            at::detail::empty_cpu({count}, at::kLong)};
  std::vector<uint64_t> keys(size);
  for (int64_t sample = 0; sample < size; ++sample) {
    keys[sample] = draw_key(seed, offset, sample, size);
  }
  std::vector<uint64_t> ordered(keys);
  std::nth_element(ordered.begin(), ordered.begin() + (count - 1), ordered.end());
  fill_slots(size, std::get<0>(result).mutable_data_ptr<int64_t>(), std::get<1>(result).mutable_data_ptr<int64_t>(),
             [&](int64_t sample) { return keys[sample] <= ordered[count - 1]; });
  return result;
}

at::Tensor draw_keep_mask(uint64_t seed, uint64_t offset, int64_t size, double drop_prob) {
  at::Tensor keep = at::detail::empty_cpu({size}, at::kBool);
  auto* data = keep.mutable_data_ptr<bool>();
  const uint64_t threshold = keep_threshold(drop_prob);
  parallel_for(size, kGrainSize / 16, [&](int64_t begin, int64_t end) {
    for (int64_t sample = begin; sample < end; ++sample) {
      data[sample] = draw_keep(seed, offset, sample, threshold);
    }
  });
  return keep;
}

at::Tensor draw_keep_mask(const std::optional<at::Generator>& generator, int64_t size, double drop_prob) {
  return draw_keep_mask(draw_seed(generator), /*offset=*/0, size, drop_prob);
}

std::tuple<at::Tensor, at::Tensor, int64_t> draw_bernoulli(int64_t size, double drop_prob, at::Device device,
                                                           const std::optional<at::Generator>& generator) {
  // The seed in a tensor: vmap then has its say about random numbers.
  const at::Tensor seed = at::empty({}, at::kLong).random_(INT64_MIN, /*to=*/std::nullopt, generator);
  const at::Tensor keep = draw_keep_mask(seed.item<int64_t>(), /*offset=*/0, size, drop_prob);
  const auto* is_kept = keep.const_data_ptr<bool>();
  const int64_t count = std::count(is_kept, is_kept + size, true);
  const int64_t rows = std::max<int64_t>(count, 1);
  // Both in one buffer, pinned: one copy to the device, for which nobody waits.
  at::Tensor buffer = at::detail::empty_cpu({size + rows}, at::kLong, /*pin_memory=*/device.is_cuda());
  auto* slots = buffer.mutable_data_ptr<int64_t>();
  slots[size] = kDropped;
  fill_slots(size, slots, slots + size, [&](int64_t sample) { return is_kept[sample]; });
  if (!device.is_cpu()) {
    buffer = buffer.to(device, at::kLong, /*non_blocking=*/true);
  }
  return {buffer.narrow(0, 0, size), buffer.narrow(0, size, rows), count};
}

TORCH_LIBRARY_IMPL(droppath_ext, CPU, m) { m.impl("draw_fixed", &draw_fixed_cpu); }

}  // namespace droppath_ext
