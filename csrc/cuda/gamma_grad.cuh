// The backward of gamma * x in one pass: grad_x = grad * gamma * scale where the sample is kept and zero where it is
// dropped, and for each channel the sum of grad * x over what is kept. Blocks write partial sums, [parts, channels];
// sum_parts_kernel adds them up. No atomics: the order of every sum is fixed.
#pragma once

#include "operands.cuh"
#include "tiling.h"
#include "vector.cuh"

namespace droppath_ext {

constexpr int kLinesInFlight = 4;

// grad_x may be null, which asks for the sums alone. Rows are those of x's samples, in the memory of grad_x; grad is
// read where `sources` says.
template <typename TG, typename TX>
struct BackwardArgs {
  TX* grad_x;
  Opmath<TX>* parts;
  const TG* grad;
  const TX* x;
  Sources sources;
  Gamma gamma;
  Rows rows;
  RowStrides strides;
  RowStrides grad_strides;
  Opmath<TX> scale;
};

// The shape of a block where the channels lie innermost: it walks over lines of channels.count neighbours, `lines` of
// them at a time, and its thread t always works on the same vector of channels.
struct Columns {
  int vectors;  // of channels that a block works on
  int lines;
  int64_t tiles;  // blocks that share a line

  static Columns make(int64_t channels, int width) {
    const int64_t vectors = channels / width;
    const int64_t tiles = (vectors + kThreads - 1) / kThreads;
    const int per_tile = static_cast<int>((vectors + tiles - 1) / tiles);
    return {per_tile, kThreads / per_tile, tiles};
  }
};

// channels.inner == 1. Lines are dealt out in turns, so that blocks meet about as many dropped samples as each other.
template <typename TG, typename TX, int kWidth>
__global__ void __launch_bounds__(kThreads)
    columns_backward_kernel(BackwardArgs<TG, TX> args, Columns columns, int64_t parts) {
  using F = Opmath<TX>;
  __shared__ F shared[kThreads * kWidth];

  const int64_t channels = args.gamma.channels.count;
  const int64_t part = divide(blockIdx.x, columns.tiles);
  const int64_t tile = blockIdx.x - part * columns.tiles;
  const int line_of_block = threadIdx.x / columns.vectors;
  const int vector = threadIdx.x - line_of_block * columns.vectors;
  const int64_t channel = (tile * columns.vectors + vector) * kWidth;
  const bool works = line_of_block < columns.lines && channel < channels;
  const int64_t lines_per_row = divide(args.rows.length, channels);
  const int64_t lines = args.rows.count * lines_per_row;
  const int64_t stride = parts * columns.lines;

  F sums[kWidth] = {};
  if (works) {
    F factors[kWidth];
    args.gamma.template factors<TX, kWidth>(factors, channel, args.scale);
    for (int64_t first = part * columns.lines + line_of_block; first < lines; first += stride * kLinesInFlight) {
      Vector<TG, kWidth> grads[kLinesInFlight];
      Vector<TX, kWidth> values[kLinesInFlight];
      bool is_kept[kLinesInFlight];
#pragma unroll
      for (int i = 0; i < kLinesInFlight; ++i) {
        const int64_t line = first + i * stride;
        is_kept[i] = false;
        if (line < lines) {
          const int64_t row = divide(line, lines_per_row);
          const RowPlace place = args.rows.place_of(row);
          const int64_t source = args.sources(place.sample);
          is_kept[i] = source != kDropped;
          if (is_kept[i]) {
            const int64_t column = (line - row * lines_per_row) * channels + channel;
            const int64_t grad_offset = args.grad_strides.offset_of(source, place.outer);
            grads[i] = load_vector<TG, kWidth>(args.grad + grad_offset + column);
            const int64_t offset = args.strides.offset_of(place.sample, place.outer);
            values[i] = load_vector<TX, kWidth>(args.x + offset + column);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kLinesInFlight; ++i) {
        const int64_t line = first + i * stride;
        if (line < lines) {
          Vector<TX, kWidth> result{};
          if (is_kept[i]) {
#pragma unroll
            for (int j = 0; j < kWidth; ++j) {
              const F grad = to_opmath(grads[i].values[j]);
              sums[j] += grad * to_opmath(values[i].values[j]);
              result.values[j] = from_opmath<TX>(grad * factors[j]);
            }
          }
          if (args.grad_x != nullptr) {
            store_vector(args.grad_x + line * channels + channel, result);
          }
        }
      }
    }
  }

#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    shared[threadIdx.x * kWidth + j] = sums[j];
  }
  __syncthreads();
  if (works && line_of_block == 0) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      F sum = 0;
      for (int line = 0; line < columns.lines; ++line) {
        sum += shared[(line * columns.vectors + vector) * kWidth + j];
      }
      args.parts[part * channels + channel + j] = sum;
    }
  }
}

