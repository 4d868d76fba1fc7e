// The index arithmetic of the kernels as ops of integers, for numbers that no tensor reaches: check_index_functions.py
// calls them. Structs go in and come out as lists of their members.
#pragma once

#include <torch/library.h>

// Before what it stands in for.
#include "cuda_on_host.h"

#include "csrc/cuda/gamma_grad.cuh"
#include "csrc/cuda/tiling.h"
#include "csrc/rows.h"

namespace cuda_on_host::index_functions {

using namespace droppath_ext;
using Ints = std::vector<int64_t>;
using In = at::IntArrayRef;

inline Rows rows_of(In a) { return {a[0], a[1], a[2]}; }
inline RowLocation row_location_of(In a) { return {a[0], a[1]}; }
inline Channels channels_of(In a) { return {a[0], a[1]}; }
inline ChannelLocation channel_location_of(In a) { return {a[0], a[1]}; }
inline PeriodLocation period_location_of(In a) { return {{a[0], a[1]}, a[2]}; }
inline Periods periods_of(In a) { return {a[0], a[1], a[2], a[3]}; }

inline Ints list(const RowLocation& location) { return {location.sample, location.outer}; }
inline Ints list(const ChannelLocation& location) { return {location.channel, location.offset}; }
inline Ints list(const PeriodLocation& location) { return {location.row.sample, location.row.outer, location.period}; }

inline Ints row_location(In rows, int64_t row) { return list(rows_of(rows).locate(row)); }
inline Ints row_advance(In rows, In location, In step) {
  return list(rows_of(rows).advance(row_location_of(location), row_location_of(step)));
}
inline int64_t row_offset(In strides, int64_t source, int64_t outer) {
  return RowStrides{strides[0], strides[1]}.offset_of(source, outer);
}
inline Ints channel_location(In channels, int64_t location) { return list(channels_of(channels).locate(location)); }
inline Ints channel_advance(In channels, In location, In step) {
  return list(channels_of(channels).advance(channel_location_of(location), channel_location_of(step)));
}
inline int64_t tiles(In rows, int64_t vectors, int64_t width) {
  return Tiling::make(rows_of(rows), static_cast<int>(vectors), static_cast<int>(width)).tiles(rows_of(rows));
}
inline Ints tile(In rows, int64_t vectors, int64_t width, int64_t index) {
  const auto tiling = Tiling::make(rows_of(rows), static_cast<int>(vectors), static_cast<int>(width));
  const Tile tile = tiling.tile(index, rows_of(rows));
  return {tile.first_row, tile.first_column, tile.rows, tile.columns};
}
inline Ints period_tiling(In channels, int64_t width) {
  const auto tiling = PeriodTiling::make(channels_of(channels), static_cast<int>(width));
  return {tiling.period_vectors, tiling.tiles, tiling.vectors, tiling.periods, tiling.segments, tiling.threads()};
}
inline Ints periods(In rows, In channels) {
  const auto periods = Periods::make(rows_of(rows), channels_of(channels));
  return {periods.count, periods.length, periods.per_row, periods.rows_of_period};
}
inline Ints period_location(In periods, In rows, int64_t period, int64_t row_of_period) {
  return list(periods_of(periods).locate(period, row_of_period, rows_of(rows)));
}
inline Ints period_advance(In periods, In rows, In location, In step) {
  return list(periods_of(periods).advance(period_location_of(location), period_location_of(step), rows_of(rows)));
}

}  // namespace cuda_on_host::index_functions

TORCH_LIBRARY_FRAGMENT(cuda_on_host, m) {
  namespace f = cuda_on_host::index_functions;
  m.def("divide(int a, int b) -> int", &droppath_ext::divide);
  m.def("row_location(int[] rows, int row) -> int[]", &f::row_location);
  m.def("row_advance(int[] rows, int[] location, int[] step) -> int[]", &f::row_advance);
  m.def("row_offset(int[] strides, int source, int outer) -> int", &f::row_offset);
  m.def("channel_location(int[] channels, int location) -> int[]", &f::channel_location);
  m.def("channel_advance(int[] channels, int[] location, int[] step) -> int[]", &f::channel_advance);
  m.def("tiles(int[] rows, int vectors, int width) -> int", &f::tiles);
  m.def("tile(int[] rows, int vectors, int width, int index) -> int[]", &f::tile);
  m.def("period_tiling(int[] channels, int width) -> int[]", &f::period_tiling);
  m.def("periods(int[] rows, int[] channels) -> int[]", &f::periods);
  m.def("period_location(int[] periods, int[] rows, int period, int row_of_period) -> int[]", &f::period_location);
  m.def("period_advance(int[] periods, int[] rows, int[] location, int[] step) -> int[]", &f::period_advance);
}
