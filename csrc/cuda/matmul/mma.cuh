// Matmuls on tensor cores (mma.sync, sm_80): float16, bfloat16, and float with its operands rounded to TF32.
//
// Contract
//   See common.cuh. A block computes a tile of rows x columns, a warp some fragments of 16 x 16 of it, from tiles of both
//   operands in shared memory, which copies that run ahead (cp.async) fill round-robin, `stages` of them.
//   Operands lie in shared memory as they do in memory, step by step or line by line, and are transposed, where they
//   must be, when they are read from there. 16 bytes are copied at a time where the operand is packed; else they are
//   gathered number by number, which takes any layout, and several times as long.
//   TF32 is float with 10 bits after the point, rounded to nearest, ties away from zero; its products are exact in float.
//   The order of a sum: a K block is cut into `slices`, one for each group of warps. A slice adds its steps of
//   every tile, first to last, 16 (TF32: 8) at a time, in an order and with a rounding (of 2^-23 at most) that are the
//   tensor core's; then the slices are added, first to last.
#pragma once

#include "cuda/matmul/common.cuh"
#include "cuda/ptx.cuh"

namespace gemmlet {

template <class T_, int rows_, int columns_, int k_block_, int row_warps_, int column_warps_, int slices_, int stages_>
struct MmaTile {
  using T = T_;
  static constexpr int rows = rows_, columns = columns_, k_block = k_block_, slices = slices_, stages = stages_;
  static constexpr int row_warps = row_warps_, column_warps = column_warps_, slice_warps = row_warps * column_warps;
  static constexpr int threads = 32 * slice_warps * slices;
  // In fragments of 16 rows or columns.
  static constexpr int warp_rows = rows / row_warps / 16, warp_columns = columns / column_warps / 16;
  // An instruction takes 32 bytes of a line.
  static constexpr int size = sizeof(T), slice_k = k_block / slices, slice_steps = slice_k * size / 32;
  static_assert(warp_rows * row_warps * 16 == rows && warp_columns * column_warps * 16 == columns);
  static_assert(slice_k * slices == k_block && slice_steps * 32 == slice_k * size && slice_steps % 2 == 0);

  // Rows of an operand's tile begin 16 bytes further apart than they are long, or 32, for steps in float: then what a warp
  // reads at once, 8 times 16 bytes, or 4 times 32, is in as many banks.
  static constexpr int row_bytes(int lines, bool along_lines) {
    return along_lines ? lines * size + (size == 4 ? 32 : 16) : k_block * size + 16;
  }
  static constexpr int operand_bytes(int lines) {
    const int by_line = lines * row_bytes(lines, false), by_step = k_block * row_bytes(lines, true);
    return by_line > by_step ? by_line : by_step;
  }
  static constexpr int stage_bytes = operand_bytes(rows) + operand_bytes(columns);
  // The sums go out through the same memory.
  static constexpr int out_row = columns + 8, finishing = slices * rows * out_row * static_cast<int>(sizeof(float));
  static constexpr int shared_bytes = stages * stage_bytes > finishing ? stages* stage_bytes : finishing;
  // By the registers that sums and fragments take.
  static constexpr int registers = 8 * warp_rows * warp_columns + 8 * (warp_rows + warp_columns) + 48;
  static constexpr int blocks = 2 * threads * registers <= 65536 ? 2 : 1;
};

// Copies tiles of an operand to shared memory, one after the other. A row of a tile is there what is contiguous in
// memory: the lines of a step, or the steps of a line.
template <class Tile, int lines, bool along_lines>
class MmaLoader {
 public:
  using T = typename Tile::T;

  __device__ __forceinline__ MmaLoader(const Operand<T>& operand, int first_line, StepRange steps,
                                       unsigned char* shared)
      : packed_(operand.packed), tile_stride_(Tile::k_block * operand.step_stride) {
    const int inner = threadIdx.x % packs * V, outer = threadIdx.x / packs;
    const int lines_left = operand.lines - first_line, steps_left = steps.last - steps.first;
    const Index outer_stride = along_lines ? operand.step_stride : operand.line_stride;
    inner_stride_ = along_lines ? operand.line_stride : operand.step_stride;
    copy_stride_ = apart * outer_stride;
    from_ = operand.data + static_cast<Index>(first_line) * operand.line_stride +
            static_cast<Index>(steps.first) * operand.step_stride + inner * inner_stride_ + outer * outer_stride;
    to_ = ptx::shared_address(shared) + outer * row_bytes + threadIdx.x % packs * 16;
    inner_left_ = (along_lines ? lines_left : steps_left) - inner;
    outer_left_ = (along_lines ? steps_left : lines_left) - outer;
  }

