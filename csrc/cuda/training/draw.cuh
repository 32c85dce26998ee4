// Fused training: dropout, and noise on the inputs of a network. Formulas: formulas/dropout.h, formulas/input_noise.h.
//
// Contract
//   What is drawn is a function of the seed, the step, the row and the unit: each kernel draws what it needs, backward the
//   same as forward, and nothing of it is kept in memory.
//   Rows are those of a matrix of the mini-batch. Where a network reads two inputs, the matrix begins with the second one.
//   Units are multiplied by a factor that is rounded to T, and are 0 where they are dropped, whatever they were; noise is
//   a product and a sum, each rounded. Gradients go back through the same factors.
#pragma once

#include "cuda/training/step.cuh"
// After the type that it is written on.
#include "formulas/dropout.h"
#include "formulas/input_noise.h"
#include "formulas/random.h"

namespace gemmlet {

// How random numbers are counted in one forward pass of a network (formulas/random.h).
struct Draw {
  const Progress* progress;
  Index seed;
  int stream;
  int boundary;  // rows before this one are those of a second input, the others those of the first

  // The number of the step that is being opened, or that has been.
  template <bool opens = false>
  __device__ __forceinline__ Index step() const {
    return progress->first_step + (opens ? progress->next : progress->step);
  }
  // Two words of a block, from word `first` on, which is 0 or 2.
  __device__ __forceinline__ void words(unsigned block, int first, int row, Index step, unsigned (&pair)[2]) const {
    using Word = unsigned long long;
    const bool is_second = row < boundary;
    const auto place = dropout::place_of(is_second, static_cast<unsigned>(is_second ? row : row - boundary));
    Word all[4];
    random_words<Word>(all, block, place, static_cast<Word>(step), static_cast<unsigned>(stream),
                       static_cast<Word>(seed));
    pair[0] = static_cast<unsigned>(first == 0 ? all[0] : all[2]);
    pair[1] = static_cast<unsigned>(first == 0 ? all[1] : all[3]);
  }
};

// The dropout of a layer's inputs.
template <class T>
struct Drops {
  Draw draw;
  int keep;  // a threshold; 0: there is no dropout
  T factor;

  // Whether n units from `unit` on are kept, a bit for each; n is 1, 2 or 4 and divides `unit`.
  template <int n>
  __device__ __forceinline__ unsigned kept(int row, int unit, Index step) const {
    const auto first = static_cast<unsigned>(unit);
    unsigned pair[2], bits = 0;
    draw.words(dropout::block_of(first), dropout::first_word_of(first), row, step, pair);
#pragma unroll
    for (unsigned c = 0; c < n; ++c) {
      const unsigned decision = (n == 4 ? c : first % 4 + c), word = decision < 2 ? pair[0] : pair[1];
      const unsigned half = (n == 1 ? first : c) % 2 == 0 ? word & 0xffffu : word >> 16;
      bits |= static_cast<unsigned>(half < static_cast<unsigned>(keep)) << c;
    }
    return bits;
  }
  // Results, or gradients.
  template <int n>
  __device__ __forceinline__ void apply(unsigned kept, T (&x)[n]) const {
#pragma unroll
    for (int c = 0; c < n; ++c) x[c] = (kept >> c & 1) != 0 ? x[c] * factor : T(0);
  }
};

// Noise on the inputs of a network.
template <class T>
struct Noise {
  Draw draw;
  T factor;  // of integers; 0: there is no noise

  // Adds it to 4 units from `unit` on, which is a multiple of 4.
  __device__ __forceinline__ void add(int row, int unit, Index step, T (&x)[4]) const {
#pragma unroll
    for (unsigned c = 0; c < 4; c += 2) {
      const unsigned first = static_cast<unsigned>(unit) + c;
      unsigned pair[2];
      draw.words(input_noise::block_of(first), input_noise::first_word_of(first), row, step, pair);
#pragma unroll
      for (unsigned i = 0; i < 2; ++i) {
        const unsigned sums = (pair[i] & 0x00ff00ffu) + (pair[i] >> 8 & 0x00ff00ffu);
        x[c + i] += factor * static_cast<T>(static_cast<int>((sums & 0xffffu) + (sums >> 16)) - input_noise::mean);
      }
    }
  }
};

// What becomes of the inputs of a network.
template <class T>
struct Changes {
  Noise<T> noise;
  Drops<T> drops;  // after the noise

  __device__ __forceinline__ bool any() const { return noise.factor != T(0) || drops.keep != 0; }

  // Row `row`, by a block: read(k, x) gives numbers k to k + 3, of which those beyond the row have no meaning.
  template <class Read>
  __device__ __forceinline__ void of_row(int row, Index step, int width, Read read, T* to) const {
    for (int k = 4 * static_cast<int>(threadIdx.x); k < width; k += 4 * static_cast<int>(blockDim.x)) {
      T x[4];
      read(k, x);
      if (noise.factor != T(0)) noise.add(row, k, step, x);
      if (drops.keep != 0) drops.apply(drops.template kept<4>(row, k, step), x);
      store_numbers<4>(to + k, x);
    }
  }
};

}  // namespace gemmlet
