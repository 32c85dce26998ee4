// Where the elements of an array lie, whatever its strides.
#pragma once

#include "cpu/kernels.h"

namespace gemmlet {

// The bytes of an array that is not empty: first, and one past the last. Strides and items are in bytes.
struct Extent {
  const char *begin, *end;

  template <class Int>
  Extent(const char* data, Index item, int axes, const Int* shape, const Int* strides) : begin(data), end(data + item) {
    for (int i = 0; i < axes; ++i) {
      const Index reach = strides[i] * (shape[i] - 1);
      (reach < 0 ? begin : end) += reach;
    }
  }

  bool apart_from(const Extent& other) const { return end <= other.begin || other.end <= begin; }
};

}  // namespace gemmlet
