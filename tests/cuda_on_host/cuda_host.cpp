// Runs the blocks of a launch: fibers for threads, and OS threads for blocks. For what it promises see cuda_host.h.
//
// Contract
//   Compiled once, without the sanitizers that the kernels are compiled with (-DCUDA_HOST_ADDRESS, -DCUDA_HOST_THREAD
//   and -DCUDA_HOST_UNDEFINED say which those are), so that what is done here is no part of the program under test.
//   Linux. On x86-64 a switch between fibers takes some nanoseconds; elsewhere, or with -DCUDA_HOST_UCONTEXT, it is
//   ucontext's, with a system call.
#include "cuda_host.h"

#include <link.h>
#include <signal.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#if !defined(__x86_64__)
#define CUDA_HOST_UCONTEXT
#endif
#if defined(CUDA_HOST_UCONTEXT)
#include <ucontext.h>
#endif
#if defined(CUDA_HOST_ADDRESS)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(CUDA_HOST_THREAD)
#include <sanitizer/tsan_interface.h>
#endif

namespace cuda_host {

// How a launch is done, as device.py fills it in.
struct Configuration {
  unsigned grid[3], block;
  unsigned shared_bytes;
  int step;       // from each thread to the next, and below 0 from the last to the first
  int eager;      // who could go on last goes on first, so that warps run ahead of each other
  unsigned seed;  // not 0: after each event a thread drawn at random goes on
  unsigned os_threads;
};

template <class Item>
struct Queue {
  std::deque<Item> items;
  std::deque<unsigned> groups;  // sizes, the oldest first; what belongs to no group is behind them

  void clear() {
    items.clear();
    groups.clear();
  }
  void commit() { groups.push_back(items.size() - std::accumulate(groups.begin(), groups.end(), Size{0})); }
  bool next(unsigned newest_groups, Item& item) {
    while (groups.size() > newest_groups && groups.front() == 0) groups.pop_front();
    if (groups.size() <= newest_groups) return false;
    item = items.front();
    items.pop_front();
    --groups.front();
    return true;
  }
};

// An mbarrier. In shared memory there is a mark alone.
struct SharedBarrier {
  unsigned arrivals, pending, phase;  // of each phase; that the present one still waits for; the number of ended ones
  Size expected, queued;              // bytes
  // In no vector: ThreadSanitizer would see the memory of one change hands.
  BulkCopy copies[64];
  unsigned copy_count;
  Fiber* initialized_by;
  Fiber *first, *last;  // who waits
  Block* block;
  bool fenced;
  unsigned char edge[2];  // as of a Barrier
};

struct CopyQueue : Queue<Copy> {};
struct WgmmaQueue : Queue<Wgmma> {};

namespace {

// Kernels with arrays of their own need some; the sanitizers' frames are larger.
#if defined(CUDA_HOST_ADDRESS) || defined(CUDA_HOST_THREAD)
constexpr Size stack_bytes = 256 * 1024;
#else
constexpr Size stack_bytes = 64 * 1024;
#endif
constexpr Size page = 4096;
// A page below each stack that no one may touch. The distance is no power of two, as stacks would share cache sets.
constexpr Size stack_distance = stack_bytes + 2 * page;
constexpr Size guard_bytes = 4096;
// No more is promised for dynamic shared memory, and for arrays.
constexpr Size shared_alignment = 16, array_alignment = 256;

// What is where an mbarrier is.
constexpr unsigned long long shared_barrier_mark = 0x6d62617272696572;

struct Launch {
  const Kernel* kernel;
  const Configuration& configuration;
  void* const* arguments;
  unsigned blocks;
  unsigned workers = 1;
  std::atomic<unsigned> next{0};
  std::atomic<bool> failed{false};
  std::mutex mutex = {};
  std::string message = {};
};

//
// What the sanitizers must be told
//

#if defined(CUDA_HOST_THREAD)
// Of the launch that runs. It is given up then, at the next barrier: one report tells enough.
std::atomic<bool> race_reported{false};
#endif

// What precedes the release of an address is seen after it is acquired.
void release([[maybe_unused]] void* p) {
#if defined(CUDA_HOST_THREAD)
  __tsan_release(p);
#endif
}
void acquire([[maybe_unused]] void* p) {
#if defined(CUDA_HOST_THREAD)
  __tsan_acquire(p);
#endif
}

void forbid([[maybe_unused]] void* p, [[maybe_unused]] Size bytes) {
#if defined(CUDA_HOST_ADDRESS)
  __asan_poison_memory_region(p, bytes);
#endif
}
void allow([[maybe_unused]] void* p, [[maybe_unused]] Size bytes) {
#if defined(CUDA_HOST_ADDRESS)
  __asan_unpoison_memory_region(p, bytes);
#endif
}

// memcpy, which ThreadSanitizer would take for the running thread's.
void copy_unseen(void* to, const void* from, Size bytes) {
  for (Size i = 0; i < bytes; ++i) {
    static_cast<char*>(to)[i] = static_cast<const char*>(from)[i];
    asm volatile("");  // else it would become a memcpy
  }
}

//
// Memory with a guard on both sides
//

// What guards are filled with: 16-bit words that are NaN, alone or as part of a float or a double, and that depend on
// the address, so that a copy of what was read beside one array is seen beside another.
struct GuardBytes {
  static constexpr Size period = 2 * 4099;  // a prime, as addresses of arrays are often alike
  unsigned char bytes[period + guard_bytes];

