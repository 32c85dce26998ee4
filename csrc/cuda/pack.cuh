// Several numbers in one access of memory; dynamic shared memory.
//
// Contract
//   Addresses are multiples of sizeof(Pack<T, N>), which is at most 16 bytes, what one thread moves at once.
#pragma once

#include "cuda/scalar.cuh"

namespace gemmlet {

template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  static_assert(N * sizeof(T) <= 16);
  T value[N];
};

// As many as fit into 16 bytes.
template <class T>
inline constexpr int pack_size = 16 / static_cast<int>(sizeof(T));

template <int N, class T>
__device__ __forceinline__ Pack<T, N> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}

template <int N, class T>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

// n numbers, their address a multiple of their size or of 16.
template <int n, class T>
__device__ __forceinline__ void load_numbers(const T* p, T (&v)[n]) {
  constexpr int size = n < pack_size<T> ? n : pack_size<T>;
#pragma unroll
  for (int i = 0; i < n; i += size) {
    const Pack<T, size> pack = load_pack<size>(p + i);
#pragma unroll
    for (int j = 0; j < size; ++j) v[i + j] = pack.value[j];
  }
}

template <int n, class T>
__device__ __forceinline__ void store_numbers(T* p, const T (&v)[n]) {
  constexpr int size = n < pack_size<T> ? n : pack_size<T>;
#pragma unroll
  for (int i = 0; i < n; i += size) {
    Pack<T, size> pack;
#pragma unroll
    for (int j = 0; j < size; ++j) pack.value[j] = v[i + j];
    store_pack(p + i, pack);
  }
}

// Number i of a pack, which should be known to the compiler: each half of a word takes one instruction.
template <class T, int N>
__device__ __forceinline__ Compute<T> widen(const Pack<T, N>& pack, int i) {
  if constexpr (same_type<T, bfloat16> && N % 2 == 0) {
    unsigned pair;
    memcpy(&pair, &pack.value[i / 2 * 2], sizeof pair);
    return reinterpreted<float>(i % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
  } else {
    return widen(pack.value[i]);
  }
}

// Numbers as narrow() rounds them, those of 16 bits in pairs.
template <class T, int N>
__device__ __forceinline__ Pack<T, N> narrowed(const Compute<T> (&x)[N]) {
  Pack<T, N> pack;
  constexpr bool half = same_type<T, float16>, pairs = (half || same_type<T, bfloat16>) && N % 2 == 0;
#pragma unroll
  for (int i = 0; i < N; i += pairs ? 2 : 1) {
    if constexpr (pairs) {
      const unsigned pair = half ? ptx::halves_of_floats(x[i], x[i + 1]) : ptx::bfloats_of_floats(x[i], x[i + 1]);
      memcpy(&pack.value[i], &pair, sizeof pair);
    } else {
      pack.value[i] = narrow<T>(x[i]);
    }
  }
  return pack;
}

// What one number is loaded as, or two neighbours of 16 bits at once.
template <class T, int count>
struct RegisterType {
  using type = T;
};
template <class T>
struct RegisterType<T, 2> {
  using type = unsigned;
};
template <class T, int count>
using RegisterOf = typename RegisterType<T, count>::type;

// Whether p may be the address of a pack of 16 bytes.
__device__ __forceinline__ bool is_aligned(const void* p) { return reinterpret_cast<unsigned long long>(p) % 16 == 0; }

// The block's dynamic shared memory, 16-byte aligned; a launch says how many bytes there are.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
#else
  return static_cast<T*>(cuda_host::dynamic_shared());
#endif
}

}  // namespace gemmlet
