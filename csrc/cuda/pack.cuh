// Several numbers in one access of memory.
//
// Contract
//   Addresses are multiples of sizeof(Pack<T, N>), which is at most 16 bytes, what one thread moves at once.
#pragma once

#include "cuda/value.cuh"

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

// Whether p may be the address of a pack of 16 bytes.
__device__ __forceinline__ bool is_aligned(const void* p) { return reinterpret_cast<unsigned long long>(p) % 16 == 0; }

}  // namespace gemmlet
