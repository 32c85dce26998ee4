// Kernels for tests/test_cuda_on_host.py: what cuda_host.h must run as a GPU does, and what it must report.
#pragma once

#include "cuda/pack.cuh"
#include "cuda/scalar.cuh"

namespace shim {

using gemmlet::dynamic_shared;

constexpr unsigned all = 0xffffffffu;

__device__ inline unsigned global_thread() {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  return block * blockDim.x + threadIdx.x;
}

// Where each thread is, as digits, and when it came.
__global__ void places(int* place, unsigned* turn, unsigned* counter) {
  const unsigned i = global_thread();
  place[i] = static_cast<int>(((blockIdx.z * 10 + blockIdx.y) * 10 + blockIdx.x) * 1000 + threadIdx.x);
  turn[i] = atomicAdd(counter, 1);
}

// The sum over a block, in dynamic shared memory. One barrier can be left out: 1 or 2.
template <int Missing>
__global__ void __launch_bounds__(Missing ? 256 : 512) block_sum(const float* x, float* y) {
  float* values = dynamic_shared<float>();
  values[threadIdx.x] = x[global_thread()];
  if (Missing != 1) __syncthreads();
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) values[threadIdx.x] += values[threadIdx.x + half];
    if (Missing != 2) __syncthreads();
  }
  if (threadIdx.x == 0) y[blockIdx.x] = values[0];
}

// Shared memory that nobody wrote to; and, behind it, what the block before left.
__global__ void unwritten(unsigned* y) {
  __shared__ unsigned values[64];
  unsigned* more = dynamic_shared<unsigned>();
  const unsigned i = threadIdx.x;
  y[global_thread()] = values[i] & more[i];
  __syncthreads();
  values[i] = more[i] = 0;
}

// A lane's neighbours, in every way; of a lane that there is not, 0xFF bytes come.
__global__ void shuffles(long long* y) {
  const int i = static_cast<int>(threadIdx.x);
  long long* out = y + 6 * i;
  const long long mine = 1ll << 40 | i;
  out[0] = __shfl_xor_sync(all, mine, 1);
  out[1] = __shfl_sync(all, mine, 3);
  out[2] = __shfl_up_sync(all, mine, 2);
  out[3] = __shfl_down_sync(all, mine, 2, 8);
  out[4] = __ballot_sync(all, i % 3 == 0);
  out[5] = __any_sync(all, i == 40) * 2 + __all_sync(all, i < 40);
}

// Half of the threads exit before the barriers that the rest come to.
__global__ void exits(int* y) {
  __shared__ int values[128];
  const unsigned i = threadIdx.x;
  if (i % 2) return;
  values[i] = static_cast<int>(i);
  __syncthreads();
  y[i] = values[(i + 2) % blockDim.x] + __shfl_xor_sync(all, static_cast<int>(i), 2);
}

__global__ void deadlock() {
  if (threadIdx.x == 5)
    __syncwarp();
  else
    __syncthreads();
}

__global__ void divergent(int* y) {
  if (threadIdx.x < 32) {
    __syncthreads();
    y[0] = 1;
  } else {
    __syncthreads();
    y[1] = 1;
  }
}

__global__ void part_of_a_warp(int* y) {
  if (threadIdx.x < 16) y[threadIdx.x] = __shfl_xor_sync(0xffffu, static_cast<int>(threadIdx.x), 1);
}

__global__ void stray_write(float* y, int index) { y[index] = 1; }

__global__ void stray_shared_write(float* y) {
  dynamic_shared<float>()[threadIdx.x + 1] = 1;
  __syncthreads();
  y[threadIdx.x] = dynamic_shared<float>()[threadIdx.x + 1];
}

__global__ void stray_index(int* y, int last) {
  int values[4] = {};
  for (int i = 0; i <= last; ++i) values[i] = i;
  y[0] = values[last / 2];
}

__global__ void misaligned(float* y, int offset) { gemmlet::store_pack<4>(y + offset, {{1, 2, 3, 4}}); }

