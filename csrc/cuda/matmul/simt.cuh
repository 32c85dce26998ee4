// Matmuls in float and double, one fused multiply-add after the other.
//
// Contract
//   See common.cuh. A block computes a tile of rows x columns, a thread some rows x some columns of it, from tiles of
//   both operands in shared memory, which copies that run ahead (cp.async) fill round-robin, `stages` of them.
//   16 bytes are copied at a time where that is told (a_packed, b_packed): where the operand is packed along its lines and
//   these are whole packs; else number by number, which takes any layout, and transposes what is contiguous along k.
//   The order of a sum: a K block is cut into `slices`, one for each group of warps. A slice adds its steps of
//   every tile, first to last, by fused multiply-adds, beginning with 0; then the slices are added, first to last.
#pragma once

#include "cuda/matmul/common.cuh"
#include "cuda/ptx.cuh"

namespace gemmlet {

// In how many parts the copies of a long K block go out: as many as there are registers for, as found by compiling.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
inline constexpr int max_parts = 4;
#else
inline constexpr int max_parts = 8;
#endif

template <class T_, int rows_, int columns_, int k_block_, int thread_rows_, int thread_columns_, int slices_,
          int stages_>
struct SimtTile {
  using T = T_;
  static constexpr int rows = rows_, columns = columns_, k_block = k_block_, slices = slices_, stages = stages_;
  static constexpr int thread_rows = thread_rows_, thread_columns = thread_columns_;
  static constexpr int V = pack_size<T>;
  // A warp is 4 x 8 threads.
  static constexpr int warp_rows = 4 * thread_rows, warp_columns = 8 * thread_columns;
  static constexpr int row_warps = rows / warp_rows, column_warps = columns / warp_columns;
  static constexpr int slice_warps = row_warps * column_warps;
  static constexpr int threads = 32 * slice_warps * slices, slice_k = k_block / slices;
  static_assert(rows % warp_rows == 0 && columns % warp_columns == 0 && k_block % slices == 0 && slice_k % 2 == 0);
  static_assert(thread_rows % V == 0 && thread_columns % V == 0);

  // The copies of a large tile go out in parts, from one barrier to the next, so that loads from shared memory need not wait
  // behind them all; those of a small one at once, to arrive in time. The barrier is passed before step `barrier_step` + 1
  // is loaded. With a spare stage it stands in the middle of a tile: the next one has been there for long when it is
  // needed. Else it stands where the last step of a tile has been loaded, so that the tile itself can be written over.
  // `ahead`: how many tiles have been copied at the barrier, of those behind the one that it stands in.
  static constexpr bool has_spare = stages >= 4 && slices == 1;
  static constexpr int barrier_step = has_spare ? slice_k / 2 : slice_k - 1, ahead = stages - 1 - has_spare;
  static constexpr int parts = slices > 1 ? 1 : slice_k >= 16 ? max_parts : 2, part_steps = slice_k / parts;
  static constexpr int early_parts = (slice_k - 1 - barrier_step) / part_steps + 1;
  static_assert(slice_k % parts == 0 && ahead >= 1);

  // In shared memory a tile lies step by step. 16 bytes more a step: then 8 steps x 4 lines, written number by number, are
  // in as many banks.
  static constexpr int a_step = rows + V, b_step = columns + V;
  static constexpr int stage = k_block * (a_step + b_step);
  // The sums go out through the same memory, some of each thread's rows at a time if all would not fit.
  static constexpr int passes = slices == 1 ? thread_rows / V : 1;
  static constexpr int pass_rows = rows / passes, out_row = columns + V;
  static constexpr int loading = stages * stage, finishing = slices * pass_rows * out_row;
  static constexpr int shared_bytes = (loading > finishing ? loading : finishing) * static_cast<int>(sizeof(T));
  // By the registers that sums and fragments take.
  static constexpr int words = static_cast<int>(sizeof(T)) / 4;
  static constexpr int registers = (thread_rows * thread_columns + 2 * (thread_rows + thread_columns)) * words + 32;
  static constexpr int blocks = 2 * threads * registers <= 65536 ? 2 : 1;
};

// Copies tiles of an operand, lines x k_block, to shared memory, one after the other; in packs, or number by number.
template <class T, bool packed, int lines, int k_block, int threads>
class SimtLoader {
 public:
  __device__ __forceinline__ SimtLoader(const Operand<T>& operand, int first_line, StepRange steps, T* shared) {
    const int t = threadIdx.x;
    const int line = packed ? t % packs * V : t / 32 % cell_lines * 4 + t % 32 / 8;
    const int step = packed ? t / packs : t / 32 / cell_lines * 8 + t % 8;
    from_ = reinterpret_cast<const unsigned char*>(operand.data +
                                                   static_cast<Index>(first_line + line) * operand.line_stride +
                                                   static_cast<Index>(steps.first + step) * operand.step_stride);
    column_stride_ = cells_apart * operand.line_stride * size;
    row_stride_ = (packed ? packs_apart : cell_rows_apart) * operand.step_stride * size;
    if (!packed) row_stride_ -= (cell_columns - 1) * column_stride_;
    lines_left_ = operand.lines - first_line - line;
    steps_left_ = steps.last - steps.first - step;
    to_ = ptx::shared_address(shared) + (step * row + line) * size;
  }