  GuardBytes() {
    for (Size i = 0; i < sizeof bytes; ++i)
      bytes[i] =
          i % 2 ? 0x7F : static_cast<unsigned char>(0x81 | static_cast<unsigned>(i % period) * 2654435761u >> 25);
  }
  const unsigned char* at(const unsigned char* address) const {
    return bytes + reinterpret_cast<Size>(address) % period;
  }
};
const GuardBytes guard;

void set_guard(unsigned char* p) { memcpy(p, guard.at(p), guard_bytes); }
[[maybe_unused]] bool is_intact(const unsigned char* p) { return std::memcmp(p, guard.at(p), guard_bytes) == 0; }

// Aligned to a power of two, at most a page, but not to twice as much.
void* allocate(Size bytes, Size alignment) {
  const Size whole = (alignment + bytes + 3 * guard_bytes) / guard_bytes * guard_bytes;
  auto* p = static_cast<unsigned char*>(std::aligned_alloc(guard_bytes, whole));
  if (!p) return nullptr;
  unsigned char *memory = p + guard_bytes + alignment, *end = memory + bytes;
  memset(memory, 0xFF, bytes);
  set_guard(memory - guard_bytes);
  set_guard(end);
  forbid(p, memory - p);
  forbid(end, p + whole - end);
  return memory;
}

// Whether a guard was written to, and which; the guards are as new after it.
const char* damage([[maybe_unused]] void* memory, [[maybe_unused]] Size bytes) {
#if !defined(CUDA_HOST_ADDRESS)  // which reports it at once
  auto* p = static_cast<unsigned char*>(memory);
  const bool before = !is_intact(p - guard_bytes), behind = !is_intact(p + bytes);
  if (before) set_guard(p - guard_bytes);
  if (behind) set_guard(p + bytes);
  if (before || behind) return before ? "before" : "behind";
#endif
  return nullptr;
}

void release_memory(void* memory, Size bytes, Size alignment) {
  auto* p = static_cast<unsigned char*>(memory) - alignment - guard_bytes;
  allow(p, guard_bytes + alignment + bytes + guard_bytes);
  std::free(p);
}

// The arrays of the device, and their sizes.
std::map<void*, Size> arrays;
std::mutex arrays_mutex;

//
// Switching
//

extern "C" void cuda_host_begin();

// Stacks begin within a page where no other near them does, again because of the cache sets.
Size stack_top(const Fiber* fiber) { return (stack_bytes - fiber->index * 320 % page) / 16 * 16; }

#if defined(CUDA_HOST_UCONTEXT)
// A fiber's is at the lower end of its stack.
void switch_stacks(Fiber* from, Fiber* to) {
  ucontext_t of_main;
  if (!from->stack) from->stack_pointer = &of_main;
  swapcontext(static_cast<ucontext_t*>(from->stack_pointer), static_cast<ucontext_t*>(to->stack_pointer));
}
// A switch to the fiber will begin at cuda_host_begin.
void prepare(Fiber* fiber) {
  auto* context = static_cast<ucontext_t*>(fiber->stack);
  fiber->stack_pointer = context;
  getcontext(context);
  context->uc_stack.ss_sp = context + 1;
  context->uc_stack.ss_size = stack_top(fiber) - sizeof *context;
  makecontext(context, cuda_host_begin, 0);
}
#else
// Keeps what a function must preserve on the stack, and takes another stack's.
extern "C" void cuda_host_switch(void** from, void* to);
asm(R"(
.text
.type cuda_host_switch, @function
cuda_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_host_switch, .-cuda_host_switch
)");
void switch_stacks(Fiber* from, Fiber* to) { cuda_host_switch(&from->stack_pointer, to->stack_pointer); }
// A switch to the fiber will begin at cuda_host_begin.
void prepare(Fiber* fiber) {
  auto** words = reinterpret_cast<void**>(static_cast<char*>(fiber->stack) + stack_top(fiber)) - 8;
  for (int i = 0; i < 8; ++i) words[i] = nullptr;
  words[6] = reinterpret_cast<void*>(&cuda_host_begin);
  fiber->stack_pointer = words;
}
#endif

//
// An OS thread at work, and what it keeps for the next launch
//

struct Worker {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Block> blocks;
  std::vector<CopyQueue> copies;
  std::vector<WgmmaQueue> wgmmas;
  std::vector<Fiber*> ready;  // a ring
  unsigned first_ready = 0, ready_count = 0, live = 0;
  unsigned random = 0;
  bool eager = false;
  Launch* launch = nullptr;
  Fiber main{};
  Block* statics_of = nullptr;  // whose static shared memory is in place
  void* statics = nullptr;
  Size static_bytes = 0;
  char* stacks = nullptr;
  const void* main_stack = nullptr;
  Size main_stack_bytes = 0;
  unsigned char begins, ends;  // addresses for ThreadSanitizer
  std::map<void*, SharedBarrier> shared_barriers;

