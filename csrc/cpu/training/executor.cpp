// Fused training: see plan.h.
//
// A step of a network is two phases. Rows: each thread takes some rows of the mini-batch through all layers, the loss,
// and back to the gradients of every layer's preactivation; no row needs another. Weights: each thread takes some rows
// of the weights, adds up their gradient in registers, and updates them there, so that no gradient of a weight is ever
// written. Between the phases all threads meet.
//
// Every sum is one chain: over the inputs first to last, over the rows of the mini-batch first to last; a step from
// outputs back to inputs sums as micro_kernel.h's dots do. None of it depends on how the work is divided. To skip a zero
// leaves out a product that is 0, which changes no bit.
//
// Rows of activations and gradients are padded to whole vectors with zeros.
#include "cpu/training/plan.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

#include "cpu/matmul/micro_kernel.h"
#include "cpu/rows.h"
#include "cpu/threads.h"
#include "formulas/activations.h"
#include "formulas/math.h"
// After the functions that it is written on.
#include "formulas/optimizers.h"

namespace gemmlet {
namespace {

// Rows of the mini-batch that go through the layers together: their activations stay in the second-level cache.
constexpr Index most_task_rows = 48;
// Multiply-adds below which a second thread costs more than it saves.
constexpr double parallel_work = 200e3;
// Weights whose rows are further apart than this many bytes are packed before several rows use them: each row is on a
// page of its own, and too many of them share a set of the cache.
constexpr Index packed_from_stride = 4096;
constexpr Index packed_depth = 256;
// Mini-batches of fewer rows go back through a layer by dots: to turn its weights round would cost more.
constexpr Index tiles_from_rows = 16;

// So many blocks of features of a sparse mini-batch go through its rows at a time: what they use of w stays in the cache.
constexpr Index sparse_blocks = 2;
// From so many mini-batches in a call, a thread that always has the same columns of the first layer copies them.
constexpr Index own_from_steps = 8;
// Up to so many threads, and rows of a mini-batch, each thread prepares all rows of bytes for itself.
constexpr Index most_own_threads = 4, most_own_rows = 1024;

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

// Calls f(first, second, vectors) for the strips of two vectors that cover some columns, at least one vector: the second
// vector begins `second` after the first. At the end they overlap.
template <class T, class F>
inline void for_strips(Range columns, F&& f) {
  constexpr Index n = lanes<T>;
  Index j = columns.first;
  for (; j + 2 * n <= columns.end; j += 2 * n) f(j, n, Constant<2>{});
  if (columns.end - j > n)
    f(j, columns.end - n - j, Constant<2>{});
  else if (columns.end > j)
    f(columns.end - n, n, Constant<1>{});
}

// f(first, count) for tiles of nearly equal height that cover `rows`, none higher than the micro-kernel's.
template <class T, class F>
inline void for_tiles(Index rows, F&& f) {
  constexpr int most = TileSizes<T>::rows;
  const Index tiles = pieces(rows, most);
  Index first = 0;
  for (Index t = 0; t < tiles; ++t) {
    const int count = static_cast<int>((rows - first) / (tiles - t));
    with_constant<most>(count, [&](auto height) { f(first, height); });
    first += count;
  }
}

template <class T>
struct Packed {
  alignas(64) T w[packed_depth * 2 * lanes<T>];
  alignas(64) Vec<T> sums[most_task_rows][2];
};

// Some columns of y = x w + b for rows that lie anywhere; after the last column each row of y is set to 0.
template <class T>
void forward_dense(const T* const* x, Index rows, const Layer<T>& layer, Range columns, T* y, Index y_stride) {
  constexpr int n = lanes<T>;
  const Index out = layer.out, stride = layer.stride;
  const T *w = layer.weight.value, *bias = layer.bias.value;
  const bool narrow = out < n;
  thread_local Packed<T> packed;

  const auto finish = [&]<int height, int vectors>(const Vec<T>(&sum)[height][vectors], Index row, Index j,
                                                   Index second) {
    for (int r = 0; r < height; ++r) {
      T* y_r = y + (row + r) * y_stride;
      for (int v = 0; v < vectors; ++v) {
        const Index at = j + v * second;
        store(y_r + at, sum[r][v] + (narrow ? load_part(bias, static_cast<int>(out)) : load(bias + at)));
      }
    }
  };

  const auto strip = [&]<int vectors>(Index j, Index second, Constant<vectors>) {
    if (!narrow && (stride * static_cast<Index>(sizeof(T)) < packed_from_stride || rows < 2 * TileSizes<T>::rows)) {
      for_tiles<T>(rows, [&]<int height>(Index row, Constant<height>) {
        Vec<T> sum[height][vectors];
        accumulate(RowsAnywhere<T>{x + row}, Strip<T>{w + j, stride, second}, layer.in, true, sum);
        finish(sum, row, j, second);
      });
      return;
    }
    for (Index k = 0; k < layer.in; k += packed_depth) {
      const Index depth = std::min(packed_depth, layer.in - k);
      for (Index i = 0; i < depth; ++i)
        for (int v = 0; v < vectors; ++v) {
          const T* source = w + (k + i) * stride + j + v * second;
          store(packed.w + (i * vectors + v) * n, narrow ? load_part(source, static_cast<int>(out)) : load(source));
        }
      for_tiles<T>(rows, [&]<int height>(Index row, Constant<height>) {
        Vec<T> sum[height][vectors];
        const T* rows_at_k[height];
        for (int r = 0; r < height; ++r) {
          rows_at_k[r] = x[row + r] + k;
          for (int v = 0; v < vectors; ++v) sum[r][v] = packed.sums[row + r][v];
        }
        accumulate(RowsAnywhere<T>{rows_at_k}, Strip<T>{packed.w, vectors * n, n}, depth, k == 0, sum);
        for (int r = 0; r < height; ++r)
          for (int v = 0; v < vectors; ++v) packed.sums[row + r][v] = sum[r][v];
        if (k + depth == layer.in) finish(sum, row, j, second);
      });
    }
  };

  if (narrow)
    strip(0, n, Constant<1>{});
  else
    for_strips<T>(columns, strip);
  if (columns.end == out)
    for (Index r = 0; r < rows; ++r) std::fill(y + r * y_stride + out, y + (r + 1) * y_stride, T(0));
}

// f(first, vectors) for blocks of eight, four, two or one vectors that cover some columns; the last may reach beyond them.
template <class T, class F>
inline void for_wide_blocks(Range columns, F&& f) {
  constexpr Index n = lanes<T>;
  Index j = columns.first;
  const auto blocks_of = [&]<int vectors>(Constant<vectors> count) {
    for (; pieces(columns.end - j, n) >= vectors; j += vectors * n) f(j, count);
  };
  blocks_of(Constant<8>{});
  blocks_of(Constant<4>{});
  blocks_of(Constant<2>{});
  blocks_of(Constant<1>{});
}

// Sparse rows are used in blocks of so many columns (features), in one of two forms.
constexpr Index block_features = 64;

// Lists: begin[b] is the first number of block b.
template <class T>
struct BlockedRow {
  const std::int32_t* columns;
  const T* values;
  const std::int32_t* begin;

