// Augmentation of small images of bytes: warped, with noise, with a rectangle erased; each image of each epoch in a way of
// its own.
//
// Contract
//   An image is height x width bytes, row by row, each side from 1 to augmentation::max_side. What is outside of it is 0.
//   A transform depends on (seed, epoch, sample) alone, sample and epoch being below 2^40: not on threads, nor on which images
//   a call has. After its parameters (formulas/augmentation.h) all arithmetic is in integers: every instruction set gives the
//   same bytes, and so does the reference, python/gemmlet/formulas/augmentation.py. Settings that are all 0 copy.
//   Only the image is read, only `out` is written; they are one and the same, or overlap nowhere.
#pragma once

#include <cstdint>
#include <utility>

#include "cpu/kernels.h"
#include "cpu/memory.h"
#include "cpu/simd.h"
// After the function that it is written on.
#include "formulas/augmentation.h"

namespace gemmlet {

// The transforms of images of one size. Several threads may use it at once, each with a workspace of its own.
class Augmenter {
 public:
  Augmenter(const augmentation::Settings& settings, Index height, Index width, std::uint64_t seed);

  // What the transform of one image takes meanwhile: at most 15 KiB for 28 x 28 pixels.
  class Workspace {
   public:
    explicit Workspace(const Augmenter& augmenter);

   private:
    friend Augmenter;
    Buffer<std::uint16_t> pairs_;   // the image, each pixel beside the one below it; cleared at the start
    Buffer<std::int32_t> bends_;    // the elastic grid's rows of control points, for each column of pixels
    Buffer<std::int32_t> places_;   // of a strip: where each pixel comes from, in pairs_,
    Buffer<std::int32_t> weights_;  // how far it lies from there to the next pixels,
    Buffer<std::int32_t> fours_;    // and the four pixels around it
    Buffer<std::uint8_t> result_;
  };

  void transform(const std::uint8_t* image, Index sample, Index epoch, Workspace& workspace, std::uint8_t* out) const;

 private:
  struct Words;
  struct Reach;
  template <bool elastic>
  void warp(const std::uint8_t* image, const Words& words, Workspace& workspace) const;
  void pair_rows(const std::uint8_t* image, std::uint16_t* pairs) const;
  void bend(const Words& words, std::int32_t* bends) const;
  template <int log_pitch>
  std::pair<int, int> pair_nonzero_rows(const std::uint8_t* image, std::uint16_t* pairs) const;
  template <bool elastic, int log_pitch>
  void warp_by_lookups(const std::uint8_t* image, const augmentation::AffineMap& map, Workspace& workspace) const;
  template <bool elastic>
  void locate(const augmentation::AffineMap& map, int row, int rows, Workspace& workspace) const;
  void blend(int row, int rows, Workspace& workspace) const;
  void add_noise(Index sample, Index epoch, std::uint8_t* pixels) const;
  void erase(Index sample, Index epoch, std::uint8_t* pixels) const;

  augmentation::Settings settings_;
  std::uint64_t seed_;
  int height_, width_;
  int log_pitch_;     // of pairs_
  int padded_width_;  // whole vectors; where pixels are looked up in registers, pairs of vectors
  int strip_rows_;
  int spacing_;                          // of the elastic grid
  Buffer<std::int32_t> column_weights_;  // of the control points 2 k and 2 k + 1, by k and column
  Buffer<std::int32_t> row_weights_;     // of the control points 0 and 1, and 2 and 3, that a row lies between
};

}  // namespace gemmlet