  ~Worker() {
#if defined(CUDA_HOST_THREAD)
    for (Fiber& fiber : fibers) __tsan_destroy_fiber(fiber.tsan);
#endif
    if (stacks) {
      allow(stacks, fibers.size() * stack_distance);
      munmap(stacks, fibers.size() * stack_distance);
    }
  }

  explicit Worker(unsigned threads) : fibers(threads), copies(threads), wgmmas(threads), ready(threads) {
    void* memory = mmap(nullptr, threads * stack_distance, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      std::perror("cuda_host: the stacks of the fibers");
      std::abort();
    }
    stacks = static_cast<char*>(memory);
    for (unsigned i = 0; i < threads; ++i) {
      mprotect(stacks + i * stack_distance, page, PROT_NONE);
      fibers[i].stack = stacks + i * stack_distance + page;
      fibers[i].copies = &copies[i];
      fibers[i].wgmmas = &wgmmas[i];
#if defined(CUDA_HOST_THREAD)
      fibers[i].tsan = __tsan_create_fiber(0);
#endif
    }
  }

  Fiber*& place(unsigned i) { return ready[(first_ready + i) % ready.size()]; }

  void make_ready(Fiber* fiber) { place(ready_count++) = fiber; }

  Fiber* take_ready() {
    --ready_count;
    if (eager) return place(ready_count);
    if (random) {
      random = random * 1664525u + 1013904223u;
      std::swap(place(0), place((random >> 8) % (ready_count + 1)));
    }
    Fiber* fiber = place(0);
    first_ready = (first_ready + 1) % ready.size();
    return fiber;
  }

