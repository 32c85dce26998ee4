#include "cpu/threads.h"

#include <pthread.h>
#include <signal.h>
#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "cpu/float_status.h"

namespace gemmlet {
namespace {

inline void pause_processor() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

template <class Condition>
bool spin_until(Condition done) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds{tuning::spin_microseconds};
  do {
    for (int i = 0; i < 64; ++i) {
      if (done()) return true;
      pause_processor();
    }
  } while (std::chrono::steady_clock::now() < end);
  return done();
}

// Where a worker sleeps. Linux wakes a thread where it ran before, or where the one that wakes it runs, and on many a
// machine it looks for no other processor: there the worker would wait until the caller has done all the work. So it may
// run anywhere but on the processor of the caller that woke it last. Used with the pool's sleep_mutex_ held.
class Bed {
 public:
#if defined(__linux__)
  Bed() : thread_(static_cast<pid_t>(syscall(SYS_gettid))) { CPU_ZERO(&set_); }
  // By the caller, before it wakes the worker.
  void keep_off_my_processor() {
    const int mine = sched_getcpu();
    if (mine == avoided_ || mine < 0 || mine >= CPU_SETSIZE) return;
    cpu_set_t now;
    if (sched_getaffinity(thread_, sizeof now, &now) != 0) return;
    if (!CPU_EQUAL(&now, &set_)) allowed_ = now;  // as it was at the start, or as somebody else set it
    cpu_set_t others = allowed_;
    CPU_CLR(mine, &others);
    if (CPU_COUNT(&others) == 0 || sched_setaffinity(thread_, sizeof others, &others) != 0) return;
    avoided_ = mine;
    set_ = others;
  }

 private:
  const pid_t thread_;
  int avoided_ = -1;
  cpu_set_t allowed_, set_;  // by the process; by us
#else
  void keep_off_my_processor() {}
#endif
};

struct Job {
  void (*call)(const void*, std::int64_t);
  const void* context;
  std::int64_t tasks;
  std::atomic<std::int64_t> next{0};
  std::mutex error_mutex;
  std::exception_ptr error;
  FloatMode mode = float_mode();    // the caller's
  std::atomic<unsigned> raised{0};  // floating-point status of the workers' tasks

  void work() {
    for (std::int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      try {
        call(context, task);
      } catch (...) {
        const std::lock_guard lock(error_mutex);
        if (!error) error = std::current_exception();
      }
    }
  }
};

class Pool {
 public:
  explicit Pool(int count) : wanted_(count) {}

  int size() const { return wanted_.load(std::memory_order_relaxed); }

  void resize(int count) {
    const std::lock_guard entry(entry_);
    stop_workers();
    wanted_.store(count, std::memory_order_relaxed);
  }

  // False if another thread has the pool: then the caller does the work alone. A team has a task for each thread.
  bool try_run(Job& job, bool team = false) {
    const std::unique_lock entry(entry_, std::try_to_lock);
    if (!entry.owns_lock()) return false;
    start_workers();
    if (team) job.tasks = static_cast<std::int64_t>(workers_.size()) + 1;
    job_ = &job;
    joined_.fetch_and(~closed, std::memory_order_release);
    generation_.fetch_add(1);
    if (sleepers_.load() > 0) {
      const std::lock_guard lock(sleep_mutex_);
      for (Bed* bed : beds_) bed->keep_off_my_processor();
      wake_.notify_all();
    }
    job.work();
    // No worker joins from here on; those that have will soon be done.
    joined_.fetch_or(closed, std::memory_order_acquire);
    while (!spin_until([&] { return joined_.load(std::memory_order_acquire) == closed; })) std::this_thread::yield();
    if (const unsigned raised = job.raised.load(std::memory_order_relaxed)) raise_float_status(raised);
    return true;
  }

 private:
  static constexpr std::uint32_t closed = 1u << 31;
  static constexpr int starting = 0, started = 1, refused = 2;

  // By a new worker: whether there is memory to throw an exception with. The C library makes a thread's data for that at
  // the first use, and aborts the process if it cannot.
  static bool has_memory() {
    void* const memory = std::malloc(1 << 16);
    std::free(memory);
    return memory != nullptr && std::uncaught_exceptions() == 0;
  }

