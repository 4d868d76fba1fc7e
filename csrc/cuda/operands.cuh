// What the kernels read beside x: which samples are kept, and gamma.
#pragma once

#include <c10/macros/Macros.h>
#include <c10/util/Load.h>

#include <cstdint>
#include <tuple>

// After <tuple>, which it needs and in torch 2.11 does not include.
#include <ATen/cuda/PhiloxUtils.cuh>

#include "../draws.h"
#include "../rows.h"
#include "vector.cuh"

namespace droppath_ext {

// For each sample of an output, the sample of the input that it is made from.
struct SourceLookup {
  enum Kind { kAllKept, kDrawnMask, kSavedMask, kIndex };

  Kind kind;
  bool* keep;            // an entry for each sample of the output; written if drawn, read if saved
  const int64_t* index;  // the same
  int64_t limit;         // samples of the input
  at::PhiloxCudaState philox;
  uint64_t threshold;
  const double* factor;  // of the scale, or null

  template <typename F>
  __device__ F times_factor(F scale) const {
    return factor == nullptr ? scale : scale * static_cast<F>(*factor);
  }

  // kDropped for none. `write` is true for one block of each sample.
  __device__ int64_t operator()(int64_t sample, bool write = false) const {
    if (kind == kAllKept) {
      return sample;
    }
    if (kind == kIndex) {
      const int64_t source = index[sample];
      // A kernel cannot raise; it reads nothing that is not there.
      return static_cast<uint64_t>(source) < static_cast<uint64_t>(limit) ? source : kDropped;
    }
    if (kind == kSavedMask) {
      return c10::load(keep + sample) ? sample : kDropped;
    }
    // Unpacked here, not on the host: under CUDA-graph capture the state lives in device memory.
    const auto [seed, offset] = at::cuda::philox::unpack(philox);
    const bool kept = draw_keep(seed, offset, sample, threshold);
    if (write) {
      keep[sample] = kept;
    }
    return kept ? sample : kDropped;
  }
};

// The values of gamma that one vector of x meets, as they were loaded. kIsAligned: they are a vector of gamma, too;
// with registers for either case, fewer blocks would fit.
template <typename T, int kWidth, bool kIsAligned>
struct GammaValues {
  Vector<T, kWidth> values;
  // How many of the elements belong to the first channel, whose gamma is in part 0 of the vector; the rest belong to
  // the next one, in part 1. 0: a value for each element.
  int of_first;

  // Each of the terms by its value.
  __device__ void multiply(Opmath<T> (&terms)[kWidth]) const {
    Opmath<T> factors[kWidth];
    values.to_opmath(factors);
    if constexpr (kWidth > 1 && !kIsAligned) {
      if (of_first != 0) {
        const auto first = factors[0];
        const auto second = factors[kWidth / Vector<T, kWidth>::kParts];
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          terms[i] *= i < of_first ? first : second;
        }
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      terms[i] *= factors[i];
    }
  }
};

// The LayerScale weight; of type void where there is none.
template <typename T>
struct Gamma {
  const T* values;  // [channels.count]
  bool is_aligned;  // every vector of x meets a whole vector of gamma: what load is told
  Channels channels;

  // Those for the elements from `location` on. No load is waited for here, but in the last branch: channels shorter
  // than a vector, or vectors that are not aligned to them.
  template <int kWidth, bool kIsAligned>
  __device__ GammaValues<T, kWidth, kIsAligned> load(ChannelLocation location) const {
    const ChannelLocation next_channel{1, 0};
    const ChannelLocation next_element{0, 1};
    GammaValues<T, kWidth, kIsAligned> loaded{};
    if constexpr (kIsAligned) {
      loaded.values = load_vector<T, kWidth>(values + location.channel);
    } else if constexpr (kWidth == 1) {
      loaded.values.set_part(0, values[location.channel]);
    } else if (channels.inner >= kWidth) {
      const int64_t left = channels.inner - location.offset;
      loaded.values.set_part(0, values[location.channel]);
      loaded.values.set_part(1, values[channels.advance(location, next_channel).channel]);
      loaded.of_first = static_cast<int>(left < kWidth ? left : kWidth);
    } else {
      T elements[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        elements[i] = values[location.channel];
        location = channels.advance(location, channels.inner == 1 ? next_channel : next_element);
      }
      memcpy(&loaded.values, elements, sizeof(elements));
    }
    return loaded;
  }
};
template <>
struct Gamma<void> {};

}  // namespace droppath_ext
