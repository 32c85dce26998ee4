// Augmentation of images: see augmenter.h. Bound by the loads of the pixels that a pixel comes from.
//
// The image lies in pairs of pixels, each beside the one below it, so that one load of 32 bits brings all four neighbours;
// AVX2's gather is no faster than single loads. A strip of rows passes through three loops: locate (where each pixel comes
// from), gather, blend. In one loop each vector would be read just after it was written lane by lane, and wait until the
// stores have reached the cache.
//
// AVX-512 looks up 32 pixels at once in two registers of pairs: warp_by_lookups, for images up to 60 pixels wide, whose rows
// are short enough that a row of the result comes from few registers.
#include "cpu/augment.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "cpu/augmenter.h"
#include "cpu/random.h"
#include "cpu/simd.h"
#include "cpu/threads.h"
#include "cpu/tuning.h"

namespace gemmlet {

using namespace augmentation;

namespace {

using Ints = Vec<std::int32_t>;
constexpr int width_of_vector = lanes<std::int32_t>;

// Of the coordinates, in 2^16 of a pixel, and of the weights that pixels are blended with.
constexpr int place_bits = 16, blend_bits = 6;
// Zeros around the image in Workspace::pairs_: on the left and above; and on the right. Places further out are as good.
constexpr int margin = 2, right_margin = 2;
constexpr int strip_pixels = 1024;

constexpr std::uint8_t zeros[max_side] = {};

// The pairs that are looked up in at once, two registers of them; a row of pairs has half of that, or all of it.
constexpr int log_table = 6, table_pairs = 1 << log_table;
constexpr bool uses_lookups(int log_pitch) { return lookups_are_cheap && log_pitch <= log_table; }
constexpr int round_up(int n, int size) { return (n + size - 1) / size * size; }
// Pixels of the result that are looked up at once, a block.
constexpr int block_pixels = table_pairs / 2;

GEMMLET_INLINE Ints pair_of(Ints low, Ints high) { return (low & 0xffff) | (high << 16); }
// A pair of weights, for multiply_pairs.
GEMMLET_INLINE Ints pair_of(int low, int high) { return splat<std::int32_t>((low & 0xffff) | (high << 16)); }

template <class V>
GEMMLET_INLINE V clamped(V v, int low, int high) {
  const V lowest = splat(static_cast<ScalarOf<V>>(low)), highest = splat(static_cast<ScalarOf<V>>(high));
  v = v < lowest ? lowest : v;
  return v > highest ? highest : v;
}

// How far pixels are displaced along an axis, in 2^-place_bits: by the first two rows of control points around them, and the
// other two.
GEMMLET_INLINE Ints displacement(const std::int32_t* bends01, const std::int32_t* bends23, Ints weight01,
                                 Ints weight23) {
  constexpr int surplus = 8 + weight_bits - place_bits;  // of the fraction's bits
  const Ints sum = multiply_pairs(load(bends01), weight01) + multiply_pairs(load(bends23), weight23);
  return (sum + (1 << (surplus - 1))) >> surplus;
}

}  // namespace

// The random words of the warp: those of block b are low[2 b], low[2 b + 1], high[2 b], high[2 b + 1]. Blocks 0 and 1 are the
// affine map's, block 2 + control_points * axis + i has the control points of row i of the elastic grid, two in each word.
struct Augmenter::Words {
  static constexpr Index affine_blocks = random_block_step, all_blocks = 2 + 2 * control_points;
  static_assert(all_blocks % random_block_step == 0);
  alignas(64) std::uint32_t low[2 * all_blocks], high[2 * all_blocks];
};

Augmenter::Augmenter(const Settings& settings, Index height, Index width, std::uint64_t seed)
    : settings_(settings),
      seed_(seed),
      height_(static_cast<int>(height)),
      width_(static_cast<int>(width)),
      log_pitch_(
          std::max<int>(log_table - 1, std::bit_width(static_cast<unsigned>(margin + width_ + right_margin - 1)))),
      padded_width_(round_up(width_, uses_lookups(log_pitch_) ? block_pixels : width_of_vector)),
      strip_rows_(std::clamp(strip_pixels / padded_width_, 1, height_)),
      spacing_(grid_spacing(height_, width_)) {
  if (settings.elastic == 0) return;
  constexpr int pairs = (control_points + 1) / 2;
  column_weights_ = space<std::int32_t>(pairs * padded_width_);
  std::fill_n(column_weights_.get(), pairs * padded_width_, 0);
  for (int x = 0; x < width_; ++x)
    for (int i = 0; i < 4; ++i) {
      const int point = x / spacing_ + i;
      column_weights_[point / 2 * padded_width_ + x] |= spline_weight(i, x, spacing_) << (point % 2 * 16);
    }
  row_weights_ = space<std::int32_t>(2 * height);
  for (int y = 0; y < height_; ++y)
    for (int half = 0; half < 2; ++half)
      row_weights_[2 * y + half] = spline_weight(2 * half, y, spacing_) | spline_weight(2 * half + 1, y, spacing_)
                                                                              << 16;
}

Augmenter::Workspace::Workspace(const Augmenter& of)
    : result_(space<std::uint8_t>(Index{of.height_} * of.width_ + 4 * random_block_step)) {
  if (!of.settings_.warps()) return;
  const Index pairs = round_up((margin + of.height_ + 1) << of.log_pitch_, table_pairs);
  pairs_ = space<std::uint16_t>(pairs);
  std::fill_n(pairs_.get(), pairs, 0);
  if (of.settings_.elastic != 0) bends_ = space<std::int32_t>(2 * (control_points - 1) * of.padded_width_);
  if (!uses_lookups(of.log_pitch_))
    for (auto* buffer : {&places_, &weights_, &fours_})
      *buffer = space<std::int32_t>(of.strip_rows_ * of.padded_width_);
}

void Augmenter::transform(const std::uint8_t* image, Index sample, Index epoch, Workspace& workspace,
                          std::uint8_t* out) const {
  std::uint8_t* pixels = workspace.result_.get();
  const std::size_t bytes = static_cast<std::size_t>(height_) * static_cast<std::size_t>(width_);
  if (settings_.warps()) {
    Words words;
    const bool elastic = settings_.elastic != 0;
    fill_random(elastic ? Words::all_blocks : Words::affine_blocks, static_cast<std::uint64_t>(sample),
                static_cast<std::uint64_t>(epoch), streams::warp, seed_, words.low, words.high);
    elastic ? warp<true>(image, words, workspace) : warp<false>(image, words, workspace);
  } else {
    std::memcpy(pixels, image, bytes);
  }
  if (settings_.noise != 0) add_noise(sample, epoch, pixels);
  if (settings_.erase != 0) erase(sample, epoch, pixels);
  std::memcpy(out, pixels, bytes);
}

template <bool elastic>
void Augmenter::warp(const std::uint8_t* image, const Words& words, Workspace& workspace) const {
  if constexpr (elastic) bend(words, workspace.bends_.get());
  const unsigned of_map[] = {words.low[0], words.low[1], words.high[0], words.high[1], words.low[2], words.low[3]};
  const AffineMap map = affine_map(settings_, height_, width_, of_map);
  if constexpr (lookups_are_cheap) {
    if (log_pitch_ == log_table - 1) return warp_by_lookups<elastic, log_table - 1>(image, map, workspace);
    if (log_pitch_ == log_table) return warp_by_lookups<elastic, log_table>(image, map, workspace);
  }
  pair_rows(image, workspace.pairs_.get());
  for (int row = 0; row < height_; row += strip_rows_) {
    const int rows = std::min(strip_rows_, height_ - row);
    locate<elastic>(map, row, rows, workspace);
    const std::uint16_t* pairs = workspace.pairs_.get();
    const std::int32_t* places = workspace.places_.get();
    std::int32_t* fours = workspace.fours_.get();
    // Two at a time: stores are what there is least room for.
    for (int i = 0, n = rows * padded_width_; i < n; i += 2) {
      std::uint64_t both;
      std::memcpy(&both, places + i, sizeof both);
      std::uint32_t first, second;
      std::memcpy(&first, pairs + (both & 0xffffffff), sizeof first);
      std::memcpy(&second, pairs + (both >> 32), sizeof second);
      both = first | std::uint64_t{second} << 32;
      std::memcpy(fours + i, &both, sizeof both);
    }
    blend(row, rows, workspace);
  }
}

// A row of pairs has a row of the image and the one below it; the first one, nothing and the first row.
void Augmenter::pair_rows(const std::uint8_t* image, std::uint16_t* pairs) const {
  constexpr int step = 16;
  typedef std::uint8_t Bytes __attribute__((vector_size(step)));
  const int height = height_, width = width_, last = width - step;
  for (int y = -1; y < height; ++y) {
    const std::uint8_t* above = y < 0 ? zeros : image + y * width;
    const std::uint8_t* below = y + 1 < height ? image + (y + 1) * width : zeros;
    std::uint16_t* to = pairs + ((y + margin) << log_pitch_) + margin;
    if (width < step)
      for (int x = 0; x < width; ++x) to[x] = static_cast<std::uint16_t>(above[x] | below[x] << 8);
    else
      for (int x = 0; x < width; x += step) {
        const int at = std::min(x, last);  // the last ones overlap those before
        Bytes a, b;
        std::memcpy(&a, above + at, sizeof a);
        std::memcpy(&b, below + at, sizeof b);
        const Bytes low = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        const Bytes high = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        std::memcpy(to + at, &low, sizeof low);
        std::memcpy(to + at + step / 2, &high, sizeof high);
      }
  }
}

// For each axis, each two rows of control points and each column of pixels: how far the two rows displace it, as a pair.
void Augmenter::bend(const Words& words, std::int32_t* bends) const {
  const int scale = displacement_scale(settings_);
  alignas(64) std::int32_t low[2 * Words::all_blocks], high[2 * Words::all_blocks];
  const auto scaled = [&](const std::uint32_t* from, std::int32_t* to) {
    for (int i = 0; i < 2 * Words::all_blocks; i += width_of_vector) {
      const Ints points = std::bit_cast<Ints>(load(from + i));
      const Ints first = multiply_pairs(points, pair_of(scale, 0)) >> 15;
      const Ints second = multiply_pairs(points, pair_of(0, scale)) >> 15;
      store(to + i, pair_of(first, second));
    }
  };
  scaled(words.low, low);
  scaled(words.high, high);
  for (int axis = 0; axis < 2; ++axis)
    for (int x = 0; x < padded_width_; x += width_of_vector) {
      const std::int32_t* weights = column_weights_.get() + x;
      const Ints weight01 = load(weights), weight23 = load(weights + padded_width_);
      const Ints weight45 = load(weights + 2 * padded_width_), weight6 = load(weights + 3 * padded_width_);
      Ints before{};
      for (int i = 0; i < control_points; ++i) {
        const int at = 2 * (2 + control_points * axis + i);
        const Ints sum = (multiply_pairs(weight01, splat(low[at])) + multiply_pairs(weight23, splat(low[at + 1]))) +
                         (multiply_pairs(weight45, splat(high[at])) + multiply_pairs(weight6, splat(high[at + 1])));
        const Ints displaced = (sum + (1 << (weight_bits - 1))) >> weight_bits;
        if (i > 0) store(bends + ((control_points - 1) * axis + i - 1) * padded_width_ + x, pair_of(before, displaced));
        before = displaced;
      }
    }
}

template <bool elastic>
void Augmenter::locate(const AffineMap& map, int row, int rows, Workspace& workspace) const {
  std::int32_t *places = workspace.places_.get(), *weights = workspace.weights_.get();
  const int height = height_, width = width_, padded_width = padded_width_, log_pitch = log_pitch_;
  Ints lane;
  for (int i = 0; i < width_of_vector; ++i) lane[i] = i;
  const Ints lane_x = lane * map.x_x, lane_y = lane * map.y_x;
  const Ints step_x = splat(width_of_vector * map.x_x), step_y = splat(width_of_vector * map.y_x);
  const int origin = (margin << log_pitch) + margin;
  for (int y = row; y < row + rows; ++y) {
    Ints from_x = lane_x + (map.x_y * y + map.x_0), from_y = lane_y + (map.y_y * y + map.y_0);
    const std::int32_t* bends = elastic ? workspace.bends_.get() + y / spacing_ * padded_width : nullptr;
    const Ints weight01 = elastic ? splat(row_weights_[2 * y]) : Ints{};
    const Ints weight23 = elastic ? splat(row_weights_[2 * y + 1]) : Ints{};
    for (int x = 0; x < padded_width; x += width_of_vector) {
      Ints at_x = from_x, at_y = from_y;
      from_x += step_x;
      from_y += step_y;
      if constexpr (elastic) {
        const std::int32_t* of_x = bends + x;
        at_x += displacement(of_x, of_x + 2 * padded_width, weight01, weight23);
        const std::int32_t* of_y = of_x + (control_points - 1) * padded_width;
        at_y += displacement(of_y, of_y + 2 * padded_width, weight01, weight23);
      }
      const Ints column = clamped(at_x >> place_bits, -margin, width);
      const Ints line = clamped(at_y >> place_bits, -margin, height);
      store(places, (line << log_pitch) + column + origin);
      constexpr int mask = (1 << blend_bits) - 1, surplus = place_bits - blend_bits;
      store(weights, ((at_x >> surplus) & mask) | ((at_y << (16 - surplus)) & mask << 16));
      places += width_of_vector;
      weights += width_of_vector;
    }
  }
}

void Augmenter::blend(int row, int rows, Workspace& workspace) const {
  using Shorts = Vec<std::uint16_t>;
  const std::int32_t *weights = workspace.weights_.get(), *fours = workspace.fours_.get();
  std::uint8_t* pixels = workspace.result_.get() + row * width_;
  constexpr int one = 1 << blend_bits;
  const int width = width_, padded_width = padded_width_;
  for (int y = 0; y < rows; ++y, pixels += width)
    for (int x = 0; x < padded_width; x += width_of_vector) {
      const Ints both = load(weights), right = both & (one - 1), down = both >> 16;
      const Shorts four = std::bit_cast<Shorts>(load(fours)), below = std::bit_cast<Shorts>(down << 16 | down);
      // Of the pixels on the left and on the right: between the upper and the lower one.
      const Shorts sides = (four & 0xff) * (one - below) + (four >> 8) * below;
      const Ints sum = multiply_pairs(std::bit_cast<Ints>(sides), right << 16 | (one - right));
      // What exceeds a row is overwritten by the next one.
      store_bytes(pixels + x, (sum + (one * one / 2)) >> (2 * blend_bits));
      weights += width_of_vector;
      fours += width_of_vector;
    }
}

#if defined(__AVX512BW__)
using Shorts = Vec<std::int16_t>;

// What pair_rows does; and which row of pairs is the last above the image's first one that is not all 0, and which the first
// below its last, 0 where there is none.
template <int log_pitch>
std::pair<int, int> Augmenter::pair_nonzero_rows(const std::uint8_t* image, std::uint16_t* pairs) const {
  const int height = height_, width = width_;
  int above_first = height, below_last = 0;
  for (int x = 0; x < width; x += block_pixels) {
    const int columns = std::min(block_pixels, width - x);
    std::uint16_t* to = pairs + (1 << log_pitch) + margin + x;
    Shorts above{};
    for (int y = 0; y < height; ++y, to += 1 << log_pitch) {
      const Shorts below = load_bytes_as_shorts(image + y * width + x, columns);
      store(to, std::bit_cast<Vec<std::uint16_t>>(above | below << 8));
      if (has_nonzero(below)) {
        above_first = std::min(above_first, y);
        below_last = std::max(below_last, y + margin + 1);
      }
      above = below;
    }
    store(to, std::bit_cast<Vec<std::uint16_t>>(above));
  }
  return {above_first, below_last};
}

// The groups of an elastic grid: a row of control points and the three below it. How far the displacements of each reach up and
// down, in 2^-place_bits of a pixel. The weights of a spline's points sum to 2^weight_bits but for four roundings of a half.
// That makes at most 58/256 of a pixel for the largest displacements; `slack` is more.
struct Augmenter::Reach {
  static constexpr int groups = control_points - 3, slack = 64;
  static_assert(augment_largest[4] <= 32);
  int up[groups], down[groups];

