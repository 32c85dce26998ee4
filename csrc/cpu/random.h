// Random numbers for arrays; formulas/random.h says which.
//
// Contract
//   fill_random writes, for block b, its words 0 and 1 to low[2 b] and low[2 b + 1], and its words 2 and 3 to the same places
//   of high: an order that is the same for every width of vectors. `blocks` is a multiple of random_block_step.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/simd.h"
// After the function that it is written on.
#include "formulas/random.h"

namespace gemmlet {

// The most blocks that a vector has.
constexpr Index random_block_step = 8;

// The words of the blocks from `block` on, one in each lane: two vectors as fill_random writes them.
struct WordPairs {
  Vec<std::uint32_t> low, high;
};
GEMMLET_INLINE WordPairs random_pairs(Index block, std::uint64_t row, std::uint64_t step, unsigned stream,
                                      std::uint64_t seed) {
  using W = Vec<std::uint64_t>;
  W words[4], blocks;
  for (int lane = 0; lane < lanes<std::uint64_t>; ++lane) blocks[lane] = static_cast<std::uint64_t>(block + lane);
  random_words(words, blocks, row, step, stream, seed);
  const auto pair = [](W first, W second) GEMMLET_INLINE_LAMBDA {
    return std::bit_cast<Vec<std::uint32_t>>((first & 0xffffffffu) | (second << 32));
  };
  return {pair(words[0], words[1]), pair(words[2], words[3])};
}

inline void fill_random(Index blocks, std::uint64_t row, std::uint64_t step, unsigned stream, std::uint64_t seed,
                        std::uint32_t* low, std::uint32_t* high) {
  for (Index block = 0; block < blocks; block += lanes<std::uint64_t>) {
    const WordPairs pairs = random_pairs(block, row, step, stream, seed);
    store(low + 2 * block, pairs.low);
    store(high + 2 * block, pairs.high);
  }
}

}  // namespace gemmlet
