// Augmentation of images and random numbers, as the bindings call them; augmenter.h says what a transform is.
//
// Contract
//   As kernels.h has it: no type here depends on the instruction set.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"

namespace gemmlet {

constexpr Index augment_max_side = 1024;
constexpr int augment_setting_count = 7;
// The most that each setting may be, as `Augment` has it (python/gemmlet/nn/augment.py); the least is 0.
constexpr double augment_largest[augment_setting_count] = {180, 0.5, 1, 1024, 32, 255, 1};

// Many images, by all threads. Image i is sample samples[i], and lies at rows[i] of images, or at i where rows is null; settings
// are those of augmentation::Settings, in its order; out may be images, where rows is null.
void augment(const double (&settings)[augment_setting_count], const std::uint8_t* images, Index count, Index height,
             Index width, std::uint64_t seed, Index epoch, const Index* samples, const Index* rows, std::uint8_t* out);

// `blocks` blocks of four random words each, one after the other, as formulas/random.h has them.
void random_blocks(std::uint64_t seed, unsigned stream, std::uint64_t step, std::uint64_t row, Index first,
                   Index blocks, std::uint32_t* out);

}  // namespace gemmlet