  SparseRow<T> blocks(Index first, Index end) const {
    return {columns + begin[first], values + begin[first], begin[end] - begin[first]};
  }
  void prefetch(Index block) const {
    __builtin_prefetch(columns + begin[block]);
    __builtin_prefetch(values + begin[block]);
  }
};

// Bytes, one word of bits for a block.
template <class T>
struct MaskedRow {
  const std::uint8_t* bytes;
  const std::uint64_t* masks;
  const T* numbers;

  MaskedBytes<T> blocks(Index first, Index end) const { return {bytes, masks, first, end, numbers}; }
  void prefetch(Index block) const { __builtin_prefetch(bytes + block * block_features); }
};

template <class T>
inline void prefetch_row(const T* from, Index count) {
  for (Index i = 0; i < count; i += 64 / static_cast<Index>(sizeof(T))) __builtin_prefetch(from + i);
}

// y += x w, or y = x w to begin with, for some columns; at last, with a bias. A function of its own, so that its loop has
// all registers for itself.
template <int vectors, class T, class Sparse>
[[gnu::noinline]] void add_sparse(const Sparse& x, const T* w, Index stride, Index last, T* y, bool begin,
                                  const T* bias) {
  constexpr Index n = lanes<T>;
  Vec<T> sum[vectors];
  if (begin) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) sum[v] = Vec<T>{};
  } else {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) sum[v] = load(y + (v + 1 < vectors ? v * n : last));
  }
  accumulate_sparse(x, w, stride, last, sum);
  if (bias != nullptr) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) sum[v] = sum[v] + load(bias + (v + 1 < vectors ? v * n : last));
  }
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) store(y + (v + 1 < vectors ? v * n : last), sum[v]);
}

// As forward_dense, for sparse rows; sparse_blocks of features at a time, so that what all rows use of w stays in the
// first-level cache while they do.
template <class T, class Row>
void forward_sparse(const Row* x, Index rows, const Layer<T>& layer, Range columns, T* y, Index y_stride) {
  constexpr Index n = lanes<T>;
  const Index out = layer.out, stride = layer.stride, blocks = pieces(layer.in, block_features),
              at_once = rows == 1 ? blocks : sparse_blocks;
  const T *w = layer.weight.value, *bias = layer.bias.value;
  if (out < n) {
    const int part = static_cast<int>(out);
    for (Index r = 0; r < rows; ++r) {
      Vec<T> sum{};
      x[r].blocks(0, blocks).for_each(
          [&](Index k, T number) { sum = fma(splat<T>(number), load_part(w + k * stride, part), sum); });
      store(y + r * y_stride, sum + load_part(bias, part));
    }
  } else {
    for_wide_blocks<T>(columns, [&]<int vectors>(Index j, Constant<vectors>) {
      // The last vector is moved back to end with the columns. What it shares with others has the same values there.
      const Index last = std::min((vectors - 1) * n, columns.end - n - j);
      for (Index block = 0; block < blocks; block += at_once) {
        const Index end = std::min(block + at_once, blocks);
        for (Index r = 0; r < rows; ++r) {
          // It lies among the samples, or another thread has written it, so that it is far away.
          if (r + prefetched_rows / 2 < rows) x[r + prefetched_rows / 2].prefetch(block);
          if (const Index next = end * block_features + r; r < block_features && next < layer.in)
            prefetch_row(w + next * stride + j, vectors * n);
          add_sparse<vectors>(x[r].blocks(block, end), w + j, stride, last, y + r * y_stride + j, block == 0,
                              end == blocks ? bias + j : nullptr);
        }
      }
    });
  }
  if (columns.end == out)
    for (Index r = 0; r < rows; ++r) std::fill(y + r * y_stride + out, y + (r + 1) * y_stride, T(0));
}

// grad_x = grad_y w^T for some rows: by dots, or, if the mini-batch has many rows, by tiles with w turned round.
template <class T>
void backward_by_dots(const T* grad_y, Index y_stride, Index rows, const Layer<T>& layer, T* grad_x, Index x_stride) {
  constexpr int n = lanes<T>, height = std::max(1, TileSizes<T>::rows * TileSizes<T>::vectors * 2 / 3 / n);
  const T *w = layer.weight.value, *end = w + layer.in * layer.stride, *grad_end = grad_y + rows * y_stride;
  for (Index k = 0; k < layer.in; k += n) {
    const int count = static_cast<int>(std::min<Index>(n, layer.in - k));
    const auto some = [&]<int rows_at_once>(Index row, Constant<rows_at_once>) {
      Vec<T> result[rows_at_once];
      dots<rows_at_once>(grad_y + row * y_stride, y_stride, grad_end, w + k * layer.stride, layer.stride, end, count,
                         layer.out, result);
      for (int r = 0; r < rows_at_once; ++r) store(grad_x + (row + r) * x_stride + k, result[r]);
    };
    Index row = 0;
    for (; row + height <= rows; row += height) some(row, Constant<height>{});
    for (; row < rows; ++row) some(row, Constant<1>{});
  }
}

template <class T>
void backward_by_tiles(const T* grad_y, Index y_stride, Index rows, const Layer<T>& layer, T* grad_x, Index x_stride) {
  constexpr int n = lanes<T>;
  thread_local Packed<T> packed;
  for (Index k = 0; k < layer.in; k += 2 * n) {
    const Index inputs = std::min<Index>(2 * n, layer.in - k);
    for (Index j = 0; j < layer.out; j += packed_depth) {
      const Index depth = std::min(packed_depth, layer.out - j);
      pack_strip<T>({layer.weight.value + k * layer.stride + j, depth, inputs, 1, layer.stride}, packed.w);
      for_tiles<T>(rows, [&]<int height>(Index row, Constant<height>) {
        Vec<T> sum[height][2];
        T* to = grad_x + row * x_stride + k;
        const auto place = [&](int r, int v) { return to + r * x_stride + v * n; };
        if (j > 0)
          for (int r = 0; r < height; ++r)
            for (int v = 0; v < 2; ++v) sum[r][v] = v * n < inputs ? load(place(r, v)) : Vec<T>{};
        accumulate(Strided<T>{grad_y + row * y_stride + j, y_stride, 1}, Strip<T>{packed.w, 2 * n, n}, depth, j == 0,
                   sum);
        for (int r = 0; r < height; ++r)
          for (int v = 0; v < 2; ++v)
            if (v * n < inputs) store(place(r, v), sum[r][v]);
      });
    }
  }
}

// One optimizer update of some columns of one row of a parameter, its gradient being in registers; what of its state and
// average there is, too.
template <class T, class OptimizerRule>
struct Updating {
  Vec<T> numbers[OptimizerRule::scalar_count];
  Vec<T> decay, gain;
  bool idle_without_gradient;

  Updating(const double* scalars, double average_decay)
      : decay(constant<Vec<T>>(average_decay)),
        gain(constant<Vec<T>>(1.0 - average_decay)),
        idle_without_gradient(OptimizerRule::idle_without_gradient(scalars)) {
    for (int s = 0; s < OptimizerRule::scalar_count; ++s) numbers[s] = constant<Vec<T>>(scalars[s]);
  }

