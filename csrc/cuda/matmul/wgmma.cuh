// Matmuls on Hopper's tensor cores (wgmma, sm_90a): float16, bfloat16, and float with its operands rounded to TF32.
//
// Contract
//   See common.cuh. For sm_90a alone: no other architecture has the instruction. Operands come through tensor maps (TMA):
//   one stride is 1 number, the other one a multiple of 16 bytes and no shorter than a row, and the first number's address
//   is a multiple of 16 bytes. k > 0, and no part of it is empty. m, n and k are any: what a box has beyond a matrix is
//   zeros.
//   The kernel's operands are x and y, a and b; or, if the tile is transposed, b and a, and it computes the transpose.
//   Those of 16 bits may lie in memory by lines or by steps. wgmma takes floats from shared memory by lines alone: those
//   of y must be so; x goes through registers, and may be either. (So it takes two matrices in row-major order transposed.)
//   A block computes tiles of rows x columns, lines of x and of y, in turn: the grid is persistent, at most one block for
//   each multiprocessor. Its first warpgroup is the producer: one thread of it copies tiles of both operands to `stages` of
//   shared memory. Each of the others is a consumer of 64 rows, which has wgmma read them from there, and writes its part
//   of the tile out while the producer fetches the next tile's operands. Barriers in shared memory tell when a stage is
//   full, and when empty.
//   `cluster` blocks compute tiles of the same columns at the same time: each copies a part of y to all of them, so that it
//   comes from the L2 cache once. Blocks walk over the tiles in groups of `group_rows` rows of (clusters of) tiles, column
//   by column, for what the L2 cache holds.
//   On an SM the tensor cores take 1024 cycles for a stage, 128 x 256 lines of 128 bytes. Shared memory, of 128 bytes a
//   cycle, is busy meanwhile for 640 with what they read and for 384 with what is copied, 48 KB, which are 48 bytes a cycle
//   from the L2 cache, or 32 in a cluster of two.
//   TF32 is float with 10 bits after the point: x is rounded to nearest, ties away from zero; y as a tensor map rounds, by
//   2^-10 at most.
//   The order of a sum: all steps, first to last, 16 (TF32: 8) at a time, in an order and with a rounding (of 2^-23 at
//   most) that are the tensor core's.
#pragma once

#include "cuda/matmul/common.cuh"
#include "cuda/ptx.cuh"

namespace gemmlet {

template <class T_, int rows_, int columns_, int stages_, int cluster_, int group_rows_, int transposed_>
struct WgmmaTile {
  using T = T_;
  static constexpr int rows = rows_, columns = columns_, stages = stages_, cluster = cluster_, group_rows = group_rows_;
  static constexpr bool transposed = transposed_;
  // A row of shared memory is 128 bytes, steps of a line or lines of a step; an instruction takes 32.
  static constexpr int size = sizeof(T), k_block = 128 / size, step = 32 / size;
  static constexpr int consumers = rows / 64, threads = (1 + consumers) * 128;
  static_assert((rows == 64 || rows == 128) && stages > 1);
  static_assert((size == 2 || size == 4) && (columns == 128 || columns == 256));
  static_assert(columns / cluster % k_block == 0);

  static constexpr int operand_bytes(int lines) { return lines * 128; }
  static constexpr int stage_bytes = operand_bytes(rows) + operand_bytes(columns);
  // Sums go out through memory of each warp's own, some columns at a time.
  static constexpr int out_columns = 64, out_bytes = 16 * out_columns * static_cast<int>(sizeof(float));
  static constexpr int out_offset = stages * stage_bytes, barrier_offset = out_offset + consumers * 4 * out_bytes;
  // Eight rows begin at a multiple of 1024 bytes, which the block's memory need not.
  static constexpr int alignment = 1024;
  static constexpr int shared_bytes = alignment - 16 + barrier_offset + 2 * stages * 8;

