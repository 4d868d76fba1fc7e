#include "draws.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

#include "cpu/loops.h"

namespace droppath_ext {
namespace {

// Numbers the samples for which is_kept, in ascending order. kept may hold as many as there are.
template <typename IsKept>
void fill_slots(int64_t size, int64_t* slots, int64_t* kept, const IsKept& is_kept) {
  int64_t slot = 0;
  for (int64_t sample = 0; sample < size; ++sample) {
    slots[sample] = is_kept(sample) ? slot : kDropped;
    if (slots[sample] != kDropped) {
      kept[slot++] = sample;
    }
  }
}

}  // namespace

void draw_keep_mask(const at::Tensor& keep, uint64_t seed, uint64_t offset, double drop_prob) {
  auto* data = keep.mutable_data_ptr<bool>();
  const uint64_t threshold = keep_threshold(drop_prob);
  const auto draw = [&](int64_t begin, int64_t end) { draw_samples(data, seed, offset, threshold, begin, end); };
  constexpr int64_t kGrainSize = at::internal::GRAIN_SIZE / 16;
  if (keep.numel() <= kGrainSize) {  // at::parallel_for would still ask OpenMP where it runs
    draw(0, keep.numel());
  } else {
    at::parallel_for(0, keep.numel(), kGrainSize, draw);
  }
}

void draw_fixed(const at::Tensor& slots, const at::Tensor& kept, uint64_t seed, uint64_t offset) {
  const int64_t size = slots.numel();
  std::vector<uint64_t> keys(size);
  for (int64_t sample = 0; sample < size; ++sample) {
    keys[sample] = draw_key(seed, offset, sample, size);
  }
  std::vector<uint64_t> ordered(keys);
  const auto last = ordered.begin() + (kept.numel() - 1);
  std::nth_element(ordered.begin(), last, ordered.end());
  fill_slots(size, slots.mutable_data_ptr<int64_t>(), kept.mutable_data_ptr<int64_t>(),
             [&](int64_t sample) { return keys[sample] <= *last; });
}

std::tuple<at::Tensor, at::Tensor, int64_t> draw_bernoulli(int64_t size, double drop_prob, at::Device device,
                                                           const std::optional<at::Generator>& generator,
                                                           bool per_sample) {
  // Drawn through the dispatcher, so that vmap's randomness= is enforced.
  const at::Tensor seed = at::empty({}, at::kLong).random_(INT64_MIN, /*to=*/std::nullopt, generator);
  const at::Tensor keep = at::detail::empty_cpu({per_sample ? size : 1}, at::kBool);
  draw_keep_mask(keep, seed.item<int64_t>(), /*offset=*/0, drop_prob);
  return index_kept(keep, size, device);
}

std::tuple<at::Tensor, at::Tensor, int64_t> index_kept(const at::Tensor& keep, int64_t size, at::Device device) {
  const bool is_one = keep.numel() == 1;
  const auto* is_kept = reinterpret_cast<const uint8_t*>(keep.const_data_ptr<bool>());  // which may hold any byte
  const int64_t count = is_one ? (is_kept[0] ? size : 0) : size - std::count(is_kept, is_kept + size, 0);
  const int64_t taken = std::max<int64_t>(count, 1);
  // Both in one buffer, for one copy to the device. Nobody waits for it if the memory is pinned, as torch pins it for
  // CUDA: the copy reads it later, when it may have been freed otherwise.
  const bool is_pinned = device.is_cuda();
  at::Tensor buffer = at::detail::empty_cpu({size + taken}, at::kLong, is_pinned);
  auto* slots = buffer.mutable_data_ptr<int64_t>();
  slots[size] = kDropped;
  fill_slots(size, slots, slots + size, [&](int64_t sample) { return is_kept[is_one ? 0 : sample] != 0; });
  if (!device.is_cpu()) {
    buffer = buffer.to(device, at::kLong, /*non_blocking=*/is_pinned);
  }
  return {buffer.narrow(0, 0, size), buffer.narrow(0, size, taken), count};
}

}  // namespace droppath_ext
