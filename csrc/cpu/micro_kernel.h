// The tile: rows x columns of y from a packed panel of x and a packed strip of w.
//
// Contract
//   x_panel holds `rows` numbers for each of `depth` steps, w_strip `columns`; both aligned to a vector, padded with
//   zeros.
//   accumulate adds products step by step, first to last: one fused multiply-add an element and step where the
//   instruction set has it. All accumulators live in registers (tile_sizes.h).
#pragma once

#include "cpu/tile_sizes.h"

namespace gemmlet {

template <class T>
struct Tile {
  using Sizes = TileSizes<T>;
  Vec<T> sum[Sizes::rows][Sizes::vectors];
};

template <class T>
[[gnu::always_inline]] inline void accumulate(Tile<T>& tile, const T* x_panel, const T* w_strip, int depth) {
  using Sizes = TileSizes<T>;
  Tile<T> t{};
  // The main loop:
  for (int k = 0; k < depth; ++k) {
    Vec<T> w[Sizes::vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Sizes::vectors; ++v) w[v] = load(w_strip + v * lanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < Sizes::rows; ++r) {
      const Vec<T> x = splat<T>(x_panel[r]);
#pragma GCC unroll 4
      for (int v = 0; v < Sizes::vectors; ++v) t.sum[r][v] = fma(x, w[v], t.sum[r][v]);
    }
    x_panel += Sizes::rows;
    w_strip += Sizes::columns;
  }
  tile = t;
}

}  // namespace gemmlet
