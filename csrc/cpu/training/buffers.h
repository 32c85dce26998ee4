// What the phases of a training step keep their numbers in: aligned buffers, padded rows, ranges of rows and columns.
//
// Contract
//   Buffers begin at a cache line and are uninitialized; Rows are zero, and padded with zeros to whole vectors.
//   Included by executor.cpp alone, as are the other headers of this folder but plan.h: one translation unit for each
//   instruction set, everything with internal linkage.
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>

#include "cpu/kernels.h"

namespace gemmlet {
namespace {

Index pieces(Index n, Index size) { return (n + size - 1) / size; }

template <class T>
struct FreeAligned {
  void operator()(T* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
template <class T>
using Buffer = std::unique_ptr<T[], FreeAligned<T>>;

// Not set to anything: what is never used then takes no memory.
template <class T>
Buffer<T> space(Index count) {
  const std::size_t bytes = static_cast<std::size_t>(std::max<Index>(count, 1)) * sizeof(T);
  return Buffer<T>(static_cast<T*>(::operator new[](bytes, std::align_val_t{64})));
}

// Rows of whole vectors. The distance of two rows is an odd number of cache lines, so that they do not share sets.
template <class T>
struct Rows {
  Index stride = 0;
  Buffer<T> data;

  Rows() = default;
  Rows(Index rows, Index columns) {
    constexpr Index line = 64 / sizeof(T);
    stride = (pieces(columns, line) | 1) * line;
    data = space<T>(rows * stride);
    std::fill_n(data.get(), rows * stride, T(0));
  }
  T* row(Index i) const { return data.get() + i * stride; }
  void point(const T** pointers, Index first, Index count) const {
    for (Index i = 0; i < count; ++i) pointers[i] = row(first + i);
  }
};

struct Range {
  Index first, end;
  Index size() const { return end - first; }
};

// Part `index` of `count` of n things, all parts nearly equal.
Range part_of(Index n, Index index, Index count) { return {n * index / count, n * (index + 1) / count}; }

}  // namespace
}  // namespace gemmlet
