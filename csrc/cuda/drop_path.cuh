// One pass over a tensor: every element of a kept sample is scaled, every element of a dropped one becomes zero.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <tuple>
#include <type_traits>

// After <tuple>, which it needs and in torch 2.11 does not include.
#include <ATen/cuda/PhiloxUtils.cuh>

#include "../keep_mask.h"
#include "../rows.h"
#include "tiling.h"

namespace droppath_ext {

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T values[kWidth];
};

__device__ inline float to_opmath(__half x) { return __half2float(x); }
__device__ inline float to_opmath(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_opmath(float x) { return x; }
__device__ inline double to_opmath(double x) { return x; }

template <typename T>
struct Opmath {
  using type = float;
};
template <>
struct Opmath<double> {
  using type = double;
};

// Rounds once, to nearest even.
template <typename T>
__device__ inline T from_opmath(typename Opmath<T>::type x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

// Where the keep mask comes from. `write` is true for one block of each sample.
struct DrawnMask {
  at::PhiloxCudaState philox;
  uint64_t threshold;
  bool* keep;  // [samples]

  __device__ bool operator()(int64_t sample, bool write) const {
    // Unpacked here, not on the host: under CUDA-graph capture the state lives in device memory.
    const auto [seed, offset] = at::cuda::philox::unpack(philox);
    const bool kept = draw_keep(seed, offset, sample, threshold);
    if (write) {
      keep[sample] = kept;
    }
    return kept;
  }
};

struct SavedMask {
  const bool* keep;  // [samples]

  __device__ bool operator()(int64_t sample, bool /*write*/) const { return keep[sample]; }
};

// A block takes one tile. For each of the tile's rows it asks the mask once and notes where the row is to be read; then
// each thread moves kUnroll vectors, all loaded before the first is used, so that enough reads are in flight to cover
// the latency of memory.
template <typename T, int kWidth, typename Mask>
__global__ void __launch_bounds__(kThreads)
    scale_kept_kernel(T* __restrict__ out, const T* __restrict__ x, Mask mask, Rows rows, Tiling tiling,
                      typename Opmath<T>::type scale) {
  using VectorT = Vector<T, kWidth>;
  constexpr int64_t kDropped = -1;
  __shared__ int64_t sources[kVectorsPerTile];  // offset of each row in x, or kDropped

  const Tile tile = tiling.tile(blockIdx.x, rows);
#pragma unroll 1
  for (int i = threadIdx.x; i < tile.rows; i += kThreads) {
    const int64_t row = tile.first_row + i;
    const bool writes_mask = tile.first_column == 0 && row < rows.samples;
    sources[i] = mask(rows.sample_of(row), writes_mask) ? rows.input_offset(row) + tile.first_column : kDropped;
  }
  __syncthreads();

  const int vectors_per_row = tile.columns / kWidth;
  const int vectors = tile.rows * vectors_per_row;
  VectorT values[kUnroll];
  bool is_kept[kUnroll];
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    const int vector = threadIdx.x + i * kThreads;
    is_kept[i] = false;
    if (vector < vectors) {
      const int row = tile.rows == 1 ? 0 : vector / vectors_per_row;
      const int64_t source = sources[row];
      is_kept[i] = source != kDropped;
      if (is_kept[i]) {
        values[i] = *reinterpret_cast<const VectorT*>(x + source + (vector - row * vectors_per_row) * kWidth);
      }
    }
  }

  // A tile's output is one run of memory: part of a row, or whole rows.
  auto* tile_out = reinterpret_cast<VectorT*>(out + tile.first_row * rows.length + tile.first_column);
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    const int vector = threadIdx.x + i * kThreads;
    if (vector < vectors) {
      VectorT result{};
      if (is_kept[i]) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          result.values[j] = from_opmath<T>(to_opmath(values[i].values[j]) * scale);
        }
      }
      tile_out[vector] = result;
    }
  }
}

}  // namespace droppath_ext
