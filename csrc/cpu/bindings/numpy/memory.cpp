// Contract
//   Blocks of at least `smallest` bytes are kept by size class, four to an octave, last in first out, and aligned to a cache
//   line. Smaller ones are NumPy's own functions', which keep a few of each size below 1 KiB.
//   All are malloc's, as those of NumPy's own functions are: either frees what the other has allocated, so that the functions
//   may be replaced while arrays are alive. Hence a block is kept only if it has the size of its class: NumPy's are exact.
//   Who finds the blocks in use does without: nobody waits, also not in a child that was forked meanwhile. NumPy tells
//   tracemalloc.
#include "cpu/bindings/numpy/memory.h"

#include <pybind11/pybind11.h>
#if defined(__APPLE__)
#include <malloc/malloc.h>
#else
#include <malloc.h>
#include <sys/mman.h>
#endif
#include <sys/resource.h>

#include <atomic>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <utility>

#include "cpu/bindings/numpy/operands.h"

namespace gemmlet::numpy {
namespace {

constexpr std::size_t smallest = 1 << 14, largest = 1 << 27, huge_page = 1 << 21;
constexpr int steps = 4, classes = 13 * steps + 1;

struct Block {
  Block* next;
};
std::atomic_flag in_use;
Block* kept[classes];
std::size_t kept_bytes, most_bytes, freed_bytes;
PyDataMemAllocator theirs;  // NumPy's own functions
bool replaced;

// The smallest class whose blocks hold `bytes`, and their size.
struct Class {
  int index;
  std::size_t bytes;
  explicit Class(std::size_t wanted) {
    const int octave = std::bit_width(wanted - 1) - 1;
    const std::size_t step = std::size_t{1} << (octave - 2);
    bytes = (wanted + step - 1) / step * step;
    index = wanted <= smallest ? 0 : (octave - 14) * steps + static_cast<int>(bytes / step) - steps;
    if (wanted <= smallest) bytes = smallest;
  }
};

bool takes(std::size_t bytes) { return bytes >= smallest && bytes <= largest; }

std::size_t usable_bytes(void* p) {
#if defined(__APPLE__)
  return malloc_size(p);
#else
  return malloc_usable_size(p);
#endif
}

// Who has the blocks, if anybody: false where somebody else has.
class Turn {
 public:
  Turn() : mine_(!in_use.test_and_set(std::memory_order_acquire)) {}
  ~Turn() {
    if (mine_) in_use.clear(std::memory_order_release);
  }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;
  explicit operator bool() const { return mine_; }

 private:
  const bool mine_;
};

// Gives free memory back to the system: free() itself does so with no more than what lies at the end.
void trim() {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

// Blocks that are kept may lie above those that are freed, which malloc then cannot give back by itself.
void count_freed(std::size_t bytes) {
  if ((freed_bytes += bytes) <= most_bytes) return;
  freed_bytes = 0;
  trim();
}

// What `allocate` returns, once more without the blocks that are kept if it is null.
template <class F>
void* or_give_back(F allocate) {
  void* p = allocate();
  if (p != nullptr) return p;
  give_back_memory();
  return allocate();
}

void* reuse(const Class& c) {
  const Turn turn;
  if (!turn) return nullptr;
  Block* block = kept[c.index];
  if (block == nullptr) return nullptr;
  kept[c.index] = block->next;
  kept_bytes -= c.bytes;
  return block;
}

void* take(const Class& c) {
  void* const p = or_give_back([&] {
    void* block = nullptr;
    return posix_memalign(&block, c.bytes >= 2 * huge_page ? huge_page : 64, c.bytes) == 0 ? block : nullptr;
  });
#if defined(MADV_HUGEPAGE)
  if (p != nullptr && c.bytes >= 2 * huge_page) madvise(p, c.bytes, MADV_HUGEPAGE);
#endif
  return p;
}

// The last resort is a block of the very size.
[[gnu::noinline]] void* allocate_large(void* context, std::size_t bytes) {
  const Class c(bytes);
  if (void* p = reuse(c)) return p;
  if (void* p = take(c)) return p;
  return theirs.malloc(context, bytes);
}

// Small blocks are most: what is done with large ones is kept out of their way.
void* allocate(void* context, std::size_t bytes) {
  if (takes(bytes)) return allocate_large(context, bytes);
  return or_give_back([&] { return theirs.malloc(context, bytes); });
}

void* allocate_zeros(void* context, std::size_t count, std::size_t size) {
  const std::size_t bytes = count * size;  // NumPy has checked the product
  if (!takes(bytes)) return or_give_back([&] { return theirs.calloc(context, count, size); });
  const Class c(bytes);
  if (void* p = reuse(c)) return std::memset(p, 0, bytes);
  // The system's pages are zeros already.
  if (void* p = or_give_back([&] { return std::calloc(1, c.bytes); })) return p;
  return theirs.calloc(context, count, size);
}

[[gnu::noinline]] void release_large(void* p, std::size_t bytes) {
  const Class c(bytes);
  const Turn turn;
  if (!turn || kept_bytes + c.bytes > most_bytes || usable_bytes(p) < c.bytes) {
    std::free(p);
    if (turn) count_freed(c.bytes);
    return;
  }
  Block* block = static_cast<Block*>(p);
  block->next = kept[c.index];
  kept[c.index] = block;
  kept_bytes += c.bytes;
}

void release(void* context, void* p, std::size_t bytes) {
  if (p != nullptr && takes(bytes)) return release_large(p, bytes);
  theirs.free(context, p, bytes);
}

void* reallocate(void* context, void* p, std::size_t bytes) {
  const std::size_t rounded = takes(bytes) ? Class(bytes).bytes : bytes;
  if (void* q = or_give_back([&] { return theirs.realloc(context, p, rounded); })) return q;
  return rounded == bytes ? nullptr : theirs.realloc(context, p, bytes);
}

// Whether the process may have only so many addresses: holes between blocks count there, which free() gives back otherwise.
bool memory_is_limited() {
  rlimit limit;
  for (const auto resource : {RLIMIT_AS, RLIMIT_DATA})
    if (getrlimit(resource, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY) return true;
  return false;
}

}  // namespace

[[gnu::cold]] void give_back_memory() {
  const Turn turn;
  if (!turn) return;
  for (Block*& first : kept)
    while (first != nullptr) std::free(std::exchange(first, first->next));
  kept_bytes = 0;
  trim();
}

void keep_memory(std::int64_t bytes) {
  if (bytes > 0 && memory_is_limited()) return;
  auto* handler = static_cast<PyDataMem_Handler*>(PyCapsule_GetPointer(PyDataMem_DefaultHandler, "mem_handler"));
  if (handler == nullptr) throw pybind11::error_already_set();
  most_bytes = static_cast<std::size_t>(bytes);
  if (bytes > 0 && !replaced)
    theirs = std::exchange(handler->allocator, {nullptr, allocate, allocate_zeros, reallocate, release});
  if (bytes == 0 && replaced && handler->allocator.malloc == &allocate) handler->allocator = theirs;
  replaced = bytes > 0;
  if (kept_bytes > most_bytes || most_bytes == 0) give_back_memory();
}

}  // namespace gemmlet::numpy
