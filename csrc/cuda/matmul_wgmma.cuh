// Matmuls on Hopper's tensor cores (wgmma, sm_90a): float16 and bfloat16.
//
// Contract
//   See matmul.cuh. For sm_90a alone: no other architecture has the instruction. Operands come through tensor maps (TMA):
//   one stride is 1 number, the other one a multiple of 16 bytes and no shorter than a row, and the first number's address
//   is a multiple of 16 bytes. k > 0. m, n and k are any: what a box has beyond a matrix is zeros.
//   A block computes tiles of rows x columns in turn (the grid is persistent: at most one block for each multiprocessor).
//   Its first warpgroup is the producer: one thread of it copies tiles of both operands to `stages` of shared memory. Each
//   of the others is a consumer of 64 rows, which has wgmma read them from there, and writes its part of the tile out while
//   the producer fetches the next tile's operands. Barriers in shared memory tell when a stage is full, and when empty.
//   `cluster` blocks compute tiles above each other at the same time: each copies a part of the columns' operand to all of
//   them, so that it comes from the L2 cache once. Blocks walk over the tiles in groups of `group_rows` rows of
//   (clusters of) tiles, column by column, for what the L2 cache holds.
//   On an SM 128 x 256 x 64 take the tensor cores 128 x 256 x 64 / 2048 = 1024 cycles. Shared memory, of 128 bytes a cycle,
//   is busy meanwhile for 640 with what they read and for 384 with what is copied, 48 KB, which are 48 bytes a cycle from
//   the L2 cache, or 32 in a cluster of two.
//   The order of a sum: all steps, first to last, 16 at a time, in an order and with a rounding (of 2^-23 at most) that
//   are the tensor core's.
#pragma once

#include "cuda/matmul.cuh"
#include "cuda/ptx.cuh"
#include "cuda/shared.cuh"

namespace gemmlet {

template <class T_, int rows_, int columns_, int stages_, int cluster_, int group_rows_>
struct WgmmaTile {
  using T = T_;
  static constexpr int rows = rows_, columns = columns_, stages = stages_, cluster = cluster_, group_rows = group_rows_;
  // A row of shared memory is 128 bytes: so many steps of a line or lines of a step.
  static constexpr int size = sizeof(T), depth = 128 / size;
  static constexpr int consumers = rows / 64, threads = (1 + consumers) * 128;
  static_assert(rows % 64 == 0 && (columns == 128 || columns == 256) && size == 2 && stages > 1);
  static_assert(columns / cluster % depth == 0);

  static constexpr int operand_bytes(int lines) { return lines * 128; }
  static constexpr int stage_bytes = operand_bytes(rows) + operand_bytes(columns);
  // Sums go out through memory of each warp's own, so many columns at a time.
  static constexpr int out_columns = 64, out_bytes = 16 * out_columns * static_cast<int>(sizeof(float));
  static constexpr int out_offset = stages * stage_bytes, barrier_offset = out_offset + consumers * 4 * out_bytes;
  // Eight rows begin at a multiple of 1024 bytes, which the block's memory need not.
  static constexpr int alignment = 1024;
  static constexpr int shared_bytes = alignment - 16 + barrier_offset + 2 * stages * 8;
  // A producer needs few registers. What it gives back is for the consumers' sums; they must be multiples of 8.
  static constexpr int producer_registers = consumers == 2 ? 40 : 32, consumer_registers = consumers == 2 ? 232 : 160;
  static constexpr bool moves_registers = consumers > 1;
  static_assert(consumers <= 3);
};

// Where a product of 16 steps finds an operand in shared memory, and how far it is to the next 16 steps.
template <bool along_lines>
struct WgmmaOperand {
  unsigned long long descriptor;

  __device__ __forceinline__ explicit WgmmaOperand(ptx::SharedAddress shared) {
    // Where a row is a line's, nothing is read of the first distance; CUTLASS has 16 bytes there.
    constexpr unsigned long long lines_apart = along_lines ? 64 * 128 : 16, eight_rows = 8 * 128, swizzle = 1;
    const unsigned long long address = ptx::address_bits(shared);
    descriptor = (address & 0x3ffff) >> 4 | lines_apart >> 4 << 16 | eight_rows >> 4 << 32 | swizzle << 62;
  }
  __device__ __forceinline__ unsigned long long at(int stage, int step) const {
    return descriptor + (stage + step * (along_lines ? 16 * 128 : 32)) / 16;
  }
};

// The stages in turn, and the barriers of the one whose turn it is.
template <class Tile>
class WgmmaStages {
 public:
  __device__ __forceinline__ explicit WgmmaStages(ptx::SharedAddress shared) : barriers_(shared + Tile::barrier_offset) {}