// How a plane, the `inner` neighbours that share a channel, is cut where it is too much for one warp.
struct Segments {
  int64_t count;   // of a plane
  int64_t length;  // of all but the last, a multiple of every width

  static Segments make(int64_t inner) {
    constexpr int64_t kLength = 4096;
    const int64_t count = (inner + kLength - 1) / kLength;
    const int64_t length = ((inner + count - 1) / count + 15) / 16 * 16;
    return {(inner + length - 1) / length, length};
  }
};

// channels.inner > 1: a warp takes a segment and writes its sum.
template <typename TG, typename TX, int kWidth>
__global__ void __launch_bounds__(kThreads)
    planes_backward_kernel(BackwardArgs<TG, TX> args, Segments segments, int64_t planes) {
  using F = Opmath<TX>;
  const int64_t inner = args.gamma.channels.inner;
  const int64_t channels = args.gamma.channels.count;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int64_t plane = segments.count == 1 ? warp : divide(warp, segments.count);
  if (plane >= planes) {
    return;
  }
  const int64_t segment = warp - plane * segments.count;
  const int64_t planes_per_row = divide(args.rows.length, inner);
  const int64_t row = divide(plane, planes_per_row);
  const RowPlace place = args.rows.place_of(row);
  const int64_t source = args.sources(place.sample);
  const bool is_kept = source != kDropped;
  const int64_t column = (plane - row * planes_per_row) * inner;
  const int64_t grad_offset = is_kept ? args.grad_strides.offset_of(source, place.outer) + column : 0;
  const int64_t offset = args.strides.offset_of(place.sample, place.outer) + column;
  const int64_t outer = divide(plane, channels);
  const int64_t channel = plane - outer * channels;
  const F factor = args.gamma.factor(args.gamma.template value<TX>(channel), args.scale);
  const int64_t first = segment * segments.length;
  const int64_t last = first + segments.length < inner ? first + segments.length : inner;

  F sum = 0;
#pragma unroll 4
  for (int64_t i = first + lane * kWidth; i < last; i += kWarp * kWidth) {
    Vector<TX, kWidth> result{};
    if (is_kept) {
      const auto grads = load_vector<TG, kWidth>(args.grad + grad_offset + i);
      const auto values = load_vector<TX, kWidth>(args.x + offset + i);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const F grad = to_opmath(grads.values[j]);
        sum += grad * to_opmath(values.values[j]);
        result.values[j] = from_opmath<TX>(grad * factor);
      }
    }
    if (args.grad_x != nullptr) {
      store_vector(args.grad_x + plane * inner + i, result);
    }
  }
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(0xffffffff, sum, distance);
  }
  if (lane == 0) {
    args.parts[(outer * segments.count + segment) * channels + channel] = sum;
  }
}

// grad_gamma[channel] = scale * sum of parts[:, channel]: a block takes kWarp channels, each of its warps a share of
// parts.
template <typename T, typename F>
__global__ void __launch_bounds__(kThreads) sum_parts_kernel(T* __restrict__ grad_gamma, const F* __restrict__ parts,
                                                             int64_t count, int64_t channels, F scale) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ F shared[kWarps][kWarp];
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  F sum = 0;
  if (channel < channels) {
#pragma unroll 8
    for (int64_t part = warp; part < count; part += kWarps) {
      sum += parts[part * channels + channel];
    }
  }
  shared[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && channel < channels) {
    for (int i = 1; i < kWarps; ++i) {
      sum += shared[i][lane];
    }
    grad_gamma[channel] = from_opmath<T>(sum * scale);
  }
}

}  // namespace droppath_ext
