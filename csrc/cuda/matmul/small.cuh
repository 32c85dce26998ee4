// Matmuls of small matrices, one tile of the result for each block: what the kernels of fused training are made of.
//
// Contract
//   A tile's multiply() gives sum_k a(i, k) b(k, j), k from 0 to k_size - 1, to an epilogue; all threads of the block
//   call it. `memory` is shared and aligned to 16 bytes, of a size that the tile tells; between two uses there must be a
//   barrier.
//   a and b are operands. The rows of a and the columns of b are lines of numbers; operand.lines<n>(first) is an object
//   whose load(k, v) gives number k of n lines that lie side by side. `along` tells whether a line's numbers are
//   neighbours in memory, else those of neighbouring lines are. Lines beyond the last repeat it, and their sums are
//   dropped.
//   The epilogue has inside(i, j), load<n>(i, j), called before the main loop, which its loads overlap, and
//   store<n>(i, j, what load returned, sums) for n columns from j on. Where (i, j) is inside, the n - 1 columns after
//   it must be in memory, but need not be inside.
//   Sums are fma chains in T, several for each result, added in an order that depends on the tile's type, K and
//   the block's size alone: the same bits on every run.
#pragma once

#include "cuda/pack.cuh"

namespace gemmlet {

//
// Operands
//

// Rows of a matrix of numbers or bytes, which may be picked: rows order[0], order[1], ...
template <class N>
struct Rows {
  using Number = N;
  const N* first;
  Index stride;
  const Index* order;  // or null

  __device__ __forceinline__ const N* row(int i) const { return first + (order == nullptr ? i : order[i]) * stride; }
};

// Lines are rows, `count` of them.
template <class T, class N>
struct LinesOfRows {
  static constexpr bool along = true;
  Rows<N> rows;
  int count;

  template <int n>
  struct Lines {
    const N* line[n];
    __device__ __forceinline__ void load(int k, T (&v)[n]) const {
#pragma unroll
      for (int i = 0; i < n; ++i) v[i] = number<T>(line[i][k]);
    }
  };
  template <int n>
  __device__ __forceinline__ Lines<n> lines(int at) const {
    Lines<n> picked;
#pragma unroll
    for (int i = 0; i < n; ++i) picked.line[i] = rows.row(min(at + i, count - 1));
    return picked;
  }
};

// Lines are columns of a matrix that is stored by rows; `stride` is a multiple of 4, the address of 16.
template <class T>
struct LinesOfColumns {
  static constexpr bool along = false;
  const T* first;
  int stride;

  template <int n>
  struct Lines {
    const T* at;
    int stride;
    __device__ __forceinline__ void load(int k, T (&v)[n]) const {
      load_numbers<n>(at + static_cast<Index>(k) * stride, v);
    }
  };
  template <int n>
  __device__ __forceinline__ Lines<n> lines(int at) const {
    return {first + min(at, stride - n), stride};
  }
};

// Lines are columns of rows that may be picked, and after the last of them a line of ones.
template <class T, class N>
struct LinesOfPicked {
  static constexpr bool along = false;
  Rows<N> rows;
  int count;