  void run(Launch& of, [[maybe_unused]] unsigned first);
  void start(Block& block, unsigned number, Fiber* fibers, Warp* warps);
  void finish(Block& block);
  void give_up();
  void switch_to(Fiber* fiber);
  void switch_to_next();
  template <class AnyBarrier>
  void wait_in(AnyBarrier& barrier, Place place);
  template <class AnyBarrier>
  void wake(AnyBarrier& barrier);
  void complete(Barrier& barrier);
  SharedBarrier& shared_barrier(void* p);
  void end_phase(SharedBarrier& barrier);
  void exit();
  std::string deadlock() const;
};

__thread Worker* worker __attribute__((tls_model("initial-exec")));

bool is_same(const Place& a, const Place& b) {
  return a.line == b.line && (a.what == b.what || std::strcmp(a.what, b.what) == 0);
}

std::string text(const Place& place) {
  std::string file = place.file;
  return std::string(place.what) + " at " + file.substr(file.rfind('/') + 1) + ":" + std::to_string(place.line);
}

std::string text(const Block& block) {
  const uint3 i = block.index;
  return "block (" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

std::string text(const Fiber* fiber) { return "thread " + std::to_string(fiber->index) + " of " + text(*fiber->block); }

std::string Worker::deadlock() const {
  std::string message = "deadlock: no thread can go on";
  std::map<std::string, std::pair<const Fiber*, unsigned>> places;
  for (const Fiber& fiber : fibers)
    if (fiber.waits) {
      auto& [first, count] = places[text(fiber.place)];
      if (!count++) first = &fiber;
    }
  for (const auto& [place, who] : places) {
    message += "; " + text(who.first);
    if (who.second > 1) message += " and " + std::to_string(who.second - 1) + " more";
    message += (who.second > 1 ? " wait in " : " waits in ") + place;
  }
  return message;
}

[[noreturn]] void fail_with(const std::string& message) {
  Launch& launch = *worker->launch;
  {
    std::lock_guard lock(launch.mutex);
    if (!launch.failed.exchange(true)) launch.message = message;
  }
  // The fibers are left as they are, and the worker is not used again.
  worker->switch_to(&worker->main);
  std::abort();
}

void Worker::switch_to(Fiber* fiber) {
  Fiber* from = self;
  if (static_bytes && fiber->block && fiber->block != statics_of) {
    if (statics_of) copy_unseen(statics_of->statics, statics, static_bytes);
    copy_unseen(statics, fiber->block->statics, static_bytes);
    statics_of = fiber->block;
  }
  self = fiber;
#if defined(CUDA_HOST_THREAD)
  __tsan_switch_to_fiber(fiber->tsan, __tsan_switch_to_fiber_no_sync);  // only barriers order accesses
#endif
#if defined(CUDA_HOST_ADDRESS)
  if (fiber == &main)
    __sanitizer_start_switch_fiber(&from->asan, main_stack, main_stack_bytes);
  else
    __sanitizer_start_switch_fiber(&from->asan, fiber->stack, stack_bytes);
#endif
  switch_stacks(from, fiber);
#if defined(CUDA_HOST_ADDRESS)
  __sanitizer_finish_switch_fiber(from->asan, nullptr, nullptr);
#endif
}

void Worker::switch_to_next() {
  if (ready_count) {
    Fiber* next = take_ready();
    if (next != self) switch_to(next);
  } else if (live == 0 || launch->failed) {
    switch_to(&main);
  } else {
    fail_with(deadlock());
  }
}

// The thread that runs goes on when `wake` lets it.
template <class AnyBarrier>
void Worker::wait_in(AnyBarrier& barrier, Place place) {
  self->next = nullptr;
  self->place = place;
  self->waits = true;
  (barrier.first ? barrier.last->next : barrier.first) = self;
  barrier.last = self;
  switch_to_next();
}

// Lets all go on who wait.
template <class AnyBarrier>
void Worker::wake(AnyBarrier& barrier) {
  for (Fiber* fiber = barrier.first; fiber; fiber = fiber->next) {
    fiber->waits = false;
    make_ready(fiber);
  }
  barrier.first = barrier.last = nullptr;
}

void Worker::complete(Barrier& barrier) {
  wake(barrier);
  barrier.arrived = 0;
  ++barrier.phase;
}

SharedBarrier& Worker::shared_barrier(void* p) {
  const auto found = shared_barriers.find(p);
  if (found == shared_barriers.end()) fail("there is no mbarrier at %p", p);
  SharedBarrier& barrier = found->second;
  if (!barrier.fenced) fail("the mbarrier at %p is used, and there was no fence after it was initialized", p);
  if (*static_cast<const volatile unsigned long long*>(p) != shared_barrier_mark)
    fail("the mbarrier at %p was written to", p);
  return barrier;
}

// Ends the phase if it waits for nothing.
void Worker::end_phase(SharedBarrier& barrier) {
  if (barrier.pending != 0) return;
  if (barrier.queued > barrier.expected)
    fail("an mbarrier expects %zu bytes, and %zu are copied", barrier.expected, barrier.queued);
  if (barrier.queued < barrier.expected) return;
  unsigned char* edge = &barrier.edge[barrier.phase % 2];
  if (barrier.copy_count) {
    acquire(edge);
    for (unsigned i = 0; i < barrier.copy_count; ++i) barrier.copies[i].perform(barrier.copies[i]);
    release(edge);
  }
  barrier.copy_count = 0;
  barrier.expected = barrier.queued = 0;
  barrier.pending = barrier.arrivals;
  ++barrier.phase;
  wake(barrier);
}

// The thread that runs has come to its end.
void Worker::exit() {
  --live;
  for (Barrier* barrier : {&self->block->barrier, &self->warp->barrier, &self->block->cluster->of_cluster})
    if (--barrier->expected && barrier->arrived == barrier->expected) complete(*barrier);
  switch_to_next();
  std::abort();
}

extern "C" void cuda_host_begin() {
#if defined(CUDA_HOST_ADDRESS)
  const void* stack;
  Size bytes;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &bytes);
  if (!worker->main_stack) worker->main_stack = stack, worker->main_stack_bytes = bytes;
#endif
  acquire(&worker->begins);
  worker->launch->kernel->run(worker->launch->arguments);
  if (!self->copies->items.empty()) fail("ends, and has not waited for all its asynchronous copies");
  if (!self->wgmmas->items.empty()) fail("ends, and has not waited for all its wgmma");
  if (self->arrived) fail("ends, and has not waited at the barrier of its cluster");
  release(&worker->ends);
  worker->exit();
}

void Worker::start(Block& block, unsigned number, Fiber* fiber, Warp* warp) {
  const Configuration& c = launch->configuration;
  const unsigned threads = c.block;
  block.index = {number % c.grid[0], number / c.grid[0] % c.grid[1], number / c.grid[0] / c.grid[1]};
  block.size = {threads, 1, 1};
  block.grid = {c.grid[0], c.grid[1], c.grid[2]};
  block.barrier = {};
  block.barrier.expected = threads;
  block.rank = number % launch->kernel->cluster;
  block.cluster = &block - block.rank;
  block.of_cluster = {};
  block.of_cluster.expected = threads * launch->kernel->cluster;
  memset(block.dynamic, 0xFF, c.shared_bytes);
  memset(block.statics ? block.statics : statics, 0xFF, static_bytes);
  for (unsigned i = 0; i < threads; i += 32) {
    warp[i / 32].barrier = {};
    warp[i / 32].barrier.expected = std::min(32u, threads - i);
  }
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& f = fiber[i];
    f.thread = {i, 0, 0};
    f.index = i;
    f.lane = i % 32;
    f.block = &block;
    f.warp = &warp[i / 32];
    f.waits = f.fenced = f.wgmma_fenced = f.arrived = false;
    f.last_atomic = nullptr;
    f.copies->clear();
    f.wgmmas->clear();
    prepare(&f);
  }
  unsigned step = std::abs(c.step), i = c.step < 0 ? threads - 1 : 0;
  while (std::gcd(step, threads) != 1) ++step;
  if (c.step < 0) step = threads - step % threads;
  for (unsigned count = 0; count < threads; ++count, i = (i + step) % threads) make_ready(&fiber[i]);
  live += threads;
}

void Worker::finish(Block& block) {
  for (auto& [p, barrier] : shared_barriers)
    if (barrier.block == &block && (barrier.copy_count || barrier.expected) && !launch->failed.exchange(true)) {
      std::lock_guard lock(launch->mutex);
      launch->message =
          text(block) + " ends, and " +
          (barrier.copy_count ? "has not waited for all its bulk copies"
                              : "an mbarrier still expects " + std::to_string(barrier.expected) + " bytes");
    }
  const unsigned bytes = launch->configuration.shared_bytes;
  if (const char* where = damage(block.dynamic, bytes); where && !launch->failed.exchange(true)) {
    std::lock_guard lock(launch->mutex);
    launch->message = std::string("a write ") + where + " the dynamic shared memory of " + text(block) + ", " +
                      std::to_string(bytes) + " bytes";
  }
}

// What fibers did that will not go on precedes what comes.
void Worker::give_up() {
#if defined(CUDA_HOST_THREAD)
  for (Fiber& fiber : fibers) {
    __tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync);
    release(&ends);
  }
  __tsan_switch_to_fiber(main.tsan, __tsan_switch_to_fiber_no_sync);
#endif
}

