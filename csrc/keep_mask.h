// The draws that every kernel shares: is sample b kept? Which come first?
#pragma once

#include <c10/macros/Macros.h>
#include <c10/util/Exception.h>
// After Exception.h, which it needs and does not include.
#include <ATen/core/PhiloxRNGEngine.h>

#include <cmath>
#include <cstdint>

namespace droppath_ext {

// A random 32-bit number r keeps its sample iff r < keep_prob * 2^32. Rounding up leaves that comparison of an
// integer with a real unchanged, and 33 bits make drop_prob 0 (always) and 1 (never) exact.
inline uint64_t keep_threshold(double drop_prob) {
  return static_cast<uint64_t>(std::ceil(std::ldexp(1.0 - drop_prob, 32)));
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

}  // namespace droppath_ext
