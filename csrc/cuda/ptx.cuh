// Every PTX instruction that the kernels use, one small function each, by the PTX ISA manual's names and layouts.
//
// Contract
//   For the CPU the same functions, by the manual's layouts of fragments, are in tests/cuda_on_host/ptx_on_host.h.
#pragma once

#if !defined(__CUDACC__)
#include "ptx_on_host.h"
#else

namespace gemmlet::ptx {

// An instruction that makes one number of another, with the letters that asm has for their types.
#define GEMMLET_PTX(To, function, instruction, to, From, from) \
  __device__ __forceinline__ To function(From x) {             \
    To result;                                                 \
    asm(instruction " %0, %1;" : to(result) : from(x));        \
    return result;                                             \
  }

// cvt.f32.f16: exact.
GEMMLET_PTX(float, float_of_half, "cvt.f32.f16", "=f", unsigned short, "h")

// cvt.rn.f16.f32: rounds to nearest, ties to even; subnormals are kept.
GEMMLET_PTX(unsigned short, half_of_float, "cvt.rn.f16.f32", "=h", float, "f")

// cvt.rn.bf16.f32 (sm_80): likewise.
GEMMLET_PTX(unsigned short, bfloat_of_float, "cvt.rn.bf16.f32", "=h", float, "f")

// cvt.rn.f16x2.f32, cvt.rn.bf16x2.f32 (sm_80): likewise, two at once, `low` to the low bits.
__device__ __forceinline__ unsigned halves_of_floats(float low, float high) {
  unsigned pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ unsigned bfloats_of_floats(float low, float high) {
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

//
// Arithmetic
//

// prmt.b32: four of the bytes of `low`, which are 0 to 3, and of `high`, 4 to 7: the hexadecimal digits of `which` say
// which ones, from the lowest up.
__device__ __forceinline__ unsigned permuted(unsigned low, unsigned high, unsigned which) {
  unsigned result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(which));
  return result;
}

// abs.f32.
GEMMLET_PTX(float, abs, "abs.f32", "=f", float, "f")

// copysign.f32.
__device__ __forceinline__ float copysign(float magnitude, float sign) {
  float result;
  asm("copysign.f32 %0, %1, %2;" : "=f"(result) : "f"(sign), "f"(magnitude));
  return result;
}

// max.f32: the other one where one is NaN.
__device__ __forceinline__ float larger(float a, float b) {
  float result;
  asm("max.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// rcp.approx.ftz.f32: 1 / x, off by 1 ULP at most. Subnormal numbers are zeros to it, as `x` and as the result.
GEMMLET_PTX(float, reciprocal, "rcp.approx.ftz.f32", "=f", float, "f")

// sqrt.approx.f32: the square root, off by 1 ULP at most; of zeros and infinity exactly.
GEMMLET_PTX(float, square_root, "sqrt.approx.f32", "=f", float, "f")

// ex2.approx.f32, ex2.approx.ftz.f32: 2^x, off by 2^-22 of it, and exactly 1 for 0; what would be subnormal is 0 to the
// second.
GEMMLET_PTX(float, exp2, "ex2.approx.f32", "=f", float, "f")
GEMMLET_PTX(float, exp2_flushed, "ex2.approx.ftz.f32", "=f", float, "f")

// lg2.approx.ftz.f32: the logarithm to base 2, off by 2^-22 within [0.5, 2], else by 2^-22 of it. Of subnormal numbers -inf.
GEMMLET_PTX(float, log2_flushed, "lg2.approx.ftz.f32", "=f", float, "f")

//
// Shared memory, and asynchronous copies to it
//

// An address in shared memory, to which bytes can be added.
using SharedAddress = unsigned;

// cvta.to.shared.
__device__ __forceinline__ SharedAddress shared_address(const void* p) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(p));
}

// The bits of an address in shared memory; and the address with some of them flipped.
__device__ __forceinline__ unsigned address_bits(SharedAddress address) { return address; }
__device__ __forceinline__ SharedAddress flipped(SharedAddress address, unsigned bits) { return address ^ bits; }

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

// cp.async.wait_group: waits for all of the thread's groups but the `newest` newest ones.
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
GEMMLET_PTX(unsigned, tf32_of_float, "cvt.rna.tf32.f32", "=r", unsigned, "r")

// and.b32: x without the 13 bits that TF32 has not; where it stands, so that registers are not written between wgmma instructions.
__device__ __forceinline__ unsigned cut_to_tf32(unsigned x) {
  unsigned result;
  asm volatile("and.b32 %0, %1, 0xffffe000;" : "=r"(result) : "r"(x));
  return result;
}

// mma.sync.m16n8k16 (f16, bf16) and m16n8k8 (tf32), sm_80: d (16 x 8) += a @ b in float. A lane holds, of d, rows g and
// g + 8, columns 2t and 2t + 1 of each. Of a, which is row by row 16 x 32 bytes: word t of rows g and g + 8, then word
// t + 4 of them. Of b, column by column 8 x 32 bytes: words t and t + 4 of column g.
#define GEMMLET_MMA(function, shape, type)                                                                           \
  __device__ __forceinline__ void function(float (&d)[4], const unsigned (&a)[4], unsigned b_low, unsigned b_high) { \
    asm("mma.sync.aligned." shape ".row.col.f32." type "." type                                                      \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                       \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                             \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));                                      \
  }
GEMMLET_MMA(mma_f16, "m16n8k16", "f16")
GEMMLET_MMA(mma_bf16, "m16n8k16", "bf16")
GEMMLET_MMA(mma_tf32, "m16n8k8", "tf32")

//
// Clusters of blocks (sm_90)
//

// %cluster_ctarank: the block's number in its cluster.
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// barrier.cluster.arrive and .wait, by whole warps: what the threads of the cluster wrote before they arrive is seen by
// those that have waited. A thread arrives once, then waits once.
__device__ __forceinline__ void arrive_at_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void wait_for_cluster() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

//
// Barriers in shared memory, and bulk copies that complete on them (sm_90)
//

// A CUtensorMap: an array of two dimensions, the inner one contiguous, and the box of it that a copy takes. Made by the
// driver (Device.tensor_map), handed to a kernel as a __grid_constant__, and read by copies alone.
struct alignas(64) TensorMap {
  unsigned long long opaque[16];
};

// prefetch.tensormap: a copy by it will soon be issued.
__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// mbarrier.init: a phase of the barrier, 8 bytes of shared memory, ends after `arrivals` arrivals, and when all bytes
// that were expected are there; they may come before they are expected. Phases count from 0.
__device__ __forceinline__ void init_barrier(SharedAddress barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// fence.mbarrier_init: the thread's barriers are seen by copies and, after the next barrier of all threads, of the cluster
// if there is one, by everyone.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// mbarrier.arrive.expect_tx: arrives, and lets the phase wait for `bytes` bytes of copies.
__device__ __forceinline__ void arrive_expecting(SharedAddress barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// mbarrier.arrive at the barrier of the same address in a block of the cluster. (It orders what the thread's block sees
// alone: release.cluster would be a fence of the whole GPU's memory, and what passes through here are copies' bytes.)
__device__ __forceinline__ void arrive_at(SharedAddress barrier, unsigned block) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
      "r"(block)
      : "memory");
}

// mbarrier.try_wait.parity, until the phase of that parity has ended: of the one that runs and the one before it. What has
// completed on it is seen then.
__device__ __forceinline__ void wait_for_phase(SharedAddress barrier, unsigned parity) {
  asm volatile(
      "{\n.reg .pred done;\nwait:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra wait;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// cp.async.bulk.tensor.2d: the box of the map's array that begins at (inner, outer) arrives in shared memory, row by row
// and swizzled as the map says, zeros where it is beyond the array; its bytes complete on the barrier. To a multiple of
// 1024 bytes for swizzling by 128 bytes. One thread issues it.
__device__ __forceinline__ void copy_box(SharedAddress to, const TensorMap& map, int inner, int outer,
                                         SharedAddress barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          to),
      "l"(&map), "r"(inner), "r"(outer), "r"(barrier)
      : "memory");
}

// Likewise to the same address in each block of the cluster that has its bit in the mask, and on its barrier there.
__device__ __forceinline__ void copy_box_to_blocks(SharedAddress to, const TensorMap& map, int inner, int outer,
                                                   SharedAddress barrier, unsigned short blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(&map), "r"(inner), "r"(outer), "r"(barrier), "h"(blocks)
      : "memory");
}