  // The next tile, to `offset` bytes after the first one.
  __device__ __forceinline__ void copy(int offset) {
    const int valid = max(0, min(inner_left_, V));
    const T* from = from_;
    if (packed_) {
#pragma unroll
      for (int i = 0; i < copies; ++i) {
        ptx::copy_async<16>(to_ + offset + i * apart * row_bytes, from, i * apart < outer_left_ ? valid * size : 0);
        from += copy_stride_;
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < copies; ++i) {
        gather(to_ + offset + i * apart * row_bytes, from, i * apart < outer_left_ ? valid : 0);
        from += copy_stride_;
      }
    }
    from_ += tile_stride_;
    (along_lines ? outer_left_ : inner_left_) -= Tile::k_block;
  }

 private:
  static constexpr int size = Tile::size, V = 16 / size, row_bytes = Tile::row_bytes(lines, along_lines);
  // Packs of a row; and a thread's copies, `apart` rows from one to the next.
  static constexpr int packs = (along_lines ? lines : Tile::k_block) / V, apart = Tile::threads / packs;
  static constexpr int copies = lines * Tile::k_block / V / Tile::threads;
  static_assert(apart * packs == Tile::threads && copies * V * Tile::threads == lines * Tile::k_block);

  __device__ __forceinline__ void gather(ptx::SharedAddress to, const T* from, int valid) {
    if constexpr (size == 4) {
#pragma unroll
      for (int j = 0; j < V; ++j) ptx::copy_async<4>(to + j * 4, from + j * inner_stride_, j < valid ? 4 : 0);
    } else {
      unsigned pairs[4];
#pragma unroll
      for (int j = 0; j < V; j += 2) {
        const unsigned low = j < valid ? from[j * inner_stride_].bits : 0;
        const unsigned high = j + 1 < valid ? from[(j + 1) * inner_stride_].bits : 0;
        pairs[j / 2] = low | high << 16;
      }
      ptx::store_shared(to, pairs);
    }
  }

  bool packed_;
  const T* from_;
  Index inner_stride_, copy_stride_, tile_stride_;
  int inner_left_, outer_left_;
  ptx::SharedAddress to_;
};

// Reads an operand's fragments, of 16 lines x 32 bytes of steps, from shared memory: for each quarter, 8 lines x 16 bytes,
// a lane gets one number (or pair). mma.sync wants those of a by step and then by line, and those of b, which are two
// fragments to it, by line and then by step.
template <class Tile, int lines, bool along_lines, bool is_b>
class MmaReader {
 public:
  __device__ __forceinline__ MmaReader(int first_line, int first_step, const unsigned char* shared) {
    const int lane = threadIdx.x % 32;
    int line = first_line, step = first_step;
    if constexpr (along_lines && size == 4) {
      line += lane / 4;
      step += lane % 4;
    } else {
      line += upper(lane / 8, is_b) * 8 + (along_lines ? 0 : lane % 8);
      step += upper(lane / 8, !is_b) * V + (along_lines ? lane % 8 : 0);
    }
    from_ =
        ptx::shared_address(shared) + (along_lines ? step * row_bytes + line * size : line * row_bytes + step * size);
  }

  template <int count>
  __device__ __forceinline__ void read(unsigned (&to)[count][4], int stage, int step) const {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const ptx::SharedAddress from =
          from_ + stage + (along_lines ? step * 32 / size * row_bytes + i * 16 * size : step * 32 + i * 16 * row_bytes);
      if constexpr (!along_lines || size == 2) {
        ptx::load_matrices<along_lines>(to[i], from);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j)
          to[i][j] = ptx::load_shared(from + upper(j, is_b) * 8 * size + upper(j, !is_b) * V * row_bytes);
      }
      if constexpr (size == 4) {
#pragma unroll
        for (int j = 0; j < 4; ++j) to[i][j] = ptx::tf32_of_float(to[i][j]);
      }
    }
  }

 private:
  static constexpr int size = Tile::size, V = 16 / size, row_bytes = Tile::row_bytes(lines, along_lines);
  // The upper or the lower bit of a quarter's number.
  static constexpr int upper(int quarter, bool yes) { return yes ? quarter / 2 : quarter % 2; }

  ptx::SharedAddress from_;
};

template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const unsigned (&a)[4], unsigned b_low, unsigned b_high) {
  if constexpr (same_type<T, float16>)
    ptx::mma_f16(d, a, b_low, b_high);
  else if constexpr (same_type<T, bfloat16>)
    ptx::mma_bf16(d, a, b_low, b_high);
  else
    ptx::mma_tf32(d, a, b_low, b_high);
}