  // Has the cache fetch what holds element `at`.
  [[gnu::always_inline]] void prefetch(const Parameter<T>& p, Index at) const {
    __builtin_prefetch(p.value + at, 1);
    for (int s = 0; s < OptimizerRule::state_count; ++s) __builtin_prefetch(p.state[s] + at, 1);
    if (p.average != nullptr) __builtin_prefetch(p.average + at, 1);
  }

  // Vector v begins at `at + v * second` and has n lanes. All is loaded before any is stored, as the vectors may overlap.
  template <int vectors>
  [[gnu::always_inline]] void operator()(const Parameter<T>& p, Index at, Index second, int n,
                                         const Vec<T> (&gradient)[vectors]) const {
    constexpr int states = OptimizerRule::state_count;
    Vec<T> value[vectors], state[vectors][std::max(states, 1)];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      value[v] = load_lanes(p.value + at + v * second, n);
      for (int s = 0; s < states; ++s) state[v][s] = load_lanes(p.state[s] + at + v * second, n);
      OptimizerRule::apply(value[v], gradient[v], state[v], numbers);
    }
    if (p.average != nullptr) {
      Vec<T> average[vectors];
      for (int v = 0; v < vectors; ++v)
        average[v] = optimizers::moving_average(load_lanes(p.average + at + v * second, n), value[v], decay, gain);
      for (int v = 0; v < vectors; ++v) store_lanes(p.average + at + v * second, average[v], n);
    }
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      store_lanes(p.value + at + v * second, value[v], n);
      for (int s = 0; s < states; ++s) store_lanes(p.state[s] + at + v * second, state[v][s], n);
    }
  }
};

// As for_strips, for arrays that are read and written: a single vector at the end has n lanes, and overlaps nothing.
template <class T, class F>
inline void for_written_strips(Range columns, F&& f) {
  constexpr Index n = lanes<T>;
  Index j = columns.first;
  for (; j + 2 * n <= columns.end; j += 2 * n) f(j, n, lanes<T>, Constant<2>{});
  if (columns.end - j > n)
    f(j, columns.end - n - j, lanes<T>, Constant<2>{});
  else if (columns.end > j)
    f(j, n, static_cast<int>(columns.end - j), Constant<1>{});
}

template <class T, class OptimizerRule>
void update_bias(const Layer<T>& layer, const Rows<T>& grad, Index rows, Range columns,
                 const Updating<T, OptimizerRule>& update) {
  for_written_strips<T>(columns, [&]<int vectors>(Index j, Index second, int n, Constant<vectors>) {
    Vec<T> sum[vectors] = {};
    for (Index i = 0; i < rows; ++i)
      for (int v = 0; v < vectors; ++v) sum[v] = sum[v] + load(grad.row(i) + j + v * second);
    update(layer.bias, j, second, n, sum);
  });
}

// Some inputs' weights, in some columns, from the rows x of the mini-batch and the gradients of their preactivations.
template <class T, class OptimizerRule>
void update_dense(const Layer<T>& layer, const T* const* x, const Rows<T>& grad, Index rows, Range inputs,
                  Range columns, const Updating<T, OptimizerRule>& update) {
  constexpr int most = TileSizes<T>::rows;
  const Index tiles = pieces(inputs.size(), most);
  for (Index tile = 0; tile < tiles; ++tile) {
    const Range part = part_of(inputs.size(), tile, tiles);
    const Index k = inputs.first + part.first;
    const int height = static_cast<int>(part.size());
    for_written_strips<T>(columns, [&]<int vectors>(Index j, Index second, int n, Constant<vectors>) {
      // The next strip of the parameter and its state comes from far away, but has the time of this strip's sums.
      // Its first line may be here already, so that it is fetched from its end, a line or two of a row.
      constexpr Index strip_size = 2 * lanes<T>, line = 64 / static_cast<Index>(sizeof(T));
      const Index next = j + strip_size, last = std::min(next + strip_size, columns.end) - 1;
      for (int r = 0; r < height && next <= last; ++r) {
        const Index row = (k + r) * layer.stride;
        update.prefetch(layer.weight, row + last);
        if constexpr (strip_size > line) update.prefetch(layer.weight, row + std::max(next, last - line));
      }
      Sums<T> sums;
      const ColumnsOfRowsAnywhere<T> x_at{x, k};
      const Strip<T> strip{grad.row(0) + j, grad.stride, second};
      with_constant<most>(height, [&]<int rows_at_once>(Constant<rows_at_once>) {
        accumulate(x_at, strip, rows, true, reinterpret_cast<Vec<T>(&)[rows_at_once][vectors]>(sums));
      });
      for (int r = 0; r < height; ++r)
        update(layer.weight, (k + r) * layer.stride + j, second, n,
               reinterpret_cast<const Vec<T>(&)[vectors]>(sums[r * vectors]));
    });
  }
}

// The numbers of a mini-batch's sparse rows, feature by feature: those of feature k are number begin[k] and on.
template <class T>
struct FeatureLists {
  Buffer<std::int32_t> begin, row;
  Buffer<T> value;

  // Of one block of features.
  void list(const BlockedRow<T>* x, Index rows, Index features, Index block) {
    const Index first = block * block_features, end = std::min(features, first + block_features);
    std::int32_t next[block_features] = {}, place = 0;
    for (Index i = 0; i < rows; ++i) {
      place += x[i].begin[block];
      const SparseRow<T> numbers = x[i].blocks(block, block + 1);
      for (Index e = 0; e < numbers.count; ++e) ++next[numbers.columns[e] - first];
    }
    for (Index k = first; k < end; ++k) {
      begin[k] = place;
      place += std::exchange(next[k - first], place);
    }
    begin[end] = place;  // if another block begins there, it has the same
    for (Index i = 0; i < rows; ++i) {
      const SparseRow<T> numbers = x[i].blocks(block, block + 1);
      for (Index e = 0; e < numbers.count; ++e) {
        const std::int32_t at = next[numbers.columns[e] - first]++;
        row[at] = static_cast<std::int32_t>(i);
        value[at] = numbers.values[e];
      }
    }
  }

  SparseRow<T> feature(Index k) const {
    return {row.get() + begin[k], value.get() + begin[k], begin[k + 1] - begin[k]};
  }
};

typedef std::uint8_t Bytes16 __attribute__((vector_size(16)));