// The thread_local variables of the kernel's library, as this OS thread has them.
struct Statics {
  void* anchor;
  void* start;
  Size bytes;
};
int find_statics(dl_phdr_info* info, Size, void* data) {
  auto& statics = *static_cast<Statics*>(data);
  for (unsigned i = 0; i < info->dlpi_phnum; ++i)
    if (info->dlpi_phdr[i].p_type == PT_TLS && info->dlpi_tls_data) {
      auto* start = static_cast<char*>(info->dlpi_tls_data);
      const Size bytes = info->dlpi_phdr[i].p_memsz;
      if (statics.anchor >= start && statics.anchor < start + bytes) statics.start = start, statics.bytes = bytes;
    }
  return statics.bytes != 0;
}

#if !defined(CUDA_HOST_ADDRESS) && !defined(CUDA_HOST_THREAD)
// A fault of a thread ends the launch; of anything else it is what it was before. The sanitizers tell more.
struct sigaction before_fault[2];
constexpr int faults[2] = {SIGSEGV, SIGFPE};

void on_fault(int signal, siginfo_t* info, void* context) {
  if (worker && self != &worker->main) {
    if (signal == SIGFPE) fail("divides by zero");
    fail("illegal access of %p, or the stack is full", info->si_addr);
  }
  const struct sigaction& old = before_fault[signal == SIGFPE];
  if (old.sa_flags & SA_SIGINFO) return old.sa_sigaction(signal, info, context);
  if (old.sa_handler != SIG_DFL && old.sa_handler != SIG_IGN) return old.sa_handler(signal);
  sigaction(signal, &old, nullptr);  // and it comes again
}

