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

// A tensor as rows in the order of the output's memory. A row is a run of elements of one sample that is dense in the
// input and in the output; the output is dense as a whole, so its row r starts at r * length.
//
//   contiguous or channels_last [B, ...]     count = B,     length = elements of a sample
//   sequence-first [N, B, D], viewed [B, N, D]   count = N * B, length = D
struct Rows {
  int64_t count;
  int64_t length;
  int64_t samples;        // row r belongs to sample r % samples
  int64_t sample_stride;  // of the input, in elements
  int64_t outer_stride;   // of the input, from row r to row r + samples

  C10_HOST_DEVICE int64_t outer_of(int64_t row) const { return count == samples ? 0 : divide(row, samples); }
  // The one place that knows which sample a row belongs to.
  C10_HOST_DEVICE int64_t sample_of(int64_t row) const { return row - outer_of(row) * samples; }
  C10_HOST_DEVICE int64_t input_offset(int64_t row) const {
    return sample_of(row) * sample_stride + outer_of(row) * outer_stride;
  }
};

}  // namespace droppath_ext
