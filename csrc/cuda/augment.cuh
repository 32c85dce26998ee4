// Augmentation of images: a block transforms one. formulas/augmentation.h has what a transform is made of.
//
// Contract
//   augment: out[i] is images[rows[i]], or images[i], as sample samples[i] is in an epoch: warped, with noise, with a
//   rectangle of 0, as far as the settings say so; the bytes of csrc/cpu/augment.cpp. Images are bytes (height, width), of any
//   alignment; faster where they and their rows begin at multiples of 4, and images of 16 bytes. Grid: a block an image.
//   elastic: whether settings[4] is not 0.
//   staged: in shared memory, SharedParts says how much; then `out` may be `images`. Otherwise the two do not
//   overlap, and `out` is written to several times.
//   Coordinates are in 2^-16 of a pixel, weights in 2^-6, those of splines in 2^-weight_bits: nothing is rounded but as the
//   CPU does, and no integer overflows.
//
// For MNIST's digits it is bound by integer instructions: some 45 a pixel, of which a dozen are the displacement, and one
// in ten reads shared memory. Noise has 25 more.
#pragma once

#include "cuda/pack.cuh"
#include "cuda/scalar.cuh"
#include "formulas/random.h"

// After the square root that it is written on.
#include "formulas/augmentation.h"

namespace gemmlet {

// Of a block, by whether the image is staged: a digit of MNIST has 112 items, as warp_pixels divides it. And blocks that share
// a multiprocessor's registers: while one waits for what it draws, others compute.
inline constexpr int staged_threads = 128, unstaged_threads = 512;
inline constexpr int staged_blocks = 9, unstaged_blocks = 2;

struct Augmentation {
  // Twice the largest distance of control points.
  static constexpr int weight_pairs = 512;

  const unsigned char* images;
  const Index* rows;  // null: all, in order
  const Index* samples;
  unsigned char* out;
  Index seed, epoch;
  double settings[7];
  bool warps, adds_noise, erases;  // what settings ask for
  int height, width, spacing;
  // What the four control points around a pixel weigh, by its place between them: two in each number.
  int weights[weight_pairs];
};

namespace augmenting {

using namespace augmentation;

using Four = Pack<int, 4>;
using Quads = Pack<unsigned, 4>;

// Zeros around what is staged, in pixels: to the left of each row, which is also to the right of the one before; above it;
// and below. Places further out are as good.
inline constexpr int left_margin = 4, margin = 2;

// A numerator below 2^20 divided by a positive number: the error of the quotient is less than half of 1 / n.
__device__ __forceinline__ int divided(int numerator, int n) {
  return static_cast<int>((static_cast<float>(numerator) + 0.5f) * ptx::reciprocal(static_cast<float>(n)));
}

__device__ __forceinline__ int clamped(int value, int low, int high) { return min(max(value, low), high); }

// What a block draws, before it transforms the image.
struct Drawn {
  AffineMap map;
  int noise;  // what noise is multiplied by
  Rectangle erased;
  // Of row i of the grid, 7 further for the other axis: the control points from each of the first four on.
  Four points[2 * control_points][4];
};

__device__ __forceinline__ void draw(unsigned (&words)[4], int block, const Augmentation& p, Index sample,
                                     unsigned stream) {
  using W = unsigned long long;
  W wide[4];
  random_words<W>(wide, static_cast<W>(block), static_cast<W>(sample), static_cast<W>(p.epoch), stream,
                  static_cast<W>(p.seed));
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = static_cast<unsigned>(wide[i]);
}

// By a warp: lane i has block i of the words. Blocks 0 and 1 are the map's, 2 and those that follow have a row of control
// points each, two points in a word.
template <bool elastic>
__device__ __forceinline__ void draw_warp(Drawn& to, const Augmentation& p, const Settings& by, Index sample,
                                          int lane) {
  unsigned words[4];
  draw(words, lane, p, sample, streams::warp);
  const unsigned fifth = __shfl_sync(~0u, words[0], 1), sixth = __shfl_sync(~0u, words[1], 1);
  if (lane == 0) {
    const unsigned of_map[] = {words[0], words[1], words[2], words[3], fifth, sixth};
    to.map = affine_map(by, p.height, p.width, of_map);
  }
  if constexpr (elastic)
    if (const int row = lane - 2; 0 <= row && row < 2 * control_points) {
      const int scale = displacement_scale(by);
      int points[8];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        points[2 * i] = (static_cast<int>(words[i] << 16) >> 16) * scale >> 15;
        points[2 * i + 1] = (static_cast<int>(words[i]) >> 16) * scale >> 15;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) to.points[row][i] = {{points[i], points[i + 1], points[i + 2], points[i + 3]}};
    }
}

// By a warp, of which two lanes have words.
__device__ __forceinline__ void draw_erased(Drawn& to, const Augmentation& p, const Settings& by, Index sample,
                                            int lane) {
  unsigned words[4];
  draw(words, lane, p, sample, streams::erase);
  const unsigned fifth = __shfl_sync(~0u, words[0], 1);
  if (lane == 0) {
    const unsigned of_rectangle[] = {words[0], words[1], words[2], words[3], fifth};
    to.erased = augmentation::erased(by, p.height, p.width, of_rectangle);
  }
}

// An image in memory; beyond it pixels are 0.
struct Image {
  const unsigned char* pixels;
  int height, width;
  bool of_words;  // whether each four pixels from a multiple of 4 on are a word