template <class Tile, bool a_along_lines, bool b_along_lines, class Epilogue>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks)
    matmul_mma(Operand<typename Tile::T> a, Operand<typename Tile::T> b, int k, int steps_per_split,
               Epilogue epilogue) {
  using T = typename Tile::T;
  constexpr int rows = Tile::warp_rows, columns = Tile::warp_columns;
  unsigned char* const shared = dynamic_shared<unsigned char>();
  unsigned char* const b_shared = shared + Tile::operand_bytes(Tile::rows);

  const TileOrigin origin = tile_origin<Tile::rows, Tile::columns>(blockIdx.x, a.lines, b.lines);
  const StepRange steps = step_range(k, steps_per_split);
  const int tiles = tiles_of(steps, Tile::k_block);

  MmaLoader<Tile, Tile::rows, a_along_lines> a_loader(a, origin.row, steps, shared);
  MmaLoader<Tile, Tile::columns, b_along_lines> b_loader(b, origin.column, steps, b_shared);
#pragma unroll 1
  for (int i = 0; i < Tile::stages - 1; ++i) {
    if (i < tiles) {
      a_loader.copy(i * Tile::stage_bytes);
      b_loader.copy(i * Tile::stage_bytes);
    }
    ptx::commit_copies();
  }

  const int warp = threadIdx.x / 32, slice = warp / Tile::slice_warps;
  const int row = warp % Tile::slice_warps / Tile::column_warps * rows * 16;
  const int column = warp % Tile::column_warps * columns * 16;
  const MmaReader<Tile, Tile::rows, a_along_lines, false> a_reader(row, slice * Tile::slice_k, shared);
  const MmaReader<Tile, Tile::columns, b_along_lines, true> b_reader(column, slice * Tile::slice_k, b_shared);

  float sum[rows][columns][2][4] = {};
  unsigned a_now[2][rows][4], b_now[2][columns][4];
  ptx::wait_for_copies<Tile::stages - 2>();
  __syncthreads();
  a_reader.read(a_now[0], 0, 0);
  b_reader.read(b_now[0], 0, 0);

  // The main loop:
  int read = 0, write = (Tile::stages - 1) * Tile::stage_bytes;
  const auto next_stage = [](int at) {
    return at == (Tile::stages - 1) * Tile::stage_bytes ? 0 : at + Tile::stage_bytes;
  };
  for (int tile = 0; tile < tiles; ++tile) {
    // The stage that is written was read to its end before the last barrier.
    if (tile + Tile::stages - 1 < tiles) {
      a_loader.copy(write);
      b_loader.copy(write);
    }
    ptx::commit_copies();
    write = next_stage(write);

#pragma unroll
    for (int step = 0; step < Tile::slice_steps; ++step) {
      int next = step + 1;
      if (next == Tile::slice_steps) {
        next = 0;
        ptx::wait_for_copies<Tile::stages - 2>();
        __syncthreads();
        read = next_stage(read);
      }
      a_reader.read(a_now[(step + 1) % 2], read, next);
      b_reader.read(b_now[(step + 1) % 2], read, next);
#pragma unroll
      for (int i = 0; i < rows; ++i)
#pragma unroll
        for (int j = 0; j < columns; ++j)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            multiply_add<T>(sum[i][j][half], a_now[step % 2][i], b_now[step % 2][j][2 * half],
                            b_now[step % 2][j][2 * half + 1]);
    }
  }

  // The tail: through shared memory, which no copy writes any more.
  ptx::wait_for_copies<0>();
  __syncthreads();
  float* const sums = dynamic_shared<float>();
  const int lane = threadIdx.x % 32;
  float* const out = sums + (slice * Tile::rows + row + lane / 4) * Tile::out_row + column + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < rows; ++i)
#pragma unroll
    for (int j = 0; j < columns; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* const to = out + i * 16 * Tile::out_row + j * 16 + half * 8;
        const float (&d)[4] = sum[i][j][half];
        store_pack(to, Pack<float, 2>{d[0], d[1]});
        store_pack(to + 8 * Tile::out_row, Pack<float, 2>{d[2], d[3]});
      }
  __syncthreads();
  finish_rows<Tile::rows, Tile::columns, Tile::out_row, Tile::slices, Tile::threads>(
      sums, origin.column, epilogue, [&](int i) { return origin.row + i; });
}

}  // namespace gemmlet