// 16 rows of 16 bytes become columns: four times each row is interleaved with the one eight below.
inline void transpose(Bytes16 (&v)[16]) {
  for (int round = 0; round < 4; ++round) {
    Bytes16 next[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      next[2 * i] = __builtin_shufflevector(v[i], v[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      next[2 * i + 1] =
          __builtin_shufflevector(v[i], v[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) v[i] = next[i];
  }
}

// The same for masked rows: the bytes of feature k, one for each row, begin at k * words * 64, its masks at k * words.
template <class T>
struct FeatureMasks {
  Index words = 0;
  const T* numbers = nullptr;
  Buffer<std::uint8_t> bytes;
  Buffer<std::uint64_t> masks;

  void list(const MaskedRow<T>* x, Index rows, Index features, Index block) {
    const Index first = block * block_features, end = std::min(features, first + block_features), stride = words * 64;
    if (rows == 1) {
      for (Index k = first; k < end; ++k) {
        bytes[k * stride] = x[0].bytes[k];
        masks[k * words] = x[0].bytes[k] != 0;
        for (Index word = 1; word < words; ++word) masks[k * words + word] = 0;
      }
      return;
    }
    for (Index k = first; k < end; k += 16)
      end - k >= 16 ? turn(x, rows, k, 16) : turn(x, rows, k, static_cast<std::size_t>(end - k));
    for (Index word = first * words; word < end * words; ++word) masks[word] = mask_of_bytes(bytes.get() + word * 64);
  }

  // `count` features from k on, at most 16.
  [[gnu::always_inline]] void turn(const MaskedRow<T>* x, Index rows, Index k, std::size_t count) {
    const Index stride = words * 64;
    for (Index i = 0; i < stride; i += 16) {
      Bytes16 square[16] = {};
      if (rows - i >= 16)
#pragma GCC unroll 16
        for (Index r = 0; r < 16; ++r) std::memcpy(&square[r], x[i + r].bytes + k, count);
      else
        for (Index r = 0; r < rows - i; ++r) std::memcpy(&square[r], x[i + r].bytes + k, count);
      transpose(square);
#pragma GCC unroll 16
      for (std::size_t c = 0; c < 16; ++c)
        if (c < count) std::memcpy(bytes.get() + (k + static_cast<Index>(c)) * stride + i, &square[c], 16);
    }
  }

  MaskedBytes<T> feature(Index k) const {
    return {bytes.get() + k * words * 64, masks.get() + k * words, 0, words, numbers};
  }
};

// As update_dense, for one input, from the rows of the mini-batch in which it is not 0.
template <int vectors, class T, class Sparse, class OptimizerRule>
[[gnu::always_inline]] inline void update_from(const Sparse& rows, const Layer<T>& layer, Index k, const Rows<T>& grad,
                                               Index j, Index end, const Updating<T, OptimizerRule>& update) {
  constexpr int n = lanes<T>;
  Vec<T> sum[vectors] = {};
  accumulate_sparse(rows, grad.row(0) + j, grad.stride, (vectors - 1) * n, sum);
  const Index at = k * layer.stride + j;
  if (j + vectors * n <= end) {
    constexpr int together = std::min(vectors, 2);
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v += together)
      update(layer.weight, at + v * n, n, n, reinterpret_cast<const Vec<T>(&)[together]>(sum[v]));
    return;
  }
  for (int v = 0; v < vectors; ++v) {
    const Vec<T> one[1] = {sum[v]};
    update(layer.weight, at + v * n, n, static_cast<int>(std::clamp<Index>(end - j - v * n, 0, n)), one);
  }
}

template <class T, class Features, class OptimizerRule>
void update_sparse(const Layer<T>& layer, const Features& features, const Rows<T>& grad, Range inputs, Range columns,
                   const Updating<T, OptimizerRule>& update) {
  constexpr Index n = lanes<T>;
  for_wide_blocks<T>(columns, [&]<int vectors>(Index j, Constant<vectors>) {
    for (Index k = inputs.first; k < inputs.end; ++k) {
      prefetch_row(layer.weight.value + std::min(k + 4, layer.in - 1) * layer.stride + j, vectors * n);
      const auto rows = features.feature(k);
      if (!rows.empty() || !update.idle_without_gradient)
        update_from<vectors>(rows, layer, k, grad, j, columns.end, update);
    }
  });
}

// The same from a single row, for a rule that is idle without gradient.
template <class T, class Row, class OptimizerRule>
void update_from_row(const Layer<T>& layer, const Row& x, const Rows<T>& grad, Range columns,
                     const Updating<T, OptimizerRule>& update) {
  static constexpr std::int32_t first_row = 0;
  for_wide_blocks<T>(columns, [&]<int vectors>(Index j, Constant<vectors>) {
    x.blocks(0, pieces(layer.in, block_features)).for_each([&](Index k, T number) {
      update_from<vectors>(SparseRow<T>{&first_row, &number, 1}, layer, k, grad, j, columns.end, update);
    });
  });
}

// Sparse rows of a mini-batch, and the same feature by feature.
template <class T, class Row, class Features>
struct SparseInputs {
  std::vector<Row> rows;
  Features features;
};

// What a mini-batch brings to the first layer: rows that lie anywhere, or sparse rows in one form or the other.
template <class T>
struct Inputs {
  std::vector<const T*> rows;
  SparseInputs<T, BlockedRow<T>, FeatureLists<T>> listed;
  SparseInputs<T, MaskedRow<T>, FeatureMasks<T>> masked;

  explicit Inputs(Index most_rows) : rows(static_cast<std::size_t>(most_rows)) {}
  // f(the form that there is); false if the rows are dense.
  template <class F>
  bool if_sparse(F&& f) const {
    if (!masked.rows.empty())
      f(masked);
    else if (!listed.rows.empty())
      f(listed);
    else
      return false;
    return true;
  }
  // The share of a block of features that the rows come to.
  void list(Index rows_there, Index features, Index block) {
    if (!masked.rows.empty()) masked.features.list(masked.rows.data(), rows_there, features, block);
    if (!listed.rows.empty()) listed.features.list(listed.rows.data(), rows_there, features, block);
  }
};

// A layer of which some columns of the weights, and of what belongs to them, stand in memory of their own, so that no
// cache line and no guess of a processor's prefetching is shared with who has the other columns. All offsets stay as
// they are but for `stride`. Where there is no memory it is the layer itself.
template <class T>
class OwnColumns {
 public:
  OwnColumns(const Layer<T>& layer, Range columns, bool wanted) : whole_(layer), layer_(layer), columns_(columns) {
    const std::size_t count = static_cast<std::size_t>(columns.first + layer.in * columns.size());
    if (!wanted) return;
    for_arrays([&](Buffer<T>& own, T*, T*&) {
      own.reset(static_cast<T*>(::operator new[](count * sizeof(T), std::align_val_t{64}, std::nothrow)));
    });
    bool there = true;
    for_arrays([&](Buffer<T>& own, T*, T*&) { there = there && own != nullptr; });
    if (!there) return;
    layer_.stride = columns.size();
    for_arrays([&](Buffer<T>& own, T* from, T*& used) {
      used = own.get();
      for_rows([&](Index there_at, Index here_at) { std::copy_n(from + there_at, columns_.size(), used + here_at); });
    });
  }
  OwnColumns(const OwnColumns&) = delete;
  OwnColumns& operator=(const OwnColumns&) = delete;
  ~OwnColumns() {
    if (layer_.stride == whole_.stride) return;
    for_arrays([&](Buffer<T>&, T* to, T*& used) {
      for_rows([&](Index there_at, Index here_at) { std::copy_n(used + here_at, columns_.size(), to + there_at); });
    });
  }
  const Layer<T>& layer() const { return layer_; }

 private:
  // f(memory, the layer's array, what is used) for the weights, their states and their average, as far as they are there.
  template <class F>
  void for_arrays(F&& f) {
    f(own_[0], whole_.weight.value, layer_.weight.value);
    for (int s = 0; s < most_states; ++s)
      if (whole_.weight.state[s] != nullptr) f(own_[1 + s], whole_.weight.state[s], layer_.weight.state[s]);
    if (whole_.weight.average != nullptr) f(own_[1 + most_states], whole_.weight.average, layer_.weight.average);
  }
  template <class F>
  void for_rows(F&& f) const {
    for (Index k = 0; k < whole_.in; ++k) f(k * whole_.stride + columns_.first, k * columns_.size() + columns_.first);
  }

  const Layer<T>& whole_;
  Layer<T> layer_;
  Range columns_;
  Buffer<T> own_[2 + most_states];
};

// The layers of one network, and the space that mini-batches need: `slots` of them at a time as far as the first layer's
// results are concerned, one beyond.
template <class T>
class Network {
 public:
  Network(const std::vector<Layer<T>>& layers, Index most_rows, Index slots = 1)
      : layers_(layers), most_rows_(most_rows) {
    for (std::size_t l = 0; l < layers.size(); ++l) {
      const Index rows = l == 0 ? slots * most_rows : most_rows;
      y_.emplace_back(rows, layers[l].out);
      z_.push_back(activation_needs_x(layers[l].activation) ? Rows<T>(rows, layers[l].out) : Rows<T>());
      grad_.emplace_back(most_rows, layers[l].out);
      y_rows_.emplace_back(static_cast<std::size_t>(rows));
      y_[l].point(y_rows_[l].data(), 0, rows);
    }
  }

  // Row `row` of the results, and of their gradients, which the caller writes between forward and backward.
  const T* outputs(Index slot, Index row) const {
    return y_.back().row(row + (layers_.size() == 1 ? slot * most_rows_ : 0));
  }
  const Rows<T>& output_gradients() const { return grad_.back(); }

  const Layer<T>& first_layer() const { return layers_[0]; }

  // The first layer's preactivations of some rows, in some columns, which `layer` has: first_layer() or OwnColumns.
  void forward_first(const Layer<T>& layer, const Inputs<T>& inputs, Index slot, Range rows, Range columns) const {
    const Rows<T>& target = preactivations(0);
    T* to = target.row(slot * most_rows_ + rows.first);
    const bool sparse = inputs.if_sparse([&](const auto& x) {
      forward_sparse(x.rows.data() + rows.first, rows.size(), layer, columns, to, target.stride);
    });
    if (!sparse)
      for (Index first = rows.first; first < rows.end; first += most_task_rows, to += most_task_rows * target.stride)
        forward_dense(inputs.rows.data() + first, std::min(most_task_rows, rows.end - first), layer, columns, to,
                      target.stride);
  }

  // All that follows, for some rows.
  void forward_rest(Index slot, Range rows) const {
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      const Layer<T>& layer = layers_[l];
      const Index at = rows.first + (l == 0 ? slot * most_rows_ : 0);
      const Rows<T>& z = preactivations(l);
      if (l > 0) {
        const Index below = rows.first + (l == 1 ? slot * most_rows_ : 0);
        forward_dense(y_rows_[l - 1].data() + below, rows.size(), layer, {0, layer.out}, z.row(at), z.stride);
      }
      if (layer.activation >= 0)
        for_pieces(rows.size() * z.stride, [&](Index i, Index n) {
          activation_forward(layer.activation, z.row(at) + i, layer.activation_parameter, y_[l].row(at) + i, n);
        });
    }
  }

  // From the gradients of the outputs to those of every layer's preactivation; and of the inputs, unless null. The
  // mini-batch has batch_rows.
  void backward(Index slot, Range rows, Index batch_rows, const Rows<T>* input_gradients) const {
    // By the mini-batch, not by the task: the two sum in different orders.
    const auto backward_inputs = batch_rows < tiles_from_rows ? backward_by_dots<T> : backward_by_tiles<T>;
    for (std::size_t l = layers_.size(); l-- > 0;) {
      const Layer<T>& layer = layers_[l];
      T* grad = grad_[l].row(rows.first);
      if (layer.activation >= 0) {
        const T* saved = (z_[l].stride > 0 ? z_[l] : y_[l]).row(rows.first + (l == 0 ? slot * most_rows_ : 0));
        for_pieces(rows.size() * grad_[l].stride, [&](Index i, Index n) {
          activation_backward(layer.activation, grad + i, saved + i, layer.activation_parameter, grad + i, n);
        });
      }
      const Rows<T>* below = l > 0 ? &grad_[l - 1] : input_gradients;
      if (below != nullptr)
        backward_inputs(grad, grad_[l].stride, rows.size(), layer, below->row(rows.first), below->stride);
    }
  }

  // Part `index` of `count` of all weights is updated from the inputs, activations and gradients of `rows` rows; the
  // first layer's part is given by columns, if there are any.
  template <class OptimizerRule>
  void update(const Layer<T>& first_layer, const Inputs<T>& inputs, Index slot, Index rows, Index index, Index count,
              Range first_columns, const double* scalars, double average_decay) const {
    const Updating<T, OptimizerRule> update(scalars, average_decay);
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      const Layer<T>& layer = l == 0 ? first_layer : layers_[l];
      const bool by_columns = l == 0 && first_columns.size() > 0;
      const Range columns = by_columns ? first_columns : Range{0, layer.out};
      const Range inputs_part = by_columns ? Range{0, layer.in} : part_of(layer.in, index, count);
      if (by_columns || index == static_cast<Index>(l) % count) update_bias(layer, grad_[l], rows, columns, update);
      const bool sparse = l == 0 && inputs.if_sparse([&](const auto& x) {
        // A rule with state is never idle.
        if constexpr (OptimizerRule::state_count == 0)
          if (rows == 1 && update.idle_without_gradient) {
            if (by_columns || index == 0) update_from_row(layer, x.rows[0], grad_[0], columns, update);
            return;
          }
        if (by_columns) {
          update_sparse(layer, x.features, grad_[0], {0, layer.in}, columns, update);
        } else {
          // In turn, as they are not equally full.
          for (Index block = index; block < pieces(layer.in, block_features); block += count) {
            const Index first = block * block_features;
            update_sparse(layer, x.features, grad_[0], {first, std::min(layer.in, first + block_features)}, columns,
                          update);
          }
        }
      });
      if (!sparse) {
        const T* const* x = l == 0 ? inputs.rows.data() : y_rows_[l - 1].data() + (l == 1 ? slot * most_rows_ : 0);
        update_dense(layer, x, grad_[l], rows, inputs_part, columns, update);
      }
    }
  }

  void update(int rule, const Layer<T>& first_layer, const Inputs<T>& inputs, Index slot, Index rows, Index index,
              Index count, Range first_columns, const double* scalars, double average_decay) const {
    using Function = void (Network::*)(const Layer<T>&, const Inputs<T>&, Index, Index, Index, Index, Range,
                                       const double*, double) const;
#define GEMMLET_ENTRY(name) &Network::update<optimizers::name>,
    static constexpr Function table[] = {GEMMLET_OPTIMIZER_RULES(GEMMLET_ENTRY)};
#undef GEMMLET_ENTRY
    (this->*table[rule])(first_layer, inputs, slot, rows, index, count, first_columns, scalars, average_decay);
  }

  // Multiply-adds of one row, forward.
  double work() const {
    double total = 0;
    for (const Layer<T>& layer : layers_) total += static_cast<double>(layer.in) * static_cast<double>(layer.out);
    return total;
  }

  // The columns of the first layer that member `index` of `count` always works on, so that they stay in its cache; none
  // if there are too few to go round.
  Range first_columns(Index index, Index count) const {
    const Index unit = 2 * lanes<T>, strips = layers_[0].out / unit;
    if (strips < count || (strips % count != 0 && strips < 4 * count)) return {0, 0};
    const Range part = part_of(strips, index, count);
    return {part.first * unit, index + 1 == count ? layers_[0].out : part.end * unit};
  }

 private:
  const Rows<T>& preactivations(std::size_t l) const { return z_[l].stride > 0 ? z_[l] : y_[l]; }

  // Pieces that an elementwise function does not divide among threads: this is inside of a task.
  template <class F>
  static void for_pieces(Index n, F&& f) {
    for (Index at = 0; at < n; at += serial_elements) f(at, std::min(serial_elements, n - at));
  }

  static bool activation_needs_x(int activation) {
#define GEMMLET_ENTRY(name) activations::name::needs_x,
    static constexpr bool table[] = {GEMMLET_ACTIVATIONS(GEMMLET_ENTRY)};
#undef GEMMLET_ENTRY
    return activation >= 0 && table[activation];
  }

  const std::vector<Layer<T>>& layers_;
  Index most_rows_;
  std::vector<Rows<T>> y_, z_, grad_;
  std::vector<std::vector<const T*>> y_rows_;
};

// f(member) on all threads, if a step has work enough for them.
template <class F>
void with_team(double work, const F& f) {
  if (work > parallel_work && get_num_threads() > 1) return run_team(f);
  std::atomic<int> arrived{0};
  Member alone(0, 1, &arrived);
  f(alone);
}

// Makes samples the rows of a mini-batch.
template <class T>
class Feed {
 public:
  // most_numbers: that are not 0, in a mini-batch of sparse rows.
  Feed(const Samples<T>& samples, Index most_rows, Index most_numbers, Inputs<T>& inputs)
      : samples_(samples), inputs_(inputs), blocks_(pieces(samples.features, block_features)) {
    const bool unchanged = samples.scale == T(1) && samples.shift == T(0);
    if (sparse() && samples.bytes != nullptr) {
      masks_ = space<std::uint64_t>(most_rows * blocks_);
      inputs.masked.rows.resize(static_cast<std::size_t>(most_rows));
      const Index words = pieces(most_rows, 64), count = samples.features * words;
      inputs.masked.features = {words, of_byte_, space<std::uint8_t>(count * 64), space<std::uint64_t>(count)};
    } else if (sparse()) {
      begin_ = space<std::int32_t>(most_rows * (blocks_ + 1));
      inputs.listed.rows.resize(static_cast<std::size_t>(most_rows));
      inputs.listed.features = {space<std::int32_t>(samples.features + 1), space<std::int32_t>(most_numbers),
                                space<T>(most_numbers)};
      if (samples.row_start == nullptr) {
        columns_ = space<std::int32_t>(most_numbers);
        values_ = space<T>(most_numbers);
      }
    } else if (samples.bytes != nullptr || !unchanged) {
      rows_ = Rows<T>(most_rows, samples.features);
    }
    for (int byte = 0; byte < 256; ++byte) of_byte_[byte] = static_cast<T>(byte) / T(255);
  }

  bool sparse() const { return samples_.row_start != nullptr || samples_.skip_zeros; }

  // Has the cache fetch a sample that is soon to be brought: samples in random order are not in it.
  void prefetch(Index sample) const {
    const Index features = samples_.features;
    const char *from, *end;
    if (samples_.row_start != nullptr) {
      from = reinterpret_cast<const char*>(samples_.values + samples_.row_start[sample]);
      end = reinterpret_cast<const char*>(samples_.values + samples_.row_start[sample + 1]);
      for (Index e = samples_.row_start[sample]; e < samples_.row_start[sample + 1]; e += 16)
        __builtin_prefetch(samples_.columns + e, 0, 2);
    } else if (samples_.bytes != nullptr) {
      from = reinterpret_cast<const char*>(samples_.bytes + sample * features);
      end = from + features;
    } else {
      from = reinterpret_cast<const char*>(samples_.values + sample * features);
      end = from + features * static_cast<Index>(sizeof(T));
    }
    for (; from < end; from += 64) __builtin_prefetch(from, 0, 2);
  }

  // Sample number `sample` becomes row `row` of the mini-batch.
  void bring(Index sample, Index row) const {
    const Index features = samples_.features;
    if (sparse() && samples_.bytes != nullptr) {
      inputs_.masked.rows[static_cast<std::size_t>(row)] = masked_row(sample, row);
    } else if (sparse()) {
      inputs_.listed.rows[static_cast<std::size_t>(row)] = listed_row(sample, row);
    } else if (rows_.stride == 0) {
      inputs_.rows[static_cast<std::size_t>(row)] = samples_.values + sample * features;
    } else {
      T* to = rows_.row(row);
      inputs_.rows[static_cast<std::size_t>(row)] = to;
      const T scale = samples_.scale, shift = samples_.shift;
      if (samples_.bytes != nullptr) {
        const std::uint8_t* from = samples_.bytes + sample * features;
        for (Index k = 0; k < features; ++k) to[k] = static_cast<T>(from[k]) / T(255) * scale + shift;
      } else {
        const T* from = samples_.values + sample * features;
        for (Index k = 0; k < features; ++k) to[k] = from[k] * scale + shift;
      }
    }
  }

 private:
  MaskedRow<T> masked_row(Index sample, Index row) const {
    const std::uint8_t* bytes = samples_.bytes + sample * samples_.features;
    std::uint64_t* masks = masks_.get() + row * blocks_;
    const Index whole = samples_.features / block_features, rest = samples_.features - whole * block_features;
    for (Index block = 0; block < whole; ++block) masks[block] = mask_of_bytes(bytes + block * block_features);
    if (rest > 0) {
      std::uint8_t last[block_features] = {};
      std::copy_n(bytes + whole * block_features, rest, last);
      masks[whole] = mask_of_bytes(last);
    }
    return {bytes, masks, of_byte_};
  }

  BlockedRow<T> listed_row(Index sample, Index row) const {
    const Index features = samples_.features;
    std::int32_t* begin = begin_.get() + row * (blocks_ + 1);
    if (samples_.row_start != nullptr) {
      const Index at = samples_.row_start[sample], count = samples_.row_start[sample + 1] - at;
      const std::int32_t* columns = samples_.columns + at;
      Index e = 0;
      for (Index block = 0; block <= blocks_; ++block) {
        while (e < count && columns[e] < block * block_features) ++e;
        begin[block] = static_cast<std::int32_t>(e);
      }
      return {columns, samples_.values + at, begin};
    }
    std::int32_t* columns = columns_.get() + row * features;
    T* values = values_.get() + row * features;
    Index count = 0;
    for (Index k = 0; k < features; ++k) {
      if (k % block_features == 0) begin[k / block_features] = static_cast<std::int32_t>(count);
      // Each number is written, and counts if it is not zero.
      const T value = samples_.values[sample * features + k];
      columns[count] = static_cast<std::int32_t>(k);
      values[count] = value;
      count += value != T(0);
    }
    begin[blocks_] = static_cast<std::int32_t>(count);
    return {columns, values, begin};
  }

  const Samples<T>& samples_;
  Inputs<T>& inputs_;
  Index blocks_;
  Rows<T> rows_;
  Buffer<std::int32_t> columns_, begin_;
  Buffer<T> values_;
  Buffer<std::uint64_t> masks_;
  T of_byte_[256];
};

// A mini-batch, and what brings it.
template <class T>
struct Slot {
  Inputs<T> inputs;
  Feed<T> feed;

  Slot(const Samples<T>& samples, Index most_rows, Index most_numbers)
      : inputs(most_rows), feed(samples, most_rows, most_numbers, inputs) {}
};

// How many numbers that are not 0 a mini-batch has at most.
template <class T>
Index most_numbers(const Samples<T>& samples, const Steps& steps) {
  if (samples.row_start == nullptr) return std::min(steps.batch, steps.count) * samples.features;
  Index most = 0, numbers = 0;
  for (Index i = 0; i < steps.count; ++i) {
    if (i % steps.batch == 0) numbers = 0;
    numbers += samples.row_start[steps.order[i] + 1] - samples.row_start[steps.order[i]];
    most = std::max(most, numbers);
  }
  return most;
}

// The class that a row of outputs stands for; NaN counts as the largest, as in NumPy.
template <class T>
Index predicted_class(const T* row, Index columns) {
  if (columns == 1) return row[0] > T(0);
  Index best = 0;
  for (Index j = 1; j < columns; ++j)
    if (row[j] > row[best] || (row[j] != row[j] && row[best] == row[best])) best = j;
  return best;
}

// The loss and its gradient for rows of outputs.
template <class T>
struct Objective {
  Targets<T> targets;
  int loss;
  T parameter;
  double row_weight;
  Index out;
  Rows<T> one_hot;
  std::vector<double> losses;
  std::vector<Index> right, indices;
  std::vector<const T*> values;

  Objective(const Targets<T>& wanted, int loss_number, T loss_parameter, double weight, Index outputs, Index most_rows)
      : targets(wanted),
        loss(loss_number),
        parameter(loss_parameter),
        row_weight(weight),
        out(outputs),
        one_hot(most_rows, outputs),
        losses(static_cast<std::size_t>(most_rows)),
        right(static_cast<std::size_t>(most_rows)),
        indices(static_cast<std::size_t>(most_rows)),
        values(static_cast<std::size_t>(most_rows)) {}

  // Rows of the mini-batch, which are samples[rows.first] and so on.
  void evaluate(const Index* samples, Range rows, const Network<T>& network, Index slot, T share) {
    const Rows<T>& gradients = network.output_gradients();
    for (Index i = rows.first; i < rows.end; ++i) {
      const auto at = static_cast<std::size_t>(i);
      indices[at] = targets.indices == nullptr ? 0 : targets.indices[samples[i]];
      values[at] = targets.values == nullptr ? nullptr : targets.values + samples[i] * out;
      right[at] = targets.indices != nullptr && predicted_class(network.outputs(slot, i), out) == indices[at];
    }
    const auto first = static_cast<std::size_t>(rows.first);
    if (loss == softmax_loss) {
      softmax_cross_entropy_rows(network.outputs(slot, rows.first),
                                 targets.values != nullptr ? nullptr : &indices[first],
                                 targets.values != nullptr ? &values[first] : nullptr, share, gradients.row(rows.first),
                                 gradients.stride, rows.size(), out, &losses[first]);
      return;
    }
    for (Index i = rows.first; i < rows.end; ++i) {
      const auto at = static_cast<std::size_t>(i);
      const T* wanted = values[at];
      if (wanted == nullptr) {
        std::fill_n(one_hot.row(i), out, T(0));
        if (out == 1)
          one_hot.row(i)[0] = static_cast<T>(indices[at]);
        else
          one_hot.row(i)[indices[at]] = T(1);
        wanted = one_hot.row(i);
      }
      losses[at] =
          elementwise_loss_row(loss, network.outputs(slot, i), wanted, parameter, share, gradients.row(i), out);
    }
  }
};

}  // namespace

