// Dropout: which units are kept, and what they are multiplied by.
//
// Srivastava, Hinton, Krizhevsky, Sutskever and Salakhutdinov, "Dropout: a simple way to prevent neural networks from
// overfitting", 2014; scaled in training rather than afterwards ("inverted").
//
// Contract
//   A unit is kept where 16 random bits are below a threshold, 1 to 65536. The words of formulas/random.h are counted by the
//   stream of the layer, the step of the training, and the row's place in the mini-batch. A group of 64 units has eight
//   blocks, of four words of two decisions each, the lower half first: units 0 to 31 have the words 0 and 1 of the blocks in
//   turn, units 32 to 63 the words 2 and 3. That is the order of random_pairs (cpu/random.h).
//   The reference: python/gemmlet/formulas/dropout.py.
#pragma once

namespace gemmlet::dropout {

constexpr int group_units = 64, group_blocks = 8;

// A threshold that keeps all.
constexpr unsigned all = 1u << 16;

// What units that are kept are multiplied by: the mean stays, whatever the threshold was rounded to.
constexpr double scale(unsigned keep) { return static_cast<double>(all) / keep; }

// The place of row `row` of input `input` of a mini-batch.
constexpr unsigned long long place_of(unsigned long long input, unsigned long long row) { return (input << 32) + row; }
// The same where the rows of several inputs follow each other, `batch_rows` of each.
constexpr unsigned long long place(unsigned long long row, unsigned long long batch_rows) {
  return place_of(row / batch_rows, row % batch_rows);
}

// The block of units 4 n to 4 n + 3, and the first of their two words.
constexpr unsigned block_of(unsigned unit) { return unit / group_units * group_blocks + unit % 32 / 4; }
constexpr int first_word_of(unsigned unit) { return unit % group_units < 32 ? 0 : 2; }

}  // namespace gemmlet::dropout