struct FaultHandler {
  FaultHandler() {
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < 2; ++i) sigaction(faults[i], &action, &before_fault[i]);
  }
};

// The handler cannot have the fiber's stack.
class FaultStack {
 public:
  FaultStack() : memory_(new char[bytes]) {
    static const FaultHandler handler;
    stack_t mine = {};
    mine.ss_sp = memory_.get();
    mine.ss_size = bytes;
    sigaltstack(&mine, &before_);
  }
  ~FaultStack() { sigaltstack(&before_, nullptr); }

 private:
  static constexpr Size bytes = 64 * 1024;
  std::unique_ptr<char[]> memory_;
  stack_t before_;
};
#else
struct FaultStack {
  FaultStack() {}
};
#endif

void Worker::run(Launch& of, [[maybe_unused]] unsigned first) {
  launch = &of;
  worker = this;
  const FaultStack fault_stack;
  const Configuration& c = of.configuration;
  const unsigned resident = of.kernel->cluster, warps_of_block = (c.block + 31) / 32;
  Statics found{of.kernel->statics(), nullptr, 0};
  dl_iterate_phdr(find_statics, &found);
  statics = found.start;
  static_bytes = found.bytes > sizeof shared_memory_anchor ? found.bytes : 0;
  statics_of = nullptr;
  random = c.seed;
  eager = c.eager;
  main_stack = nullptr;
  main = {};
#if defined(CUDA_HOST_THREAD)
  main.tsan = __tsan_get_current_fiber();
#endif
  if (warps.size() < resident * warps_of_block) warps = std::vector<Warp>(resident * warps_of_block);
  blocks.assign(resident, {});
  std::vector<char> copies_of_statics(resident > 1 ? resident * static_bytes : 0);
  for (unsigned i = 0; i < resident; ++i) {
    blocks[i].dynamic = allocate(c.shared_bytes, shared_alignment);
    blocks[i].statics = resident > 1 ? copies_of_statics.data() + i * static_bytes : nullptr;
  }
  if (resident == 1) statics_of = &blocks[0];
#if defined(CUDA_HOST_THREAD)
  first *= resident;
#endif

  self = &main;
  while (!of.failed) {
#if defined(CUDA_HOST_THREAD)
    // Neighbours are in different OS threads: those in one are ordered, and no race between them is seen.
    const unsigned number = first;
    first += of.workers * resident;
#else
    const unsigned number = of.next.fetch_add(resident);
#endif
    if (number >= of.blocks) break;
    first_ready = ready_count = live = 0;
    shared_barriers.clear();
    for (unsigned i = 0; i < resident; ++i) {
      const unsigned index = c.step < 0 ? of.blocks - 1 - (number + i) : number + i;
      // Those of a cluster lie by their ranks.
      start(blocks[index % resident], index, &fibers[i * c.block], &warps[i * warps_of_block]);
    }
    release(&begins);
    switch_to(take_ready());
    if (of.failed) give_up();
    acquire(&ends);
    for (Block& block : blocks) finish(block);
  }
  for (Block& block : blocks) release_memory(block.dynamic, c.shared_bytes, shared_alignment);
  launch = nullptr;
  worker = nullptr;
}

std::vector<std::unique_ptr<Worker>> idle_workers;
std::mutex idle_mutex;
unsigned char launch_begins, launch_ends;

std::unique_ptr<Worker> take_worker(unsigned threads) {
  std::unique_ptr<Worker> taken;
  {
    std::lock_guard lock(idle_mutex);
    if (!idle_workers.empty()) {
      taken = std::move(idle_workers.back());
      idle_workers.pop_back();
    }
  }
  if (!taken || taken->fibers.size() < threads) taken = std::make_unique<Worker>(std::max(threads, 256u));
  return taken;
}

void work(Launch& launch, Worker& worker, unsigned number) {
  acquire(&launch_begins);
  worker.run(launch, number);
  release(&launch_ends);
}

}  // namespace

//
// What kernels call
//

__thread Fiber* self;