  Reach() : up{}, down{} {}
  Reach(const std::int32_t* bends, int padded_width) {
    for (int group = 0; group < groups; ++group) {
      Shorts low{}, high{};
      const std::int32_t* pair = bends + (control_points - 1 + group) * padded_width;
      for (int x = 0; x < padded_width; x += width_of_vector)
        for (int k = 0; k < 2; ++k) {
          const Shorts both = std::bit_cast<Shorts>(load(pair + 2 * k * padded_width + x));
          low = both < low ? both : low;
          high = both > high ? both : high;
        }
      up[group] = (reduce_min(low) - slack) * (1 << (place_bits - 8));
      down[group] = (slack - reduce_min(-high)) * (1 << (place_bits - 8));
    }
  }
};

// Rows and columns are those of pairs_: the image's, plus the margin. Where the image is all 0, nothing is looked up: for rows
// of the result that come from there, and in tables above its first row and below its last.
template <bool elastic, int log_pitch>
void Augmenter::warp_by_lookups(const std::uint8_t* image, const AffineMap& map, Workspace& workspace) const {
  constexpr int log_rows = log_table - log_pitch;  // of a table
  const auto all = [](int value) GEMMLET_INLINE_LAMBDA { return splat(static_cast<std::int16_t>(value)); };
  const int height = height_, width = width_, padded_width = padded_width_;
  std::uint16_t* const pairs = workspace.pairs_.get();
  std::uint8_t* pixels = workspace.result_.get();
  const auto [above_first, below_last] = pair_nonzero_rows<log_pitch>(image, pairs);
  if (below_last == 0) {
    std::memset(pixels, 0, static_cast<std::size_t>(height) * static_cast<std::size_t>(width));
    return;
  }
  const Reach reach = elastic ? Reach(workspace.bends_.get(), padded_width) : Reach();

  Ints lane;
  for (int i = 0; i < width_of_vector; ++i) lane[i] = i;
  const int origin_x = map.x_0 + (margin << place_bits), origin_y = map.y_0 + (margin << place_bits);
  Ints row_x = lane * map.x_x + origin_x, row_y = lane * map.y_x + origin_y;
  const Ints half_x = splat(width_of_vector * map.x_x), half_y = splat(width_of_vector * map.y_x);
  // How much further down the source of a block's last pixel lies than that of its first.
  const int slope = (std::min(block_pixels, width) - 1) * map.y_x;
  for (int y = 0, group = 0, next = spacing_; y < height; ++y, pixels += width) {
    if (elastic && y == next) ++group, next += spacing_;
    const std::int32_t* bends = elastic ? workspace.bends_.get() + group * padded_width : nullptr;
    const Ints weight01 = elastic ? splat(row_weights_[2 * y]) : Ints{};
    const Ints weight23 = elastic ? splat(row_weights_[2 * y + 1]) : Ints{};
    const int highest = origin_y + map.y_y * y + std::min(slope, 0) + reach.up[group];
    const int lowest = origin_y + map.y_y * y + std::max(slope, 0) + reach.down[group];
    for (int x = 0; x < (log_pitch < log_table ? 1 : width); x += block_pixels) {
      int first = (highest + map.y_x * x) >> place_bits, last = (lowest + map.y_x * x) >> place_bits;
      if (last <= above_first || first >= below_last) {
        store_bytes(pixels + x, Shorts{});
        continue;
      }
      Ints x0 = row_x, y0 = row_y;
      if constexpr (log_pitch == log_table) x0 += x * map.x_x, y0 += x * map.y_x;
      Ints x1 = x0 + half_x, y1 = y0 + half_y;
      if constexpr (elastic) {
        const auto displaced = [&](Ints& at, const std::int32_t* of) GEMMLET_INLINE_LAMBDA {
          at += displacement(of, of + 2 * padded_width, weight01, weight23);
        };
        const std::int32_t* of_x = bends + x;
        displaced(x0, of_x), displaced(x1, of_x + width_of_vector);
        const std::int32_t* of_y = of_x + (control_points - 1) * padded_width;
        displaced(y0, of_y), displaced(y1, of_y + width_of_vector);
      }
      const Shorts column = clamped(halves<1>(x0, x1), 0, margin + width);
      const Shorts row = clamped(halves<1>(y0, y1), above_first, below_last);
      Shorts left = (row << log_pitch) + column, right = left + 1;

      // The main loop: each table in turn, for the pixels that come from there.
      first = std::max(first, above_first) >> log_rows;
      last = std::min(last, below_last) >> log_rows;
      const Shorts table = row >> log_rows;
      const std::uint16_t* entries = pairs + (Index{first} << log_table);
      Shorts wanted = all(first);
      for (int i = first; i <= last; ++i, entries += table_pairs, wanted += 1) {
        left = look_up_where(table, wanted, entries, left);
        right = look_up_where(table, wanted, entries, right);
      }

      // As blend does; floor((floor(n / 64) + 32) / 64) = floor((n + 2048) / 4096), so 64 is divided out first and all fits
      // 16 bits.
      constexpr int one = 1 << blend_bits, surplus = 16 - blend_bits;
      const auto fraction = [](Shorts v) GEMMLET_INLINE_LAMBDA { return std::bit_cast<Vec<std::uint16_t>>(v); };
      const Shorts below = std::bit_cast<Shorts>(fraction(halves<0>(y0, y1)) >> surplus);
      const Shorts weights = below * 255 + one;  // below << 8 | (one - below)
      const Shorts of_left = multiply_byte_pairs(left, weights), of_right = multiply_byte_pairs(right, weights);
      const Shorts difference = of_right - of_left;
      const Shorts across = std::bit_cast<Shorts>(fraction(halves<0>(x0, x1)) >> 1 & ((one - 1) << (surplus - 1)));
      const Shorts sum = of_left + multiply_high(difference + difference, across);
      store_bytes(pixels + x, multiply_high_rounded(sum, all(1 << (15 - blend_bits))));
    }
    row_x += map.x_y, row_y += map.y_y;
  }
}
#endif

// The words 0 and 1 of all blocks are for the pixels of the first half, those 2 and 3 for the second.
void Augmenter::add_noise(Index sample, Index epoch, std::uint8_t* pixels) const {
  constexpr int bits = 13, mean = 2 * 255;
  const int scale = noise_scale(settings_);
  const Index blocks = ceil_div(Index{height_} * width_, 4 * random_block_step) * random_block_step;
  const auto add = [&](std::uint8_t* to, Vec<std::uint32_t> words) GEMMLET_INLINE_LAMBDA {
    const Ints sums = std::bit_cast<Ints>((words & 0x00ff00ffu) + ((words >> 8) & 0x00ff00ffu));
    const Ints noise = (multiply_pairs(sums, pair_of(scale, scale)) + ((1 << (bits - 1)) - mean * scale)) >> bits;
    store_bytes(to, clamped(load_bytes(to) + noise, 0, 255));
  };
  for (Index block = 0; block < blocks; block += lanes<std::uint64_t>) {
    const WordPairs words = random_pairs(block, static_cast<std::uint64_t>(sample), static_cast<std::uint64_t>(epoch),
                                         streams::noise, seed_);
    add(pixels + 2 * block, words.low);
    add(pixels + 2 * (blocks + block), words.high);
  }
}

void Augmenter::erase(Index sample, Index epoch, std::uint8_t* pixels) const {
  std::uint32_t low[2 * random_block_step], high[2 * random_block_step];
  fill_random(random_block_step, static_cast<std::uint64_t>(sample), static_cast<std::uint64_t>(epoch), streams::erase,
              seed_, low, high);
  const unsigned words[] = {low[0], low[1], high[0], high[1], low[2]};
  const Rectangle rectangle = erased(settings_, height_, width_, words);
  for (int y = rectangle.top; y < rectangle.top + rectangle.height; ++y)
    std::fill_n(pixels + y * width_ + rectangle.left, rectangle.width, 0);
}

static_assert(augment_max_side == max_side);

namespace {

// One for each thread from the start: where memory is short, nothing has been written yet.
class Workspaces {
 public:
  Workspaces(const Augmenter& augmenter, Index count) : augmenter_(augmenter) {
    for (Index i = 0; i < count; ++i) free_.push_back(std::make_unique<Augmenter::Workspace>(augmenter));
  }
  // A new one, if another thread has asked for more threads meanwhile.
  std::unique_ptr<Augmenter::Workspace> take() {
    const std::lock_guard lock(mutex_);
    if (free_.empty()) return std::make_unique<Augmenter::Workspace>(augmenter_);
    std::unique_ptr<Augmenter::Workspace> workspace = std::move(free_.back());
    free_.pop_back();
    return workspace;
  }
  void give_back(std::unique_ptr<Augmenter::Workspace> workspace) {
    const std::lock_guard lock(mutex_);
    free_.push_back(std::move(workspace));
  }

