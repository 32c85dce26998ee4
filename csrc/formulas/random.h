// Random numbers that are a function of what they are for: Philox 4x32-10, a counter-based generator.
//
// Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011.
//
// Contract
//   W holds 64-bit words, of which the low halves count, in and out: a vector of std::uint64_t (cpu/simd.h), or an unsigned
//   long long. Whoever includes this file has declared ScalarOf<W>, and for a vector multiply_low_halves.
//   The key is the seed. The counter is (block, row, step, stream), which no two uses share, so that numbers depend on no
//   order: not on threads, mini-batches or backends. A block has four numbers of 32 bits.
//     block   32 bits: which numbers of a row
//     row     40 bits: the sample, by its index in the data set; or the row of a mini-batch
//     step    40 bits: the epoch; or the step of the training
//     stream  16 bits: what they are for, of the list below
//   As Philox's four words: block, row, step, and stream + 2^16 (row >> 32) + 2^24 (step >> 32).
//   The reference, with the same layout: python/gemmlet/formulas/random.py.
#pragma once

namespace gemmlet {

// What random numbers are for; python/gemmlet/formulas/random.py has the others, which plans are given.
namespace streams {
constexpr unsigned warp = 0, noise = 1, erase = 2;
}

// A vector's is in cpu/simd.h.
GEMMLET_INLINE constexpr unsigned long long multiply_low_halves(unsigned long long a, unsigned b) {
  return (a & 0xffffffffu) * b;
}

// A counter becomes four random words.
template <class W>
GEMMLET_INLINE constexpr void philox(W (&words)[4], unsigned long long key) {
  unsigned key0 = static_cast<unsigned>(key), key1 = static_cast<unsigned>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const W product0 = multiply_low_halves(words[0], 0xD2511F53u),
            product1 = multiply_low_halves(words[2], 0xCD9E8D57u);
    words[0] = (product1 >> 32) ^ words[1] ^ key0;
    words[1] = product1;
    words[2] = (product0 >> 32) ^ words[3] ^ key1;
    words[3] = product0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// The four words of a block; where W is a vector, those of a block in each lane.
template <class W>
GEMMLET_INLINE constexpr void random_words(W (&words)[4], W block, unsigned long long row, unsigned long long step,
                                           unsigned stream, unsigned long long seed) {
  using T = ScalarOf<W>;
  words[0] = block;
  words[1] = W{} + static_cast<T>(row & 0xffffffffu);
  words[2] = W{} + static_cast<T>(step & 0xffffffffu);
  words[3] = W{} + static_cast<T>(stream + (row >> 32 << 16) + (step >> 32 << 24));
  philox(words, seed);
}

}  // namespace gemmlet
