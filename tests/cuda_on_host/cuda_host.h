// CUDA C++ for g++: what a kernel of csrc/cuda/ names, so that the very kernels run on the CPU, for tests.
//
// Contract
//   Each thread of a block is a fiber; blocks are spread over OS threads. The order of the fibers can be chosen, and a
//   correct kernel computes the same in every one. cuda_host.cpp has the scheduler; a kernel's source is compiled with
//   this file in front of it and CUDA_HOST_KERNEL for each kernel behind it, and device.py launches them.
//   There are: threadIdx blockIdx blockDim gridDim, static and dynamic shared memory, barriers of a block, of a warp and
//   of a cluster, barriers in shared memory and bulk copies, shuffles, votes, atomics on integers, what asynchronous
//   copies need, and of the functions of C those declared below, no others: what else a kernel calls does not compile.
//   All shared memory is 0xFF in every byte (NaN) before each block. A cluster has all of its blocks' fibers in one OS
//   thread; such a kernel should have dynamic shared memory only, as static shared memory changes hands there, and
//   ThreadSanitizer takes it for all blocks' in common.
//   Found and reported, as an error of the launch: a barrier that not all can reach, a barrier in divergent code, lanes
//   of a warp at different exchanges, misaligned addresses and indices outside of arrays of known size (by GCC's
//   -fsanitize=alignment,bounds), writes beside dynamic shared memory or arrays, accesses of no memory, a full stack
//   (64 KB), an asynchronous copy that nobody waited for (what it should have copied reads as NaN), a wgmma of a
//   warpgroup that was not fenced, or that nobody waited for (it is computed as late as it may be), a barrier in shared
//   memory that was not initialized, or twice, or not fenced, or that too many arrive at, a phase that expects fewer bytes
//   than come, or is left expecting some, a bulk copy or a store to another block that nobody waited for (what it fills
//   reads as NaN from when it is issued), a wait for a phase that cannot end, an access of a block of the cluster that may
//   not have begun, or has ended, an arrival at the cluster's barrier that nobody waited for.
//   With -fsanitize=thread every missing __syncthreads or __syncwarp is a data race, and so is a missing __threadfence or
//   barrier of the cluster, and the launch is given up after the first one; with -fsanitize=address every stray access
//   ends the process.
//   Not found: what depends on a GPU's weak memory order, on the number of registers, on time. Lanes named in a mask
//   must be all that there are: parts of a warp cannot shuffle alone.
#pragma once

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) alignas(bytes)
#define __grid_constant__
// device.py reads both in the source, and checks.
#define __launch_bounds__(...)
#define __cluster_dims__(...)
// No other thread_local variables may be in the source: cuda_host.cpp takes all that the library has for shared memory.
#define __shared__ static thread_local

#if defined(__SANITIZE_THREAD__)
// Bookkeeping is not part of the program under test.
#define CUDA_HOST_QUIET __attribute__((no_sanitize("thread"), noinline))
#else
#define CUDA_HOST_QUIET inline
#endif

extern "C" {
void* memcpy(void*, const void*, decltype(sizeof 0)) noexcept;
void* memset(void*, int, decltype(sizeof 0)) noexcept;
float fmaf(float, float, float) noexcept;
double fma(double, double, double) noexcept;
float sqrtf(float) noexcept;
double sqrt(double) noexcept;
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
};

