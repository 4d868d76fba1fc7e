// One pass over a tensor: a kept sample becomes x * scale, or residual + gamma * x * scale; a dropped one becomes zero,
// or the residual. x is read only where it is kept, and where an index says.
#pragma once

#include "operands.cuh"
#include "tiling.h"
#include "vector.cuh"

namespace droppath_ext {

// A block takes one tile. For each of the tile's rows it asks once for the source and notes where the row is to be
// read; then each thread moves kVectors vectors. All that it reads, gamma too, is loaded before the first of it is used
// and before the first store, so that enough reads are in flight to cover the latency of memory. TR and TGamma are void
// where there is no residual and no gamma; gamma_step leads from one vector of a thread to the next. If in_place, the
// residual is out itself, and what is dropped stays as it is.
template <typename TO, typename TR, typename TX, typename TGamma, int kWidth, int kVectors, bool kGammaIsAligned>
__global__ void __launch_bounds__(kThreads)
    add_kept_kernel(TO* out, const TR* residual, const TX* __restrict__ x, SourceLookup sources, Gamma<TGamma> gamma,
                    ChannelLocation gamma_step, Rows rows, RowStrides strides, RowStrides residual_strides,
                    Tiling tiling, bool in_place, Opmath<TO> given_scale) {
  using F = Opmath<TO>;
  constexpr bool kHasResidual = !std::is_void_v<TR>;
  constexpr bool kHasGamma = !std::is_void_v<TGamma>;
  constexpr bool kOnlyScales = !kHasResidual && !kHasGamma && std::is_same_v<TX, TO>;
  using Residual = std::conditional_t<kHasResidual, TR, TO>;
  using GammaOrX = std::conditional_t<kHasGamma, TGamma, TX>;
  __shared__ int64_t offsets[kThreads * kVectors];  // of each row in x, or kDropped
  __shared__ int64_t residual_offsets[kHasResidual ? kThreads * kVectors : 1];

  const Tile tile = tiling.tile(blockIdx.x, rows);
#pragma unroll 1
  for (int i = threadIdx.x; i < tile.rows; i += kThreads) {
    const RowLocation location = rows.locate(tile.first_row + i);
    const bool writes_mask = tile.first_column == 0 && location.outer == 0;
    const int64_t source = sources(location.sample, writes_mask);
    offsets[i] = source == kDropped ? kDropped : strides.offset_of(source, location.outer) + tile.first_column;
    if constexpr (kHasResidual) {
      residual_offsets[i] = residual_strides.offset_of(location.sample, location.outer) + tile.first_column;
    }
  }
  __syncthreads();

  // A tile's output is one run of memory: part of a row, or whole rows.
  const int64_t first_position = tile.first_row * rows.length + tile.first_column;
  const int vectors_per_row = tile.columns / kWidth;
  const int vectors = tile.rows * vectors_per_row;
  Vector<TX, kWidth> values[kVectors];
  Vector<Residual, kWidth> residuals[kVectors];
  GammaValues<GammaOrX, kWidth, kGammaIsAligned> gammas[kVectors];
  bool is_kept[kVectors];
  ChannelLocation channel{};
  if constexpr (kHasGamma) {
    if (vectors > 0) {
      channel = gamma.channels.locate(first_position + threadIdx.x * kWidth);
    }
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int vector = threadIdx.x + i * kThreads;
    is_kept[i] = false;
    if (vector < vectors) {
      const int row = tile.rows == 1 ? 0 : vector / vectors_per_row;
      const int column = (vector - row * vectors_per_row) * kWidth;
      const int64_t offset = offsets[row];
      is_kept[i] = offset != kDropped;
      if (is_kept[i]) {
        values[i] = load_vector<TX, kWidth>(x + offset + column);
        if constexpr (kHasGamma) {
          gammas[i] = gamma.template load<kWidth, kGammaIsAligned>(channel);
        }
      }
      if constexpr (kHasResidual) {
        if (is_kept[i] || !in_place) {
          residuals[i] = load_vector<TR, kWidth>(residual + residual_offsets[row] + column);
        }
      }
    }
    if constexpr (kHasGamma) {
      channel = gamma.channels.advance(channel, gamma_step);
    }
  }

  const F scale = sources.times_factor(given_scale);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int vector = threadIdx.x + i * kThreads;
    if (vector >= vectors || (in_place && !is_kept[i])) {
      continue;
    }
    Vector<TO, kWidth> result{};
    F sums[kWidth];
    if constexpr (kHasResidual) {
      residuals[i].to_opmath(sums);
    }
    if (is_kept[i]) {
      F terms[kWidth];
      values[i].to_opmath(terms);
      if constexpr (kHasGamma) {
        gammas[i].multiply(terms);
      }
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        if constexpr (kHasResidual) {
          sums[j] += terms[j] * scale;
        } else {
          sums[j] = terms[j] * scale;
        }
      }
      result = Vector<TO, kWidth>::from_opmath(sums);
      if constexpr (kOnlyScales) {
        // A copy is one bit for bit: arithmetic would change a NaN.
        if (scale == F(1)) {
          result = values[i];
        }
      }
    } else if constexpr (std::is_same_v<TR, TO>) {
      result = residuals[i];
    } else if constexpr (kHasResidual) {
      result = Vector<TO, kWidth>::from_opmath(sums);
    }
    store_vector(out + first_position + vector * kWidth, result);
  }
}

}  // namespace droppath_ext