  template <int n>
  struct Lines {
    static_assert(n == 1);
    Rows<N> rows;
    int column;  // or -1
    __device__ __forceinline__ void load(int k, T (&v)[1]) const {
      v[0] = column < 0 ? T(1) : number<T>(rows.row(k)[column]);
    }
  };
  template <int n>
  __device__ __forceinline__ Lines<n> lines(int at) const {
    return {rows, at < count ? at : -1};
  }
};

//
// Tiles
//

// Each of N sums of a lane is added to those of the lanes that differ from it in the bits from `mask` down to `last`. At
// each bit a lane gives one half of its sums away and keeps the other: N / 2 to begin with, the upper half if its bit
// is set.
template <int mask, int last, int kept, class T, int N>
__device__ __forceinline__ void exchange_sums(T (&sum)[N], int lane) {
  if constexpr (mask >= last) {
    const bool upper = (lane & mask) != 0;
#pragma unroll
    for (int i = 0; i < kept / 2; ++i) {
      const T keep = upper ? sum[i + kept / 2] : sum[i], give = upper ? sum[i] : sum[i + kept / 2];
      sum[i] = keep + __shfl_xor_sync(0xffffffffu, give, mask);
    }
    exchange_sums<mask / 2, last, kept / 2>(sum, lane);
  }
}

// Few results, each a long sum: K is divided among all lanes and warps of the block, and nothing is shared but
// the sums. side x side results; blocks of at least side * side threads, in whole warps; shared memory for side * side
// numbers of each warp.
template <int side>
struct SmallTile {
  static constexpr int rows = side, columns = side, max_threads = 512;
  // A lane takes eight rows and four columns at one k, which `lanes` lanes share.
  static constexpr int lanes_across = side / 4, lanes = lanes_across * side / 8, results = side * side;
  // Steps of k loaded together: what registers allow, beside eight addresses of rows.
  template <class T>
  static constexpr int k_unroll = sizeof(T) == 4 ? 3 : 1;

  template <class T, class A, class B, class Epilogue>
  __device__ __forceinline__ static void multiply(const A& a, const B& b, int k_size, int row, int column,
                                                  const Epilogue& epilogue, T* memory) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    const int i = row + thread / side, j = column + thread % side;
    const bool finishes = thread < results && epilogue.inside(i, j);
    typename Epilogue::template Loaded<1> loaded = {};
    if (finishes) loaded = epilogue.template load<1>(i, j);

    const int r = lane % lanes / lanes_across * 8, c = lane % lanes_across * 4;
    const auto a_lines = a.template lines<8>(row + r);
    const auto b_lines = b.template lines<4>(column + c);
    T sum[8 * 4] = {};
    constexpr int warp_k = 32 / lanes, warp_step = warp_k * k_unroll<T>;
    // The main loop:
    for (int k = thread / 32 * warp_step + lane / lanes; k < k_size;
         k += static_cast<int>(blockDim.x) / 32 * warp_step) {
      T x[k_unroll<T>][8], w[k_unroll<T>][4];
      // All loads before the first fma: their latency is most of what there is to wait for.
#pragma unroll
      for (int u = 0; u < k_unroll<T>; ++u)
        if (k + u * warp_k < k_size) {
          a_lines.load(k + u * warp_k, x[u]);
          b_lines.load(k + u * warp_k, w[u]);
        }
#pragma unroll
      for (int u = 0; u < k_unroll<T>; ++u)
        if (k + u * warp_k < k_size) {
#pragma unroll
          for (int s = 0; s < 8; ++s)
#pragma unroll
            for (int t = 0; t < 4; ++t) sum[s * 4 + t] = fma(x[u][s], w[u][t], sum[s * 4 + t]);
        }
    }

    // Each lane keeps `lanes` of its 32 sums, to which those of the block's other warps are to be added.
    exchange_sums<16, lanes, 32>(sum, lane);
    T* const of_warp = memory + thread / 32 * results + r * side + c;
#pragma unroll
    for (int s = 0; s < lanes; ++s) {
      const int at = lane / lanes * lanes + s;
      of_warp[at / 4 * side + at % 4] = sum[s];
    }
    __syncthreads();
    if (!finishes) return;
    T total[1] = {memory[thread]};
    for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) total[0] += memory[warp * results + thread];
    epilogue.template store<1>(i, j, loaded, total);
  }
};

// Many results, or short sums: both operands go through shared memory. 32 x 32 results; blocks of 256 threads, of which
// each quarter has a quarter of every stage; shared memory for 128 * stride numbers.
struct WideTile {
  static constexpr int rows = 32, columns = 32, max_threads = 256;
  static constexpr int groups = 4;
  template <class T>
  static constexpr int stage_k = 256 / static_cast<int>(sizeof(T));
  // From one row of shared memory to the next: aligned, and those that a warp writes to at once begin in other banks.
  static constexpr int stride = 36;

