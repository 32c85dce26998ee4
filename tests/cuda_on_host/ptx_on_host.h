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

inline unsigned halves_of_floats(float low, float high) { return half_of_float(low) | half_of_float(high) << 16; }
inline unsigned bfloats_of_floats(float low, float high) { return bfloat_of_float(low) | bfloat_of_float(high) << 16; }

//
// Arithmetic. What is not exact is off by as much as the manual allows, up or down as the bits of the argument have it, and
// so that no test can do with less.
//

inline unsigned permuted(unsigned low, unsigned high, unsigned which) {
  const unsigned long long bytes = low | static_cast<unsigned long long>(high) << 32;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> (which >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}
inline float abs(float x) { return __builtin_fabsf(x); }
inline float copysign(float magnitude, float sign) { return __builtin_copysignf(magnitude, sign); }
inline float larger(float a, float b) { return __builtin_fmaxf(a, b); }

inline bool errs_upwards(float argument) { return (reinterpreted<unsigned>(argument) * 2654435761u) >> 31; }
inline float flushed(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0, x) : x; }

inline float reciprocal(float x) {
  x = flushed(x);
  const float nearest = 1 / x;
  if (!(__builtin_fabsf(nearest) > 0 && __builtin_fabsf(nearest) < __builtin_inff())) return nearest;
  // The neighbour on the other side of 1 / x, or either where that is exact.
  const float missing = __builtin_fmaf(-x, nearest, 1);
  if (missing != 0 && errs_upwards(x)) return flushed(nearest);
  const bool larger = missing > 0 || (missing == 0 && errs_upwards(x));
  return flushed(reinterpreted<float>(reinterpreted<unsigned>(nearest) + (larger ? 1u : ~0u)));
}

inline float square_root(float x) {
  const float nearest = __builtin_sqrtf(x);
  if (!(nearest > 0 && nearest < __builtin_inff())) return nearest;
  // The neighbour on the other side of the root, or either where that is exact.
  const float missing = __builtin_fmaf(-nearest, nearest, x);
  if (missing != 0 && errs_upwards(x)) return nearest;
  const bool larger = missing > 0 || (missing == 0 && errs_upwards(x));
  return reinterpreted<float>(reinterpreted<unsigned>(nearest) + (larger ? 1u : ~0u));
}

inline float exp2(float x) {
  if (flushed(x) == 0) return 1;  // by the manual's table
  const double off = errs_upwards(x) ? 0x1p-22 : -0x1p-22;
  return static_cast<float>(__builtin_exp2(x) * (1 + off));
}
inline float exp2_flushed(float x) { return flushed(exp2(flushed(x))); }

inline float log2_flushed(float x) {
  x = flushed(x);
  const double exact = __builtin_log2(x), off = errs_upwards(x) ? 0x1p-22 : -0x1p-22;
  return static_cast<float>(x >= 0.5f && x <= 2 ? exact + off : exact * (1 + off));
}

//
// Shared memory, and asynchronous copies to it
//

using SharedAddress = unsigned char*;

inline SharedAddress shared_address(const void* p) {
  return const_cast<SharedAddress>(static_cast<const unsigned char*>(p));
}

// As if dynamic shared memory began here: at a multiple of 16, and of no more, as no more is promised.
constexpr unsigned first_address = 1024 + 16;

