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

// The place of a row of a mini-batch of `batch_rows` samples, where the rows of several inputs follow each other.
constexpr unsigned long long place(unsigned long long row, unsigned long long batch_rows) {
  return (row / batch_rows << 32) + row % batch_rows;
}

}  // namespace gemmlet::dropout
