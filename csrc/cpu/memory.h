// Aligned memory, and memory that stays for the next call.
//
// Contract
//   Memory begins with a cache line and is uninitialized, so that pages that are never used take none. Where there is none:
//   std::bad_alloc.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "cpu/kernels.h"

namespace gemmlet {

template <class T>
struct FreeAligned {
  void operator()(T* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
template <class T>
using Buffer = std::unique_ptr<T[], FreeAligned<T>>;

template <class T>
Buffer<T> space(Index count) {
  const std::size_t bytes = static_cast<std::size_t>(count > 1 ? count : 1) * sizeof(T);
  return Buffer<T>(static_cast<T*>(::operator new[](bytes, std::align_val_t{64})));
}

// Blocks that a call leaves to the next one, which takes the same ones if it asks for the same sizes in the same order. Large
// blocks that are freed go back to the system, which clears each page before it hands it out again.
class KeptMemory {
 public:
  // Of the call that has it: others in the meantime need memory of their own.
  std::mutex used;

  // The call begins.
  void begin() { next_ = 0; }
  template <class T>
  T* take(Index count) {
    if (next_ == blocks_.size()) blocks_.emplace_back();
    Block& block = blocks_[next_++];
    const Index bytes = count * static_cast<Index>(sizeof(T));
    if (block.bytes < bytes) {
      block = {};  // first: there may be no memory for both
      block = {space<std::byte>(bytes), bytes};
    }
    return reinterpret_cast<T*>(block.data.get());
  }

 private:
  struct Block {
    Buffer<std::byte> data;
    Index bytes = 0;
  };
  std::vector<Block> blocks_;
  std::size_t next_ = 0;
};

}  // namespace gemmlet