void fail(const char* format, ...) {
  char message[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  fail_with(text(self) + ": " + message);
}

void wait(Barrier& barrier, Place place, bool orders_memory) {
#if defined(CUDA_HOST_THREAD)
  if (race_reported) fail("ThreadSanitizer reports a data race");
#endif
  if (barrier.arrived && !is_same(barrier.place, place))
    fail("comes to %s, while another waits in %s", text(place).c_str(), text(barrier.place).c_str());
  barrier.place = place;
  unsigned char* edge = &barrier.edge[barrier.phase % 2];
  if (orders_memory) release(edge);
  if (++barrier.arrived == barrier.expected) {
    worker->complete(barrier);
    if (worker->random) {
      worker->make_ready(self);
      worker->switch_to_next();
    }
  } else {
    worker->wait_in(barrier, place);
  }
  if (orders_memory) acquire(edge);
}

void init_shared_barrier(void* p, unsigned arrivals) {
  if (reinterpret_cast<Size>(p) % 8) fail("an mbarrier at %p: misaligned", p);
  if (worker->shared_barriers.count(p)) fail("there is an mbarrier at %p already", p);
  *static_cast<volatile unsigned long long*>(p) = shared_barrier_mark;
  SharedBarrier& barrier = worker->shared_barriers[p];
  barrier.arrivals = barrier.pending = arrivals;
  barrier.initialized_by = self;
  barrier.block = self->block;
}

void fence_barrier_init() {
  for (auto& [p, barrier] : worker->shared_barriers)
    if (barrier.initialized_by == self) barrier.fenced = true;
}

void arrive(void* p, unsigned bytes) {
  SharedBarrier& barrier = worker->shared_barrier(p);
  worker->end_phase(barrier);
  if (barrier.pending == 0) fail("more threads arrive at the mbarrier at %p than it waits for", p);
  release(&barrier.edge[barrier.phase % 2]);
  --barrier.pending;
  barrier.expected += bytes;
  // Copies are done when they are waited for.
  if (barrier.first || barrier.expected == 0) worker->end_phase(barrier);
}

void queue_bulk_copy(void* p, const BulkCopy& copy, unsigned bytes) {
  SharedBarrier& barrier = worker->shared_barrier(p);
  worker->end_phase(barrier);
  release(&barrier.edge[barrier.phase % 2]);
  if (barrier.copy_count == std::size(barrier.copies)) fail("more bulk copies than the mbarrier at %p has room for", p);
  barrier.copies[barrier.copy_count++] = copy;
  barrier.queued += bytes;
  if (barrier.first) worker->end_phase(barrier);
}

void wait_for_phase(void* p, unsigned parity, Place place) {
  SharedBarrier& barrier = worker->shared_barrier(p);
  if (barrier.block != self->block) fail("waits for an mbarrier of another block");
#if defined(CUDA_HOST_THREAD)
  if (race_reported) fail("ThreadSanitizer reports a data race");
#endif
  worker->end_phase(barrier);
  if (barrier.phase % 2 == parity) worker->wait_in(barrier, place);
  acquire(&barrier.edge[parity]);
}

void arrive_at_cluster(Place place) {
  Barrier& barrier = self->block->cluster->of_cluster;
  if (self->arrived) fail("comes to %s a second time, and has not waited", text(place).c_str());
  if (barrier.arrived && !is_same(barrier.place, place))
    fail("comes to %s, while another has arrived in %s", text(place).c_str(), text(barrier.place).c_str());
  barrier.place = place;
  self->arrived = true;
  self->arrived_in = barrier.phase;
  release(&barrier.edge[barrier.phase % 2]);
  if (++barrier.arrived == barrier.expected) worker->complete(barrier);
}

void wait_for_cluster(Place place) {
#if defined(CUDA_HOST_THREAD)
  if (race_reported) fail("ThreadSanitizer reports a data race");
#endif
  Barrier& barrier = self->block->cluster->of_cluster;
  if (!self->arrived) fail("waits in %s, and has not arrived", text(place).c_str());
  const unsigned phase = self->arrived_in;
  if (barrier.phase == phase) worker->wait_in(barrier, place);
  self->arrived = false;
  acquire(&barrier.edge[phase % 2]);
}

unsigned char* in_block(void* shared, unsigned rank) {
  Block& block = *self->block;
  if (rank >= worker->launch->kernel->cluster) fail("there is no block %u in the cluster", rank);
  const Size offset = static_cast<unsigned char*>(shared) - static_cast<unsigned char*>(block.dynamic);
  if (offset >= worker->launch->configuration.shared_bytes) fail("%p is not in the dynamic shared memory", shared);
  Block& other = block.cluster[rank];
  if (&other != &block && block.cluster->of_cluster.phase == 0)
    fail("accesses block %u of the cluster, which may not have begun", rank);
  if (other.barrier.expected == 0) fail("accesses block %u of the cluster, which has ended", rank);
  return static_cast<unsigned char*>(other.dynamic) + offset;
}

void fence() {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  if (self->last_atomic) acquire(self->last_atomic);
  self->fenced = true;
}

void before_atomic(void* p) {
  if (self->fenced) release(p);
}

void check_mask(unsigned mask, Place place) {
  // Lanes that have exited, or never were, may be named, and may be left out.
  const unsigned lanes = std::min(32u, self->block->size.x - (self->index - self->lane));
  if (mask != ~0u && mask != (lanes == 32 ? ~0u : (1u << lanes) - 1))
    fail("%s: the mask %08x does not name the %u lanes of the warp", text(place).c_str(), mask, lanes);
}

void queue_copy(const Copy& copy) { self->copies->items.push_back(copy); }
void commit_copies() { self->copies->commit(); }
bool next_copy(unsigned newest_groups, Copy& copy) { return self->copies->next(newest_groups, copy); }

void queue_wgmma(const Wgmma& wgmma) { self->wgmmas->items.push_back(wgmma); }
void commit_wgmma() { self->wgmmas->commit(); }
bool next_wgmma(unsigned newest_groups, Wgmma& wgmma) { return self->wgmmas->next(newest_groups, wgmma); }

}  // namespace cuda_host

