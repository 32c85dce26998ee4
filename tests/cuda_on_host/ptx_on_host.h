// The functions of csrc/cuda/ptx.cuh for the CPU, by the PTX ISA manual: same names, same bits.
#pragma once

namespace gemmlet::ptx {

//
// Conversions. A NaN becomes the one of all ones without a sign, whatever it was.
//

inline float float_of_half(unsigned short h) {
  const unsigned exponent = h >> 10 & 31, mantissa = h & 0x3ff;
  if (exponent == 31 && mantissa != 0) return reinterpreted<float>(0x7fffffffu);
  const unsigned sign = (h & 0x8000u) << 16;
  if (exponent == 31) return reinterpreted<float>(sign | 0x7f800000u);
  if (exponent != 0) return reinterpreted<float>(sign | (exponent + 112) << 23 | mantissa << 13);
  // Subnormal: a multiple of 2^-24.
  const float size = static_cast<float>(mantissa) * 0x1p-24f;
  return sign ? -size : size;
}

// The 16 bits that a float's `count` lowest bits are rounded off to, to nearest, ties to even; the carry may go up into
// the exponent, and so to infinity.
inline unsigned rounded_off(unsigned bits, int count) {
  const unsigned half = 1u << (count - 1), odd = bits >> count & 1;
  return (bits + (half - 1) + odd) >> count;
}

inline unsigned short half_of_float(float x) {
  const unsigned bits = reinterpreted<unsigned>(x), size = bits & 0x7fffffffu, sign = bits >> 16 & 0x8000u;
  if (size > 0x7f800000u) return 0x7fff;
  if (size >= 0x47800000u) return static_cast<unsigned short>(sign | 0x7c00u);  // from 2^16 on
  if (size >= 0x38800000u) return static_cast<unsigned short>(sign | rounded_off(size - (112u << 23), 13));
  // Below 2^-14. What is added has 2^-24, the smallest subnormal number, in its last place: the sum is rounded to it.
  const float sum = reinterpreted<float>(size) + 0.5f;
  return static_cast<unsigned short>(sign | (reinterpreted<unsigned>(sum) - reinterpreted<unsigned>(0.5f)));
}

inline unsigned short bfloat_of_float(float x) {
  const unsigned bits = reinterpreted<unsigned>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<unsigned short>(rounded_off(bits, 16));
}

//
// Waiting for other blocks
//

inline void nanosleep(unsigned, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_host::yield({"nanosleep", file, line});
}

inline unsigned load_acquire(const unsigned* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }

//
// Asynchronous copies to shared memory
//

using SharedAddress = unsigned char*;

inline SharedAddress shared_address(const void* p) {
  return const_cast<SharedAddress>(static_cast<const unsigned char*>(p));
}

template <int bytes>
inline void copy_async(SharedAddress to, const void* from, int valid) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  if (valid < 0 || valid > bytes) cuda_host::fail("an asynchronous copy of %d of %d bytes", valid, bytes);
  cuda_host::copy_async(to, from, bytes, static_cast<unsigned>(valid));
}

inline void commit_copies() { cuda_host::commit_copies(); }

template <int newest>
inline void wait_for_copies() {
  cuda_host::wait_for_copies(newest);
}

inline void check_aligned(const void* p, unsigned bytes) {
  if (reinterpret_cast<decltype(sizeof 0)>(p) % bytes) cuda_host::fail("misaligned shared memory at %p", p);
}

inline unsigned load_shared(SharedAddress from) {
  check_aligned(from, 4);
  unsigned word;
  memcpy(&word, from, sizeof word);
  return word;
}

inline void store_shared(SharedAddress to, const unsigned (&words)[4]) {
  check_aligned(to, 16);
  memcpy(to, words, sizeof words);
}

//
// Tensor cores
//

template <bool transposed>
inline void load_matrices(unsigned (&to)[4], SharedAddress row, const char* file = __builtin_FILE(),
                          int line = __builtin_LINE()) {
  check_aligned(row, 16);
  const auto rows = cuda_host::warp_exchange(row, "ldmatrix", file, line);
  const unsigned g = cuda_host::self->lane / 4, t = cuda_host::self->lane % 4;
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    if (transposed) {
      unsigned short pair[2];
      for (unsigned i = 0; i < 2; ++i) memcpy(pair + i, rows[matrix * 8 + 2 * t + i] + 2 * g, 2);
      memcpy(to + matrix, pair, 4);
    } else {
      memcpy(to + matrix, rows[matrix * 8 + g] + 4 * t, 4);
    }
  }
}

inline unsigned tf32_of_float(unsigned x) {
  if ((x & 0x7fffffffu) > 0x7f800000u) return 0x7fffffffu;
  return (x + 0x1000u) & ~0x1fffu;
}

struct Fragments {
  unsigned a[4], b[2];
};

// Products are exact in float; their sum is rounded after each.
template <int numbers, class F>
inline void mma(float (&d)[4], const unsigned (&a)[4], unsigned b_low, unsigned b_high, F number, const char* file,
                int line) {
  const Fragments mine{{a[0], a[1], a[2], a[3]}, {b_low, b_high}};
  const auto lanes = cuda_host::warp_exchange(mine, "mma", file, line);
  const unsigned g = cuda_host::self->lane / 4, t = cuda_host::self->lane % 4;
  for (unsigned word = 0; word < 8; ++word) {
    const Fragments of_row = lanes[g * 4 + word % 4];
    for (unsigned j = 0; j < 2; ++j) {
      const Fragments of_column = lanes[(2 * t + j) * 4 + word % 4];
      for (unsigned half = 0; half < 2; ++half)
        for (int i = 0; i < numbers; ++i)
          d[2 * half + j] += number(of_row.a[word / 4 * 2 + half], i) * number(of_column.b[word / 4], i);
    }
  }
}

inline void mma_f16(float (&d)[4], const unsigned (&a)[4], unsigned b_low, unsigned b_high,
                    const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const auto number = [](unsigned word, int i) { return float_of_half(static_cast<unsigned short>(word >> 16 * i)); };
  mma<2>(d, a, b_low, b_high, number, file, line);
}
inline void mma_bf16(float (&d)[4], const unsigned (&a)[4], unsigned b_low, unsigned b_high,
                     const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const auto number = [](unsigned word, int i) { return reinterpreted<float>(word >> 16 * i << 16); };
  mma<2>(d, a, b_low, b_high, number, file, line);
}
// The 13 lowest bits are not looked at.
inline void mma_tf32(float (&d)[4], const unsigned (&a)[4], unsigned b_low, unsigned b_high,
                     const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const auto number = [](unsigned word, int) { return reinterpreted<float>(word & ~0x1fffu); };
  mma<1>(d, a, b_low, b_high, number, file, line);
}

}  // namespace gemmlet::ptx