  // Two consumers' threads need more registers than the 168 that each of 384 has; a producer's need few.
  static constexpr bool moves_registers = consumers > 1;
  static constexpr int producer_registers = 40, consumer_registers = 232;
};

// Where wgmma finds an operand in shared memory, and how far it is to the next steps.
template <bool along_lines>
struct WgmmaOperand {
  unsigned long long descriptor;

  __device__ __forceinline__ explicit WgmmaOperand(ptx::SharedAddress shared) {
    // Where a row is a line's, nothing is read of the first distance; CUTLASS has 16 bytes there.
    constexpr unsigned long long lines_apart = along_lines ? 64 * 128 : 16, eight_rows = 8 * 128, swizzle = 1;
    const unsigned long long address = ptx::address_bits(shared);
    descriptor = (address & 0x3ffff) >> 4 | lines_apart >> 4 << 16 | eight_rows >> 4 << 32 | swizzle << 62;
  }
  __device__ __forceinline__ unsigned long long at(int stage, int i) const {
    return descriptor + (stage + i * (along_lines ? 16 * 128 : 32)) / 16;
  }
};

// Which of a consumer's lines is row r of a warp's 16 sums. Of floats that lie by steps it is not the r-th one, so that what
// the lanes of a warp read at once, 8 lines of 4 steps, is in as many banks.
template <class Tile, bool along_lines>
__device__ __forceinline__ constexpr int wgmma_line(int warp, int r) {
  if (Tile::size == 4 && along_lines) return warp / 2 * 32 + warp % 2 * 8 + r % 4 + r / 4 % 2 * 16 + r / 8 * 4;
  return warp * 16 + r;
}

// Reads x of a stage, floats, for instructions that take it from registers; see ptx::wgmma_tf32. Rows of shared memory
// are swizzled: the lowest three bits of a row's number are XORed into the places of its 16 bytes.
template <class Tile, bool along_lines>
class WgmmaReader {
 public:
  __device__ __forceinline__ WgmmaReader(ptx::SharedAddress shared, int consumer) {
    const int warp = threadIdx.x / 32 % 4, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int line = consumer * 64 + wgmma_line<Tile, along_lines>(warp, g + i % 2 * 8), step = t + i / 2 * 4;
      if constexpr (along_lines)
        from_[i] = shared + line / 32 * 4096 + step * 128 + (line % 32 / 4 ^ step) * 16 + line % 4 * 4;
      else
        from_[i] = shared + line * 128 + (step / 4 ^ line % 8) * 16 + step % 4 * 4;
    }
  }

  // What is left to do to round them is to cut bits off: half a unit of TF32 is added, but to what is infinite or NaN.
  __device__ __forceinline__ void read(unsigned (&to)[4][4], int stage) const {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const unsigned x =
            ptx::load_shared(along_lines ? from_[j] + stage + i * 1024 : ptx::flipped(from_[j] + stage, i * 32));
        to[i][j] = (x & 0x7fffffff) < 0x7f800000 ? x + 0x1000 : x;
      }
  }

 private:
  ptx::SharedAddress from_[4];
};

// The stages in turn, and the barriers of the one whose turn it is.
template <class Tile>
class WgmmaStages {
 public:
  __device__ __forceinline__ explicit WgmmaStages(ptx::SharedAddress shared)
      : barriers_(shared + Tile::barrier_offset) {}

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

// The tiles that are this block's, in turn. Blocks of a cluster have tiles of neighbouring rows, and equally many of them:
// some may lie beyond the matrix.
template <class Tile, class Epilogue>
class WgmmaTiles {
 public:
  __device__ __forceinline__ explicit WgmmaTiles(const Epilogue& epilogue)
      : x_lines_(Tile::transposed ? epilogue.n : epilogue.m),
        y_lines_(Tile::transposed ? epilogue.m : epilogue.n),
        tile_(blockIdx.x / Tile::cluster) {}

