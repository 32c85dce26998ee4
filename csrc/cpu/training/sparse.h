// The first layer on sparse rows: its forward pass, and a mini-batch's numbers feature by feature for its update.
//
// Contract
//   A row has one of two forms: lists of columns and values (BlockedRow), or bytes with a bit mask of those that are not
//   0 (MaskedRow). Both go by blocks of block_features features. Every sum runs over the nonzeros in the order of the
//   features (FeatureLists and FeatureMasks: of the rows of the mini-batch), so that it has the bits of the dense sum as
//   long as all weights are finite.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "cpu/matmul/micro_kernel.h"
#include "cpu/training/buffers.h"
#include "cpu/training/plan.h"

namespace gemmlet {
namespace {

// So many blocks of features of a sparse mini-batch go through its rows at a time: what they use of w stays in the cache.
constexpr Index sparse_blocks = 2;

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

}  // namespace
}  // namespace gemmlet
