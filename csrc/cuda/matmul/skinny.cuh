// Matmuls with at most four rows, or at most four columns, of the result: bound by reading the other operand.
//
// Contract
//   See common.cuh; for every type. `many` is the operand of many lines (b, or a where the result has few columns), `few`
//   the other one, of at most `count` lines. Each number of `many` goes from memory to a register, 16 bytes at a time where
//   it is packed, and is used `count` times there. A block has skinny_lines<T>(along_lines) of its lines, one after the other.
//   The order of a sum: 32 threads (8, where `many` lies along k) each add every 32nd step (8th pack of steps), first to last,
//   by fused multiply-adds, beginning with 0; then the threads' sums are added, by halves within a warp, and in order
//   from warp to warp.
#pragma once

#include "cuda/matmul/common.cuh"

namespace gemmlet {

inline constexpr int skinny_threads = 256;

// Eight threads side by side read 128 bytes of neighbours; there are 32 such groups.
template <class T>
__host__ __device__ constexpr int skinny_lines(bool along_lines) {
  return along_lines ? 8 * pack_size<T> : 32;
}

// Numbers `stride` apart, or neighbours.
template <class T, int N>
__device__ __forceinline__ Pack<T, N> gather(const T* from, Index stride) {
  Pack<T, N> pack;
#pragma unroll
  for (int j = 0; j < N; ++j) pack.value[j] = from[j * stride];
  return pack;
}

// f(step, load(step)) for every `apart`-th step from the first one on that begins `size` steps before the end, or more; a batch
// of loads is on its way at a time. Returns the step after those.
template <int batch, int apart, int size, class Load, class F>
__device__ __forceinline__ int for_steps(int step, int last, Load load, F f) {
  // The main loop:
  for (; step <= last - size - (batch - 1) * apart; step += batch * apart) {
    decltype(load(0)) loaded[batch];
#pragma unroll
    for (int i = 0; i < batch; ++i) loaded[i] = load(step + i * apart);
#pragma unroll
    for (int i = 0; i < batch; ++i) f(step + i * apart, loaded[i]);
  }
  // The tail:
#pragma unroll 1
  for (; step <= last - size; step += apart) f(step, load(step));
  return step;
}

template <class C>
__device__ __forceinline__ C sum_over_lanes(C value, int first, int last) {
  for (int lanes = last / 2; lanes >= first; lanes /= 2) value = value + __shfl_xor_sync(0xffffffffu, value, lanes);
  return value;
}

// Hands on the sum for a line of each operand.
template <class C, class Epilogue>
__device__ __forceinline__ void put_skinny(const Epilogue& epilogue, bool many_are_rows, int many_line, int few_line,
                                           C sum) {
  const int row = many_are_rows ? many_line : few_line, column = many_are_rows ? few_line : many_line;
  const C sums[1] = {sum};
  epilogue.template put<1>(row, column, epilogue.template columns<1>(column), sums);
}

// How many packs are on their way, to hide the latency of memory; gathered ones are many loads each.
template <int count>
inline constexpr int skinny_batch = count == 1 ? 8 : 4;

// `many` lies along k: groups take a line each, and their threads packs of steps.
template <int count, class T, class Epilogue>
__device__ __forceinline__ void skinny_by_line(const Operand<T>& many, const Operand<T>& few, StepRange steps,
                                               bool many_are_rows, const Epilogue& epilogue) {
  using C = Compute<T>;
  constexpr int N = pack_size<T>;
  const int line = blockIdx.x * 32 + threadIdx.x / 8;
  // Where there is no such line, another one is read, and the sum dropped.
  const T* const row = many.data + min(line, many.lines - 1) * many.line_stride;
  const bool few_packed = few.packed && !few.along_lines;
  const T* few_rows[count];
#pragma unroll
  for (int f = 0; f < count; ++f) few_rows[f] = few.data + min(f, few.lines - 1) * few.line_stride;

  C sum[count] = {};
  const auto add = [&](int step, const Pack<T, N>& x) {
#pragma unroll
    for (int f = 0; f < count; ++f) {
      const T* const from = few_rows[f] + step * few.step_stride;
      const Pack<T, N> y = few_packed ? load_pack<N>(from) : gather<T, N>(from, few.step_stride);
#pragma unroll
      for (int j = 0; j < N; ++j) sum[f] = fma(widen(x.value[j]), widen(y.value[j]), sum[f]);
    }
  };
  const int first = steps.first + threadIdx.x % 8 * N;
  int step = many.packed ? for_steps<skinny_batch<count>, 8 * N, N>(
                               first, steps.last, [&](int s) { return load_pack<N>(row + s); }, add)
                         : for_steps<1, 8 * N, N>(
                               first, steps.last,
                               [&](int s) { return gather<T, N>(row + s * many.step_stride, many.step_stride); }, add);
  // What is left, less than a pack, is one thread's.
  for (; step < steps.last; ++step)
#pragma unroll
    for (int f = 0; f < count; ++f)
      sum[f] = fma(widen(row[step * many.step_stride]), widen(few_rows[f][step * few.step_stride]), sum[f]);

#pragma unroll
  for (int f = 0; f < count; ++f) {
    const C whole = sum_over_lanes(sum[f], 1, 8);
    if (threadIdx.x % 8 == f && line < many.lines && f < few.lines) put_skinny(epilogue, many_are_rows, line, f, whole);
  }
}

// `many` lies along its lines: threads take a pack of lines each, and their groups every 32nd step.
template <int count, class T, class Epilogue>
__device__ __forceinline__ void skinny_by_step(const Operand<T>& many, const Operand<T>& few, StepRange steps,
                                               bool many_are_rows, const Epilogue& epilogue) {
  using C = Compute<T>;
  constexpr int N = pack_size<T>, lines = 8 * N, warps = skinny_threads / 32;
  const int first = blockIdx.x * lines, line = first + threadIdx.x % 8 * N;
  const bool packed = many.packed && line + N <= many.lines;
  // Where there are no such lines, others are read, and the sums dropped.
  const int left = max(many.lines - 1 - line, 0);
  const T* const column = many.data + min(line, many.lines - 1) * many.line_stride;
  const T* few_rows[count];
#pragma unroll
  for (int f = 0; f < count; ++f) few_rows[f] = few.data + min(f, few.lines - 1) * few.line_stride;

  C sum[count][N] = {};
  const auto add = [&](int step, const Pack<T, N>& x) {
#pragma unroll
    for (int f = 0; f < count; ++f) {
      const C y = widen(few_rows[f][step * few.step_stride]);
#pragma unroll
      for (int j = 0; j < N; ++j) sum[f][j] = fma(widen(x.value[j]), y, sum[f][j]);
    }
  };
  const int first_step = steps.first + threadIdx.x / 8;
  if (packed)
    for_steps<skinny_batch<count>, 32, 1>(
        first_step, steps.last, [&](int s) { return load_pack<N>(column + s * many.step_stride); }, add);
  else
    for_steps<1, 32, 1>(
        first_step, steps.last,
        [&](int s) {
          Pack<T, N> pack;
#pragma unroll
          for (int j = 0; j < N; ++j) pack.value[j] = column[s * many.step_stride + min(j, left) * many.line_stride];
          return pack;
        },
        add);

  // Four groups are in a warp.
  __shared__ C partial[warps][count][lines];
#pragma unroll
  for (int f = 0; f < count; ++f)
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const C of_warp = sum_over_lanes(sum[f][j], 8, 32);
      if (threadIdx.x % 32 < 8) partial[threadIdx.x / 32][f][threadIdx.x % 8 * N + j] = of_warp;
    }
  __syncthreads();
  for (int i = threadIdx.x; i < count * lines; i += skinny_threads) {
    const int f = i / lines, l = i % lines;
    if (f >= few.lines || first + l >= many.lines) continue;
    C whole = partial[0][f][l];
#pragma unroll
    for (int warp = 1; warp < warps; ++warp) whole = whole + partial[warp][f][l];
    put_skinny(epilogue, many_are_rows, first + l, f, whole);
  }
}

template <int count, class T, class Epilogue>
__global__ void __launch_bounds__(skinny_threads)
    matmul_skinny(Operand<T> many, Operand<T> few, int k, int steps_per_split, int many_are_rows, Epilogue epilogue) {
  const StepRange steps = step_range(k, steps_per_split);
  if (many.along_lines)
    skinny_by_step<count>(many, few, steps, many_are_rows, epilogue);
  else
    skinny_by_line<count>(many, few, steps, many_are_rows, epilogue);
}

}  // namespace gemmlet