  // Part number `part` of the next tile, the parts in order, to `offset` bytes after the first tile. Beyond the last
  // tile there are zeros.
  template <int part, int parts>
  __device__ __forceinline__ void copy_part(int offset) {
    const ptx::SharedAddress to = to_ + offset;
    if constexpr (packed) {
#pragma unroll
      for (int i = pack_copies * part / parts; i < pack_copies * (part + 1) / parts; ++i) {
        const int step = i * packs_apart;
        ptx::copy_async<16>(to + step * row * size, from_, lines_left_ > 0 && step < steps_left_ ? 16 : 0);
        from_ += row_stride_;
      }
    } else {
      constexpr int cells = cell_rows * cell_columns;
#pragma unroll
      for (int i = cells * part / parts; i < cells * (part + 1) / parts; ++i) {
        const int line = i % cell_columns * cells_apart, step = i / cell_columns * cell_rows_apart;
        ptx::copy_async<size>(to + (step * row + line) * size, from_,
                              line < lines_left_ && step < steps_left_ ? size : 0);
        from_ += i % cell_columns == cell_columns - 1 ? row_stride_ : column_stride_;
      }
    }
    if (part == parts - 1) steps_left_ -= k_block;
  }

 private:
  static constexpr int V = pack_size<T>, size = sizeof(T), row = lines + V, warps = threads / 32;
  // Packed: a thread copies the same lines at some steps.
  static constexpr int packs = lines / V, packs_apart = threads / packs, pack_copies = k_block / packs_apart;
  static_assert(packs_apart * packs == threads && pack_copies * packs_apart == k_block);
  // Number by number: a warp copies cells of 8 steps x 4 lines, so that it reads whole sectors of 32 bytes where steps are
  // neighbours in memory. The warps stand side by side along the lines, as many as there is room for.
  static constexpr int cell_lines = lines / 4 < warps ? lines / 4 : warps, cells_apart = 4 * cell_lines;
  static constexpr int cell_columns = lines / cells_apart, cell_rows_apart = warps / cell_lines * 8;
  static constexpr int cell_rows = k_block / cell_rows_apart;
  static_assert(warps % cell_lines == 0 && lines % cells_apart == 0 && k_block % cell_rows_apart == 0);

