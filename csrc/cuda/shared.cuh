// Dynamic shared memory.
#pragma once

namespace gemmlet {

#if defined(__CUDACC__)
// The block's dynamic shared memory, 16-byte aligned; a launch says how many bytes there are.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}
#else
template <class T>
inline T* dynamic_shared() {
  return static_cast<T*>(cuda_host::dynamic_shared());
}
#endif

}  // namespace gemmlet
