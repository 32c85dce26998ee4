// Matrix products on Hopper's tensor cores (wgmma, sm_90a): float16 and bfloat16, for large ones.
//
// Contract
//   See matmul.cuh. For sm_90a alone: no other architecture has the instruction. A block computes a tile of rows x
//   columns, each of its warpgroups 64 rows, from tiles of both operands in shared memory, `stages` of them in turns,
//   which copies (MmaLoader) fill from operands of any layout. Two stages are the tensor cores', so that they find the
//   next products when they are done with some, and the others are being copied.
//   With 128 (192) rows, 64 steps of k take an SM's tensor cores rows x 256 x 64 / 2048 = 1024 (1536) cycles. Shared
//   memory, of 128 bytes a cycle, is busy meanwhile for 640 (960) with what they read, 2 + 8 KB for each product of
//   64 x 256 x 16, and for 384 (448) with what is copied. That is 48 (37) bytes a cycle for each SM, out of an L2 cache
//   that may have less: more rows need less, but make fewer blocks, which may be too few, or leave SMs idle at the end.
//   The order of a sum: all steps, first to last, 16 at a time, in an order and with a rounding (of 2^-23 at most) that
//   are the tensor core's.
#pragma once

#include "cuda/matmul_mma.cuh"

namespace gemmlet {

template <class T_, int rows_, int columns_, int depth_, int stages_>
struct WgmmaTile {
  using T = T_;
  static constexpr int rows = rows_, columns = columns_, depth = depth_, stages = stages_;
  static constexpr int threads = rows / 64 * 128, size = sizeof(T);
  // So many tiles the copies run ahead.
  static constexpr int ahead = stages - 2;
  // All threads, or 256, where they cannot divide an operand's lines among them.
  static constexpr int copying(int lines) { return lines * 8 % threads == 0 ? threads : 256; }
  static_assert(rows % 64 == 0 && columns == 256 && depth == 64 && size == 2 && ahead > 0);

  // 64 numbers, 128 bytes, are a row: the steps of a line, or of a step 64 lines; the steps follow each other, and
  // then come the next 64 lines. Where 16 bytes are depends on the row, so that those of 8 rows are in as many banks.
  static constexpr int row_period = 8;
  static constexpr int row_bytes(int, bool) { return 128; }
  static constexpr int place(int, bool, int row, int pack) {
    return (pack / 8 * depth + row) * 128 + (pack % 8 ^ row % 8) * 16;
  }
  static constexpr int operand_bytes(int lines) { return lines * 128; }
  static constexpr int stage_bytes = operand_bytes(rows) + operand_bytes(columns);
  // Eight rows begin at a multiple of 1024 bytes, which the block's memory need not.
  static constexpr int alignment = 1024;
  static constexpr int loading = stages * stage_bytes + alignment - 16;
  // The sums go out through the same memory.
  static constexpr int out_row = columns + 8, finishing = rows * out_row * static_cast<int>(sizeof(float));
  static constexpr int shared_bytes = loading > finishing ? loading : finishing;
};

// Where a product of 16 steps finds an operand that WgmmaTile has placed there, and how far it is to the next 16 steps.
template <bool along_lines>
struct WgmmaOperand {
  unsigned long long descriptor;

  __device__ __forceinline__ explicit WgmmaOperand(const unsigned char* shared) {
    // Where a row is a line's, nothing is read of the first distance; CUTLASS has 16 bytes there.
    constexpr unsigned long long lines_apart = along_lines ? 64 * 128 : 16, eight_rows = 8 * 128, swizzle = 1;
    const unsigned long long address = ptx::address_bits(ptx::shared_address(shared));
    descriptor = (address & 0x3ffff) >> 4 | lines_apart >> 4 << 16 | eight_rows >> 4 << 32 | swizzle << 62;
  }
  __device__ __forceinline__ unsigned long long at(int stage, int step) const {
    return descriptor + (stage + step * (along_lines ? 16 * 128 : 32)) / 16;
  }
};

template <class Tile, bool a_along_lines, bool b_along_lines, class Epilogue>
__global__ void __launch_bounds__(Tile::threads, 1)
    matmul_wgmma(Operand<typename Tile::T> a, Operand<typename Tile::T> b, int k, int steps_per_split,
                 Epilogue epilogue) {
  using T = typename Tile::T;
  constexpr int ahead = Tile::ahead;
  unsigned char* const memory = dynamic_shared<unsigned char>();
  unsigned char* const shared = memory + (-ptx::address_bits(ptx::shared_address(memory)) & (Tile::alignment - 1));
  unsigned char* const b_shared = shared + Tile::operand_bytes(Tile::rows);

  const TileOrigin origin = tile_origin<Tile::rows, Tile::columns>(a.lines, b.lines);
  const StepRange steps = step_range(k, steps_per_split);
  const int tiles = tiles_of(steps, Tile::depth);

  MmaLoader<Tile, Tile::rows, a_along_lines> a_loader(a, origin.row, steps, shared);
  MmaLoader<Tile, Tile::columns, b_along_lines> b_loader(b, origin.column, steps, b_shared);
#pragma unroll 1
  for (int i = 0; i < ahead; ++i) {
    if (i < tiles) {
      a_loader.copy(i * Tile::stage_bytes);
      b_loader.copy(i * Tile::stage_bytes);
    }
    ptx::commit_copies();
  }

  const WgmmaOperand<a_along_lines> of_a(shared + threadIdx.x / 128 * Tile::operand_bytes(64));
  const WgmmaOperand<b_along_lines> of_b(b_shared);
  float sum[128] = {};

  // The main loop:
  int read = 0, write = ahead * Tile::stage_bytes;
  const auto next_stage = [](int at) {
    return at == (Tile::stages - 1) * Tile::stage_bytes ? 0 : at + Tile::stage_bytes;
  };
  for (int tile = 0; tile < tiles; ++tile) {
    // Copies, and stores of what is gathered, are seen by products after a fence of those who wrote and a barrier.
    ptx::wait_for_copies<ahead - 1>();
    ptx::fence_proxy_async();
    __syncthreads();
    ptx::fence_products();
#pragma unroll
    for (int step = 0; step < Tile::depth / 16; ++step) {
      if constexpr (same_type<T, float16>)
        ptx::wgmma_f16<a_along_lines, b_along_lines>(sum, of_a.at(read, step), of_b.at(read, step));
      else
        ptx::wgmma_bf16<a_along_lines, b_along_lines>(sum, of_a.at(read, step), of_b.at(read, step));
    }
    ptx::commit_products();
    read = next_stage(read);

    // The products of the stage that is written were waited for before the barrier, by everyone.
    if (tile + ahead < tiles) {
      a_loader.copy(write);
      b_loader.copy(write);
    }
    ptx::commit_copies();
    write = next_stage(write);
    ptx::wait_for_products<1>();
  }

  // The tail: through shared memory, which no product reads any more.
  ptx::finish_products(sum);
  __syncthreads();
  float* const sums = dynamic_shared<float>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* const out = sums + (warp * 16 + lane / 4) * Tile::out_row + lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < 32; ++j) {
    store_pack(out + j * 8, Pack<float, 2>{sum[4 * j], sum[4 * j + 1]});
    store_pack(out + j * 8 + 8 * Tile::out_row, Pack<float, 2>{sum[4 * j + 2], sum[4 * j + 3]});
  }
  __syncthreads();
  finish_rows<Tile::rows, Tile::columns, Tile::out_row, 1, Tile::threads>(sums, origin.column, epilogue,
                                                                          [&](int i) { return origin.row + i; });
}

}  // namespace gemmlet