 private:
  const Augmenter& augmenter_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Augmenter::Workspace>> free_;
};

}  // namespace

void augment(const double (&settings)[augment_setting_count], const std::uint8_t* images, Index count, Index height,
             Index width, std::uint64_t seed, Index epoch, const Index* samples, const Index* rows, std::uint8_t* out) {
  const auto [rotate, scale, shear, shift, elastic, noise, erase] = settings;
  const Augmenter augmenter({rotate, scale, shear, shift, elastic, noise, erase}, height, width, seed);
  const Index pixels = height * width, chunk = std::max<Index>(1, tuning::augment_chunk_pixels / pixels);
  Workspaces workspaces(augmenter, std::min<Index>(get_num_threads(), ceil_div(count, chunk)));
  parallel_chunks(
      count,
      [&](Index begin, Index end) {
        std::unique_ptr<Augmenter::Workspace> workspace = workspaces.take();
        for (Index i = begin; i < end; ++i) {
          // Rows in random order are not in the cache.
          if (rows != nullptr && i + 2 < end)
            for (Index k = 0; k < pixels; k += 64) __builtin_prefetch(images + rows[i + 2] * pixels + k, 0, 3);
          augmenter.transform(images + (rows == nullptr ? i : rows[i]) * pixels, samples[i], epoch, *workspace,
                              out + i * pixels);
        }
        workspaces.give_back(std::move(workspace));
      },
      chunk);
}

void random_blocks(std::uint64_t seed, unsigned stream, std::uint64_t step, std::uint64_t row, Index first,
                   Index blocks, std::uint32_t* out) {
  for (Index done = 0; done < blocks; done += lanes<std::uint64_t>) {
    const WordPairs pairs = random_pairs(first + done, row, step, stream, seed);
    for (Index i = 0; i < std::min<Index>(lanes<std::uint64_t>, blocks - done); ++i) {
      std::uint32_t* block = out + 4 * (done + i);
      block[0] = pairs.low[2 * i], block[1] = pairs.low[2 * i + 1];
      block[2] = pairs.high[2 * i], block[3] = pairs.high[2 * i + 1];
    }
  }
}

}  // namespace gemmlet