// y = x by asynchronous copies, one ahead, but for zeros in every second place in the end. All but the `Wait` newest
// ones are waited for.
template <int Buffers, int Wait>
__global__ void copies(const float* x, float* y, int turns) {
  float* buffers = dynamic_shared<float>();
  const auto copy = [&](int turn) {
    if (turn < turns)
      cuda_host::copy_async(buffers + turn % Buffers * blockDim.x + threadIdx.x, x + turn * blockDim.x + threadIdx.x, 4,
                            turn + 1 == turns && threadIdx.x % 2 ? 0 : 4);
    cuda_host::commit_copies();
  };
  copy(0);
  for (int turn = 0; turn < turns; ++turn) {
    copy(turn + 1);
    cuda_host::wait_for_copies(Wait);
    y[turn * blockDim.x + threadIdx.x] = buffers[turn % Buffers * blockDim.x + threadIdx.x];
  }
}

// Passes sums round in a cluster: in each of the turns a block reads what its neighbour wrote in the turn before.
template <bool Static, bool Wait>
__global__ void __launch_bounds__(96) __cluster_dims__(3, 1, 1) ring(int* values, int turns) {
  int* mine = dynamic_shared<int>();
  if constexpr (Static) {
    __shared__ int memory[96];
    mine = memory;
  }
  const unsigned rank = gemmlet::ptx::cluster_rank(), next = blockIdx.x - rank + (rank + 1) % 3;
  mine[threadIdx.x] = static_cast<int>(blockIdx.x);
  __syncthreads();
  for (int turn = 0; turn < turns; ++turn) {
    if (threadIdx.x == 0)
      values[(turn + 1) % 2 * gridDim.x + blockIdx.x] = values[turn % 2 * gridDim.x + next] + mine[blockDim.x - 1];
    if constexpr (Wait) {
      gemmlet::ptx::arrive_at_cluster();
      gemmlet::ptx::wait_for_cluster();
    }
  }
}

// Each block of three gives its number to all, and adds what it was given. What may be wrong is 1: no barrier before, 2:
// it adds too early; 3: it arrives twice; 4: it does not wait for the others' arrival; 5: it waits only; 6: there is no
// such block; 7: a block has ended; 8: more bytes come than are expected; 9: fewer do; 10: the barrier is not fenced;
// 11: it is none; 12: it is initialized twice; 13: nobody waits for it.
template <int Wrong>
__global__ void __cluster_dims__(3, 1, 1) __launch_bounds__(64) cluster(int* y) {
  float* const given = dynamic_shared<float>();
  const unsigned rank = gemmlet::ptx::cluster_rank();
  const auto barrier = gemmlet::ptx::shared_address(given + 16);
  if (threadIdx.x == 0 && Wrong != 11) {
    gemmlet::ptx::init_barrier(barrier, 1);
    if (Wrong == 12) gemmlet::ptx::init_barrier(barrier, 1);
  }
  if (Wrong != 10) gemmlet::ptx::fence_barrier_init();
  if (Wrong != 1 && Wrong != 5) gemmlet::ptx::arrive_at_cluster();
  if (Wrong == 3) gemmlet::ptx::arrive_at_cluster();
  if (Wrong != 1 && Wrong != 4) gemmlet::ptx::wait_for_cluster();
  if (Wrong == 7 && rank == 1) return;
  if (Wrong == 7) __syncthreads();
  const float numbers[4] = {1, 2, 3, static_cast<float>(blockIdx.x + 1)};
  if (threadIdx.x == 0) {
    for (unsigned other = 0; other < 3; ++other)
      gemmlet::ptx::store_to_block(gemmlet::ptx::shared_address(given + 4 * rank), other + (Wrong == 6), barrier,
                                   numbers);
    gemmlet::ptx::arrive_expecting(barrier, Wrong == 8 ? 32 : Wrong == 9 ? 64 : 48);
  }
  const auto add = [=] { y[global_thread()] = static_cast<int>(given[3] + given[7] + given[11]); };
  if (Wrong == 2) add();
  if (Wrong != 13) gemmlet::ptx::wait_for_phase(barrier, 0);
  add();
}

// The sum of all blocks' numbers, by the last block to come; one fence can be left out: 1 or 2.
template <int Missing>
__global__ void last_block(int* values, unsigned* counter) {
  if (threadIdx.x != 0) return;
  values[blockIdx.x] = static_cast<int>(blockIdx.x);
  if (Missing != 1) __threadfence();
  if (atomicInc(counter, gridDim.x - 1) < gridDim.x - 1) return;
  if (Missing != 2) __threadfence();
  int sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += values[i];
  values[gridDim.x] = sum;
}

