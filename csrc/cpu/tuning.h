// Every number of the matrix product that depends on the machine.
//
// rows, vectors   the micro-kernel's tile: rows x vectors accumulators, one register each, beside `vectors` of w and
//                 one of x, in 16 registers (x86-64 before AVX-512) or 32. On x86-64-v3 that is 12 + 2 + 1.
// depth           k is cut into nearly equal runs of at most `depth`: a tile's rows of x (20 KiB for float, of 12 rows)
//                 stay in a first-level cache of 32 KiB while strip after strip of w passes by. It fixes the order of
//                 summation, for all block sizes and threads.
// task_rows       rows of x that one task goes through: each run of w is packed once for all of them.
// block_rows      rows of x of which a run (156 KiB for float) is copied at a time, if it is copied.
// block_columns   columns of w that are packed at a time (208 KiB for float): in the second level for all tiles.
// copied_from_columns, turned_from_columns   so many columns of w pay for a copy of a run of block_rows of x; for one
//                 that turns x round, where it lies column by column.
// wide_columns    of w are then packed at a time (1.6 MiB for float), in the third level: each strip comes from there for
//                 each tile, in the order that it lies in, which was faster than to go through the tiles of block_rows
//                 for each strip.
// dot_rows        up to so many rows of x, to turn w round costs more than dots do.
// dot_block       dot products that are computed at a time, one register each.
// thin_depth, thin_rows   up to so many steps of k, to store y is most of the work; from so many rows on, that holds where
//                 w has to be turned round as well.
// thin_block      rows that then share what is loaded of w: thin_depth of x and a sum each.
#pragma once

#include "cpu/simd.h"

namespace gemmlet {

template <class T>
struct TileSizes {
#if defined(__AVX512F__) || defined(__aarch64__)
  static constexpr int rows = 12, dot_rows = 16, dot_block = 16, thin_block = 2;
#else
  static constexpr int rows = 6, dot_rows = 8, dot_block = 8, thin_block = 1;
#endif
  static constexpr int vectors = 2;
  static constexpr int columns = vectors * lanes<T>;
  static constexpr int depth = 416;
  static constexpr int task_rows = 1152;
  static constexpr int block_rows = 96;
  static constexpr int block_columns = 128;
  static constexpr int copied_from_columns = 512, turned_from_columns = 128;
  static constexpr int wide_columns = 1024;
  static constexpr int thin_depth = 10, thin_rows = 4;
  static_assert(depth % columns == 0);
  static_assert(block_rows % rows == 0 && block_columns % columns == 0 && wide_columns % columns == 0);

  // Below this many multiplications a second thread costs more than it saves (some 20 microseconds).
  static constexpr double parallel_work = 500e3;
};

}  // namespace gemmlet
