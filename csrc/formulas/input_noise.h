// Noise that is added to the inputs of a network: nearly normal numbers, of random bytes.
//
// Contract
//   Drawn is the sum of four random bytes less its mean: an integer of this standard deviation. The noise is T(factor) times
//   the integer, rounded to T, and is added to the input. A unit has a word of formulas/random.h, which is counted as those of
//   dropout are (formulas/dropout.h). A group of 32 units has eight blocks: units 0 to 15 have the words 0 and 1 of the blocks
//   in turn, units 16 to 31 the words 2 and 3. That is the order of random_pairs (cpu/random.h).
//   The reference: python/gemmlet/formulas/input_noise.py.
#pragma once

namespace gemmlet::input_noise {

constexpr int group_units = 32, group_blocks = 8;

// Of a sum of four random bytes.
constexpr int mean = 2 * 255;
constexpr double deviation = 147.80054127099805;  // sqrt(21845)

// The block of units 2 n and 2 n + 1, and the first of their words.
constexpr unsigned block_of(unsigned unit) { return unit / group_units * group_blocks + unit % 16 / 2; }
constexpr int first_word_of(unsigned unit) { return unit % group_units < 16 ? 0 : 2; }

// What integers are multiplied by, for noise of the standard deviation `wanted`.
constexpr double factor(double wanted) { return wanted / deviation; }

}  // namespace gemmlet::input_noise