  __device__ __forceinline__ Image(const unsigned char* pixels, int height, int width)
      : pixels(pixels),
        height(height),
        width(width),
        of_words(width % 4 == 0 && reinterpret_cast<unsigned long long>(pixels) % 4 == 0) {}

  __device__ __forceinline__ bool has_row(int y) const { return 0 <= y && y < height; }
  __device__ __forceinline__ bool has_column(int x) const { return 0 <= x && x < width; }

  __device__ __forceinline__ unsigned pixel(int y, int x) const {
    return has_row(y) && has_column(x) ? pixels[y * width + x] : 0;
  }

  // Pixels x to x + 3, x being a multiple of 4, from the lowest byte up.
  __device__ __forceinline__ unsigned four(int y, int x) const {
    if (of_words) return has_row(y) && has_column(x) ? *reinterpret_cast<const unsigned*>(pixels + y * width + x) : 0;
    unsigned four = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) four |= pixel(y, x + i) << 8 * i;
    return four;
  }

  // A pixel, the one below it, the one to the right, and the one below that, from the lowest byte up.
  __device__ __forceinline__ unsigned quad(int y, int x) const {
    return pixel(y, x) | pixel(y + 1, x) << 8 | pixel(y, x + 1) << 16 | pixel(y + 1, x + 1) << 24;
  }

  // Quads of four pixels of a row, x being a multiple of 4.
  __device__ __forceinline__ Quads quads(int y, int x) const {
    const unsigned above = four(y, x), below = four(y + 1, x), right = pixel(y, x + 4) | pixel(y + 1, x + 4) << 8;
    return {{ptx::permuted(above, below, 0x5140), ptx::permuted(above, below, 0x6251),
             ptx::permuted(above, below, 0x7362), ptx::permuted(ptx::permuted(above, below, 0x73), right, 0x5410)}};
  }
};

// Dynamic shared memory: quads of the image and its margins, four at a time; weights of control points; the result.
struct SharedParts {
  int quads_of_row, quads, weights;

  __device__ __forceinline__ SharedParts(const Augmentation& p, bool staged)
      : quads_of_row((p.width + 3) / 4 + left_margin / 4),
        // One more is to the right of the last row.
        quads(staged ? (p.height + margin + 1) * quads_of_row + 1 : 0),
        weights(p.spacing) {}
};

