// Draws: the ones that every kernel shares, for host and device; and those of the host.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <c10/macros/Macros.h>
#include <c10/util/Exception.h>
// After Exception.h, which it needs and does not include.
#include <ATen/core/PhiloxRNGEngine.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>

namespace droppath_ext {

// A rate that nobody has checked; NaN drops nothing.
C10_HOST_DEVICE inline double clamped_rate(double drop_prob) {
  return drop_prob > 0.0 ? (drop_prob < 1.0 ? drop_prob : 1.0) : 0.0;
}

// A random 32-bit number r keeps its sample iff r < keep_prob * 2^32. Rounding up leaves that comparison of an
// integer with a real unchanged, and 33 bits make drop_prob 0 (always) and 1 (never) exact.
C10_HOST_DEVICE inline uint64_t keep_threshold(double drop_prob) {
  return static_cast<uint64_t>(std::ceil((1.0 - drop_prob) * 4294967296.0));
}

// The generator counts its offset in 32-bit numbers, Philox in blocks of four: dividing keeps these draws apart from
// those of every other kernel that uses the same generator.
C10_HOST_DEVICE inline bool draw_keep(uint64_t seed, uint64_t offset, uint64_t sample, uint64_t threshold) {
  at::Philox4_32 philox(seed, /*subsequence=*/sample, offset / 4);
  return philox() < threshold;
}

// A subset of a fixed size is the samples with the smallest keys. No two keys are equal: the lowest bits, as many as
// `size` samples need, are the sample's own.
C10_HOST_DEVICE inline uint64_t draw_key(uint64_t seed, uint64_t offset, uint64_t sample, uint64_t size) {
  at::Philox4_32 philox(seed, /*subsequence=*/sample, offset / 4);
  uint64_t key = philox();
  key = key << 32 | philox();
  for (uint64_t last = size - 1; last != 0; last >>= 1) {
    key <<= 1;
  }
  return key | sample;
}

// What a device draws with this state of its generator, into tensors on the CPU: the keep mask, and the indices of the
// op draw_fixed.
void draw_keep_mask(const at::Tensor& keep, uint64_t seed, uint64_t offset, double drop_prob);
void draw_fixed(const at::Tensor& slots, const at::Tensor& kept, uint64_t seed, uint64_t offset);

// What a keep mask, [samples] or [1] for all of them, says, the number of kept samples last: the place of each sample
// among the kept ones, -1 if it is dropped, [samples]; and the kept ones, or -1 if there is none, [max(kept, 1)].
// int64, on the device.
std::tuple<at::Tensor, at::Tensor, int64_t> index_kept(const at::Tensor& keep, int64_t size, at::Device device);

// The same of independent draws on the host, or of one, so that the number is known at once.
std::tuple<at::Tensor, at::Tensor, int64_t> draw_bernoulli(int64_t size, double drop_prob, at::Device device,
                                                           const std::optional<at::Generator>& generator,
                                                           bool per_sample);

}  // namespace droppath_ext
