// The backward of gamma * x in one pass: grad_x = grad * gamma * scale where the sample is kept and zero where it is
// dropped, and for each channel the sum of grad * x over what is kept. Blocks write partial sums, [parts, channels];
// sum_parts_kernel adds them up. No atomics: the order of every sum is fixed by the shape and by the number of blocks
// that the device holds at once.
#pragma once

#include <algorithm>
#include <numeric>

#include "operands.cuh"
#include "tiling.h"
#include "vector.cuh"

namespace droppath_ext {

// grad_x may be null, which asks for the sums alone. Rows are those of x's samples, in the memory of grad_x; grad is
// read where `sources` says.
template <typename TG, typename TX, typename TGamma>
struct BackwardArgs {
  TX* grad_x;
  Opmath<TX>* parts;
  const TG* grad;
  const TX* x;
  SourceLookup sources;
  Gamma<TGamma> gamma;
  Rows rows;
  RowStrides strides;
  RowStrides grad_strides;
  Opmath<TX> scale;
};

// How blocks share the periods. A period is the shortest run of memory that holds every channel once: a token of [B, N,
// D], a sample of [B, C, H, W]. A block takes a tile, part of a period or a whole one, and walks over the periods with
// it, so that each of its threads meets the same channels in all of them and keeps their sums in registers.
struct PeriodTiling {
  int64_t period_vectors;
  int64_t tiles;     // of a period
  int vectors;       // of a tile
  int periods;       // that a block works on at a time
  int64_t segments;  // tiles that may meet one channel: each has parts of its own

  static PeriodTiling make(const Channels& channels, int width) {
    const int64_t period_vectors = channels.period() / width;
    // The shortest run of vectors that is whole channels. Tiles are made of such runs if they are not too long.
    const int64_t run = channels.inner == 1 ? 1 : channels.inner / std::gcd(channels.inner, int64_t{width});
    const int64_t unit = run <= kThreads ? run : 1;
    const int64_t units = ceil_div(period_vectors, unit);
    const int64_t tiles = ceil_div(units, kThreads / unit);
    const int64_t vectors = ceil_div(units, tiles) * unit;
    const int64_t elements = vectors * width;
    return {period_vectors, ceil_div(period_vectors, vectors), static_cast<int>(vectors),
            tiles == 1 ? static_cast<int>(kThreads / vectors) : 1,
            run <= kThreads ? 1 : (channels.inner + elements - 2) / elements + 1};
  }

  // Whole warps.
  int threads() const { return static_cast<int>(ceil_div(vectors * periods, kWarp)) * kWarp; }
};

// The location of a period: its row, and which of the row's periods it is.
struct PeriodLocation {
  RowLocation row;
  int64_t period;
};

// The periods of a tensor. A row holds whole periods; or, where the channels lie outside of the samples, a period whole
// rows.
struct Periods {
  int64_t count;
  int64_t length;
  int64_t per_row;         // 1 if a period holds rows
  int64_t rows_of_period;  // 1 if a row holds periods

  static Periods make(const Rows& rows, const Channels& channels) {
    const int64_t length = channels.period();
    return {rows.count * rows.length / length, length, std::max<int64_t>(rows.length / length, 1),
            std::max<int64_t>(length / rows.length, 1)};
  }

  C10_HOST_DEVICE PeriodLocation locate(int64_t period, int64_t row_of_period, const Rows& rows) const {
    const int64_t row = per_row == 1 ? period : divide(period, per_row);
    return {rows.locate(row * rows_of_period + row_of_period), period - row * per_row};
  }

