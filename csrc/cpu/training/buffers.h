// Storage of a training step: aligned buffers, padded rows; ranges of rows and columns.
//
// Contract
//   Buffers are aligned to cache lines and uninitialized. Rows are zero-initialized and padded to whole cache lines.
//   As all headers of this folder but plan.h it is included by executor.cpp alone and has internal linkage: one translation
//   unit for each instruction set.
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>

#include "cpu/kernels.h"

namespace gemmlet {
namespace {

template <class T>
struct FreeAligned {
  void operator()(T* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
template <class T>
using Buffer = std::unique_ptr<T[], FreeAligned<T>>;

// Uninitialized, so that pages that are never used take no memory.
template <class T>
Buffer<T> space(Index count) {
  const std::size_t bytes = static_cast<std::size_t>(std::max<Index>(count, 1)) * sizeof(T);
  return Buffer<T>(static_cast<T*>(::operator new[](bytes, std::align_val_t{64})));
}

// A matrix whose row stride is an odd number of cache lines, so that rows do not share cache sets.
template <class T>
struct Rows {
  Index stride = 0;
  Buffer<T> data;

  Rows() = default;
  Rows(Index rows, Index columns) {
    constexpr Index line = 64 / sizeof(T);
    stride = (ceil_div(columns, line) | 1) * line;
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

// Part `index` of `count` nearly equal parts of n items.
Range part_of(Index n, Index index, Index count) { return {n * index / count, n * (index + 1) / count}; }

}  // namespace
}  // namespace gemmlet