  void start_workers() {
    const int missing = size() - 1 - static_cast<int>(workers_.size());
    if (missing <= 0 || refused_) return;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      workers_.reserve(static_cast<std::size_t>(size()));
      {
        const std::lock_guard lock(sleep_mutex_);
        beds_.reserve(static_cast<std::size_t>(size()));  // a worker that is refused memory would end the process
      }
      for (int i = 0; i < missing; ++i) {
        start_.store(starting);
        std::thread thread([this, seen = generation_.load()] {
          const bool ready = has_memory();
          start_.store(ready ? started : refused);
          start_.notify_one();
          if (ready) worker(seen);
        });
        start_.wait(starting);
        if (start_.load() == refused) {
          thread.join();
          throw std::bad_alloc();
        }
        workers_.push_back(std::move(thread));
      }
    } catch (const std::exception&) {
      refused_ = true;  // the system grants no more threads, or no memory to them: those there are do the work
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  void stop_workers() {
    stop_.store(true);
    generation_.fetch_add(1);
    {
      const std::lock_guard lock(sleep_mutex_);
      wake_.notify_all();
    }
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
    stop_.store(false);
    refused_ = false;
  }

  void worker(std::uint64_t seen) {
    Bed bed;
    while (true) {
      const auto called = [&] { return generation_.load() != seen; };
      if (!spin_until(called)) {
        std::unique_lock lock(sleep_mutex_);
        // Counted before the last look: either the caller sees a sleeper, or the sleeper sees the call.
        sleepers_.fetch_add(1);
        beds_.push_back(&bed);
        wake_.wait(lock, called);
        std::erase(beds_, &bed);
        sleepers_.fetch_sub(1);
      }
      seen = generation_.load();
      if (stop_.load()) return;
      if ((joined_.fetch_add(1, std::memory_order_acquire) & closed) == 0) {
        set_float_mode(job_->mode);
        clear_float_status();
        job_->work();
        if (const unsigned raised = float_status()) job_->raised.fetch_or(raised, std::memory_order_relaxed);
      }
      joined_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::atomic<int> wanted_;
  std::mutex entry_;  // held while a call uses the pool
  std::vector<std::thread> workers_;
  bool refused_ = false;
  std::atomic<int> start_{started};  // of the newest worker
  Job* job_ = nullptr;
  std::atomic<std::uint32_t> joined_{closed};  // workers inside the job, and whether more may join
  std::atomic<std::uint64_t> generation_{0};
  std::atomic<bool> stop_{false};
  std::atomic<int> sleepers_{0};
  std::mutex sleep_mutex_;
  std::vector<Bed*> beds_;  // of those that sleep
  std::condition_variable wake_;
};

// Never destroyed: at exit the workers may be anywhere.
std::atomic<Pool*> pool{nullptr};

// The threads are the parent's; its mutexes may be held. What they hold is left as it is, and a new pool made.
void forget_pool_in_child() { pool.store(new Pool(pool.load()->size())); }

Pool& the_pool() {
  static const bool registered = [] {
    pool.store(new Pool(1));
    pthread_atfork(nullptr, nullptr, forget_pool_in_child);
    return true;
  }();
  static_cast<void>(registered);
  return *pool.load(std::memory_order_acquire);
}

}  // namespace

void set_num_threads(int count) { the_pool().resize(count); }

int get_num_threads() { return the_pool().size(); }

void detail::run_tasks(std::int64_t tasks, void (*call)(const void*, std::int64_t), const void* context) {
  if (tasks <= 0) return;
  if (tasks == 1) return call(context, 0);
  Pool& p = the_pool();
  if (p.size() > 1) {
    Job job{.call = call, .context = context, .tasks = tasks, .error_mutex = {}, .error = nullptr};
    if (p.try_run(job)) {
      if (job.error) std::rethrow_exception(job.error);
      return;
    }
  }
  for (std::int64_t task = 0; task < tasks; ++task) call(context, task);
}

void Member::barrier() {
  if (count_ == 1) return;
  // They have all arrived for the n-th time when n * count have been counted.
  const int wanted = ++passed_ * count_;
  if (arrived_->fetch_add(1, std::memory_order_acq_rel) + 1 == wanted) return;
  const auto there = [&] { return arrived_->load(std::memory_order_acquire) - wanted >= 0; };
  while (!spin_until(there)) std::this_thread::yield();
}

void detail::run_members(void (*call)(const void*, Member&), const void* context) {
  struct Team {
    void (*call)(const void*, Member&);
    const void* context;
    const Job* job;
    std::atomic<int> arrived{0};
  } team{call, context, nullptr};
  Job job{.call =
              [](const void* c, std::int64_t index) {
                auto* t = static_cast<Team*>(const_cast<void*>(c));
                Member member(static_cast<int>(index), static_cast<int>(t->job->tasks), &t->arrived);
                t->call(t->context, member);
              },
          .context = &team,
          .tasks = 1,
          .error_mutex = {},
          .error = nullptr};
  team.job = &job;
  Pool& p = the_pool();
  if (p.size() > 1 && p.try_run(job, true)) return;
  Member alone(0, 1, &team.arrived);
  call(context, alone);
}

}  // namespace gemmlet
