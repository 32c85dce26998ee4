// Peak arithmetic throughput: fused multiply-adds on registers alone.
#include "cpu/roofline.h"

#include <atomic>

#include "cpu/simd.h"
#include "cpu/threads.h"

namespace gemmlet {
namespace {

// Independent chains that keep two units with a latency of 4 to 6 cycles busy.
constexpr int chains = 12;

template <class T>
[[gnu::noinline]] T run_chains(std::int64_t steps, T factor, T term) {
  Vec<T> sum[chains];
  for (int i = 0; i < chains; ++i) sum[i] = splat(static_cast<T>(i));
  const Vec<T> a = splat(factor), b = splat(term);
  for (std::int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < chains; ++i) sum[i] = fma(sum[i], a, b);
  }
  Vec<T> total{};
  for (int i = 0; i < chains; ++i) total += sum[i];
  return total[0];
}

}  // namespace

template <class T>
double fma_loop(std::int64_t steps) {
  // More tasks than threads, so that one that starts late does not decide.
  const std::int64_t tasks = std::int64_t{8} * get_num_threads();
  std::atomic<int> finite{0};
  parallel_for(tasks, [&](std::int64_t task) {
    // The result is looked at, or the compiler would leave the loop out. It converges: no infinities, no subnormals.
    const T result = run_chains<T>(steps, T(0.5), static_cast<T>(1 + task));
    if (result - result == T(0)) finite.fetch_add(1, std::memory_order_relaxed);
  });
  return 2.0 * static_cast<double>(finite.load()) * static_cast<double>(steps) * chains * lanes<T>;
}

template double fma_loop<float>(std::int64_t);
template double fma_loop<double>(std::int64_t);

}  // namespace gemmlet

// A place that callgrind can find by its name, which is why it is exported.
extern "C" int gemmlet_mark() {
  static std::atomic<int> calls{0};
  return ++calls;
}
