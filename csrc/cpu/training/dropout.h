// Dropout of the rows of a mini-batch: one bit for each unit, drawn once for forward and backward.
//
// Contract
//   Rows are padded to whole vectors. Bit j % 64 of word j / 64 of a row says whether unit j is kept; bits beyond the units
//   are whatever was drawn. A dropped unit becomes 0, also where it is not finite.
#pragma once

#include <cstdint>

#include "cpu/random.h"
#include "cpu/training/buffers.h"
#include "cpu/training/plan.h"

namespace gemmlet {
namespace {

// What a forward pass draws with: its mini-batch is step `step`, and has `batch_rows` samples.
struct Draw {
  std::uint64_t step;
  unsigned stream;
  Index batch_rows;

  std::uint64_t place(Index row) const {
    return dropout::place(static_cast<std::uint64_t>(row), static_cast<std::uint64_t>(batch_rows));
  }
};

// Which units of a group the row at `place` keeps.
inline std::uint64_t kept_units(const Dropout& dropout, Index group, std::uint64_t place, const Draw& draw) {
  constexpr Index step = lanes<std::uint64_t>;
  const auto bound = static_cast<std::uint16_t>(dropout.keep);
  std::uint64_t low = 0, high = 0;
#pragma GCC unroll 4
  for (Index block = 0; block < dropout::group_blocks; block += step) {
    const WordPairs pairs = random_pairs(group * dropout::group_blocks + block, place, draw.step,
                                         dropout.stream + draw.stream, dropout.seed);
    low |= mask_of_halves_below(pairs.low, bound) << (4 * block);
    high |= mask_of_halves_below(pairs.high, bound) << (4 * block);
  }
  return low | high << 32;
}

// Which units of the rows of a mini-batch are kept.
class KeptUnits {
 public:
  KeptUnits() = default;
  KeptUnits(KeptMemory& memory, const Dropout& dropout, Index rows, Index units)
      : dropout_(dropout),
        groups_(ceil_div(units, dropout::group_units)),
        words_(memory.take<std::uint64_t>(rows * groups_)) {}

  explicit operator bool() const { return words_ != nullptr; }

  void draw(Index row, std::uint64_t place, const Draw& draw) const {
    for (Index group = 0; group < groups_; ++group)
      words_[row * groups_ + group] = kept_units(dropout_, group, place, draw);
  }

  // Columns of a row with what is dropped 0, and the others scaled; `first` begins a vector, whole ones are written.
  template <class T>
  void apply(Index row, const T* from, T* to, Range columns) const {
    const std::uint64_t* words = words_ + row * groups_;
    const Vec<T> factor = splat(static_cast<T>(dropout::scale(dropout_.keep)));
    for (Index j = columns.first; j < columns.end; j += lanes<T>)
      store(to + j,
            keep_set_lanes<T>(load(from + j) * factor, words[j / dropout::group_units] >> j % dropout::group_units));
  }

 private:
  Dropout dropout_;
  Index groups_ = 0;
  std::uint64_t* words_ = nullptr;
};

}  // namespace
}  // namespace gemmlet