  // A thread's share of one operand's stages: numbers of one line.
  template <class T, class Operand>
  struct Share {
    static constexpr int each = stage_k<T> * 32 / max_threads;
    typename Operand::template Lines<1> line;
    int first_k, place;
    T held[each];

    __device__ __forceinline__ Share(const Operand& operand, int first_line) {
      const int thread = static_cast<int>(threadIdx.x);
      // What a warp loads at once: of 4 lines 8 numbers that lie side by side, or of 32 lines one.
      const int at = Operand::along ? thread / 8 : thread % 32;
      first_k = Operand::along ? thread % 8 : thread / 32;
      line = operand.template lines<1>(first_line + at);
      place = first_k * stride + at;
    }
    // Beyond K are zeros.
    __device__ __forceinline__ void load(int stage, int k_size) {
#pragma unroll
      for (int e = 0; e < each; ++e) {
        const int k = stage + first_k + e * 8;
        T v[1] = {T(0)};
        if (k < k_size) line.load(k, v);
        held[e] = v[0];
      }
    }
    __device__ __forceinline__ void put(T* memory) const {
#pragma unroll
      for (int e = 0; e < each; ++e) memory[place + e * 8 * stride] = held[e];
    }
  };

  template <class T, class A, class B, class Epilogue>
  __device__ __forceinline__ static void multiply(const A& a, const B& b, int k_size, int row, int column,
                                                  const Epilogue& epilogue, T* memory) {
    const int thread = static_cast<int>(threadIdx.x);
    const int i = row + thread / 8, j = column + thread % 8 * 4;
    const bool finishes = epilogue.inside(i, j);
    typename Epilogue::template Loaded<4> loaded = {};
    if (finishes) loaded = epilogue.template load<4>(i, j);

    T* const a_memory = memory;
    T* const b_memory = memory + stage_k<T> * stride;
    Share<T, A> a_share(a, row);
    Share<T, B> b_share(b, column);
    a_share.load(0, k_size);
    b_share.load(0, k_size);
    constexpr int group_k = stage_k<T> / groups;
    // A group's threads take four rows and four columns each.
    const int group = thread / 64, r = thread % 64 / 8 * 4, c = thread % 8 * 4;
    T sum[4][4] = {};
    // The main loop:
    for (int stage = 0; stage < k_size; stage += stage_k<T>) {
      a_share.put(a_memory);
      b_share.put(b_memory);
      __syncthreads();
      // The next stage is on its way while this one is multiplied.
      if (stage + stage_k<T> < k_size) {
        a_share.load(stage + stage_k<T>, k_size);
        b_share.load(stage + stage_k<T>, k_size);
      }
#pragma unroll 4
      for (int k = group * group_k; k < (group + 1) * group_k; ++k) {
        T x[4], w[4];
        load_numbers<4>(a_memory + k * stride + r, x);
        load_numbers<4>(b_memory + k * stride + c, w);
#pragma unroll
        for (int s = 0; s < 4; ++s)
#pragma unroll
          for (int t = 0; t < 4; ++t) sum[s][t] = fma(x[s], w[t], sum[s][t]);
      }
      __syncthreads();
    }

#pragma unroll
    for (int s = 0; s < 4; ++s) store_numbers<4>(memory + (group * rows + r + s) * stride + c, sum[s]);
    __syncthreads();
    if (!finishes) return;
    T total[4];
    load_numbers<4>(memory + thread / 8 * stride + c, total);
#pragma unroll
    for (int g = 1; g < groups; ++g) {
      T part[4];
      load_numbers<4>(memory + (g * rows + thread / 8) * stride + c, part);
#pragma unroll
      for (int t = 0; t < 4; ++t) total[t] += part[t];
    }
    epilogue.template store<4>(i, j, loaded, total);
  }
};

}  // namespace gemmlet
