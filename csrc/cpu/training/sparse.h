// The first layer on sparse rows: its forward pass, and the nonzeros of a mini-batch by feature for its update.
//
// Contract
//   A row is a list of indices and values (BlockedRow), or bytes with a bit mask of the nonzeros (MaskedRow), both in blocks
//   of block_features features. Every reduction is sequential over the nonzeros, by feature in forward and by row of the
//   mini-batch in the update, and so has the bits of the dense reduction as long as all weights are finite.
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

// f(first, vectors) for blocks of nearly equal size, at most eight vectors, that cover the columns; the last vector may extend
// beyond them. Each block walks over all nonzeros.
template <class T, class F>
inline void for_wide_blocks(Range columns, F&& f) {
  constexpr Index n = lanes<T>;
  for_blocks(ceil_div(columns.size(), n), 8, [&](Index first, Index count) {
    with_constant<8>(static_cast<int>(count), [&](auto vectors) { f(columns.first + first * n, vectors); });
  });
}

// Features of a block: the bits of a word.
constexpr Index block_features = 64;

// A list of nonzeros: those of block b begin at begin[b].
template <class T>
struct BlockedRow {
  const std::int32_t* indices;
  const T* values;
  const std::int32_t* begin;

  SparseRow<T> blocks(Index first, Index end) const {
    return {indices + begin[first], values + begin[first], begin[end] - begin[first]};
  }
  void prefetch(Index block) const {
    __builtin_prefetch(indices + begin[block]);
    __builtin_prefetch(values + begin[block]);
  }
};

// Bytes, with one word of mask bits for each block.
template <class T>
struct MaskedRow {
  const std::uint8_t* bytes;
  const std::uint64_t* masks;
  const T* value_of_byte;

  MaskedBytes<T> blocks(Index first, Index end) const { return {bytes, masks, first, end, value_of_byte}; }
  void prefetch(Index block) const { __builtin_prefetch(bytes + block * block_features); }
};

template <class T>
inline void prefetch_row(const T* from, Index count) {
  for (Index i = 0; i < count; i += 64 / static_cast<Index>(sizeof(T))) __builtin_prefetch(from + i);
}

// y += x w, or y = x w for the first blocks (begin); plus the bias for the last ones. Not inlined, so that its loop has all
// registers.
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

// forward_dense for sparse rows: sparse_blocks at a time, so that their rows of w stay in the first-level cache.
template <class T, class Row>
void forward_sparse(const Row* x, Index rows, const Layer<T>& layer, Range columns, T* y, Index y_stride) {
  constexpr Index n = lanes<T>;
  const Index out = layer.out, stride = layer.stride, blocks = ceil_div(layer.in, block_features),
              at_once = rows == 1 ? blocks : tuning::sparse_blocks;
  const T *w = layer.weight.value, *bias = layer.bias.value;
  if (out < n) {
    const int part = static_cast<int>(out);
    for (Index r = 0; r < rows; ++r) {
      Vec<T> sum{};
      x[r].blocks(0, blocks).for_each(
          [&](Index k, T x_k) { sum = fma(splat<T>(x_k), load_part(w + k * stride, part), sum); });
      store(y + r * y_stride, sum + load_part(bias, part));
    }
  } else {
    for_wide_blocks<T>(columns, [&]<int vectors>(Index j, Constant<vectors>) {
      // The last vector ends with the columns. Where it overlaps the one before, both have the same values.
      const Index last = std::min((vectors - 1) * n, columns.end - n - j);
      for (Index block = 0; block < blocks; block += at_once) {
        const Index end = std::min(block + at_once, blocks);
        for (Index r = 0; r < rows; ++r) {
          // The row is among the samples or was written by another thread: this core's cache has neither.
          if (r + tuning::pack_prefetch_rows / 2 < rows) x[r + tuning::pack_prefetch_rows / 2].prefetch(block);
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

// The nonzeros of a mini-batch by feature (CSC): those of feature k begin at begin[k].
template <class T>
struct FeatureLists {
  Buffer<std::int32_t> begin, row;
  Buffer<T> value;

  // The nonzeros of one block of features.
  void list(const BlockedRow<T>* x, Index rows, Index features, Index block) {
    const Index first = block * block_features, end = std::min(features, first + block_features);
    std::int32_t next[block_features] = {}, position = 0;
    for (Index i = 0; i < rows; ++i) {
      position += x[i].begin[block];
      const SparseRow<T> nonzeros = x[i].blocks(block, block + 1);
      for (Index e = 0; e < nonzeros.count; ++e) ++next[nonzeros.indices[e] - first];
    }
    for (Index k = first; k < end; ++k) {
      begin[k] = position;
      position += std::exchange(next[k - first], position);
    }
    begin[end] = position;  // the block that begins there writes the same
    for (Index i = 0; i < rows; ++i) {
      const SparseRow<T> nonzeros = x[i].blocks(block, block + 1);
      for (Index e = 0; e < nonzeros.count; ++e) {
        const std::int32_t at = next[nonzeros.indices[e] - first]++;
        row[at] = static_cast<std::int32_t>(i);
        value[at] = nonzeros.values[e];
      }
    }
  }

  SparseRow<T> feature(Index k) const {
    return {row.get() + begin[k], value.get() + begin[k], begin[k + 1] - begin[k]};
  }
};

typedef std::uint8_t Bytes16 __attribute__((vector_size(16)));

// 16 x 16 bytes transposed: four rounds interleave each row with the one eight below.
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

// The same for masked rows: feature k has one byte for each row from k * words * 64, and its masks from k * words.
template <class T>
struct FeatureMasks {
  Index words = 0;
  const T* value_of_byte = nullptr;
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
      end - k >= 16 ? transpose_features(x, rows, k, 16)
                    : transpose_features(x, rows, k, static_cast<std::size_t>(end - k));
    for (Index word = first * words; word < end * words; ++word) masks[word] = mask_of_bytes(bytes.get() + word * 64);
  }

  // `count` features from k on, at most 16.
  [[gnu::always_inline]] void transpose_features(const MaskedRow<T>* x, Index rows, Index k, std::size_t count) {
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
    return {bytes.get() + k * words * 64, masks.get() + k * words, 0, words, value_of_byte};
  }
};

// Sparse rows of a mini-batch, and their nonzeros by feature.
template <class T, class Row, class Features>
struct SparseInputs {
  std::vector<Row> rows;
  Features features;
};

// The input of the first layer: pointers to dense rows, which may be copies, or sparse rows in one of the two forms; and the
// class of each row, if the layer has classes.
template <class T>
struct Inputs {
  std::vector<const T*> rows;
  std::vector<Index> labels;
  Rows<T> copies;
  SparseInputs<T, BlockedRow<T>, FeatureLists<T>> listed;
  SparseInputs<T, MaskedRow<T>, FeatureMasks<T>> masked;

  explicit Inputs(Index max_rows) : rows(static_cast<std::size_t>(max_rows)) {}
  // f(the sparse form in use); false if the rows are dense.
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
  // Lists one block of features of the rows by feature.
  void list(Index rows_there, Index features, Index block) {
    if (!masked.rows.empty()) masked.features.list(masked.rows.data(), rows_there, features, block);
    if (!listed.rows.empty()) listed.features.list(listed.rows.data(), rows_there, features, block);
  }
};

}  // namespace
}  // namespace gemmlet