// mapa and st.async.v4.f32: writes to the shared memory of the cluster's block `rank`, where `to` is in this block's, and
// the 16 bytes complete on the barrier there, likewise. That block must have begun, and must not have ended.
__device__ __forceinline__ void store_to_block(SharedAddress to, unsigned rank, SharedAddress barrier,
                                               const float (&value)[4]) {
  asm volatile(
      "{\n"
      ".reg .b32 to, barrier;\n"
      "mapa.shared::cluster.u32 to, %0, %2;\n"
      "mapa.shared::cluster.u32 barrier, %1, %2;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [to], {%3, %4, %5, %6}, [barrier];\n"
      "}" ::"r"(to),
      "r"(barrier), "r"(rank), "f"(value[0]), "f"(value[1]), "f"(value[2]), "f"(value[3])
      : "memory");
}

// setmaxnreg: the warpgroup gives registers back, or waits for more, until each of its threads has `registers`,
// a multiple of 8.
template <int registers>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

//
// wgmma, by a warpgroup, 4 warps from a multiple of 4 on (sm_90a): asynchronous, so they read shared memory and change
// registers until they are waited for. They are groups of the thread's, like copies, and count apart from them.
//

// wgmma.fence: between any other access of the registers and the wgmma.
__device__ __forceinline__ void fence_wgmma() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// wgmma.commit_group: the wgmma since the last one become a group.
__device__ __forceinline__ void commit_wgmma() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// wgmma.wait_group: waits for all groups but the `newest` newest ones.
template <int newest>
__device__ __forceinline__ void wait_for_wgmma() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(newest) : "memory");
}

