// How a tensor's rows are shared out among thread blocks.
#pragma once

#include <c10/macros/Macros.h>

#include <cstdint>

#include "../rows.h"

namespace droppath_ext {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Part of one row, or several whole rows.
struct Tile {
  int64_t first_row;
  int64_t first_column;
  int rows;
  int columns;
};

// A tile holds at most `vectors` vectors of `width` elements. A long row is cut into equal tiles; short rows
// share one. The tile's number is the block's: one grid dimension of up to 2^31 - 1 blocks carries every size.
struct Tiling {
  int64_t tiles_per_row;  // 1 for short rows
  int rows_per_tile;      // 1 for long rows
  int columns_per_tile;

  static Tiling make(const Rows& rows, int vectors, int width) {
    const int64_t capacity = static_cast<int64_t>(vectors) * width;
    if (rows.length > capacity) {
      const int64_t tiles = ceil_div(rows.length, capacity);
      return {tiles, 1, static_cast<int>(ceil_div(ceil_div(rows.length, tiles), width) * width)};
    }
    const int64_t fitting = rows.length == 0 ? vectors : capacity / rows.length;
    return {1, static_cast<int>(fitting < vectors ? fitting : vectors), static_cast<int>(rows.length)};
  }

  int64_t tiles(const Rows& rows) const { return ceil_div(rows.count, rows_per_tile) * tiles_per_row; }

  C10_HOST_DEVICE Tile tile(int64_t index, const Rows& rows) const {
    const int64_t group = tiles_per_row == 1 ? index : divide(index, tiles_per_row);
    const int64_t first_row = group * rows_per_tile;
    const int64_t first_column = (index - group * tiles_per_row) * columns_per_tile;
    const int64_t rows_left = rows.count - first_row;
    const int64_t columns_left = rows.length - first_column;
    return {first_row, first_column, static_cast<int>(rows_left < rows_per_tile ? rows_left : rows_per_tile),
            static_cast<int>(columns_left < columns_per_tile ? columns_left : columns_per_tile)};
  }
};

}  // namespace droppath_ext