//
// What device.py calls
//

extern "C" {

void* cuda_host_allocate(cuda_host::Size bytes) {
  void* p = cuda_host::allocate(bytes, cuda_host::array_alignment);
  std::lock_guard lock(cuda_host::arrays_mutex);
  if (p) cuda_host::arrays[p] = bytes;
  return p;
}

void cuda_host_free(void* p) {
  std::lock_guard lock(cuda_host::arrays_mutex);
  cuda_host::release_memory(p, cuda_host::arrays[p], cuda_host::array_alignment);
  cuda_host::arrays.erase(p);
}

// Whether all went well; else the message says what did not.
int cuda_host_launch(const cuda_host::Kernel* kernel, const cuda_host::Configuration* configuration,
                     void* const* arguments, char* message, cuda_host::Size message_bytes) {
  using namespace cuda_host;
  const unsigned* grid = configuration->grid;
  Launch launch{kernel, *configuration, arguments, grid[0] * grid[1] * grid[2]};
  release(&launch_begins);
#if defined(CUDA_HOST_THREAD)
  race_reported = false;
#endif
  launch.workers = std::min(configuration->os_threads, launch.blocks / kernel->cluster);
  std::vector<std::unique_ptr<Worker>> workers;
  for (unsigned i = 0; i < launch.workers; ++i) workers.push_back(take_worker(configuration->block * kernel->cluster));
  std::vector<std::thread> team;
  for (unsigned i = 1; i < launch.workers; ++i) team.emplace_back(work, std::ref(launch), std::ref(*workers[i]), i);
  work(launch, *workers[0], 0);
  for (std::thread& thread : team) thread.join();
#if defined(CUDA_HOST_THREAD)
  if (race_reported && !launch.failed.exchange(true)) launch.message = "ThreadSanitizer reports a data race";
#endif
  if (!launch.failed) {
    std::lock_guard lock(idle_mutex);
    for (auto& worker : workers) idle_workers.push_back(std::move(worker));
  }
  acquire(&launch_ends);
  if (!launch.failed) {
    std::lock_guard lock(arrays_mutex);
    for (auto [memory, bytes] : arrays)
      if (const char* where = damage(memory, bytes)) {
        launch.failed = true;
        launch.message = std::string("a write ") + where + " an array of " + std::to_string(bytes) + " bytes";
      }
  }
  std::snprintf(message, message_bytes, "%s", launch.message.c_str());
  return !launch.failed;
}

#if defined(CUDA_HOST_THREAD)
// ThreadSanitizer calls this one, if this library is loaded before it.
void __tsan_on_report(void*) { cuda_host::race_reported = true; }
#endif

#if !defined(CUDA_HOST_UNDEFINED)
// What GCC calls where -fsanitize=alignment,bounds finds something; else libubsan has these.
struct SourceLocation {
  const char* file;
  unsigned line, column;
};
struct TypeDescriptor {
  unsigned short kind, info;
  char name[1];
};
struct TypeMismatch {
  SourceLocation location;
  const TypeDescriptor* type;
  unsigned char log_alignment, check;
};
struct OutOfBounds {
  SourceLocation location;
  const TypeDescriptor *array, *index;
};
void __ubsan_handle_type_mismatch_v1_abort(const TypeMismatch* data, void* p) {
  cuda_host::fail("%s:%u: the address %p is misaligned for %s, which needs a multiple of %u", data->location.file,
                  data->location.line, p, data->type->name, 1u << data->log_alignment);
}
void __ubsan_handle_out_of_bounds_abort(const OutOfBounds* data, cuda_host::Size index) {
  cuda_host::fail("%s:%u: the index %lld is outside of %s", data->location.file, data->location.line,
                  static_cast<long long>(index), data->array->name);
}
#endif

}  // extern "C"
