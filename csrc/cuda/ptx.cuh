// Every PTX instruction that the kernels use, one small function each, by the PTX ISA manual's names and layouts.
//
// Contract
//   For the CPU the same functions, by the manual's layouts of fragments, are in tests/cuda_on_host/ptx_on_host.h.
#pragma once

#if !defined(__CUDACC__)
#include "ptx_on_host.h"
#else

namespace gemmlet::ptx {

// cvt.f32.f16: exact.
__device__ __forceinline__ float float_of_half(unsigned short h) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
  return x;
}

// cvt.rn.f16.f32: rounds to nearest, ties to even; subnormals are kept.
__device__ __forceinline__ unsigned short half_of_float(float x) {
  unsigned short h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
  return h;
}

// cvt.rn.bf16.f32 (sm_80): likewise.
__device__ __forceinline__ unsigned short bfloat_of_float(float x) {
  unsigned short h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(x));
  return h;
}

// nanosleep.u32: lets some time pass, in a loop that waits for another block.
__device__ __forceinline__ void nanosleep(unsigned nanoseconds) {
  asm volatile("nanosleep.u32 %0;" ::"r"(nanoseconds));
}

// ld.acquire.gpu.u32: what other blocks wrote before the value that is read is seen after it.
__device__ __forceinline__ unsigned load_acquire(const unsigned* p) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}

//
// Asynchronous copies to shared memory
//

// An address in shared memory, to which bytes can be added.
using SharedAddress = unsigned;

// cvta.to.shared.
__device__ __forceinline__ SharedAddress shared_address(const void* p) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(p));
}

// cp.async (sm_80): `bytes`, which both addresses are multiples of, arrive later; beyond the first `valid` ones they are
// zeros, and `from` is not read. 16 bytes go past the L1 cache.
template <int bytes>
__device__ __forceinline__ void copy_async(SharedAddress to, const void* from, int valid) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  if constexpr (bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(bytes), "r"(valid)
                 : "memory");
}

// cp.async.commit_group: the thread's copies since the last one become a group.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// cp.async.wait_group: waits for all of the thread's groups but the newest ones, so many.
template <int newest>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(newest) : "memory");
}

// ld.shared.b32.
__device__ __forceinline__ unsigned load_shared(SharedAddress from) {
  unsigned word;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(from) : "memory");
  return word;
}

// st.shared.v4.b32.
__device__ __forceinline__ void store_shared(SharedAddress to, const unsigned (&words)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(words[0]), "r"(words[1]), "r"(words[2]),
               "r"(words[3])
               : "memory");
}

//
// Tensor cores. A fragment is what the 32 lanes of a warp hold of a small matrix; in all of them g = lane / 4, t = lane % 4.
//

// ldmatrix.x4: four matrices of 8 rows of 16 bytes; lane i has the address of row i % 8 of matrix i / 8. Of matrix j, to[j]
// is the t-th word of row g, or of the transpose, as numbers of 16 bits, if `transposed`.
template <bool transposed>
__device__ __forceinline__ void load_matrices(unsigned (&to)[4], SharedAddress row) {
  if constexpr (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row)
                 : "memory");
}

// cvt.rna.tf32.f32 (sm_80), on the bits: rounds to 10 bits after the point, to nearest, ties away from zero.
__device__ __forceinline__ unsigned tf32_of_float(unsigned x) {
  unsigned result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "r"(x));
  return result;
}

// mma.sync.m16n8k16 (f16, bf16) and m16n8k8 (tf32), sm_80: d (16 x 8) += a @ b in float. A lane holds, of d, rows g and
// g + 8, columns 2t and 2t + 1 of each. Of a, which is row by row 16 x 32 bytes: word t of rows g and g + 8, then word
// t + 4 of them. Of b, column by column 8 x 32 bytes: words t and t + 4 of column g.
__device__ __forceinline__ void mma_f16(float (&d)[4], const unsigned (&a)[4], unsigned b_low, unsigned b_high) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
}
__device__ __forceinline__ void mma_bf16(float (&d)[4], const unsigned (&a)[4], unsigned b_low, unsigned b_high) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
}
__device__ __forceinline__ void mma_tf32(float (&d)[4], const unsigned (&a)[4], unsigned b_low, unsigned b_high) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
}

}  // namespace gemmlet::ptx
#endif
