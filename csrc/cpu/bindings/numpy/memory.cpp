// Contract
//   Blocks of at least `smallest` bytes are kept by size class, four to an octave, last in first out; smaller and larger ones
//   are the default handler's. A block is aligned to a cache line, from posix_memalign: free() takes it as well as realloc().
//   Sizes that NumPy passes to free may be wrong (of an array without elements, it is 1): the block's own size decides.
//   NumPy calls a handler with the GIL held. Who does not, or finds the blocks in use by such a caller, does without them:
//   nobody waits, also not in a child that was forked meanwhile.
#include "cpu/bindings/numpy/memory.h"

#include <pybind11/pybind11.h>
#if defined(__APPLE__)
#include <malloc/malloc.h>
#else
#include <malloc.h>
#include <sys/mman.h>
#endif

#include <atomic>
#include <bit>
#include <cstdlib>
#include <cstring>
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
std::size_t kept_bytes, most_bytes;
const PyDataMem_Handler* fallback;
PyObject* before;  // the handler that was in use

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

void give_back() {
  const Turn turn;
  if (!turn) return;
  for (Block*& first : kept)
    while (first != nullptr) std::free(std::exchange(first, first->next));
  kept_bytes = 0;
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
  void* p = nullptr;
  if (posix_memalign(&p, c.bytes >= 2 * huge_page ? huge_page : 64, c.bytes) != 0) {
    give_back();
    if (posix_memalign(&p, 64, c.bytes) != 0) return nullptr;
  }
#if defined(MADV_HUGEPAGE)
  if (c.bytes >= 2 * huge_page) madvise(p, c.bytes, MADV_HUGEPAGE);
#endif
  return p;
}

void* allocate(void*, std::size_t bytes) {
  if (!takes(bytes)) return fallback->allocator.malloc(fallback->allocator.ctx, bytes);
  const Class c(bytes);
  void* p = reuse(c);
  return p != nullptr ? p : take(c);
}

void* allocate_zeros(void*, std::size_t count, std::size_t size) {
  const std::size_t bytes = count * size;  // NumPy has checked the product
  if (!takes(bytes)) return fallback->allocator.calloc(fallback->allocator.ctx, count, size);
  const Class c(bytes);
  if (void* p = reuse(c)) return std::memset(p, 0, bytes);
  return std::calloc(1, c.bytes);  // the system's pages are zeros already
}

void release(void*, void* p, std::size_t bytes) {
  if (p == nullptr) return;
  if (!takes(bytes)) return fallback->allocator.free(fallback->allocator.ctx, p, bytes);
  const Class c(bytes);
  const Turn turn;
  if (!turn || kept_bytes + c.bytes > most_bytes || usable_bytes(p) < c.bytes) return std::free(p);
  Block* block = static_cast<Block*>(p);
  block->next = kept[c.index];
  kept[c.index] = block;
  kept_bytes += c.bytes;
}

void* reallocate(void*, void* p, std::size_t bytes) {
  return std::realloc(p, takes(bytes) ? Class(bytes).bytes : bytes);
}

PyDataMem_Handler handler = {"gemmlet", 1, {nullptr, allocate, allocate_zeros, reallocate, release}};

}  // namespace

void keep_memory(std::int64_t bytes) {
  most_bytes = static_cast<std::size_t>(bytes);
  if (kept_bytes > most_bytes) give_back();
  PyObject* next = nullptr;
  if (bytes > 0 && before == nullptr) {
    fallback = static_cast<PyDataMem_Handler*>(PyCapsule_GetPointer(PyDataMem_DefaultHandler, "mem_handler"));
    if (fallback == nullptr) throw pybind11::error_already_set();
    next = PyCapsule_New(&handler, "mem_handler", nullptr);
    if (next == nullptr) throw pybind11::error_already_set();
    before = PyDataMem_SetHandler(next);
  } else if (bytes == 0 && before != nullptr) {
    next = std::exchange(before, nullptr);
    Py_XDECREF(PyDataMem_SetHandler(next));
  }
  Py_XDECREF(next);
  if (PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
}

}  // namespace gemmlet::numpy
