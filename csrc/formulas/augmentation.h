// What the transform of an image is made of, from random words: csrc/cpu/augment.h says what becomes of it.
//
// Contract
//   In double, by sums, products, quotients and one square root in the order written, with nothing contracted: the numbers,
//   integers in the end, are the same for every processor and in python/gemmlet/formulas/augmentation.py, the reference.
//   Whoever includes this file has declared sqrt(double).
//   Settings are within the ranges of `Augment` (python/gemmlet/nn/augment.py), and images at most max_side high and wide:
//   within these no integer of 32 bits overflows.
#pragma once

namespace gemmlet::augmentation {

// As `Augment` has them.
struct Settings {
  double rotate, scale, shear, shift, elastic, noise, erase;

  constexpr bool warps() const { return rotate != 0 || scale != 0 || shear != 0 || shift != 0 || elastic != 0; }
};

constexpr int max_side = 1024;

// Control points of the elastic grid along an axis, and the bits of their weights' fraction.
constexpr int control_points = 7, weight_bits = 10;

constexpr int nearest(double x) { return static_cast<int>(x + 0x1.8p52 - 0x1.8p52); }

// A random word as a number within [-1, 1), and as one within [0, 1).
constexpr double signed_unit(unsigned word) { return static_cast<int>(word) * 0x1p-31; }
constexpr double unit(unsigned word) { return word * 0x1p-32; }

// A power series by Horner's rule, the coefficients from the lowest power up.
template <class... Higher>
constexpr double series(double x, double lowest, Higher... higher) {
  if constexpr (sizeof...(higher) == 0)
    return lowest;
  else
    return lowest + x * series(x, higher...);
}

// Taylor's, within 3e-8 for angles up to pi.
constexpr double sine(double x) {
  return x * series(x * x, 1.0, -1.0 / 6, 1.0 / 120, -1.0 / 5040, 1.0 / 362880, -1.0 / 39916800, 1.0 / 6227020800,
                    -1.0 / 1307674368000, 1.0 / 355687428096000);
}
constexpr double cosine(double x) {
  return series(x * x, 1.0, -1.0 / 2, 1.0 / 24, -1.0 / 720, 1.0 / 40320, -1.0 / 3628800, 1.0 / 479001600,
                -1.0 / 87178291200, 1.0 / 20922789888000, -1.0 / 6402373705728000);
}

// Pixel (x, y) of the result comes from the point (x_x x + x_y y + x_0, y_x x + y_y y + y_0) / 2^16 of the image.
struct AffineMap {
  int x_x, x_y, x_0, y_x, y_y, y_0;
};

// Around the middle of the image: rotated, sheared along x, scaled along each axis, shifted. That is the way back: what the
// image shows is shifted first, and rotated last.
constexpr AffineMap affine_map(const Settings& by, int height, int width, const unsigned (&words)[6]) {
  const double angle = signed_unit(words[0]) * (by.rotate * (3.141592653589793 / 180));
  const double scale_x = 1 / (1 + signed_unit(words[1]) * by.scale),
               scale_y = 1 / (1 + signed_unit(words[2]) * by.scale);
  const double shear = signed_unit(words[3]) * by.shear;
  const double shift_x = signed_unit(words[4]) * by.shift, shift_y = signed_unit(words[5]) * by.shift;
  const double s = sine(angle), c = cosine(angle), middle_x = (width - 1) * 0.5, middle_y = (height - 1) * 0.5;
  const double x_x = (c + shear * s) * scale_x, x_y = (shear * c - s) * scale_x, y_x = s * scale_y, y_y = c * scale_y;
  const double x_0 = middle_x + shift_x - x_x * middle_x - x_y * middle_y;
  const double y_0 = middle_y + shift_y - y_x * middle_x - y_y * middle_y;
  return {nearest(x_x * 65536), nearest(x_y * 65536), nearest(x_0 * 65536),
          nearest(y_x * 65536), nearest(y_y * 65536), nearest(y_0 * 65536)};
}

// Pixels between control points of the elastic grid, along both axes.
constexpr int grid_spacing(int height, int width) { return ((height > width ? height : width) + 3) / 4; }

// What control point place / spacing + i, 0 <= i < 4, weighs at `place`: a cubic B-spline, in 2^weight_bits.
constexpr int spline_weight(int i, int place, int spacing) {
  const long long r = place % spacing, s = spacing, t = s - r;
  const long long of_sixth[] = {t * t * t, 3 * r * r * r - 6 * r * r * s + 4 * s * s * s,
                                3 * t * t * t - 6 * t * t * s + 4 * s * s * s, r * r * r};
  const long long whole = 6 * s * s * s;
  return static_cast<int>(((of_sixth[i] << (weight_bits + 1)) + whole) / (2 * whole));
}

// A control point is displaced by (displacement_scale r) >> 15 in 1/256 of a pixel, r being 16 random bits, signed. The mean
// of a spline's squared weights is 151/315 along each axis, that of squared numbers within [-1, 1] is 1/3.
constexpr int displacement_scale(const Settings& by) {
  return nearest(by.elastic * (256 * 1.7320508075688772 * (315.0 / 151.0)));
}

// The noise of a pixel is (noise_scale (s - 510)) >> 13, rounded; s is a sum of four random bytes, of deviation sqrt(21845).
constexpr int noise_scale(const Settings& by) { return nearest(by.noise * (8192 / 147.80054127099805)); }

struct Rectangle {
  int top, left, height, width;  // of height 0: none
};

// Zhong et al., 2017: 2 to 40 % of the image, the ratio of height to width from 0.3 to 1 / 0.3; what exceeds the image is cut
// off.
GEMMLET_INLINE Rectangle erased(const Settings& by, int height, int width, const unsigned (&words)[5]) {
  if (!(unit(words[0]) < by.erase)) return {};
  const double area = (0.02 + unit(words[1]) * 0.38) * (height * width);
  const double ratio = 0.3 + unit(words[2]) * (1 / 0.3 - 0.3);
  const auto side = [](double square, int most) {
    const int rounded = nearest(sqrt(square));
    return rounded < 1 ? 1 : rounded > most ? most : rounded;
  };
  const auto place = [](unsigned word, int room) {
    return static_cast<int>(static_cast<unsigned long long>(word) * (room + 1) >> 32);
  };
  const int h = side(area * ratio, height), w = side(area / ratio, width);
  return {place(words[3], height - h), place(words[4], width - w), h, w};
}

}  // namespace gemmlet::augmentation