// Weights as warp_pixels wants them.
__device__ __forceinline__ void stage_weights(Four* to, const Augmentation& p, int thread, int threads) {
  for (int i = thread; i < p.spacing; i += threads) {
    const int first = p.weights[2 * i], second = p.weights[2 * i + 1];
    to[i] = {{first & 0xffff, first >> 16, second & 0xffff, second >> 16}};
  }
}

__device__ __forceinline__ void stage_image(Quads* to, const Image& image, const SharedParts& parts, int thread,
                                            int threads) {
  for (int i = thread; i < parts.quads; i += threads) {
    const int row = divided(i, parts.quads_of_row);
    to[i] = image.quads(row - margin, 4 * (i - row * parts.quads_of_row) - left_margin);
  }
}

__device__ __forceinline__ int weighted(const Four& numbers, const Four& weights, int rounding) {
  return numbers.value[0] * weights.value[0] + numbers.value[1] * weights.value[1] +
         numbers.value[2] * weights.value[2] + numbers.value[3] * weights.value[3] + rounding;
}

// How far a row of control points displaces a column of pixels.
__device__ __forceinline__ int bent(const Four& points, const Four& weights) {
  return weighted(points, weights, 1 << (weight_bits - 1)) >> weight_bits;
}

// Items are the pixels of a column that are between the same control points: what these displace is computed once for each.
template <bool elastic, bool staged>
__device__ __forceinline__ void warp_pixels(unsigned char* result, const Augmentation& p, const Drawn& drawn,
                                            const Image& image, const unsigned* quads, int pitch, const Four* weights) {
  const int height = p.height, width = p.width, spacing = p.spacing;
  const AffineMap map = drawn.map;
  const int items = (divided(height - 1, spacing) + 1) * width;
  for (int item = static_cast<int>(threadIdx.x); item < items; item += static_cast<int>(blockDim.x)) {
    const int cell = divided(item, width), x = item - cell * width;
    const int top = cell * spacing, rows = min(spacing, height - top);
    Four bends_x, bends_y;
    if constexpr (elastic) {
      const int point = divided(x, spacing);
      const Four of_column = weights[x - point * spacing];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        bends_x.value[i] = bent(drawn.points[cell + i][point], of_column);
        bends_y.value[i] = bent(drawn.points[control_points + cell + i][point], of_column);
      }
    }
    int map_x = map.x_x * x + map.x_y * top + map.x_0, map_y = map.y_x * x + map.y_y * top + map.y_0;
    unsigned char* to = result + top * width + x;
    for (int i = 0; i < rows; ++i, to += width) {
      int at_x = map_x, at_y = map_y;
      map_x += map.x_y;
      map_y += map.y_y;
      if constexpr (elastic) {
        constexpr int surplus = 8 + weight_bits - 16;  // of the fraction's bits
        const Four of_row = weights[i];
        at_x += weighted(bends_x, of_row, 1 << (surplus - 1)) >> surplus;
        at_y += weighted(bends_y, of_row, 1 << (surplus - 1)) >> surplus;
      }
      const int column = clamped(at_x >> 16, -margin, width), row = clamped(at_y >> 16, -margin, height);
      const unsigned quad = staged ? quads[(row + margin) * pitch + column + left_margin] : image.quad(row, column);
      const unsigned right = at_x >> 10 & 63, down = at_y >> 10 & 63;
      // Of the pixels on the left and on the right, one in each half: between the upper and the lower one.
      const unsigned sides = (quad & 0xff00ff) * (64 - down) + (quad >> 8 & 0xff00ff) * down;
      *to = static_cast<unsigned char>(((sides & 0xffff) * (64 - right) + (sides >> 16) * right + 2048) >> 12);
    }
  }
}

