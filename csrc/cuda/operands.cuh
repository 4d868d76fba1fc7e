// What the kernels read beside x: which samples are kept, and gamma.
#pragma once

#include <c10/macros/Macros.h>

#include <cstdint>
#include <tuple>

// After <tuple>, which it needs and in torch 2.11 does not include.
#include <ATen/cuda/PhiloxUtils.cuh>

#include "../keep_mask.h"
#include "../rows.h"
#include "vector.cuh"

namespace droppath_ext {

// For each sample of an output, the sample of the input that it is made from.
struct Sources {
  enum Kind { kAllKept, kDrawnMask, kSavedMask, kIndex };

  Kind kind;
  bool* keep;            // [samples]; written if drawn, read if saved
  const int64_t* index;  // [samples]
  int64_t limit;         // samples of the input
  at::PhiloxCudaState philox;
  uint64_t threshold;

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
      return keep[sample] ? sample : kDropped;
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

// The LayerScale weight, of the dtype of x or wider: of the one that is computed in.
struct Gamma {
  const void* values;  // [channels.count]
  bool is_wide;
  bool is_aligned;  // every vector of x meets a whole vector of gamma
  Channels channels;
  float scale_rest;  // what the scale lost when it became a float32

  // gamma * scale, as if of the scale in double precision. An infinite gamma has no rest: it would come out as NaN.
  template <typename F>
  __device__ F factor(F value, F scale) const {
    return isinf(value) ? value * scale : value * scale + value * static_cast<F>(scale_rest);
  }

  template <typename TX>
  __device__ Opmath<TX> value(int64_t channel) const {
    return is_wide ? static_cast<const Opmath<TX>*>(values)[channel]
                   : to_opmath(static_cast<const TX*>(values)[channel]);
  }

  // gamma * scale for the kWidth elements from `place` on.
  template <typename TX, int kWidth>
  __device__ void factors(Opmath<TX> (&to)[kWidth], int64_t place, Opmath<TX> scale) const {
    int64_t channel = channels.channel_of(place);
    if (is_aligned) {
      if (is_wide) {
        load<Opmath<TX>>(to, channel, scale);
      } else {
        load<TX>(to, channel, scale);
      }
      return;
    }
    int64_t left = channels.inner - (place - divide(place, channels.inner) * channels.inner);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      to[i] = factor(value<TX>(channel), scale);
      if (--left == 0) {
        left = channels.inner;
        channel = channel + 1 == channels.count ? 0 : channel + 1;
      }
    }
  }

 private:
  template <typename T, int kWidth>
  __device__ void load(Opmath<T> (&to)[kWidth], int64_t channel, Opmath<T> scale) const {
    const auto vector = load_vector<T, kWidth>(static_cast<const T*>(values) + channel);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      to[i] = factor(to_opmath(vector.values[i]), scale);
    }
  }
};

}  // namespace droppath_ext
