// Storage of a training step: padded rows; ranges of rows and columns.
//
// Contract
//   Rows are padded to whole cache lines: with zeros at first, later with anything. No result reads the padding.
//   As all headers of this folder but plan.h it is included by executor.cpp alone and has internal linkage: one translation
//   unit for each instruction set.
#pragma once

#include <algorithm>

#include "cpu/matmul/micro_kernel.h"

namespace gemmlet {
namespace {

// A matrix whose row stride is an odd number of cache lines, so that rows do not share cache sets.
template <class T>
struct Rows {
  Index stride = 0;
  T* data = nullptr;

  Rows() = default;
  Rows(KeptMemory& memory, Index rows, Index columns) {
    constexpr Index line = 64 / sizeof(T);
    stride = (ceil_div(columns, line) | 1) * line;
    data = memory.take<T>(rows * stride);
    for (Index i = 0; i < rows; ++i) std::fill(row(i) + columns, row(i + 1), T(0));
  }
  T* row(Index i) const { return data + i * stride; }
  void point(const T** pointers, Index first, Index count) const {
    for (Index i = 0; i < count; ++i) pointers[i] = row(first + i);
  }
};

struct Range {
  Index first, end;
  Index size() const { return end - first; }
};

// Part `index` of `count` nearly equal parts of n items.
Range part_of(Index n, Index index, Index count) { return {n * index / count, n * (index + 1) / count}; }

// f(first, second, n, vectors) for the panels of two vectors that cover the columns: the second vector begins `second`
// after the first. The last panel overlaps the one before, but for a single vector, of which n lanes are columns.
template <class T, class F>
inline void for_panels(Range columns, F&& f) {
  constexpr Index n = lanes<T>;
  Index j = columns.first;
  for (; j + 2 * n <= columns.end; j += 2 * n) f(j, n, lanes<T>, Constant<2>{});
  if (columns.end - j > n)
    f(j, columns.end - n - j, lanes<T>, Constant<2>{});
  else if (columns.end > j)
    f(j, n, static_cast<int>(columns.end - j), Constant<1>{});
}

}  // namespace
}  // namespace gemmlet