  // In bytes, as both strides: to add them takes the fewest instructions.
  const unsigned char* from_;
  // From a column of cells to the next, and from the last one, or a pack, to the next row. Rows lead on to the next tile.
  Index column_stride_, row_stride_;
  int lines_left_, steps_left_;
  ptx::SharedAddress to_;
};

// A number that is known to the compiler, and f(Number<i>{}) for each.
template <int value_>
struct Number {
  static constexpr int value = value_;
};
template <int first, int last, class F>
__device__ __forceinline__ void each_number(F f) {
  if constexpr (first < last) {
    f(Number<first>{});
    each_number<first + 1, last>(f);
  }
}

// A thread's rows or columns are packs of V, `apart` from one another.
template <int count, int apart, class T>
__device__ __forceinline__ void load_fragment(T (&fragment)[count], const T* from) {
  constexpr int V = pack_size<T>;
#pragma unroll
  for (int p = 0; p < count / V; ++p) {
    const Pack<T, V> pack = load_pack<V>(from + p * apart);
#pragma unroll
    for (int i = 0; i < V; ++i) fragment[p * V + i] = pack.value[i];
  }
}

template <class Tile, bool a_packed, bool b_packed, class Epilogue>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks)
    matmul_simt(Operand<typename Tile::T> a, Operand<typename Tile::T> b, int k, int steps_per_split,
                Epilogue epilogue) {
  using T = typename Tile::T;
  constexpr int V = Tile::V, rows = Tile::thread_rows, columns = Tile::thread_columns, size = sizeof(T);
  T* const shared = dynamic_shared<T>();
  T* const b_shared = shared + Tile::k_block * Tile::a_step;

  const TileOrigin origin = tile_origin<Tile::rows, Tile::columns>(blockIdx.x, a.lines, b.lines);
  const StepRange steps = step_range(k, steps_per_split);
  const int tiles = tiles_of(steps, Tile::k_block);

  SimtLoader<T, a_packed, Tile::rows, Tile::k_block, Tile::threads> a_loader(a, origin.row, steps, shared);
  SimtLoader<T, b_packed, Tile::columns, Tile::k_block, Tile::threads> b_loader(b, origin.column, steps, b_shared);
  // A part of the next tile, at every `Tile::part_steps` steps from the barrier on.
  const auto copy_part = [&](auto part, int offset) {
    a_loader.template copy_part<part.value, Tile::parts>(offset * size);
    b_loader.template copy_part<part.value, Tile::parts>(offset * size);
  };
  const auto copy_parts = [&](auto first, auto last, int offset) {
    each_number<first.value, last.value>([&](auto part) { copy_part(part, offset); });
  };
#pragma unroll 1
  for (int i = 0; i < Tile::ahead; ++i) {
    copy_parts(Number<0>{}, Number<Tile::parts>{}, i * Tile::stage);
    ptx::commit_copies();
  }
  copy_parts(Number<0>{}, Number<Tile::early_parts>{}, Tile::ahead * Tile::stage);

  // Lanes that are neighbours, or two apart, read the same 16 bytes, so that a load takes the fewest passes.
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, slice = warp / Tile::slice_warps;
  const int lane_row = lane / 16 * 2 + lane % 2, lane_column = lane % 16 / 2;
  const int warp_row = warp % Tile::slice_warps / Tile::column_warps;
  const int row = warp_row * Tile::warp_rows + lane_row * V;
  const int column = warp % Tile::column_warps * Tile::warp_columns + lane_column * V;
  const T* const a_first = shared + slice * Tile::slice_k * Tile::a_step + row;
  const T* const b_first = b_shared + slice * Tile::slice_k * Tile::b_step + column;

  T sum[rows][columns] = {};
  T a_now[2][rows], b_now[2][columns];
  ptx::wait_for_copies<Tile::ahead - 1>();
  __syncthreads();
  load_fragment<rows, 4 * V>(a_now[0], a_first);
  load_fragment<columns, 8 * V>(b_now[0], b_first);

  // The main loop:
  int read = 0, write = Tile::ahead * Tile::stage;
  const auto next_stage = [](int at) { return at == (Tile::stages - 1) * Tile::stage ? 0 : at + Tile::stage; };
  for (int tile = 0; tile < tiles; ++tile) {
    each_number<0, Tile::slice_k>([&](auto number) {
      constexpr int step = number.value, next = (step + 1) % Tile::slice_k;
      if constexpr (step == Tile::barrier_step) {
        // From here on the next tile is there; and what is written next has been read to its end.
        ptx::commit_copies();
        ptx::wait_for_copies<Tile::ahead - 1>();
        __syncthreads();
        write = next_stage(write);
      }
      constexpr int since = (step - Tile::barrier_step + Tile::slice_k) % Tile::slice_k;
      if constexpr (next == 0) read = next_stage(read);
      load_fragment<rows, 4 * V>(a_now[(step + 1) % 2], a_first + read + next * Tile::a_step);
      load_fragment<columns, 8 * V>(b_now[(step + 1) % 2], b_first + read + next * Tile::b_step);
      if constexpr (since % Tile::part_steps == 0) copy_part(Number<since / Tile::part_steps>{}, write);
#pragma unroll
      for (int i = 0; i < rows; ++i)
#pragma unroll
        for (int j = 0; j < columns; ++j) sum[i][j] = fma(a_now[step % 2][i], b_now[step % 2][j], sum[i][j]);
    });
  }

  // The tail: through shared memory, which no copy writes any more.
  ptx::commit_copies();
  ptx::wait_for_copies<0>();
  constexpr int pass_packs = rows / V / Tile::passes;
  T* const out =
      shared + (slice * Tile::pass_rows + warp_row * 4 * V * pass_packs + lane_row * V) * Tile::out_row + column;
#pragma unroll
  for (int pass = 0; pass < Tile::passes; ++pass) {
    __syncthreads();
#pragma unroll
    for (int p = pass * pass_packs; p < (pass + 1) * pass_packs; ++p) {
#pragma unroll
      for (int i = 0; i < V; ++i)
#pragma unroll
        for (int j = 0; j < columns; j += V) {
          Pack<T, V> pack;
#pragma unroll
          for (int l = 0; l < V; ++l) pack.value[l] = sum[p * V + i][j + l];
          store_pack(out + (p % pass_packs * 4 * V + i) * Tile::out_row + j * 8, pack);
        }
    }
    __syncthreads();
    constexpr int height = 4 * V * pass_packs;  // of what a warp has of this pass
    finish_rows<Tile::pass_rows, Tile::columns, Tile::out_row, Tile::slices, Tile::threads>(
        shared, origin.column, epilogue,
        [&](int i) { return origin.row + i / height * Tile::warp_rows + pass * height + i % height; });
  }
}

}  // namespace gemmlet