  // Further on by as many periods as lie before `step`; without a division.
  C10_HOST_DEVICE PeriodLocation advance(PeriodLocation location, const PeriodLocation& step, const Rows& rows) const {
    location.row = rows.advance(location.row, step.row);
    location.period += step.period;
    if (location.period >= per_row) {
      location.period -= per_row;
      location.row = rows.advance(location.row, {1, 0});
    }
    return location;
  }
};

// Periods that a thread has loaded before it works on the first. More need so many registers that fewer blocks fit.
constexpr int kPeriodsInFlight = 2;

// kInnermost: a vector holds kWidth channels (channels.inner == 1). Otherwise it holds one, or the end of one and the
// beginning of the next. Periods are dealt out in turns, so that blocks meet about as many dropped samples as each
// other: `stride` periods, that is `step`, lead a block from one of its periods to the next.
template <typename TG, typename TX, typename TGamma, int kWidth, bool kInnermost>
__global__ void __launch_bounds__(kThreads) gamma_grad_kernel(BackwardArgs<TG, TX, TGamma> args, PeriodTiling tiling,
                                                              Periods periods, int64_t stride, PeriodLocation step) {
  using F = Opmath<TX>;
  constexpr int kSums = kInnermost ? kWidth : 2;
  __shared__ F shared[kSums][kThreads];

  const Channels channels = args.gamma.channels;
  const int64_t part = divide(blockIdx.x, tiling.tiles);
  const int64_t tile = blockIdx.x - part * tiling.tiles;
  const int period_of_block = threadIdx.x / tiling.vectors;
  const int64_t vector = tile * tiling.vectors + (threadIdx.x - period_of_block * tiling.vectors);
  const int64_t column = vector * kWidth;  // in the period
  const bool works = period_of_block < tiling.periods && vector < tiling.period_vectors;

  F sums[kSums] = {};
  if (works) {
    const ChannelLocation channel = channels.locate(column);
    // Elements of the vector that belong to its first channel.
    const int64_t of_first = channels.inner - channel.offset;
    const F scale = args.sources.times_factor(args.scale);
    F factors[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      factors[j] = scale;
    }
    if (args.gamma.is_aligned) {
      args.gamma.template load<kWidth, true>(channel).multiply(factors);
    } else {
      args.gamma.template load<kWidth, false>(channel).multiply(factors);
    }
    const int64_t row_of_period = periods.rows_of_period == 1 ? 0 : divide(column, args.rows.length);
    const int64_t column_of_row = column - row_of_period * args.rows.length;
    int64_t period = part * tiling.periods + period_of_block;
    TX* grad_x = args.grad_x == nullptr ? nullptr : args.grad_x + period * periods.length + column;
    PeriodLocation location = periods.locate(period, row_of_period, args.rows);
    while (period < periods.count) {
      Vector<TG, kWidth> grads[kPeriodsInFlight];
      Vector<TX, kWidth> values[kPeriodsInFlight];
      bool is_kept[kPeriodsInFlight];
#pragma unroll
      for (int i = 0; i < kPeriodsInFlight; ++i) {
        is_kept[i] = false;
        if (period + i * stride < periods.count) {
          const int64_t source = args.sources(location.row.sample);
          is_kept[i] = source != kDropped;
          if (is_kept[i]) {
            const int64_t position_in_row = location.period * periods.length + column_of_row;
            grads[i] = load_vector<TG, kWidth>(args.grad + args.grad_strides.offset_of(source, location.row.outer) +
                                               position_in_row);
            values[i] = load_vector<TX, kWidth>(
                args.x + args.strides.offset_of(location.row.sample, location.row.outer) + position_in_row);
          }
        }
        location = periods.advance(location, step, args.rows);
      }
#pragma unroll
      for (int i = 0; i < kPeriodsInFlight; ++i, period += stride) {
        if (period < periods.count) {
          Vector<TX, kWidth> result{};
          if (is_kept[i]) {
            F terms[kWidth];
            F products[kWidth];
            grads[i].to_opmath(products);
            values[i].to_opmath(terms);
#pragma unroll
            for (int j = 0; j < kWidth; ++j) {
              terms[j] *= products[j];
              if constexpr (kInnermost) {
                sums[j] += terms[j];
              } else {
                sums[0] += j < of_first ? terms[j] : F(0);
                sums[1] += j < of_first ? F(0) : terms[j];
              }
              products[j] *= factors[j];
            }
            result = Vector<TX, kWidth>::from_opmath(products);
          }
          if (grad_x != nullptr) {
            store_vector(grad_x, result);
            grad_x += stride * periods.length;
          }
        }
      }
    }
  }

#pragma unroll
  for (int j = 0; j < kSums; ++j) {
    shared[j][threadIdx.x] = sums[j];
  }
  __syncthreads();
  // The sum of one of a vector's sums over the periods of the block.
  const auto sum_of = [&](int j, int64_t vector_of_tile) {
    F sum = 0;
    for (int period = 0; period < tiling.periods; ++period) {
      sum += shared[j][period * tiling.vectors + vector_of_tile];
    }
    return sum;
  };
  if constexpr (kInnermost) {
    if (works && period_of_block == 0) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        args.parts[part * channels.count + column + j] = sum_of(j, threadIdx.x);
      }
    }
  } else {
    // A warp for each channel that the tile meets, from `begin` to `end` in the period.
    const int64_t begin = tile * tiling.vectors * kWidth;
    const int64_t end = std::min((tile + 1) * tiling.vectors, tiling.period_vectors) * kWidth;
    const int64_t past_channel = divide(end - 1, channels.inner) + 1;
    const int lane = threadIdx.x % kWarp;
    for (int64_t channel = divide(begin, channels.inner) + threadIdx.x / kWarp; channel < past_channel;
         channel += blockDim.x / kWarp) {
      const int64_t from = channel * channels.inner;
      const int64_t to = from + channels.inner;
      const int64_t first_vector = divide(std::max(from, begin) - begin, kWidth);
      const int64_t last_vector = divide(std::min(to, end) - begin - 1, kWidth);
      F sum = 0;
      for (int64_t i = first_vector + lane; i <= last_vector; i += kWarp) {
        // The channel is a vector's second if the vector begins before it.
        sum += sum_of(begin + i * kWidth < from ? 1 : 0, i);
      }
#pragma unroll
      for (int distance = kWarp / 2; distance > 0; distance /= 2) {
        sum += __shfl_xor_sync(0xffffffff, sum, distance);
      }
      if (lane == 0) {
        // This tile is the channel's segment-th; the last one fills up the rest.
        const int64_t segment = tile - divide(divide(from, kWidth), tiling.vectors);
        const int64_t past = to <= end ? tiling.segments : segment + 1;
        for (int64_t i = segment; i < past; ++i) {
          args.parts[(part * tiling.segments + i) * channels.count + channel] = i == segment ? sum : F(0);
        }
      }
    }
  }
}

