// What the matmul kernels share: operands, which block computes which tile, epilogues.
//
// Contract
//   out (m x n) = epilogue(a (m x k) @ b (k x n)). The kernels: simt.cuh (float, double), mma.cuh (tensor
//   cores: float16, bfloat16, and float rounded to TF32), wgmma.cuh (Hopper's, for the same types),
//   skinny.cuh (at most four rows or columns).
//   Operands: any strides, in elements, also 0 and negative; any alignment of a number (but wgmma.cuh takes only
//   what a tensor map describes). Nothing is read outside of them, and what a tile has beyond them counts as 0, and is
//   dropped. m, n and k are at most 2^31 - 1024, offsets need not be.
//   out and preactivation: C-contiguous, any alignment; they overlap nothing that is read.
//   Sums are taken in Compute<T>, in an order that follows from the kernel, its tile, the splits of k and the shape
//   alone: the same bits on every run. Each kernel says which. (Tile and splits are chosen by the GPU's multiprocessors,
//   too.) The error is at most k eps (|a| @ |b|), eps = 2^-23 or 2^-52 (Higham, Accuracy and Stability of Numerical
//   Algorithms, 3.5); sums of integers are exact while they and their parts are integers of Compute<T>. NaN and
//   infinity propagate as in the sum written out.
//   k may be split over the blocks of gridDim.y: each writes the sum over its part to a workspace (PartialEpilogue), and
//   matmul_combine adds the parts, first to last.
#pragma once

#include "cuda/pack.cuh"
#include "cuda/scalar.cuh"

namespace gemmlet {

// The rows of a, or the columns of b: `lines` of them, each of k steps.
template <class T>
struct Operand {
  const T* data;
  Index line_stride, step_stride;
  int lines;
  // Whether neighbours in memory are of neighbouring lines; else they are neighbouring steps of one line.
  int along_lines;
  // Whether packs of neighbours, 16 bytes, are aligned.
  int packed;
};

// The tile's first row and column. Tiles that are computed at the same time are close to each other: `group_rows` rows of
// them, column by column, so that blocks find in the L2 cache what their neighbours read.
struct TileOrigin {
  int row, column;
};

template <int rows, int columns, int group_rows = 8>
__device__ __forceinline__ TileOrigin tile_origin(int tile, int m, int n) {
  const int row_tiles = (m - 1) / rows + 1, column_tiles = (n - 1) / columns + 1;
  const int in_group = group_rows * column_tiles, group = tile / in_group, rest = tile % in_group;
  const int height = min(row_tiles - group * group_rows, group_rows);
  return {(group * group_rows + rest % height) * rows, rest / height * columns};
}

// The part of the k steps that is this block's.
struct StepRange {
  int first, last;
};

__device__ __forceinline__ StepRange step_range(int k, int steps_per_split) {
  const Index first = static_cast<Index>(blockIdx.y) * steps_per_split, last = first + steps_per_split;
  return {static_cast<int>(first), static_cast<int>(last < k ? last : k)};
}

__device__ __forceinline__ int tiles_of(StepRange steps, int k_block) {
  const int count = steps.last - steps.first;
  return count / k_block + (count % k_block > 0);
}

//
// Epilogues
//
// A kernel asks once for what belongs to a column or some columns next to each other, and then hands in their sums, row by
// row. It need not care where the matrix ends.
//

// z = sum + bias; out = F::forward(z), z as rounded to T.
template <class T_, class F>
struct LinearEpilogue {
  using T = T_;
  using C = Compute<T>;

  T* out;
  T* preactivation;  // z, or null
  const T* bias;     // n numbers, or null
  int m, n;
  C parameter;
  int packed;  // whether packs of out and preactivation, 16 bytes, are aligned

  // As they are stored, so that a kernel may ask for them early, and nothing waits for memory yet.
  template <int N>
  struct Columns {
    T bias[N];
  };

  template <int N>
  __device__ __forceinline__ Columns<N> columns(int column) const {
    Columns<N> result;
#pragma unroll
    for (int j = 0; j < N; ++j)
      result.bias[j] = bias != nullptr && column + j < n ? bias[column + j] : narrow<T>(constant<C>(-0.0));
    return result;
  }