// The words 0 and 1 of all blocks are for the pixels of the first half, those 2 and 3 for the second.
__device__ __forceinline__ void add_noise(unsigned char* result, const Augmentation& p, const Drawn& drawn,
                                          Index sample) {
  constexpr int bits = 13, mean = 2 * 255;
  const int pixels = p.height * p.width, blocks = (pixels + 31) / 32 * 8, scale = drawn.noise;
  for (int block = static_cast<int>(threadIdx.x); block < blocks; block += static_cast<int>(blockDim.x)) {
    unsigned words[4];
    draw(words, block, p, sample, streams::noise);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = 2 * (block + i / 2 * blocks) + i % 2;
      if (at >= pixels) continue;
      const unsigned pairs = (words[i] & 0xff00ff) + (words[i] >> 8 & 0xff00ff);
      const int sum = static_cast<int>((pairs & 0xffff) + (pairs >> 16));
      const int noise = (sum * scale + ((1 << (bits - 1)) - mean * scale)) >> bits;
      result[at] = static_cast<unsigned char>(clamped(result[at] + noise, 0, 255));
    }
  }
}

__device__ __forceinline__ void erase(unsigned char* result, const Augmentation& p, const Drawn& drawn) {
  const Rectangle rectangle = drawn.erased;
  const int pixels = rectangle.height * rectangle.width;
  for (int i = static_cast<int>(threadIdx.x); i < pixels; i += static_cast<int>(blockDim.x)) {
    const int row = divided(i, rectangle.width);
    result[(rectangle.top + row) * p.width + rectangle.left + i - row * rectangle.width] = 0;
  }
}

__device__ __forceinline__ void copy_bytes(unsigned char* to, const unsigned char* from, int count) {
  using Bytes = Pack<unsigned char, 16>;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int packs = is_aligned(to) && is_aligned(from) ? count / 16 : 0;
  for (int i = thread; i < packs; i += threads) store_pack(to + 16 * i, load_pack<16>(from + 16 * i));
  for (int i = 16 * packs + thread; i < count; i += threads) to[i] = from[i];
}

}  // namespace augmenting

template <bool elastic, bool staged>
__global__ void __launch_bounds__(staged ? staged_threads : unstaged_threads, staged ? staged_blocks : unstaged_blocks)
    augment(const __grid_constant__ Augmentation p) {
  using namespace augmenting;
  __shared__ Drawn drawn;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int lane = thread % 32, warp = thread / 32, pixels = p.height * p.width;
  const Index index = blockIdx.x, sample = p.samples[index];
  const Image image(p.images + (p.rows == nullptr ? index : p.rows[index]) * pixels, p.height, p.width);
  unsigned char* const out = p.out + index * pixels;
  const SharedParts parts(p, staged);
  Quads* const quads = dynamic_shared<Quads>();
  Four* const weights = reinterpret_cast<Four*>(quads + parts.quads);
  unsigned char* const result = staged ? reinterpret_cast<unsigned char*>(weights + parts.weights) : out;

  const Settings by{p.settings[0], p.settings[1], p.settings[2], p.settings[3],
                    p.settings[4], p.settings[5], p.settings[6]};
  // The first warp draws, which is a long chain of operations, while the others wait for the image.
  if (warp == 0) {
    if (p.warps) draw_warp<elastic>(drawn, p, by, sample, lane);
    if (p.adds_noise && lane == 0) drawn.noise = noise_scale(by);
  } else {
    if constexpr (elastic) stage_weights(weights, p, thread - 32, threads - 32);
    if (staged && p.warps) stage_image(quads, image, parts, thread - 32, threads - 32);
    if (warp == 1 && p.erases) draw_erased(drawn, p, by, sample, lane);
  }
  if (!p.warps) copy_bytes(result, image.pixels, pixels);
  __syncthreads();

  if (p.warps) {
    const unsigned* const of_pixels = reinterpret_cast<const unsigned*>(quads);
    warp_pixels<elastic, staged>(result, p, drawn, image, of_pixels, 4 * parts.quads_of_row, weights);
    __syncthreads();
  }
  if (p.adds_noise) {
    add_noise(result, p, drawn, sample);
    __syncthreads();
  }
  if (p.erases) {
    erase(result, p, drawn);
    __syncthreads();
  }
  if constexpr (staged) copy_bytes(out, result, pixels);
}

}  // namespace gemmlet