// Of a launch with Start::kEarly: until the kernel before it has ended and what it wrote can be read.
__device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

constexpr int kSumThreads = 512;
constexpr int kSumChannels = 8;  // of a block; few, because the sums are short: many small blocks end sooner

// grad_gamma[channel] = scale * sum of parts[:, channel]: a thread adds every kPartsAtATime-th part, then the threads
// of a channel add up theirs.
template <typename T, typename F>
__global__ void __launch_bounds__(kSumThreads)
    sum_parts_kernel(T* __restrict__ grad_gamma, const F* __restrict__ parts, int64_t count, int64_t channels, F scale,
                     const double* factor) {
  constexpr int kPartsAtATime = kSumThreads / kSumChannels;
  constexpr int kWarps = kSumThreads / kWarp;
  constexpr int kShare = kWarps / (kWarp / kSumChannels);  // of the warps' sums, for each lane of the first warp
  __shared__ F shared[kWarps][kSumChannels];
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int column = lane % kSumChannels;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kSumChannels + column;
  // Over the lanes of a warp that have the same channel.
  const auto sum_over_lanes = [](F sum) {
#pragma unroll
    for (int distance = kSumChannels; distance < kWarp; distance *= 2) {
      sum += __shfl_xor_sync(0xffffffff, sum, distance);
    }
    return sum;
  };
  wait_for_previous_kernel();
  F sum = 0;
  if (channel < channels) {
#pragma unroll 8
    for (int64_t part = threadIdx.x / kSumChannels; part < count; part += kPartsAtATime) {
      sum += parts[part * channels + channel];
    }
  }
  sum = sum_over_lanes(sum);
  if (lane < kSumChannels) {
    shared[warp][lane] = sum;
  }
  __syncthreads();
  if (warp == 0) {
    sum = 0;
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      sum += shared[lane / kSumChannels * kShare + i][column];
    }
    sum = sum_over_lanes(sum);
    if (lane < kSumChannels && channel < channels) {
      if (sum != 0) {  // of nothing but dropped samples it is zero, whatever the scale
        sum *= factor == nullptr ? scale : scale * static_cast<F>(*factor);
      }
      grad_gamma[channel] = from_opmath<T>(sum);
    }
  }
}

}  // namespace droppath_ext