  __device__ __forceinline__ bool is_left() const {
    return tile_ < ((x_lines_ - 1) / rows + 1) * ((y_lines_ - 1) / Tile::columns + 1);
  }
  __device__ __forceinline__ void next() { tile_ += gridDim.x / Tile::cluster; }
  // A line of x and one of y.
  __device__ __forceinline__ TileOrigin origin() const {
    TileOrigin origin = tile_origin<rows, Tile::columns, Tile::group_rows>(tile_, x_lines_, y_lines_);
    origin.row += blockIdx.x % Tile::cluster * Tile::rows;
    return origin;
  }

 private:
  static constexpr int rows = Tile::rows * Tile::cluster;

  int x_lines_, y_lines_, tile_;
};

// Copies `count` lines of an operand's tile, from the first one on.
template <class Tile, bool along_lines, int count, class Copy>
__device__ __forceinline__ void copy_lines(ptx::SharedAddress to, int first, int line, int step, Copy copy) {
  if constexpr (along_lines) {
#pragma unroll
    for (int i = 0; i < count; i += Tile::k_block) copy(to + Tile::operand_bytes(first + i), line + first + i, step);
  } else {
    copy(to + Tile::operand_bytes(first), step, line + first);
  }
}

// The end of a tile: hands a warp's 16 rows of sums to the epilogue.
template <class Tile, class Epilogue>
class WgmmaFinish {
 public:
  // line_of(r) is the line of x that row r is.
  template <class LineOf>
  __device__ __forceinline__ WgmmaFinish(const Epilogue& epilogue, LineOf line_of, int first_column)
      : epilogue_(epilogue), first_column_(first_column) {
    column_ = transposed ? line_of(pack() * N) : first_column + pack() * N;
    // What it needs of memory is asked for while wgmma instructions still run.
    of_ = epilogue.template columns<N>(column_);
  }

  template <class LineOf>
  __device__ __forceinline__ void put(const float (&sum)[Tile::columns / 2], float* own, LineOf line_of) {
    const int g = lane() / 4, t = lane() % 4;
#pragma unroll 1
    for (int first = 0; first < Tile::columns; first += columns) {
      // Registers have no index: of all columns those are stored whose turn it is.
#pragma unroll
      for (int j = 0; j < Tile::columns / 8; ++j) {
        if (j * 8 / columns * columns != first) continue;
        const int column = j * 8 % columns + t * 2;
        if constexpr (transposed) {
#pragma unroll
          for (int i = 0; i < 4; ++i) own[place(column + i % 2, g / 4 + i / 2 * 2) + g % 4] = sum[4 * j + i];
        } else {
          float* const to = own + place(g, column / 4) + column % 4;
          store_pack(to, Pack<float, 2>{sum[4 * j], sum[4 * j + 1]});
          store_pack(to + 8 * columns, Pack<float, 2>{sum[4 * j + 2], sum[4 * j + 3]});
        }
      }
      __syncwarp();
      const Columns of = of_;
      const int column = column_;
      if constexpr (!transposed) {
        column_ += columns;
        of_ = epilogue_.template columns<N>(column_);
      }
      int from = place(lane() / packs, pack() * N / 4);
      // One copy of the epilogue: it may be long.
#pragma unroll 1
      for (int row = lane() / packs; row < out_rows; row += rows_apart) {
        float value[N];
#pragma unroll
        for (int i = 0; i < N; i += 4) {
          const Pack<float, 4> four = load_pack<4>(own + (from ^ i));
#pragma unroll
          for (int j = 0; j < 4; ++j) value[i + j] = four.value[j];
        }
        from = (from ^ flips) + rows_apart * out_row;
        epilogue_.template put<N>(transposed ? first_column_ + first + row : line_of(row), column, of, value);
      }
      __syncwarp();
    }
  }

