// The mini-batch: gather by index, decode bytes, scale and shift, list nonzeros.
//
// Contract
//   Dense rows that need no decoding are not copied, unless that is asked for. Different threads may load different rows
//   of one mini-batch. Samples are read only. Another thread may change them meanwhile, but for indptr: column indices are
//   read once, and checked. A row is loaded first, then gets its noise, then loses what is dropped.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/training/dropout.h"
#include "cpu/training/input_noise.h"
#include "cpu/training/sparse.h"

namespace gemmlet {
namespace {

// Gathers samples into the rows of a mini-batch.
template <class T>
class Loader {
 public:
  // max_nonzeros: of a mini-batch of sparse rows. Dense rows are copied where that is asked for, or they need decoding, or
  // change at random; sparse rows have no noise.
  Loader(const Samples<T>& samples, KeptMemory& memory, Index max_rows, Index max_nonzeros, bool copies,
         const Dropout& dropout, const InputNoise& noise, Inputs<T>& inputs)
      : samples_(samples),
        dropout_(dropout),
        noise_(noise),
        inputs_(inputs),
        blocks_(ceil_div(samples.features, block_features)) {
    const bool unchanged = samples.scale == T(1) && samples.shift == T(0);
    if (sparse() && samples.bytes != nullptr) {
      masks_ = space<std::uint64_t>(max_rows * blocks_);
      if (dropout) bytes_ = space<std::uint8_t>(max_rows * blocks_ * block_features);
      inputs.masked.rows.resize(static_cast<std::size_t>(max_rows));
      const Index words = ceil_div(max_rows, 64), count = samples.features * words;
      inputs.masked.features = {words, value_of_byte_, space<std::uint8_t>(count * 64), space<std::uint64_t>(count)};
    } else if (sparse()) {
      begin_ = space<std::int32_t>(max_rows * (blocks_ + 1));
      inputs.listed.rows.resize(static_cast<std::size_t>(max_rows));
      inputs.listed.features = {space<std::int32_t>(samples.features + 1), space<std::int32_t>(max_nonzeros),
                                space<T>(max_nonzeros)};
      indices_ = space<std::int32_t>(max_nonzeros);
      if (samples.indptr == nullptr || dropout) values_ = space<T>(max_nonzeros);
    } else if (copies || dropout || noise || samples.bytes != nullptr || !unchanged) {
      inputs.copies = Rows<T>(memory, max_rows, samples.features);
      if (dropout) kept_ = KeptUnits(memory, dropout, max_rows, samples.features);
    }
    for (int byte = 0; byte < 256; ++byte)
      value_of_byte_[byte] =
          samples.value_of_byte != nullptr ? samples.value_of_byte[byte] : static_cast<T>(byte) / T(255);
    if (sparse() && dropout)
      for (T& value : value_of_byte_) value *= factor();
  }

  bool sparse() const { return samples_.indptr != nullptr || samples_.skip_zeros; }

  bool changes_rows() const { return dropout_ || noise_; }

  // Noise and dropout of row `row`, which has been loaded and is at `place` of its mini-batch.
  void change(Index row, std::uint64_t place, const Draw& draw) const {
    if (noise_) add_noise(noise_, inputs_.copies.row(row), samples_.features, place, draw);
    if (dropout_) drop(row, place, draw);
  }

  // Prefetches a sample of the next mini-batch: samples in random order are not in the cache.
  void prefetch(Index sample) const {
    const Index features = samples_.features;
    const char *from, *end;
    if (samples_.indptr != nullptr) {
      from = reinterpret_cast<const char*>(samples_.values + samples_.indptr[sample]);
      end = reinterpret_cast<const char*>(samples_.values + samples_.indptr[sample + 1]);
      for (Index e = samples_.indptr[sample]; e < samples_.indptr[sample + 1]; e += 16)
        __builtin_prefetch(samples_.indices + e, 0, 2);
    } else if (samples_.bytes != nullptr) {
      from = reinterpret_cast<const char*>(samples_.bytes + sample * features);
      end = from + features;
    } else {
      from = reinterpret_cast<const char*>(samples_.values + sample * features);
      end = from + features * static_cast<Index>(sizeof(T));
    }
    for (; from < end; from += 64) __builtin_prefetch(from, 0, 2);
  }