  // Has come to the end of a phase when all its bytes are there; or when all consumers are done with it.
  __device__ __forceinline__ ptx::SharedAddress full() const { return barriers_ + 8 * stage_; }
  __device__ __forceinline__ ptx::SharedAddress empty() const { return full() + 8 * Tile::stages; }
  __device__ __forceinline__ int offset() const { return stage_ * Tile::stage_bytes; }
  // Of the phase of full() in which the stage is filled. The one of empty() in which it was left is the other one, and
  // so it counts as left before it is filled for the first time.
  __device__ __forceinline__ unsigned parity() const { return parity_; }
  __device__ __forceinline__ void next() {
    if (++stage_ == Tile::stages) {
      stage_ = 0;
      parity_ ^= 1;
    }
  }

  // By one thread, before any other use.
  __device__ __forceinline__ void init() {
    for (; parity_ == 0; next()) {
      ptx::init_barrier(full(), 1);
      ptx::init_barrier(empty(), Tile::consumers * 4 * Tile::cluster);
    }
    parity_ = 0;
    ptx::fence_barrier_init();
  }

 private:
  ptx::SharedAddress barriers_;
  int stage_ = 0;
  unsigned parity_ = 0;
};

// Calls f with the origin of each tile that is this block's. Blocks of a cluster have their tiles above each other, and
// equally many of them: some may lie below the matrix.
template <class Tile, class F>
__device__ __forceinline__ void for_tiles(int m, int n, F f) {
  constexpr int rows = Tile::rows * Tile::cluster;
  const int tiles = ((m - 1) / rows + 1) * ((n - 1) / Tile::columns + 1);
  const int cluster = blockIdx.x / Tile::cluster, clusters = gridDim.x / Tile::cluster;
  for (int tile = cluster; tile < tiles; tile += clusters) {
    TileOrigin origin = tile_origin<rows, Tile::columns, Tile::group_rows>(tile, m, n);
    origin.row += blockIdx.x % Tile::cluster * Tile::rows;
    f(origin);
  }
}

// Copies one operand's part of a tile: so many lines, `share` of them from the first one on, of `depth` steps.
template <class Tile, bool along_lines, int share, class Copy>
__device__ __forceinline__ void copy_lines(ptx::SharedAddress to, int first, int line, int step, Copy copy) {
  if constexpr (along_lines) {
#pragma unroll
    for (int i = 0; i < share; i += Tile::depth)
      copy(to + Tile::operand_bytes(first + i), line + first + i, step);
  } else {
    copy(to + Tile::operand_bytes(first), step, line + first);
  }
}

// What a warp does at the end of a tile: it hands 16 rows of sums to the epilogue.
template <class Tile, class Epilogue>
__device__ __forceinline__ void finish_warp(const float (&sum)[Tile::columns / 2], float* own, TileOrigin origin,
                                            const Epilogue& epilogue) {
  constexpr int N = pack_size<typename Epilogue::T>, columns = Tile::out_columns, packs = columns / N;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  // 16 bytes are somewhere else in each of four rows, and in both halves of a row: eight lanes write to different banks,
  // and read from them.
  const auto place = [](int row, int pack) { return row * columns + (pack ^ row % 4 * 2 ^ pack / 8) * 4; };
#pragma unroll 1
  for (int first = 0; first < Tile::columns; first += columns) {
    // Registers have no index: of all columns those are stored whose turn it is.
#pragma unroll
    for (int j = 0; j < Tile::columns / 8; ++j) {
      if (j * 8 / columns * columns != first) continue;
      float* const to = own + place(g, j * 8 % columns / 4 + t / 2) + t % 2 * 2;
      store_pack(to, Pack<float, 2>{sum[4 * j], sum[4 * j + 1]});
      store_pack(to + 8 * columns, Pack<float, 2>{sum[4 * j + 2], sum[4 * j + 3]});
    }
    __syncwarp();
    const int pack = lane % packs, column = origin.column + first + pack * N;
    const auto of = epilogue.template columns<N>(column);
    // One copy of the epilogue: it may be long.
#pragma unroll 1
    for (int row = lane / packs; row < 16; row += 32 / packs) {
      float value[N];
#pragma unroll
      for (int i = 0; i < N; i += 4) {
        const Pack<float, 4> four = load_pack<4>(own + place(row, (pack * N + i) / 4));
#pragma unroll
        for (int j = 0; j < 4; ++j) value[i + j] = four.value[j];
      }
      epilogue.template put<N>(origin.row + row, column, of, value);
    }
    __syncwarp();
  }
}

template <class Tile, bool a_along_lines, bool b_along_lines, class Epilogue>
__global__ void __launch_bounds__(Tile::threads, 1) __cluster_dims__(Tile::cluster, 1, 1)
    matmul_wgmma(const __grid_constant__ ptx::TensorMap a, const __grid_constant__ ptx::TensorMap b, int k,
                 int steps_per_split, Epilogue epilogue) {
  using T = typename Tile::T;
  unsigned char* const memory = dynamic_shared<unsigned char>();
  const int beyond = -ptx::address_bits(ptx::shared_address(memory)) & (Tile::alignment - 1);
  const ptx::SharedAddress shared = ptx::shared_address(memory) + beyond;
  const StepRange steps = step_range(k, steps_per_split);
  const int warpgroup = threadIdx.x / 128;

  WgmmaStages<Tile> stages(shared);
  if (threadIdx.x == 0) stages.init();
  if constexpr (Tile::cluster > 1)
    ptx::sync_cluster();
  else
    __syncthreads();

  if (warpgroup == 0) {
    if constexpr (Tile::moves_registers) ptx::give_registers<Tile::producer_registers>();
    if (threadIdx.x == 0) {
      // A stage is filled by all blocks of the cluster, when all of them have left it.
      constexpr int share = Tile::columns / Tile::cluster;
      const int first = blockIdx.x % Tile::cluster * share;
      for_tiles<Tile>(epilogue.m, epilogue.n, [&](TileOrigin origin) {
#pragma unroll 1
        for (int step = steps.first; step < steps.last; step += Tile::depth) {
          ptx::wait_for_phase(stages.empty(), stages.parity() ^ 1);
          ptx::arrive_expecting(stages.full(), Tile::stage_bytes);
          const ptx::SharedAddress to = shared + stages.offset();
          copy_lines<Tile, a_along_lines, Tile::rows>(
              to, 0, origin.row, step, [&](ptx::SharedAddress box, int inner, int outer) {
                ptx::copy_box(box, a, inner, outer, stages.full());
              });
          copy_lines<Tile, b_along_lines, share>(
              to + Tile::operand_bytes(Tile::rows), first, origin.column, step,
              [&](ptx::SharedAddress box, int inner, int outer) {
                if constexpr (Tile::cluster > 1)
                  ptx::copy_box_to_blocks(box, b, inner, outer, stages.full(), (1 << Tile::cluster) - 1);
                else
                  ptx::copy_box(box, b, inner, outer, stages.full());
              });
          stages.next();
        }
      });
    }
  } else {
    if constexpr (Tile::moves_registers) ptx::take_registers<Tile::consumer_registers>();
    const int consumer = warpgroup - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const WgmmaOperand<a_along_lines> of_a(shared + Tile::operand_bytes(consumer * 64));
    const WgmmaOperand<b_along_lines> of_b(shared + Tile::operand_bytes(Tile::rows));
    float* const own = reinterpret_cast<float*>(memory + beyond + Tile::out_offset) +
                       (consumer * 4 + warp) * Tile::out_bytes / static_cast<int>(sizeof(float));
    // Each warp leaves a stage, in all blocks that fill it.
    const auto leave = [&](ptx::SharedAddress empty) {
      if (lane < Tile::cluster) ptx::arrive_at(empty, lane);
    };
    for_tiles<Tile>(epilogue.m, epilogue.n, [&](TileOrigin origin) {
      float sum[Tile::columns / 2];
      ptx::SharedAddress last{};
#pragma unroll 1
      for (int step = steps.first; step < steps.last; step += Tile::depth) {
        ptx::wait_for_phase(stages.full(), stages.parity());
        ptx::fence_products();
#pragma unroll
        for (int i = 0; i < Tile::depth / 16; ++i) {
          const int adds = i > 0 || step > steps.first;
          if constexpr (same_type<T, float16>)
            ptx::wgmma_f16<a_along_lines, b_along_lines>(sum, of_a.at(stages.offset(), i), of_b.at(stages.offset(), i),
                                                         adds);
          else
            ptx::wgmma_bf16<a_along_lines, b_along_lines>(sum, of_a.at(stages.offset(), i), of_b.at(stages.offset(), i),
                                                          adds);
        }
        ptx::commit_products();
        // While these run, those of the stage before are done.
        ptx::wait_for_products<1>();
        if (step > steps.first) leave(last);
        last = stages.empty();
        stages.next();
      }
      ptx::finish_products(sum);
      leave(last);
      origin.row += consumer * 64 + warp * 16;
      finish_warp<Tile>(sum, own, origin, epilogue);
    });
  }
  // Nobody ends while others may still arrive at its barriers.
  if constexpr (Tile::cluster > 1) ptx::sync_cluster();
}

}  // namespace gemmlet
