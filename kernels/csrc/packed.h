// The packed staircase: what a kernel needs to know of a masked weight (see kernels/layout.py).
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace fastmaf {

// One row of PackedLayout.table: rows row_start..row_end, columns 0..width, row-major from offset.
struct Tile {
  int32_t row_start, row_end, width, offset;
};

template <class W>
struct Packed {
  W* weight;
  const Tile* tiles;
  long tile_count;
  const int64_t* prefix;  // how many columns each row sees; does not decrease
  long rows, columns;

  // Calls body(tile, first row, end row) for runs of at most `group` rows of row0..row1 that lie in one tile.
  template <class Body>
  void groups(long row0, long row1, long group, Body&& body) const {
    for (const Tile* tile = find(row0); row0 < row1; ++tile) {
      const long end = std::min<long>(tile->row_end, row1);
      for (; row0 < end; row0 += group) body(*tile, row0, std::min(row0 + group, end));
      row0 = end;
    }
  }

  W* row(const Tile& tile, long r) const { return weight + tile.offset + (r - tile.row_start) * tile.width; }

  // Columns to read for rows that end at `row_end`: what its last row sees, in whole cache lines where the tile is as wide.
  template <class T>
  long visible(const Tile& tile, long row_end) const {
    return std::min<long>(round_up(prefix[row_end - 1], kLineNumbers<T>), tile.width);
  }

  const Tile* find(long row) const {
    const Tile* tile = tiles;
    while (tile->row_end <= row && tile + 1 < tiles + tile_count) ++tile;
    return tile;
  }

  // About what the rows before `row` cost, in weights to stream: those that they see, and what starting and ending a row
  // takes (measured where half of the weights lie in 71 % of the rows: 28 ns a row).
  double area_before(long row) const {
    double area = 0;
    for (long t = 0; t < tile_count && tiles[t].row_start < row; ++t) area += cost(tiles[t], std::min<long>(tiles[t].row_end, row));
    return area;
  }

  // The row before which that fraction of the cost lies; a multiple of `group` rows from its tile's start.
  long row_at(double fraction, long group) const {
    if (fraction <= 0) return 0;
    if (fraction >= 1) return rows;
    const double wanted = area_before(rows) * fraction;
    const Tile* tile = tiles;
    double before = 0, area = cost(*tile, tile->row_end);
    while (before + area < wanted && tile + 1 < tiles + tile_count) before += area, ++tile, area = cost(*tile, tile->row_end);
    long low = tile->row_start, high = tile->row_end;
    while (low < high) {
      const long middle = (low + high) / 2;
      (before + cost(*tile, middle) < wanted ? low = middle + 1 : high = middle);
    }
    return std::min<long>(tile->row_start + round_up(low - tile->row_start, group), tile->row_end);
  }

 private:
  static constexpr double kRowCost = 96;

  // Of a tile's rows before `end`.
  double cost(const Tile& tile, long end) const {
    if (end <= tile.row_start) return 0;
    return 0.5 * (end - tile.row_start) * (prefix[tile.row_start] + prefix[end - 1] + 2 * kRowCost);
  }
};

}  // namespace fastmaf
