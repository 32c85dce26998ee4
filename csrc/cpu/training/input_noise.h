// Noise that is added to the rows of a mini-batch.
//
// Contract
//   Rows are padded to whole vectors. A multiplication and an addition, each rounded: the bits of the reference.
#pragma once

#include <bit>
#include <cstdint>

#include "cpu/random.h"
#include "cpu/training/dropout.h"
#include "cpu/training/plan.h"

namespace gemmlet {
namespace {

// Adds noise to the `units` numbers of the row at `place`.
template <class T>
void add_noise(const InputNoise& noise, T* x, Index units, std::uint64_t place, const Draw& draw) {
  constexpr Index words = lanes<std::uint32_t>;
  const Vec<T> factor = splat(static_cast<T>(input_noise::factor(noise.deviation)));
  const auto add = [&](Index first, Vec<std::uint32_t> bytes) GEMMLET_INLINE_LAMBDA {
    const Vec<std::uint32_t> pairs = (bytes & 0x00ff00ffu) + ((bytes >> 8) & 0x00ff00ffu);
    const auto sums = std::bit_cast<Vec<std::int32_t>>((pairs & 0xffffu) + (pairs >> 16)) - input_noise::mean;
    const Vec<float> integers = __builtin_convertvector(sums, Vec<float>);
    for (Index i = 0; i < words && first + i < units; i += lanes<T>) {
      T* const to = x + first + i;
      if constexpr (sizeof(T) == sizeof(float))
        store(to, load(to) + factor * integers);
      else
        store(to, load(to) + factor * to_double<float>(integers).part[i / lanes<T>]);
    }
  };
  for (Index group = 0; group * input_noise::group_units < units; ++group) {
    const Index first = group * input_noise::group_units;
#pragma GCC unroll 4
    for (Index block = 0; block < input_noise::group_blocks; block += lanes<std::uint64_t>) {
      const WordPairs pairs = random_pairs(group * input_noise::group_blocks + block, place, draw.step,
                                           noise.stream + draw.stream, noise.seed);
      add(first + 2 * block, pairs.low);
      add(first + 2 * (input_noise::group_blocks + block), pairs.high);
    }
  }
}

}  // namespace
}  // namespace gemmlet