namespace cuda_host {

using Size = decltype(sizeof 0);

// Where in a kernel's source a thread waits.
struct Place {
  const char* what;
  const char* file;
  int line;
};

struct Fiber;

// Exited threads are not waited for.
struct Barrier {
  unsigned expected, arrived, phase;
  Place place;
  Fiber *first, *last;    // who waits, in the order of arrival
  unsigned char edge[2];  // the addresses stand for the phases, in turn, before ThreadSanitizer
};

struct Warp {
  Barrier barrier;
  // What the lanes hand in, and which did: one is read while the other fills.
  alignas(16) unsigned char slots[2][32 * 64];
  unsigned present[2];
};

struct Block {
  uint3 index;
  dim3 size, grid;
  unsigned rank;       // in its cluster
  Block* cluster;      // the first block of the cluster
  Barrier of_cluster;  // of the first block: the barrier of the cluster
  Barrier barrier;
  void* dynamic;            // shared memory, with guards around it
  void* statics = nullptr;  // static shared memory, while another block of a cluster runs
};

// Copies and wgmma of a thread that wait to be waited for; cuda_host.cpp has the definitions.
struct CopyQueue;
struct WgmmaQueue;

struct Fiber {
  uint3 thread;
  unsigned index, lane;
  Block* block;
  Warp* warp;
  CopyQueue* copies;
  WgmmaQueue* wgmmas;
  bool wgmma_fenced;  // registers can be theirs
  bool arrived;       // at the cluster's barrier, in the phase
  unsigned arrived_in;
  // For the order of memory between blocks.
  bool fenced;
  void* last_atomic;
  // The rest is the scheduler's.
  void* stack_pointer;
  void* stack;
  Fiber* next;
  Place place;
  bool waits;
  void* tsan;
  void* asan;
};

// The thread that runs.
extern __thread Fiber* self __attribute__((tls_model("initial-exec")));

// Ends the launch, which returns the message.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// orders_memory: what was written before is seen after.
void wait(Barrier& barrier, Place place, bool orders_memory);

// The barrier of a cluster, in two parts; both order memory.
void arrive_at_cluster(Place place);
void wait_for_cluster(Place place);

// The same place of dynamic shared memory in a block of the cluster.
unsigned char* in_block(void* shared, unsigned rank);

// Of 16 bytes, but not of 32.
inline void* dynamic_shared() { return self->block->dynamic; }

// __threadfence. ThreadSanitizer knows no fences, so it is told: what a thread does before an atomic operation is seen
// by others only if there was a fence; and it sees what others did before theirs only after the next fence.
void fence();
void before_atomic(void* p);

template <class F>
auto atomic(void* p, F operation) {
  before_atomic(p);
  const auto old = operation();
  self->last_atomic = p;
  return old;
}

//
// Exchanges within a warp
//

// The values that the lanes of a warp handed in; a lane that did not reads as 0xFF bytes.
template <class T>
struct Lanes {
  const unsigned char* slots;
  unsigned present;
  CUDA_HOST_QUIET T operator[](unsigned lane) const {
    T value;
    if (present >> lane & 1)
      __builtin_memcpy(&value, slots + lane * sizeof(T), sizeof(T));
    else
      __builtin_memset(&value, 0xFF, sizeof(T));
    return value;
  }
};

void check_mask(unsigned mask, Place place);

// Every lane hands in one value, and reads those of the lanes that it wants before its next exchange or __syncwarp.
template <class T>
CUDA_HOST_QUIET Lanes<T> warp_exchange(T mine, const char* what = "a warp exchange",
                                       const char* file = __builtin_FILE(), int line = __builtin_LINE(),
                                       unsigned mask = ~0u) {
  static_assert(__is_trivially_copyable(T) && sizeof(T) <= 64);
  Warp& warp = *self->warp;
  const Place place{what, file, line};
  check_mask(mask, place);
  const unsigned turn = warp.barrier.phase % 2;
  if (warp.barrier.arrived == 0) warp.present[turn] = 0;
  warp.present[turn] |= 1u << self->lane;
  __builtin_memcpy(warp.slots[turn] + self->lane * sizeof(T), &mine, sizeof(T));
  wait(warp.barrier, place, false);
  return {warp.slots[turn], warp.present[turn]};
}

//
// Asynchronous copies (cp.async): done no earlier than they are waited for, so that a missing wait is seen.
//

struct Copy {
  void* to;
  const void* from;
  unsigned bytes, from_bytes;
};

void queue_copy(const Copy& copy);
// Takes the oldest copy out of the queue that is not in one of the `groups` newest groups.
bool next_copy(unsigned groups, Copy& copy);

// Copies from_bytes, and zeros up to `bytes`, which is 4, 8 or 16, and what both addresses are multiples of.
inline void copy_async(void* to, const void* from, unsigned bytes, unsigned from_bytes) {
  if (reinterpret_cast<Size>(to) % bytes || (from_bytes && reinterpret_cast<Size>(from) % bytes))
    fail("an asynchronous copy of %u bytes from %p to %p: misaligned", bytes, from, to);
  // (Word by word: of a memset that the compiler writes out ThreadSanitizer is not told.)
  for (unsigned i = 0; i < bytes / 4; ++i) static_cast<unsigned*>(to)[i] = ~0u;
  queue_copy({to, from, bytes, from_bytes});
}

// The copies since the last commit become a group.
void commit_copies();

// Does all copies but those of the newest groups.
inline void wait_for_copies(unsigned newest_groups) {
  Copy copy;
  while (next_copy(newest_groups, copy)) {
    for (unsigned i = 0; i < copy.bytes / 4; ++i)
      if (static_cast<const unsigned*>(copy.to)[i] != ~0u)
        fail("what an asynchronous copy fills, at %p, was written to while nobody had waited for the copy", copy.to);
    memcpy(copy.to, copy.from, copy.from_bytes);
    memset(static_cast<char*>(copy.to) + copy.from_bytes, 0, copy.bytes - copy.from_bytes);
  }
}

//
// wgmma of a warpgroup: done no earlier than they are waited for, from shared memory as it is then
//

struct Wgmma {
  void (*compute)(const Wgmma&);
  float* d;
  unsigned long long a, b;
  const unsigned* a_registers;  // instead, and what they held
  unsigned held[4];
};

void queue_wgmma(const Wgmma& wgmma);
// The wgmma since the last commit become a group.
void commit_wgmma();
// Takes the oldest wgmma out of the queue that is not in one of the `groups` newest groups.
bool next_wgmma(unsigned groups, Wgmma& wgmma);

//
// Barriers in shared memory (mbarrier), and bulk copies that complete on them (cp.async.bulk, st.async): done when the
// phase is waited for, so that a missing wait is seen
//

// A box of an array of two dimensions, on its way to shared memory; or some numbers of a thread's.
struct BulkCopy {
  void (*perform)(const BulkCopy&);
  unsigned char* to;
  const unsigned char* from;  // the array
  long long inner, outer, row_bytes;
  int first_inner, first_outer, box_inner, box_outer, size, rounds;
  unsigned words[4];
};

void init_shared_barrier(void* barrier, unsigned arrivals);
// Of the barriers that the thread has initialized.
void fence_barrier_init();
// Arrives, and lets the phase wait for `bytes` bytes.
void arrive(void* barrier, unsigned bytes);
void queue_bulk_copy(void* barrier, const BulkCopy& copy, unsigned bytes);
void wait_for_phase(void* barrier, unsigned parity, Place place);

//
// What a library of kernels exports
//

struct Kernel {
  const char* types;  // "P = {const float*; int}", as GCC puts it
  unsigned count;
  const unsigned* sizes;  // of the parameters, in bytes
  const char* kinds;      // of each parameter: p(ointer), f(loating), i(nteger), s(truct)
  unsigned max_threads, cluster;
  void (*run)(void* const* arguments);
  void* (*statics)();
};

// Of this library: its address tells which thread_local variables are shared memory.
static thread_local char shared_memory_anchor;

template <class... P>
constexpr const char* names_of_types() {
  return __PRETTY_FUNCTION__;
}

template <class T>
constexpr char kind_of = __is_class(T) ? 's' : 'i';
template <class T>
constexpr char kind_of<T*> = 'p';
template <>
constexpr char kind_of<float> = 'f';
template <>
constexpr char kind_of<double> = 'f';

template <class T>
struct WithoutConst {
  using type = T;
};
template <class T>
struct WithoutConst<const T> : WithoutConst<T> {};

template <int...>
struct Numbers {};

template <auto kernel>
struct Entry;
template <class... P, void (*kernel)(P...)>
struct Entry<kernel> {
  static constexpr unsigned sizes[] = {sizeof(P)..., 0};
  static constexpr char kinds[] = {kind_of<typename WithoutConst<P>::type>..., 0};

