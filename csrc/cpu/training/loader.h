// The mini-batch: gathers samples by index, decodes bytes, scales and shifts, lists what is not 0.
//
// Contract
//   Rows are used where they lie if nothing of them changes; else they are written to the loader's own buffers. A loader
//   brings any row on any thread, each row once. Samples are read only.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/training/buffers.h"
#include "cpu/training/plan.h"
#include "cpu/training/sparse.h"

namespace gemmlet {
namespace {

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

}  // namespace
}  // namespace gemmlet