  // Loads sample `sample` into row `row`. first: the nonzeros of a sparse matrix in the rows before it.
  void load(Index sample, Index row, Index first) const {
    const Index features = samples_.features;
    if (sparse() && samples_.bytes != nullptr) {
      inputs_.masked.rows[static_cast<std::size_t>(row)] = masked_row(sample, row);
    } else if (sparse()) {
      inputs_.listed.rows[static_cast<std::size_t>(row)] = listed_row(sample, row, first);
    } else if (inputs_.copies.stride == 0) {
      inputs_.rows[static_cast<std::size_t>(row)] = samples_.values + sample * features;
    } else {
      T* to = inputs_.copies.row(row);
      inputs_.rows[static_cast<std::size_t>(row)] = to;
      const T scale = samples_.scale, shift = samples_.shift;
      if (samples_.bytes != nullptr) {
        const std::uint8_t* from = samples_.bytes + sample * features;
        if (samples_.value_of_byte != nullptr)
          for (Index k = 0; k < features; ++k) to[k] = value_of_byte_[from[k]] * scale + shift;
        else
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
    return {bytes, masks, value_of_byte_};
  }

  BlockedRow<T> listed_row(Index sample, Index row, Index first) const {
    const Index features = samples_.features;
    std::int32_t* begin = begin_.get() + row * (blocks_ + 1);
    if (samples_.indptr != nullptr) {
      const Index at = samples_.indptr[sample];
      const std::int32_t* indices = indices_.get() + first;
      const Index count = copy_indices(at, samples_.indptr[sample + 1] - at, indices_.get() + first);
      Index e = 0;
      for (Index block = 0; block <= blocks_; ++block) {
        while (e < count && indices[e] < block * block_features) ++e;
        begin[block] = static_cast<std::int32_t>(e);
      }
      return {indices, samples_.values + at, begin};
    }
    std::int32_t* indices = indices_.get() + row * features;
    T* values = values_.get() + row * features;
    Index count = 0;
    for (Index block = 0; block < blocks_; ++block) {
      const Index k = block * block_features;
      begin[block] = static_cast<std::int32_t>(count);
      count += list_nonzeros(samples_.values + sample * features + k, std::min(block_features, features - k),
                             static_cast<std::int32_t>(k), indices + count, values + count);
    }
    begin[blocks_] = static_cast<std::int32_t>(count);
    return {indices, values, begin};
  }

  void drop(Index row, std::uint64_t place, const Draw& draw) const {
    if (sparse() && samples_.bytes != nullptr) {
      drop_bytes(row, place, draw);
    } else if (sparse()) {
      drop_listed(row, place, draw);
    } else {
      T* const x = inputs_.copies.row(row);
      kept_.draw(row, place, draw);
      kept_.apply(row, x, x, {0, samples_.features});
    }
  }

  T factor() const { return static_cast<T>(dropout::scale(dropout_.keep)); }

  // The others are scaled by their table.
  void drop_bytes(Index row, std::uint64_t place, const Draw& draw) const {
    MaskedRow<T>& masked = inputs_.masked.rows[static_cast<std::size_t>(row)];
    std::uint64_t* masks = masks_.get() + row * blocks_;
    std::uint8_t* to = bytes_.get() + row * blocks_ * block_features;
    for (Index block = 0; block < blocks_; ++block) {
      const Index k = block * block_features, rest = samples_.features - k;
      const std::uint64_t kept = kept_units(dropout_, block, place, draw);
      masks[block] &= kept;
      if (rest < block_features) std::copy_n(masked.bytes + k, rest, to + k);
      keep_set_bytes(rest < block_features ? to + k : masked.bytes + k, kept, to + k);
    }
    masked.bytes = to;
  }

  void drop_listed(Index row, std::uint64_t place, const Draw& draw) const {
    BlockedRow<T>& listed = inputs_.listed.rows[static_cast<std::size_t>(row)];
    std::int32_t* const begin = begin_.get() + row * (blocks_ + 1);
    std::int32_t* const indices = indices_.get() + (listed.indices - indices_.get());
    T* const values = values_.get() + (indices - indices_.get());
    Index e = 0, count = 0;
    for (Index block = 0; block < blocks_; ++block) {
      const std::uint64_t kept = begin[block + 1] > e ? kept_units(dropout_, block, place, draw) : 0;
      const Index end = begin[block + 1];
      begin[block] = static_cast<std::int32_t>(count);
      for (; e < end; ++e) {
        indices[count] = indices[e];
        values[count] = listed.values[e] * factor();
        count += kept >> indices[e] % block_features & 1;
      }
    }
    begin[blocks_] = static_cast<std::int32_t>(count);
    listed.values = values;
  }

  // Copies `count` column indices from `at` on. Returns count; or 0, an empty row, if they are no longer in range and
  // ascending.
  Index copy_indices(Index at, Index count, std::int32_t* to) const {
    std::copy_n(samples_.indices + at, count, to);
    asm volatile("" ::: "memory");  // a compiler, which thinks both the same, would check the source
    bool fits = count == 0 || (to[0] >= 0 && to[count - 1] < samples_.features);
    for (Index e = 1; e < count; ++e) fits &= to[e - 1] < to[e];
    return fits ? count : 0;
  }

  const Samples<T>& samples_;
  Dropout dropout_;
  InputNoise noise_;
  Inputs<T>& inputs_;
  Index blocks_;
  KeptUnits kept_;
  Buffer<std::uint8_t> bytes_;  // of masked rows after dropout
  Buffer<std::int32_t> indices_, begin_;
  Buffer<T> values_;
  Buffer<std::uint64_t> masks_;
  T value_of_byte_[256];
};

// A mini-batch and its loader.
template <class T>
struct Slot {
  Inputs<T> inputs;
  Loader<T> loader;

  Slot(const Samples<T>& samples, KeptMemory& memory, Index max_rows, Index max_nonzeros, bool copies,
       const Dropout& dropout = {}, const InputNoise& noise = {})
      : inputs(max_rows), loader(samples, memory, max_rows, max_nonzeros, copies, dropout, noise, inputs) {}
};

// Of each row of `order` the nonzeros of a sparse matrix in the rows of its mini-batch before it; `most` becomes the most
// nonzeros that a mini-batch has.
template <class T>
std::vector<std::int32_t> nonzeros_before(const Samples<T>& samples, const Steps& steps, Index& most) {
  most = samples.indptr == nullptr ? std::min(steps.batch, steps.count) * samples.features : 0;
  std::vector<std::int32_t> before(static_cast<std::size_t>(samples.indptr == nullptr ? 0 : steps.count));
  Index nonzeros = 0;
  for (std::size_t i = 0; i < before.size(); ++i) {
    if (static_cast<Index>(i) % steps.batch == 0) nonzeros = 0;
    before[i] = static_cast<std::int32_t>(nonzeros);
    nonzeros += samples.indptr[steps.order[i] + 1] - samples.indptr[steps.order[i]];
    most = std::max(most, nonzeros);
  }
  return before;
}

}  // namespace
}  // namespace gemmlet