template <class T>
MlpOutcome train_mlp(const std::vector<Layer<T>>& layers, const Samples<T>& samples, const Targets<T>& targets,
                     int loss, T loss_parameter, double row_weight, const Steps& steps, const Rule& rule,
                     double loss_sum) {
  if (steps.count == 0) return {loss_sum, 0};
  const Index most_rows = std::min(steps.batch, steps.count);
  const Network<T> network(layers, most_rows, 2);
  // Two mini-batches; or two for each thread, where to bring a row is less work than to fetch what another thread brought.
  const bool each = samples.skip_zeros && samples.bytes != nullptr && most_rows <= most_own_rows &&
                    get_num_threads() <= most_own_threads;
  const Index numbers = most_numbers(samples, steps), copies = each ? get_num_threads() : 1;
  std::vector<std::unique_ptr<Slot<T>>> slots;
  for (Index i = 0; i < 2 * copies; ++i) slots.push_back(std::make_unique<Slot<T>>(samples, most_rows, numbers));
  Objective<T> objective(targets, loss, loss_parameter, row_weight, layers.back().out, most_rows);
  MlpOutcome outcome{loss_sum, 0};

  const auto train = [&](Member& member) {
    const Index me = member.index(), all = member.count();
    const Range columns = network.first_columns(me, all);
    const OwnColumns<T> own(network.first_layer(), columns,
                            all > 1 && columns.size() > 0 && steps.count > own_from_steps * steps.batch);
    const Layer<T>& first_layer = own.layer();
    const auto rows_from = [&](Index start) { return std::clamp<Index>(steps.count - start, 0, steps.batch); };
    const bool own_slots = columns.size() > 0 && all <= copies;
    const Index number = own_slots ? 0 : me, share_of = own_slots ? 1 : all;
    const std::unique_ptr<Slot<T>>* const slot_at = &slots[static_cast<std::size_t>(own_slots ? 2 * me : 0)];
    // This member's rows of the mini-batch that begins at `start`.
    const auto bring = [&](Index start, Index slot) {
      const Range rows = part_of(rows_from(start), number, share_of);
      const Feed<T>& feed = slot_at[slot]->feed;
      for (Index i = rows.first; i < rows.end; ++i) {
        feed.bring(steps.order[start + i], i);
        if (start + steps.batch + i < steps.count) feed.prefetch(steps.order[start + steps.batch + i]);
      }
    };
    // What becomes of them once all members have brought theirs.
    const auto begin = [&](Index start, Index slot) {
      const Index rows = rows_from(start);
      Inputs<T>& inputs = slot_at[slot]->inputs;
      if (slot_at[slot]->feed.sparse() && rows > 0)
        for (Index block = number; block < pieces(samples.features, block_features); block += share_of)
          inputs.list(rows, samples.features, block);
      if (columns.size() > 0) network.forward_first(first_layer, inputs, slot, {0, rows}, columns);
    };

    bring(0, 0);
    member.barrier();
    begin(0, 0);
    member.barrier();
    const double* scalars = rule.scalars;
    Index slot = 0;
    for (Index start = 0; start < steps.count; start += steps.batch, slot ^= 1) {
      const Index batch_rows = rows_from(start);
      const Range mine = part_of(batch_rows, me, all);
      const T share = static_cast<T>(row_weight / static_cast<double>(batch_rows));
      for (Index first = mine.first; first < mine.end; first += most_task_rows) {
        const Range rows{first, std::min(mine.end, first + most_task_rows)};
        if (columns.size() == 0)
          network.forward_first(first_layer, slot_at[slot]->inputs, slot, rows, {0, layers[0].out});
        network.forward_rest(slot, rows);
        objective.evaluate(steps.order + start, rows, network, slot, share);
        network.backward(slot, rows, batch_rows, nullptr);
      }
      bring(start + steps.batch, slot ^ 1);
      member.barrier();

      network.update(rule.rule, first_layer, slot_at[slot]->inputs, slot, batch_rows, me, all, columns, scalars, 0.0);
      scalars += optimizer_scalar_count(rule.rule);
      if (me == 0)
        for (std::size_t i = 0; i < static_cast<std::size_t>(batch_rows); ++i) {
          outcome.loss += objective.losses[i] * row_weight;
          outcome.right += objective.right[i];
        }
      begin(start + steps.batch, slot ^ 1);
      member.barrier();
    }
  };
  with_team(static_cast<double>(most_rows) * network.work(), train);
  return outcome;
}