  template <int... i>
  static void run(void* const* arguments, Numbers<i...>) {
    kernel(*static_cast<typename WithoutConst<P>::type*>(arguments[i])...);
  }
  static void run(void* const* arguments) { run(arguments, Numbers<__integer_pack(sizeof...(P))...>{}); }

  static void* statics() { return &shared_memory_anchor; }

  static constexpr Kernel description(unsigned max_threads, unsigned cluster) {
    return {names_of_types<P...>(), sizeof...(P), sizes, kinds, max_threads, cluster, run, statics};
  }
};

}  // namespace cuda_host

// Exports a kernel under a number; max_threads is that of its __launch_bounds__, cluster the blocks of its
// __cluster_dims__, or 1. After them, what C++ calls it.
#define CUDA_HOST_KERNEL(number, max_threads, cluster, ...)                                             \
  extern "C" __attribute__((visibility("default"))) const cuda_host::Kernel cuda_host_kernel_##number = \
      cuda_host::Entry<&__VA_ARGS__>::description(max_threads, cluster);

#define threadIdx (cuda_host::self->thread)
#define blockIdx (cuda_host::self->block->index)
#define blockDim (cuda_host::self->block->size)
#define gridDim (cuda_host::self->block->grid)

//
// Barriers, shuffles, votes
//

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_host::wait(cuda_host::self->block->barrier, {"__syncthreads", file, line}, true);
}