 private:
  static constexpr int N = pack_size<typename Epilogue::T>, columns = Tile::out_columns;
  static constexpr bool transposed = Tile::transposed;
  // Of what goes out together, in packs. A row of out is a column here, if transposed.
  static constexpr int out_rows = transposed ? columns : 16, out_row = transposed ? 16 : columns;
  static constexpr int packs = out_row / N, rows_apart = 32 / packs;
  using Columns = typename Epilogue::template Columns<N>;

  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int pack() { return lane() % packs; }

  // Where 16 bytes of a row of out are, so that what lanes write at once is in different banks, and what they read:
  // 4 rows by 8 columns of each, as two numbers or as one; and several packs of a row, or of neighbouring rows.
  static __device__ __forceinline__ int place(int row, int four) {
    if constexpr (transposed)
      return row / 2 * 32 + (row / 4 ^ row) % 2 * 16 + (four ^ row / 2 % 2 * 3) * 4;
    else
      return row * columns + (four ^ row % 4 * 2 ^ four / 8) * 4;
  }
  // Of a place, from a row to the one that a lane reads next.
  static constexpr int flips = !transposed && rows_apart == 2 ? 16 : 0;

  const Epilogue& epilogue_;
  int first_column_, column_;
  Columns of_;
};

template <class Tile, bool x_along_lines, bool y_along_lines, class Epilogue>
__global__ void __launch_bounds__(Tile::threads, 1) __cluster_dims__(Tile::cluster, 1, 1)
    matmul_wgmma(const __grid_constant__ ptx::TensorMap x, const __grid_constant__ ptx::TensorMap y, int k,
                 int steps_per_split, Epilogue epilogue) {
  using T = typename Tile::T;
  static_assert(Tile::size == 2 || !y_along_lines);
  unsigned char* const memory = dynamic_shared<unsigned char>();
  const int beyond = -ptx::address_bits(ptx::shared_address(memory)) & (Tile::alignment - 1);
  const ptx::SharedAddress shared = ptx::shared_address(memory) + beyond;
  const StepRange steps = step_range(k, steps_per_split);
  const int warpgroup = threadIdx.x / 128;

  WgmmaTiles<Tile, Epilogue> tiles(epilogue);
  WgmmaStages<Tile> stages(shared);
  if (threadIdx.x == 0) {
    ptx::prefetch_map(x);
    ptx::prefetch_map(y);
    stages.init();
  }
  if constexpr (Tile::cluster > 1) {
    ptx::arrive_at_cluster();
    ptx::wait_for_cluster();
  } else {
    __syncthreads();
  }

  if (warpgroup == 0) {
    if constexpr (Tile::moves_registers) ptx::give_registers<Tile::producer_registers>();
    if (threadIdx.x == 0) {
      // A stage is filled by all blocks of the cluster, when all of them have left it.
      constexpr int share = Tile::columns / Tile::cluster;
      const int first = blockIdx.x % Tile::cluster * share;
      for (; tiles.is_left(); tiles.next()) {
        const TileOrigin origin = tiles.origin();
#pragma unroll 1
        for (int step = steps.first; step < steps.last; step += Tile::k_block) {
          ptx::wait_for_phase(stages.empty(), stages.parity() ^ 1);
          ptx::arrive_expecting(stages.full(), Tile::stage_bytes);
          const ptx::SharedAddress to = shared + stages.offset();
          copy_lines<Tile, x_along_lines, Tile::rows>(to, 0, origin.row, step,
                                                      [&](ptx::SharedAddress box, int inner, int outer) {
                                                        ptx::copy_box(box, x, inner, outer, stages.full());
                                                      });
          copy_lines<Tile, y_along_lines, share>(to + Tile::operand_bytes(Tile::rows), first, origin.column, step,
                                                 [&](ptx::SharedAddress box, int inner, int outer) {
                                                   if constexpr (Tile::cluster > 1)
                                                     ptx::copy_box_to_blocks(box, y, inner, outer, stages.full(),
                                                                             (1 << Tile::cluster) - 1);
                                                   else
                                                     ptx::copy_box(box, y, inner, outer, stages.full());
                                                 });
          stages.next();
        }
      }
    }
  } else {
    if constexpr (Tile::moves_registers) ptx::take_registers<Tile::consumer_registers>();
    const int consumer = warpgroup - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const WgmmaOperand<x_along_lines> of_x(shared + Tile::operand_bytes(consumer * 64));
    const WgmmaOperand<y_along_lines> of_y(shared + Tile::operand_bytes(Tile::rows));
    float* const own = reinterpret_cast<float*>(memory + beyond + Tile::out_offset) +
                       (consumer * 4 + warp) * Tile::out_bytes / static_cast<int>(sizeof(float));
    // Each warp leaves a stage, in all blocks that fill it.
    const auto leave = [&](ptx::SharedAddress empty) {
      if (lane < Tile::cluster) ptx::arrive_at(empty, lane);
    };
    for (; tiles.is_left(); tiles.next()) {
      float sum[Tile::columns / 2];
      ptx::SharedAddress last{};
      if constexpr (Tile::size == 2) {
#pragma unroll 1
        for (int step = steps.first; step < steps.last; step += Tile::k_block) {
          ptx::wait_for_phase(stages.full(), stages.parity());
          ptx::fence_wgmma();
#pragma unroll
          for (int i = 0; i < Tile::k_block / Tile::step; ++i) {
            const unsigned long long from_x = of_x.at(stages.offset(), i), from_y = of_y.at(stages.offset(), i);
            const int adds = i > 0 || step > steps.first;
            if constexpr (same_type<T, float16>)
              ptx::wgmma_f16<x_along_lines, y_along_lines>(sum, from_x, from_y, adds);
            else
              ptx::wgmma_bf16<x_along_lines, y_along_lines>(sum, from_x, from_y, adds);
          }
          ptx::commit_wgmma();
          // While these run, those of the stage before are done.
          ptx::wait_for_wgmma<1>();
          if (step > steps.first) leave(last);
          last = stages.empty();
          stages.next();
        }
      } else {
        const WgmmaReader<Tile, x_along_lines> reader(shared, consumer);
        // The next stage is read while wgmma instructions run. Registers that they take may be written when none runs:
        // ptxas would else wait for each of them. Little is left to do then, and those of the other consumers run.
        unsigned read[4][4], rounded[4][4];
        ptx::wait_for_phase(stages.full(), stages.parity());
        reader.read(read, stages.offset());
#pragma unroll 1
        for (int step = steps.first; step < steps.last; step += Tile::k_block) {
#pragma unroll
          for (int i = 0; i < 16; ++i) rounded[i / 4][i % 4] = ptx::cut_to_tf32(read[i / 4][i % 4]);
          ptx::fence_wgmma();
#pragma unroll
          for (int i = 0; i < 4; ++i)
            ptx::wgmma_tf32(sum, rounded[i], of_y.at(stages.offset(), i), i > 0 || step > steps.first);
          ptx::commit_wgmma();
          last = stages.empty();
          stages.next();
          if (step + Tile::k_block < steps.last) {
            ptx::wait_for_phase(stages.full(), stages.parity());
            reader.read(read, stages.offset());
          }
          ptx::wait_for_wgmma<0>();
          leave(last);
        }
      }
      // While the last wgmma instructions run, of 16 bits:
      const TileOrigin origin = tiles.origin();
      const auto line_of = [&](int r) { return origin.row + consumer * 64 + wgmma_line<Tile, x_along_lines>(warp, r); };
      WgmmaFinish<Tile, Epilogue> finish(epilogue, line_of, origin.column);
      ptx::finish_wgmma(sum);
      if constexpr (Tile::size == 2) leave(last);
      finish.put(sum, own, line_of);
    }
  }
  // Nobody ends while others may still arrive at its barriers. (A warp comes to the cluster's as one.)
  if constexpr (Tile::cluster > 1) {
    __syncwarp();
    ptx::arrive_at_cluster();
    ptx::wait_for_cluster();
  }
}

}  // namespace gemmlet
