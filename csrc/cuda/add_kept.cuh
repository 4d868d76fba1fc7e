// One pass over a tensor: a kept sample becomes x * scale, or residual + gamma * x * scale; a dropped one becomes zero,
// or the residual. x is read only where it is kept, and where an index says.
#pragma once

#include "operands.cuh"
#include "tiling.h"
#include "vector.cuh"

namespace droppath_ext {

// Vectors that a thread moves. A residual brings a second load for each, gamma needs registers.
template <typename TR, bool kHasGamma>
constexpr int kUnroll = std::is_void_v<TR> && !kHasGamma ? 4 : 2;

// A block takes one tile. For each of the tile's rows it asks once for the source and notes where the row is to be
// read; then each thread moves kUnroll vectors, all loaded before the first is used, so that enough reads are in flight
// to cover the latency of memory. TR is void where there is no residual. If in_place, the residual is out itself, and
// what is dropped stays as it is.
template <typename TO, typename TR, typename TX, int kWidth, bool kHasGamma>
__global__ void __launch_bounds__(kThreads)
    add_kept_kernel(TO* out, const TR* residual, const TX* __restrict__ x, Sources sources, Gamma gamma, Rows rows,
                    RowStrides strides, RowStrides residual_strides, Tiling tiling, bool in_place, Opmath<TO> scale) {
  constexpr bool kHasResidual = !std::is_void_v<TR>;
  constexpr int kVectors = kUnroll<TR, kHasGamma>;
  using Residual = std::conditional_t<kHasResidual, TR, TO>;
  __shared__ int64_t offsets[kThreads * kVectors];  // of each row in x, or kDropped
  __shared__ int64_t residual_offsets[kHasResidual ? kThreads * kVectors : 1];

  const Tile tile = tiling.tile(blockIdx.x, rows);
#pragma unroll 1
  for (int i = threadIdx.x; i < tile.rows; i += kThreads) {
    const int64_t row = tile.first_row + i;
    const bool writes_mask = tile.first_column == 0 && row < rows.samples;
    const RowPlace place = rows.place_of(row);
    const int64_t source = sources(place.sample, writes_mask);
    offsets[i] = source == kDropped ? kDropped : strides.offset_of(source, place.outer) + tile.first_column;
    if constexpr (kHasResidual) {
      residual_offsets[i] = residual_strides.offset_of(place.sample, place.outer) + tile.first_column;
    }
  }
  __syncthreads();

  const int vectors_per_row = tile.columns / kWidth;
  const int vectors = tile.rows * vectors_per_row;
  Vector<TX, kWidth> values[kVectors];
  Vector<Residual, kWidth> residuals[kVectors];
  bool is_kept[kVectors];
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
      }
      if constexpr (kHasResidual) {
        if (is_kept[i] || !in_place) {
          residuals[i] = load_vector<TR, kWidth>(residual + residual_offsets[row] + column);
        }
      }
    }
  }

  // A tile's output is one run of memory: part of a row, or whole rows.
  const int64_t first_place = tile.first_row * rows.length + tile.first_column;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int vector = threadIdx.x + i * kThreads;
    if (vector < vectors && (is_kept[i] || !in_place)) {
      Vector<TO, kWidth> result{};
      if constexpr (kHasResidual) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          if constexpr (std::is_same_v<TR, TO>) {
            result.values[j] = residuals[i].values[j];
          } else {
            result.values[j] = from_opmath<TO>(to_opmath(residuals[i].values[j]));
          }
        }
      }
      if (is_kept[i]) {
        Opmath<TO> factors[kWidth];
        if constexpr (kHasGamma) {
          gamma.factors<TX, kWidth>(factors, first_place + vector * kWidth, scale);
        }
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          const Opmath<TO> value = to_opmath(values[i].values[j]);
          const Opmath<TO> factor = kHasGamma ? factors[j] : scale;
          if constexpr (kHasResidual) {
            result.values[j] = from_opmath<TO>(to_opmath(residuals[i].values[j]) + value * factor);
          } else {
            result.values[j] = from_opmath<TO>(value * factor);
          }
        }
      }
      store_vector(out + first_place + vector * kWidth, result);
    }
  }
}

}  // namespace droppath_ext