  template <int N>
  __device__ __forceinline__ void put(int row, int column, const Columns<N>& of, const C (&sum)[N]) const {
    if (row >= m || column >= n) return;
    C number[N];
#pragma unroll
    for (int j = 0; j < N; ++j) number[j] = sum[j] + widen(of.bias[j]);
    const Pack<T, N> z = narrowed<T, N>(number);
    Pack<T, N> y = z;
    if constexpr (!same_type<F, activations::identity>) {
#pragma unroll
      for (int j = 0; j < N; ++j) number[j] = F::forward(widen(z, j), parameter);
      y = narrowed<T, N>(number);
    }
    const Index offset = static_cast<Index>(row) * n + column;
    if (packed) {
      if (preactivation != nullptr) store_pack(preactivation + offset, z);
      store_pack(out + offset, y);
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        if (column + j >= n) break;
        if (preactivation != nullptr) preactivation[offset + j] = z.value[j];
        out[offset + j] = y.value[j];
      }
    }
  }
};

// The sums of a part of k, kept for matmul_combine.
template <class C>
struct PartialEpilogue {
  using T = C;

  C* parts;  // (gridDim.y, m, n)
  int m, n;
  int packed;

  template <int N>
  struct Columns {};

  template <int N>
  __device__ __forceinline__ Columns<N> columns(int) const {
    return {};
  }

  template <int N>
  __device__ __forceinline__ void put(int row, int column, const Columns<N>&, const C (&sum)[N]) const {
    if (row >= m || column >= n) return;
    C* const to = parts + (static_cast<Index>(blockIdx.y) * m + row) * n + column;
    if (packed) {
      store_numbers(to, sum);
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j)
        if (column + j < n) to[j] = sum[j];
    }
  }
};

// The end of a tile: in shared memory lie, for each of the slices of k, rows of sums, `stride` apart. All threads add the
// slices, first to last, and hand the sums to the epilogue, a warp whole rows or long pieces of them. row_of(i) is
// which row of out is the i-th one here.
template <int rows, int columns, int stride, int slices, int threads, class C, class Epilogue, class RowOf>
__device__ __forceinline__ void finish_rows(const C* sums, int first_column, const Epilogue& epilogue, RowOf row_of) {
  constexpr int N = pack_size<typename Epilogue::T>, packs = columns / N;
  static_assert(columns % N == 0 && threads % packs == 0);
  const int column = threadIdx.x % packs * N;
  const auto of = epilogue.template columns<N>(first_column + column);
  // One copy of the epilogue: it may be long.
#pragma unroll 1
  for (int row = threadIdx.x / packs; row < rows; row += threads / packs) {
    const C* from = sums + row * stride + column;
    C sum[N];
    load_numbers(from, sum);
#pragma unroll
    for (int slice = 1; slice < slices; ++slice) {
      C more[N];
      load_numbers(from + slice * rows * stride, more);
#pragma unroll
      for (int j = 0; j < N; ++j) sum[j] = sum[j] + more[j];
    }
    epilogue.template put<N>(row_of(row), first_column + column, of, sum);
  }
}

// The second pass of a matmul whose k was split.
template <class Epilogue>
__global__ void __launch_bounds__(256)
    matmul_combine(const Compute<typename Epilogue::T>* parts, int splits, Epilogue epilogue) {
  using C = Compute<typename Epilogue::T>;
  constexpr int N = pack_size<C>;
  const int m = epilogue.m, n = epilogue.n, packs = (n - 1) / N + 1;
  const Index thread = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (thread >= static_cast<Index>(m) * packs) return;
  const int row = static_cast<int>(thread / packs), column = static_cast<int>(thread % packs) * N;
  const C* from = parts + static_cast<Index>(row) * n + column;
  const Index apart = static_cast<Index>(m) * n;
  C sum[N] = {};
  if (n % N == 0) {
#pragma unroll 4
    for (int split = 0; split < splits; ++split) {
      const Pack<C, N> part = load_pack<N>(from + split * apart);
#pragma unroll
      for (int j = 0; j < N; ++j) sum[j] = sum[j] + part.value[j];
    }
  } else {
    for (int split = 0; split < splits; ++split)
#pragma unroll
      for (int j = 0; j < N; ++j)
        if (column + j < n) sum[j] = sum[j] + from[split * apart + j];
  }
  epilogue.template put<N>(row, column, epilogue.template columns<N>(column), sum);
}

}  // namespace gemmlet