// Of registers d: operands of an asm, and what it calls them. They are undefined again below.
#define GEMMLET_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define GEMMLET_D16(i) GEMMLET_D4(i), GEMMLET_D4(i + 4), GEMMLET_D4(i + 8), GEMMLET_D4(i + 12)
#define GEMMLET_D64 GEMMLET_D16(0), GEMMLET_D16(16), GEMMLET_D16(32), GEMMLET_D16(48)
#define GEMMLET_D128 GEMMLET_D64, GEMMLET_D16(64), GEMMLET_D16(80), GEMMLET_D16(96), GEMMLET_D16(112)
#define GEMMLET_D64_NAMES                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define GEMMLET_D128_NAMES                                                                       \
  GEMMLET_D64_NAMES                                                                              \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "           \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// wgmma.wait_group 0: waits for all wgmma, after which d, the registers of some of them, can be read.
__device__ __forceinline__ void finish_wgmma(float (&d)[64]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" : GEMMLET_D64::"memory");
}
__device__ __forceinline__ void finish_wgmma(float (&d)[128]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" : GEMMLET_D128::"memory");
}

// wgmma.mma_async.m64n256k16 and .m64n128k16 (f16, bf16): d (64 x 256 or 128) = a @ b in float, + d if `adds`. A lane of
// the warpgroup's w-th warp holds rows 16w + g and 16w + g + 8: d[4j] and d[4j + 1] are of the first, columns 8j + 2t
// and 8j + 2t + 1; the next two of the second.
// Matrix descriptors tell where a and b are in shared memory: in bits 0 to 13 the address of the first number, in 16 to
// 29 and 32 to 45 two distances, all three in units of 16 bytes; and in bits 62 and 63 how it is swizzled. That is 1
// here: bits 7 to 9 of an address are XORed into bits 4 to 6. A row of 128 bytes is then 64 steps of a line, 8 rows are
// next to each other, and from 8 lines to the next ones it is the second distance. Or, if transposed, a row is 64 lines
// of a step, from 8 steps to the next ones it is the second distance, and from 64 lines to the next ones the first.
#define GEMMLET_WGMMA(function, type, count, columns, a_at, b_at, adds_at, a_transposed_at, b_transposed_at)          \
  template <bool a_transposed, bool b_transposed>                                                                     \
  __device__ __forceinline__ void function(float (&d)[count], unsigned long long a, unsigned long long b, int adds) { \
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, " adds_at                                                    \
                 ", 0;\n"                                                                                             \
                 "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" GEMMLET_D##count##_NAMES   \
                 "}, " a_at ", " b_at ", adds, 1, 1, " a_transposed_at ", " b_transposed_at ";\n}"                    \
                 : GEMMLET_D##count                                                                                   \
                 : "l"(a), "l"(b), "r"(adds), "n"(a_transposed), "n"(b_transposed)                                    \
                 : "memory");                                                                                         \
  }
GEMMLET_WGMMA(wgmma_f16, "f16", 64, "128", "%64", "%65", "%66", "%67", "%68")
GEMMLET_WGMMA(wgmma_bf16, "bf16", 64, "128", "%64", "%65", "%66", "%67", "%68")
GEMMLET_WGMMA(wgmma_f16, "f16", 128, "256", "%128", "%129", "%130", "%131", "%132")
GEMMLET_WGMMA(wgmma_bf16, "bf16", 128, "256", "%128", "%129", "%130", "%131", "%132")

// wgmma.mma_async.m64n256k8 and .m64n128k8 (tf32): likewise, of floats, of which the lowest 13 bits are not looked at. A
// lane has, of a, steps t of rows 16w + g and 16w + g + 8, and then steps t + 4 of them; a row of b in shared memory is
// 32 steps of a line.
#define GEMMLET_WGMMA_TF32(count, columns, a_at, b_at, adds_at)                                               \
  __device__ __forceinline__ void wgmma_tf32(float (&d)[count], const unsigned (&a)[4], unsigned long long b, \
                                             int adds) {                                                      \
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, " adds_at                                            \
                 ", 0;\n"                                                                                     \
                 "wgmma.mma_async.sync.aligned.m64n" columns "k8.f32.tf32.tf32 {" GEMMLET_D##count##_NAMES    \
                 "}, {" a_at "}, " b_at ", adds, 1, 1;\n}"                                                    \
                 : GEMMLET_D##count                                                                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds)                              \
                 : "memory");                                                                                 \
  }
GEMMLET_WGMMA_TF32(64, "128", "%64, %65, %66, %67", "%68", "%69")
GEMMLET_WGMMA_TF32(128, "256", "%128, %129, %130, %131", "%132", "%133")

#undef GEMMLET_PTX
#undef GEMMLET_MMA
#undef GEMMLET_WGMMA_TF32
#undef GEMMLET_WGMMA
#undef GEMMLET_D4
#undef GEMMLET_D16
#undef GEMMLET_D64
#undef GEMMLET_D128
#undef GEMMLET_D64_NAMES
#undef GEMMLET_D128_NAMES

}  // namespace gemmlet::ptx
#endif
