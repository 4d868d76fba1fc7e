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
inline RowPlace row_place_of(In a) { return {a[0], a[1]}; }
inline Channels channels_of(In a) { return {a[0], a[1]}; }
inline ChannelPlace channel_place_of(In a) { return {a[0], a[1]}; }
inline LinePlace line_place_of(In a) { return {{a[0], a[1]}, a[2]}; }
inline Lines lines_of(In a) { return {a[0], a[1], a[2], a[3]}; }

inline Ints list(const RowPlace& place) { return {place.sample, place.outer}; }
inline Ints list(const ChannelPlace& place) { return {place.channel, place.offset}; }
inline Ints list(const LinePlace& place) { return {place.row.sample, place.row.outer, place.line}; }

inline Ints row_place(In rows, int64_t row) { return list(rows_of(rows).place_of(row)); }
inline Ints row_advance(In rows, In place, In step) {
  return list(rows_of(rows).advance(row_place_of(place), row_place_of(step)));
}
inline int64_t row_offset(In strides, int64_t source, int64_t outer) {
  return RowStrides{strides[0], strides[1]}.offset_of(source, outer);
}
inline Ints channel_place(In channels, int64_t place) { return list(channels_of(channels).place_of(place)); }
inline Ints channel_advance(In channels, In place, In step) {
  return list(channels_of(channels).advance(channel_place_of(place), channel_place_of(step)));
}
inline int64_t tiles(In rows, int64_t vectors, int64_t width) {
  return Tiling::make(rows_of(rows), static_cast<int>(vectors), static_cast<int>(width)).tiles(rows_of(rows));
}
inline Ints tile(In rows, int64_t vectors, int64_t width, int64_t index) {
  const auto tiling = Tiling::make(rows_of(rows), static_cast<int>(vectors), static_cast<int>(width));
  const Tile tile = tiling.tile(index, rows_of(rows));
  return {tile.first_row, tile.first_column, tile.rows, tile.columns};
}
inline Ints line_tiling(In channels, int64_t width) {
  const auto tiling = LineTiling::make(channels_of(channels), static_cast<int>(width));
  return {tiling.line_vectors, tiling.tiles, tiling.vectors, tiling.lines, tiling.segments, tiling.threads()};
}
inline Ints lines(In rows, In channels) {
  const auto lines = Lines::make(rows_of(rows), channels_of(channels));
  return {lines.count, lines.length, lines.per_row, lines.rows_of_line};
}
inline Ints line_place(In lines, In rows, int64_t line, int64_t row_of_line) {
  return list(lines_of(lines).place_of(line, row_of_line, rows_of(rows)));
}
inline Ints line_advance(In lines, In rows, In place, In step) {
  return list(lines_of(lines).advance(line_place_of(place), line_place_of(step), rows_of(rows)));
}

}  // namespace cuda_on_host::index_functions

TORCH_LIBRARY_FRAGMENT(cuda_on_host, m) {
  namespace f = cuda_on_host::index_functions;
  m.def("divide(int a, int b) -> int", &droppath_ext::divide);
  m.def("row_place(int[] rows, int row) -> int[]", &f::row_place);
  m.def("row_advance(int[] rows, int[] place, int[] step) -> int[]", &f::row_advance);
  m.def("row_offset(int[] strides, int source, int outer) -> int", &f::row_offset);
  m.def("channel_place(int[] channels, int place) -> int[]", &f::channel_place);
  m.def("channel_advance(int[] channels, int[] place, int[] step) -> int[]", &f::channel_advance);
  m.def("tiles(int[] rows, int vectors, int width) -> int", &f::tiles);
  m.def("tile(int[] rows, int vectors, int width, int index) -> int[]", &f::tile);
  m.def("line_tiling(int[] channels, int width) -> int[]", &f::line_tiling);
  m.def("lines(int[] rows, int[] channels) -> int[]", &f::lines);
  m.def("line_place(int[] lines, int[] rows, int line, int row_of_line) -> int[]", &f::line_place);
  m.def("line_advance(int[] lines, int[] rows, int[] place, int[] step) -> int[]", &f::line_advance);
}
