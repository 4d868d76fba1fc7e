// Where the elements of a sample lie: the index arithmetic that CPU and CUDA kernels share.
#pragma once

#include <c10/macros/Macros.h>

#include <cstdint>

namespace droppath_ext {

// Quotients are 32-bit wherever the operands allow: a 64-bit division is many times slower on a GPU.
C10_HOST_DEVICE inline int64_t divide(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) {
    return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  }
  return a / b;
}

// A row, by its sample and its number among the rows of that sample.
struct RowLocation {
  int64_t sample;
  int64_t outer;
};

// A tensor as rows in the order of the output's memory. A row is a run of elements of one sample; the output is dense
// as a whole, so its row r starts at r * length.
//
//   contiguous or channels_last [B, ...]         count = B,     length = elements of a sample
//   sequence-first [N, B, D], viewed [B, N, D]   count = N * B, length = D
struct Rows {
  int64_t count;
  int64_t length;
  int64_t samples;  // row r belongs to sample r % samples

  // The one place that knows which sample a row belongs to.
  C10_HOST_DEVICE RowLocation locate(int64_t row) const {
    const int64_t outer = count == samples ? 0 : divide(row, samples);
    return {row - outer * samples, outer};
  }

  C10_HOST_DEVICE int64_t row_at(const RowLocation& location) const {
    return location.outer * samples + location.sample;
  }
  int64_t rows_of_sample() const { return count / samples; }
  // From a row to the next one of its sample, in elements of the output.
  int64_t outer_stride() const { return length * samples; }

  // Further on by as many rows as lie before `step`; without a division.
  C10_HOST_DEVICE RowLocation advance(RowLocation location, const RowLocation& step) const {
    location.sample += step.sample;
    location.outer += step.outer;
    if (location.sample >= samples) {
      location.sample -= samples;
      ++location.outer;
    }
    return location;
  }
};

// Where an input, dense within each row, has its rows; in elements.
struct RowStrides {
  int64_t sample;  // from one sample to the next
  int64_t outer;   // from row r to row r + samples

  C10_HOST_DEVICE int64_t offset_of(int64_t source, int64_t outer_index) const {
    return source * sample + outer_index * outer;
  }
};

// A row of the output that is made from no sample of the input.
constexpr int64_t kDropped = -1;

// An entry of gamma, and which of the neighbours that share it an element is.
struct ChannelLocation {
  int64_t channel;
  int64_t offset;
};

// Which entry of gamma belongs to an element, by the element's position in the output's memory: entries follow each
// other every `inner` elements. 1 for the last dim of tokens and for channels_last, H * W for contiguous [B, C, H, W].
struct Channels {
  int64_t inner;
  int64_t count;

  // Elements behind which the channels come again.
  C10_HOST_DEVICE int64_t period() const { return inner * count; }

  C10_HOST_DEVICE ChannelLocation locate(int64_t position) const {
    const int64_t run = inner == 1 ? position : divide(position, inner);
    return {run - divide(run, count) * count, position - run * inner};
  }

  // Further on by as many elements as lie before `step`; without a division.
  C10_HOST_DEVICE ChannelLocation advance(ChannelLocation location, const ChannelLocation& step) const {
    location.offset += step.offset;
    location.channel += step.channel;
    if (location.offset >= inner) {
      location.offset -= inner;
      ++location.channel;
    }
    if (location.channel >= count) {
      location.channel -= count;
    }
    return location;
  }
};

}  // namespace droppath_ext