template <class T>
GanOutcome train_gan(const std::vector<Layer<T>>& generator, const std::vector<Layer<T>>& discriminator,
                     const Samples<T>& samples, const T* noise, T real_target, bool non_saturating, const Steps& steps,
                     const Rule& generator_rule, const Rule& discriminator_rule, const double* decay,
                     GanOutcome outcome) {
  if (steps.count == 0) return outcome;
  const Index most_rows = std::min(steps.batch, steps.count), latent = generator.front().in;
  const int loss = elementwise_loss_number("binary_cross_entropy_with_logits");
  const Network<T> g(generator, most_rows), d(discriminator, 2 * most_rows);
  // Rows of the discriminator: the samples, then what is generated.
  Inputs<T> g_inputs(most_rows), d_inputs(2 * most_rows), generated(most_rows);
  const Feed<T> feed(samples, most_rows, 0, d_inputs);
  for (Index i = 0; i < most_rows; ++i) generated.rows[static_cast<std::size_t>(i)] = g.outputs(0, i);
  std::vector<double> losses(static_cast<std::size_t>(2 * most_rows));

  const auto train = [&](Member& member) {
    const Index me = member.index(), all = member.count();
    const double *g_scalars = generator_rule.scalars, *d_scalars = discriminator_rule.scalars, *d_decay = decay;
    for (Index start = 0; start < steps.count; start += steps.batch) {
      const Index batch_rows = std::min(steps.batch, steps.count - start);
      const Range mine = part_of(batch_rows, me, all);
      const T share = static_cast<T>(1.0 / static_cast<double>(batch_rows));
      const auto evaluate = [&](Index i, T target, T weight) {
        losses[static_cast<std::size_t>(i)] =
            elementwise_loss_row(loss, d.outputs(0, i), &target, T(0), weight, d.output_gradients().row(i), Index{1});
      };
      const auto in_pieces = [&](auto&& f) {
        for (Index first = mine.first; first < mine.end; first += most_task_rows)
          f(Range{first, std::min(mine.end, first + most_task_rows)});
      };
      const auto forward = [](const Network<T>& network, const Inputs<T>& inputs, Range rows, Index out) {
        network.forward_first(network.first_layer(), inputs, 0, rows, {0, out});
        network.forward_rest(0, rows);
      };
      const Index g_out = generator.front().out, d_out = discriminator.front().out;

      in_pieces([&](Range rows) {
        for (Index i = rows.first; i < rows.end; ++i) {
          const auto at = static_cast<std::size_t>(i);
          feed.bring(steps.order[start + i], i);
          if (start + steps.batch + i < steps.count) feed.prefetch(steps.order[start + steps.batch + i]);
          g_inputs.rows[at] = noise + (start + i) * latent;
          d_inputs.rows[static_cast<std::size_t>(batch_rows) + at] = generated.rows[at];
        }
        forward(g, g_inputs, rows, g_out);
        for (const bool real : {true, false}) {
          const Range half = real ? rows : Range{rows.first + batch_rows, rows.end + batch_rows};
          forward(d, d_inputs, half, d_out);
          for (Index i = half.first; i < half.end; ++i) evaluate(i, real ? real_target : T(0), share);
          d.backward(0, half, 2 * batch_rows, nullptr);
        }
      });
      member.barrier();
      d.update(discriminator_rule.rule, d.first_layer(), d_inputs, 0, 2 * batch_rows, me, all, {0, 0}, d_scalars, 0.0);
      d_scalars += optimizer_scalar_count(discriminator_rule.rule);
      if (me == 0)
        for (Index i = 0; i < 2 * batch_rows; ++i) outcome.discriminator_loss += losses[static_cast<std::size_t>(i)];
      member.barrier();

      // The generator's loss goes through the discriminator as it is now. minimax: log(1 - D) shall become small, so
      // that loss and gradient of the target 0 change their sign.
      in_pieces([&](Range rows) {
        forward(d, generated, rows, d_out);
        for (Index i = rows.first; i < rows.end; ++i)
          non_saturating ? evaluate(i, T(1), share) : evaluate(i, T(0), -share);
        d.backward(0, rows, batch_rows, &g.output_gradients());
        g.backward(0, rows, batch_rows, nullptr);
      });
      member.barrier();
      g.update(generator_rule.rule, g.first_layer(), g_inputs, 0, batch_rows, me, all, {0, 0}, g_scalars, *d_decay++);
      g_scalars += optimizer_scalar_count(generator_rule.rule);
      if (me == 0)
        for (Index i = 0; i < batch_rows; ++i) {
          const double row_loss = losses[static_cast<std::size_t>(i)];
          outcome.generator_loss += non_saturating ? row_loss : -row_loss;
        }
      member.barrier();
    }
  };
  with_team(static_cast<double>(most_rows) * (g.work() + d.work()), train);
  return outcome;
}

#define GEMMLET_INSTANTIATE(T)                                                                                      \
  template MlpOutcome train_mlp(const std::vector<Layer<T>>&, const Samples<T>&, const Targets<T>&, int, T, double, \
                                const Steps&, const Rule&, double);                                                 \
  template GanOutcome train_gan(const std::vector<Layer<T>>&, const std::vector<Layer<T>>&, const Samples<T>&,      \
                                const T*, T, bool, const Steps&, const Rule&, const Rule&, const double*, GanOutcome);
GEMMLET_INSTANTIATE(float)
GEMMLET_INSTANTIATE(double)

}  // namespace gemmlet