inline unsigned address_bits(SharedAddress address) {
  return first_address + static_cast<unsigned>(address - shared_address(cuda_host::dynamic_shared()));
}
inline SharedAddress shared_memory_at(unsigned bits) {
  return shared_address(cuda_host::dynamic_shared()) + static_cast<int>(bits - first_address);
}
inline SharedAddress flipped(SharedAddress address, unsigned bits) {
  return shared_memory_at(address_bits(address) ^ bits);
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

inline unsigned cut_to_tf32(unsigned x) { return x & ~0x1fffu; }

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

//
// Clusters of blocks
//

inline unsigned cluster_rank() { return cuda_host::self->block->rank; }

inline void arrive_at_cluster(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_host::arrive_at_cluster({"barrier.cluster.arrive", file, line});
}
inline void wait_for_cluster(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_host::wait_for_cluster({"barrier.cluster.wait", file, line});
}

inline SharedAddress in_block(SharedAddress shared, unsigned block) {
  return static_cast<SharedAddress>(cuda_host::in_block(shared, block));
}

//
// Barriers in shared memory, and what completes on them
//

// As device.py packs it.
struct alignas(64) TensorMap {
  const unsigned char* data;
  long long inner, outer, row_bytes;
  int box_inner, box_outer, size, rounds;
  unsigned char unused[80];
};

inline void prefetch_map(const TensorMap&) {}

inline void init_barrier(SharedAddress barrier, unsigned arrivals) {
  cuda_host::init_shared_barrier(barrier, arrivals);
}
inline void fence_barrier_init() { cuda_host::fence_barrier_init(); }
inline void arrive_expecting(SharedAddress barrier, unsigned bytes) { cuda_host::arrive(barrier, bytes); }
inline void arrive_at(SharedAddress barrier, unsigned block) { cuda_host::arrive(in_block(barrier, block), 0); }
inline void wait_for_phase(SharedAddress barrier, unsigned parity, const char* file = __builtin_FILE(),
                           int line = __builtin_LINE()) {
  cuda_host::wait_for_phase(barrier, parity, {"mbarrier.try_wait", file, line});
}

inline void store_words(const cuda_host::BulkCopy& copy) {
  for (int i = 0; i < 4; ++i) reinterpret_cast<unsigned*>(copy.to)[i] = copy.words[i];
}
inline void store_to_block(SharedAddress to, unsigned block, SharedAddress barrier, const float (&value)[4]) {
  check_aligned(to, 16);
  cuda_host::BulkCopy copy = {};
  copy.perform = store_words;
  copy.to = in_block(to, block);
  memcpy(copy.words, value, sizeof value);
  for (int i = 0; i < 4; ++i) reinterpret_cast<unsigned*>(copy.to)[i] = ~0u;
  cuda_host::queue_bulk_copy(in_block(barrier, block), copy, sizeof value);
}

// Bits 7 to 9 of an address, which is that of a row, are XORed into bits 4 to 6.
inline void perform(const cuda_host::BulkCopy& copy) {
  for (int row = 0; row < copy.box_outer; ++row)
    for (int i = 0; i < copy.box_inner; ++i) {
      const int at = i * copy.size, swizzled = at / 16 * 16 ^ row % 8 * 16;
      const long long inner = copy.first_inner + i, outer = copy.first_outer + row;
      unsigned number = 0;
      if (inner >= 0 && inner < copy.inner && outer >= 0 && outer < copy.outer)
        memcpy(&number, copy.from + outer * copy.row_bytes + inner * copy.size, copy.size);
      if (copy.rounds) number = tf32_of_float(number);
      memcpy(copy.to + row * 128 + swizzled + at % 16, &number, copy.size);
    }
}

inline void copy_box_to_blocks(SharedAddress to, const TensorMap& map, int inner, int outer, SharedAddress barrier,
                               unsigned short blocks) {
  check_aligned(&map, 64);
  if (address_bits(to) % 1024) cuda_host::fail("a box is copied to no multiple of 1024 bytes");
  const unsigned bytes = map.box_outer * 128;
  for (unsigned block = 0; block < 16; ++block) {
    if (!(blocks >> block & 1)) continue;
    const cuda_host::BulkCopy copy = {perform,       in_block(to, block), map.data, map.inner,
                                      map.outer,     map.row_bytes,       inner,    outer,
                                      map.box_inner, map.box_outer,       map.size, map.rounds};
    memset(copy.to, 0xFF, bytes);
    cuda_host::queue_bulk_copy(in_block(barrier, block), copy, bytes);
  }
}
inline void copy_box(SharedAddress to, const TensorMap& map, int inner, int outer, SharedAddress barrier) {
  copy_box_to_blocks(to, map, inner, outer, barrier, static_cast<unsigned short>(1 << cluster_rank()));
}

// What all lanes of a warp do together.
inline void meet(const char* what, const char* file, int line, bool orders_memory = false) {
  cuda_host::wait(cuda_host::self->warp->barrier, {what, file, line}, orders_memory);
}

template <int registers>
inline void give_registers(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  static_assert(registers % 8 == 0 && registers >= 24 && registers <= 256);
  meet("setmaxnreg", file, line);
}
template <int registers>
inline void take_registers(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  give_registers<registers>(file, line);
}

//
// wgmma, by a warpgroup
//

inline void fence_wgmma(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  meet("wgmma.fence", file, line);
  cuda_host::self->wgmma_fenced = true;
}

inline void commit_wgmma(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  meet("wgmma.commit_group", file, line);
  cuda_host::commit_wgmma();
}

template <int newest>
inline void wait_for_wgmma(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  meet("wgmma.wait_group", file, line);
  cuda_host::Wgmma wgmma;
  while (cuda_host::next_wgmma(newest, wgmma)) wgmma.compute(wgmma);
  // None goes on before all are done.
  meet("wgmma.wait_group", file, line, true);
}

template <int count>
inline void finish_wgmma(float (&)[count], const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  wait_for_wgmma<0>(file, line);
  cuda_host::self->wgmma_fenced = false;  // as registers may be read and written from here on
}

// The matrix descriptor's number of a line and a step, with swizzling of 128 bytes (PTX ISA, 9.7.15.5.1).
template <bool transposed, class Number = unsigned short>
inline Number number_of(unsigned long long descriptor, unsigned line, unsigned step) {
  const auto field = [=](int bit) { return static_cast<unsigned>(descriptor >> bit & 0x3fff) << 4; };
  const unsigned start = field(0), leading = field(16), stride = field(32);
  const unsigned place = transposed
                             ? line / 64 * leading + step / 8 * stride + step % 8 * 128 + line % 64 * sizeof(Number)
                             : line / 8 * stride + line % 8 * 128 + step * sizeof(Number);
  const unsigned address = start + place, swizzled = address ^ (address >> 7 & 7) << 4;
  Number number;
  memcpy(&number, shared_memory_at(swizzled), sizeof number);
  return number;
}

// What a thread has of a wgmma: products of numbers are exact in float; their sum is rounded after each.
template <bool adds, int count, int steps, class A, class B>
inline void part_of_wgmma(float* d, A a, B b) {
  const unsigned warp = cuda_host::self->index / 32 % 4, g = cuda_host::self->lane / 4, t = cuda_host::self->lane % 4;
  float rows[2][steps], column[steps];
  for (unsigned half = 0; half < 2; ++half)
    for (unsigned k = 0; k < steps; ++k) rows[half][k] = a(16 * warp + 8 * half + g, k);
  for (unsigned j = 0; j < count / 2; ++j) {
    for (unsigned k = 0; k < steps; ++k) column[k] = b(j / 2 * 8 + 2 * t + j % 2, k);
    for (unsigned half = 0; half < 2; ++half) {
      float& sum = d[j / 2 * 4 + 2 * half + j % 2];
      if (!adds) sum = 0;
      for (unsigned k = 0; k < steps; ++k) sum += rows[half][k] * column[k];
    }
  }
}

template <bool a_transposed, bool b_transposed, int count, float (*number)(unsigned short), bool adds>
inline void wgmma_of_16_bits(const cuda_host::Wgmma& p) {
  part_of_wgmma<adds, count, 16>(
      p.d, [&](unsigned line, unsigned k) { return number(number_of<a_transposed>(p.a, line, k)); },
      [&](unsigned line, unsigned k) { return number(number_of<b_transposed>(p.b, line, k)); });
}

inline float tf32_bits(unsigned x) { return reinterpreted<float>(x & ~0x1fffu); }

template <bool adds, int count>
inline void wgmma_of_tf32(const cuda_host::Wgmma& p) {
  for (unsigned i = 0; i < 4; ++i)
    if (p.a_registers[i] != p.held[i]) cuda_host::fail("wgmma: registers of a were written before it was waited for");
  struct Held {
    unsigned a[4];
  };
  Held mine;
  memcpy(&mine, p.held, sizeof mine);
  const auto lanes = cuda_host::warp_exchange(mine, "wgmma");
  part_of_wgmma<adds, count, 8>(
      p.d,
      [&](unsigned line, unsigned k) { return tf32_bits(lanes[line % 8 * 4 + k % 4].a[k / 4 * 2 + line / 8 % 2]); },
      [&](unsigned line, unsigned k) { return tf32_bits(number_of<false, unsigned>(p.b, line, k)); });
}

struct Descriptors {
  unsigned long long of[2];
  int adds;
};

// What is wrong with a wgmma.
inline void check_wgmma(unsigned long long a, unsigned long long b, int adds, const char* file, int line) {
  const Descriptors mine{{a, b}, adds};
  const Descriptors first = cuda_host::warp_exchange(mine, "wgmma", file, line)[0];
  if (first.of[0] != a || first.of[1] != b || first.adds != adds)
    cuda_host::fail("wgmma: the matrix descriptors of a warp's lanes differ");
  for (const unsigned long long descriptor : mine.of)
    if ((descriptor & ~0x3fff3fff3fffull) != 1ull << 62)
      cuda_host::fail("wgmma: the matrix descriptor %016llx is none of swizzling by 128 bytes", descriptor);
  if (!cuda_host::self->wgmma_fenced) cuda_host::fail("wgmma: there was no wgmma.fence");
}

template <bool a_transposed, bool b_transposed, float (*number)(unsigned short), int count>
inline void wgmma(float (&d)[count], unsigned long long a, unsigned long long b, int adds, const char* file, int line) {
  check_wgmma(a, b, adds, file, line);
  cuda_host::queue_wgmma({adds ? wgmma_of_16_bits<a_transposed, b_transposed, count, number, true>
                               : wgmma_of_16_bits<a_transposed, b_transposed, count, number, false>,
                          d, a, b});
}

inline float float_of_bfloat(unsigned short h) { return reinterpreted<float>(static_cast<unsigned>(h) << 16); }

template <bool a_transposed, bool b_transposed, int count>
inline void wgmma_f16(float (&d)[count], unsigned long long a, unsigned long long b, int adds,
                      const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  wgmma<a_transposed, b_transposed, float_of_half>(d, a, b, adds, file, line);
}
template <bool a_transposed, bool b_transposed, int count>
inline void wgmma_bf16(float (&d)[count], unsigned long long a, unsigned long long b, int adds,
                       const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  wgmma<a_transposed, b_transposed, float_of_bfloat>(d, a, b, adds, file, line);
}

template <int count>
inline void wgmma_tf32(float (&d)[count], const unsigned (&a)[4], unsigned long long b, int adds,
                       const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  check_wgmma(b, b, adds, file, line);
  cuda_host::queue_wgmma(
      {adds ? wgmma_of_tf32<true, count> : wgmma_of_tf32<false, count>, d, 0, b, a, {a[0], a[1], a[2], a[3]}});
}

}  // namespace gemmlet::ptx