// 16 KB on the stack of each thread.
__global__ void large_frame(int* y, int step) {
  int values[4096];
  for (int i = 0; i < 4096; ++i) values[i] = i;
  for (int i = step; i < 4096; ++i) values[i] += values[i - step];
  y[global_thread()] = values[4095];
}

// On a GPU a division by zero is no error; here it is.
__global__ void faults(int* y, int divisor, int frames) {
  volatile int frame[1000] = {};
  frame[threadIdx.x % 1000] = 7 / divisor;
  if (frames > 0) return faults(y, divisor, frames - 1);
  y[threadIdx.x] = frame[0];
}

__global__ void counts(unsigned* counters) {
  atomicInc(&counters[0], 9);
  if (atomicExch(&counters[1], 1) == 0) atomicCAS(&counters[2], 0, 7);
}

template <class T>
__global__ void round_trip(const T* x, float* wide, T* y, int n) {
  for (int i = static_cast<int>(global_thread()); i < n; i += gridDim.x * blockDim.x) {
    wide[i] = gemmlet::widen(x[i]);
    y[i] = gemmlet::narrow<T>(wide[i]);
  }
}

template <class T>
__global__ void rounded(const float* x, T* y, int n) {
  for (int i = static_cast<int>(global_thread()); i < n; i += gridDim.x * blockDim.x) y[i] = gemmlet::narrow<T>(x[i]);
}

__global__ void quotients(const float* a, const float* b, float* q, int n) {
  const int i = static_cast<int>(global_thread());
  if (i < n) q[i] = gemmlet::quotient(a[i], b[i]);
}

// What `boxes` leaves out or does wrong.
enum Wrong {
  nothing,
  no_init,
  no_fence,
  no_sync,
  no_wait,
  two_arrivals,
  fewer_bytes,
  more_bytes,
  overwritten,
  odd_place
};

// A box of 8 rows of 64 numbers, from the second row and the third column on, as it lies in shared memory of each block
// of a cluster. The first block copies it.
template <int Wrong, int Cluster>
__global__ void __launch_bounds__(64) __cluster_dims__(Cluster, 1, 1)
    boxes(const __grid_constant__ gemmlet::ptx::TensorMap map, unsigned short* y) {
  namespace ptx = gemmlet::ptx;
  unsigned char* const memory = dynamic_shared<unsigned char>();
  const int beyond = -ptx::address_bits(ptx::shared_address(memory)) & 1023;
  const ptx::SharedAddress box = ptx::shared_address(memory) + beyond, barrier = box + 1024;
  if (threadIdx.x == 0) {
    if (Wrong != no_init) ptx::init_barrier(barrier, 1);
    if (Wrong != no_fence) ptx::fence_barrier_init();
    if (Wrong == overwritten) memory[beyond + 1024] ^= 1;
  }
  if (Wrong != no_sync) {
    ptx::arrive_at_cluster();
    ptx::wait_for_cluster();
  }
  if (threadIdx.x == 0) {
    ptx::arrive_expecting(barrier, Wrong == fewer_bytes ? 512 : Wrong == more_bytes ? 2048 : 1024);
    if (Wrong == two_arrivals) ptx::arrive_at(barrier, blockIdx.x % Cluster);
    if (blockIdx.x % Cluster == 0) {
      if constexpr (Cluster == 1)
        ptx::copy_box(box + (Wrong == odd_place ? 512 : 0), map, 2, 1, barrier);
      else
        ptx::copy_box_to_blocks(box, map, 2, 1, barrier, (1 << Cluster) - 1);
    }
  }
  if (Wrong != no_wait) ptx::wait_for_phase(barrier, 0);
  for (int i = threadIdx.x; i < 512; i += blockDim.x)
    y[blockIdx.x * 512 + i] = reinterpret_cast<const unsigned short*>(memory + beyond)[i];
  ptx::arrive_at_cluster();
  ptx::wait_for_cluster();
}

}  // namespace shim
