// The thread pool: one for each extension module, made at first use.
//
// Contract
//   parallel_for(tasks, f) calls f(0) ... f(tasks - 1), each once, in any order, and returns when all are done. What a
//   task computes must not depend on which thread runs it or on how many there are. The first exception of a task is
//   thrown again in the caller, after the rest have ended.
//   Several threads may call it at once: the pool serves one of them, the others run their tasks themselves.
//   Workers compute in the caller's floating-point mode (rounding, flush to zero), and what their tasks raise of its status
//   flags is raised in the caller: as if it had done the work alone.
//   After fork the child has a fresh pool. Workers block all signals. Between calls they spin for some microseconds,
//   then sleep. On Linux a worker keeps off the processor of the caller that woke it last; the caller may run anywhere.
//   run_team(f) calls f(member) at the same time on as many threads as there are, the caller's among them; they meet at
//   member.barrier(). f must not throw. Alone, where another call has the pool.
//   Where the system refuses a thread or its memory, the pool goes on with those there are.
//   of_this_thread<T>() is an object of the calling thread, or std::bad_alloc.
//   Not for: tasks and members that call parallel_for or run_team.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <new>

#include "cpu/tuning.h"

namespace gemmlet {

void set_num_threads(int count);  // the caller included
int get_num_threads();

namespace detail {
void run_tasks(std::int64_t tasks, void (*call)(const void* context, std::int64_t task), const void* context);
}

template <class F>
void parallel_for(std::int64_t tasks, const F& f) {
  detail::run_tasks(tasks, [](const void* context, std::int64_t task) { (*static_cast<const F*>(context))(task); }, &f);
}

class Member {
 public:
  Member(int index, int count, std::atomic<int>* arrived) : index_(index), count_(count), arrived_(arrived) {}
  int index() const { return index_; }
  int count() const { return count_; }
  // Returns when every member has called it as often.
  void barrier();

 private:
  int index_, count_;
  int passed_ = 0;
  std::atomic<int>* arrived_;
};

namespace detail {
void run_members(void (*call)(const void* context, Member& member), const void* context);
}

template <class F>
void run_team(const F& f) {
  detail::run_members([](const void* context, Member& member) { (*static_cast<const F*>(context))(member); }, &f);
}

// Made at its first use, destroyed when the thread ends. Not thread_local: the C library aborts the process where it finds no
// memory for the thread-local data of an extension module.
template <class T>
T& of_this_thread() {
  static const pthread_key_t key = [] {
    pthread_key_t made;
    if (pthread_key_create(&made, [](void* object) { delete static_cast<T*>(object); }) != 0) throw std::bad_alloc();
    return made;
  }();
  if (void* const object = pthread_getspecific(key)) return *static_cast<T*>(object);
  auto made = std::make_unique<T>();
  if (pthread_setspecific(key, made.get()) != 0) throw std::bad_alloc();
  return *made.release();
}

// For loops over n elements: chunks of a fixed size, so that sums over a chunk are the same for any number of threads,
// and a small array is one task. f(begin, end).
template <class F>
void parallel_chunks(std::int64_t n, const F& f, std::int64_t chunk = tuning::chunk_elements) {
  parallel_for((n + chunk - 1) / chunk, [&](std::int64_t i) {
    const std::int64_t begin = i * chunk;
    f(begin, begin + chunk < n ? begin + chunk : n);
  });
}

}  // namespace gemmlet
