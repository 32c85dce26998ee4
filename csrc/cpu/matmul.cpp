// y = activation(x @ w + bias), any strides, with the activation applied to each tile while it is in registers.
//
// Contract
//   y and z are contiguous (rows of x by columns of w) and overlap nothing. k = 0 gives activation(bias).
//   Order of summation: runs of TileSizes::depth, each summed from its first to its last product, then added up in
//   order.
//   It depends on nothing else: not on where an element stands in its tile, nor on blocks or threads.
//   y is cut into blocks, one task each; a task packs what it reads, run by run.
//   What it does not do: tiny and skinny shapes without packing.
#include <algorithm>
#include <memory>
#include <new>

#include "cpu/kernels.h"
#include "cpu/micro_kernel.h"
#include "cpu/threads.h"
#include "cpu/vector_math.h"
#include "formulas/activations.h"

namespace gemmlet {
namespace {

// What a tile becomes on its way out.
template <class T>
struct Plain {
  Vec<T> operator()(Vec<T> v) const { return v; }
};

template <class T, class F>
struct Activated {
  Vec<T> parameter;
  Vec<T> operator()(Vec<T> v) const { return F::forward(v, parameter); }
};

template <class T>
struct Buffers {
  using Sizes = TileSizes<T>;
  struct Free {
    void operator()(T* p) const { ::operator delete[](p, std::align_val_t{64}); }
  };
  static std::unique_ptr<T[], Free> make(std::size_t count) {
    return std::unique_ptr<T[], Free>(static_cast<T*>(::operator new[](count * sizeof(T), std::align_val_t{64})));
  }
  // One step of slack, as tiles at the edge are padded.
  std::unique_ptr<T[], Free> x = make(std::size_t{Sizes::block_rows} * Sizes::depth);
  std::unique_ptr<T[], Free> w = make(std::size_t{Sizes::block_columns} * Sizes::depth);
};

// Copies `lines` x `depth` numbers, `width` lines at a time, so that the width of each step stands together; the last
// panel is padded with zeros. Number (line, step) stands at data[line * line_stride + step * step_stride].
template <int width, class T>
void pack(const T* data, Index lines, int depth, Index line_stride, Index step_stride, T* packed) {
  for (Index first = 0; first < lines; first += width, packed += Index{width} * depth) {
    const T* panel = data + first * line_stride;
    const int count = static_cast<int>(std::min<Index>(width, lines - first));
    if (count < width) std::fill_n(packed, Index{width} * depth, T(0));
    if (line_stride == 1) {
      if (count == width)
        for (int k = 0; k < depth; ++k) std::copy_n(panel + k * step_stride, width, packed + k * width);
      else
        for (int k = 0; k < depth; ++k) std::copy_n(panel + k * step_stride, count, packed + k * width);
    } else {
      for (int line = 0; line < count; ++line) {
        const T* source = panel + line * line_stride;
        for (int k = 0; k < depth; ++k) packed[k * width + line] = source[k * step_stride];
      }
    }
  }
}

// A finished or unfinished tile to y: what earlier runs of k left there is added; the last run adds the bias, keeps z,
// and applies the epilogue. row_stride: of y and z.
template <class T, class Epilogue>
[[gnu::always_inline]] inline void store_row(const Vec<T>* sum, bool first, bool last, const T* bias,
                                             const Epilogue& epilogue, T* y, T* z, int columns) {
  for (int v = 0; v < TileSizes<T>::vectors; ++v) {
    const int n = std::min(lanes<T>, columns - v * lanes<T>);
    if (n <= 0) return;
    const int j = v * lanes<T>;
    const bool whole = n == lanes<T>;
    Vec<T> value = sum[v];
    if (!first) value = (whole ? load(y + j) : load_part(y + j, n)) + value;
    if (last) {
      if (bias != nullptr) value = value + (whole ? load(bias + j) : load_part(bias + j, n));
      if (z != nullptr) {
        if (whole)
          store(z + j, value);
        else
          store_part(z + j, value, n);
      }
      value = epilogue(value);
    }
    if (whole)
      store(y + j, value);
    else
      store_part(y + j, value, n);
  }
}

template <class T, class Epilogue>
void compute_block(View<T> x, View<T> w, const T* bias, const Epilogue& epilogue, T* y, T* z, Index row_stride) {
  using Sizes = TileSizes<T>;
  thread_local Buffers<T> buffers;
  Index k = 0;
  do {
    const int depth = static_cast<int>(std::min<Index>(Sizes::depth, x.columns - k));
    const bool first = k == 0, last = k + depth >= x.columns;
    pack<Sizes::rows>(x.data + k * x.column_stride, x.rows, depth, x.row_stride, x.column_stride, buffers.x.get());
    pack<Sizes::columns>(w.data + k * w.row_stride, w.columns, depth, w.column_stride, w.row_stride, buffers.w.get());
    for (Index j = 0; j < w.columns; j += Sizes::columns) {
      const int columns = static_cast<int>(std::min<Index>(Sizes::columns, w.columns - j));
      for (Index i = 0; i < x.rows; i += Sizes::rows) {
        const int rows = static_cast<int>(std::min<Index>(Sizes::rows, x.rows - i));
        Tile<T> tile;
        accumulate(tile, buffers.x.get() + i * depth, buffers.w.get() + j * depth, depth);
        for (int r = 0; r < rows; ++r) {
          const Index at = (i + r) * row_stride + j;
          store_row(tile.sum[r], first, last, bias == nullptr ? nullptr : bias + j, epilogue, y + at,
                    z == nullptr ? nullptr : z + at, columns);
        }
      }
    }
    k += depth;
  } while (k < x.columns);
}

Index blocks(Index n, Index size) { return (n + size - 1) / size; }

// The largest multiple of `unit`, up to `limit`, that cuts n into at least `pieces`.
Index block_size(Index n, Index unit, Index limit, Index pieces) {
  const Index even = blocks(blocks(n, pieces), unit) * unit;
  return std::clamp(even, unit, limit);
}

template <class T, class Epilogue>
void run(View<T> x, View<T> w, const T* bias, const Epilogue& epilogue, T* y, T* z) {
  using Sizes = TileSizes<T>;
  const double work = static_cast<double>(x.rows) * static_cast<double>(w.columns) * static_cast<double>(x.columns);
  const Index pieces = work < Sizes::parallel_work ? 1 : get_num_threads();
  // The longer side of y is cut for the threads: its blocks share what is packed of the other operand.
  const bool tall = x.rows >= w.columns;
  const Index block_rows = block_size(x.rows, Sizes::rows, Sizes::block_rows, tall ? pieces : 1);
  const Index block_columns = block_size(w.columns, Sizes::columns, Sizes::block_columns, tall ? 1 : pieces);
  const Index across = blocks(w.columns, block_columns);
  const auto task = [&](Index index) {
    const Index i = index / across * block_rows, j = index % across * block_columns;
    const Index rows = std::min(block_rows, x.rows - i), columns = std::min(block_columns, w.columns - j);
    const Index at = i * w.columns + j;
    compute_block<T>({x.data + i * x.row_stride, rows, x.columns, x.row_stride, x.column_stride},
                     {w.data + j * w.column_stride, w.rows, columns, w.row_stride, w.column_stride},
                     bias == nullptr ? nullptr : bias + j, epilogue, y + at, z == nullptr ? nullptr : z + at,
                     w.columns);
  };
  const Index tasks = blocks(x.rows, block_rows) * across;
  if (pieces > 1)
    parallel_for(tasks, task);
  else
    for (Index t = 0; t < tasks; ++t) task(t);
}

template <class T, class F>
void run_activated(View<T> x, View<T> w, const T* bias, T parameter, T* y, T* z) {
  run(x, w, bias, Activated<T, F>{splat<T>(parameter)}, y, z);
}

}  // namespace

template <class T>
void linear(View<T> x, View<T> w, const T* bias, int activation, T parameter, T* y, T* z) {
  if (x.rows == 0 || w.columns == 0) return;
  if (activation < 0) return run(x, w, bias, Plain<T>{}, y, z);
  using Function = void (*)(View<T>, View<T>, const T*, T, T*, T*);
#define GEMMLET_ENTRY(name) &run_activated<T, activations::name>,
  static constexpr Function table[] = {GEMMLET_ACTIVATIONS(GEMMLET_ENTRY)};
#undef GEMMLET_ENTRY
  table[activation](x, w, bias, parameter, y, z);
}

template void linear(View<float>, View<float>, const float*, int, float, float*, float*);
template void linear(View<double>, View<double>, const double*, int, double, double*, double*);

}  // namespace gemmlet