inline void __syncwarp(unsigned mask = ~0u, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const cuda_host::Place place{"__syncwarp", file, line};
  cuda_host::check_mask(mask, place);
  cuda_host::wait(cuda_host::self->warp->barrier, place, true);
}

// The lane read from, in a segment of `width` lanes, or its own where that is outside of the segment.
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, const char* file = __builtin_FILE(),
              int line = __builtin_LINE()) {
  const unsigned self = cuda_host::self->lane, first = self & -width;
  return cuda_host::warp_exchange(value, "__shfl_sync", file, line, mask)[first + (lane & (width - 1))];
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
  const unsigned self = cuda_host::self->lane, other = self ^ lanes;
  return cuda_host::warp_exchange(value, "__shfl_xor_sync", file, line,
                                  mask)[other < (self | (width - 1)) + 1 ? other : self];
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, const char* file = __builtin_FILE(),
                   int line = __builtin_LINE()) {
  const unsigned self = cuda_host::self->lane, other = self + delta;
  return cuda_host::warp_exchange(value, "__shfl_down_sync", file, line,
                                  mask)[other <= (self | (width - 1)) ? other : self];
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, const char* file = __builtin_FILE(),
                 int line = __builtin_LINE()) {
  const unsigned self = cuda_host::self->lane, position = self & (width - 1);
  return cuda_host::warp_exchange(value, "__shfl_up_sync", file, line, mask)[delta <= position ? self - delta : self];
}

inline unsigned __ballot_sync(unsigned mask, int predicate, const char* file = __builtin_FILE(),
                              int line = __builtin_LINE()) {
  const auto lanes = cuda_host::warp_exchange(predicate != 0 ? 1u : 0u, "__ballot_sync", file, line, mask);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane) votes |= (lanes.present >> lane & lanes[lane]) << lane;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return __ballot_sync(mask, !predicate, file, line) == 0;
}

//
// Atomics on integers, and the order of memory between blocks
//

inline void __threadfence() { cuda_host::fence(); }

inline unsigned atomicAdd(unsigned* p, unsigned x) {
  return cuda_host::atomic(p, [=] { return __atomic_fetch_add(p, x, __ATOMIC_RELAXED); });
}
inline int atomicAdd(int* p, int x) {
  return cuda_host::atomic(p, [=] { return __atomic_fetch_add(p, x, __ATOMIC_RELAXED); });
}
inline unsigned atomicExch(unsigned* p, unsigned x) {
  return cuda_host::atomic(p, [=] { return __atomic_exchange_n(p, x, __ATOMIC_RELAXED); });
}
inline unsigned atomicCAS(unsigned* p, unsigned expected, unsigned x) {
  return cuda_host::atomic(p, [=]() mutable {
    __atomic_compare_exchange_n(p, &expected, x, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return expected;
  });
}
// Counts from 0 to `last`, and round.
inline unsigned atomicInc(unsigned* p, unsigned last) {
  return cuda_host::atomic(p, [=] {
    unsigned old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (
        !__atomic_compare_exchange_n(p, &old, old >= last ? 0 : old + 1, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return old;
  });
}
