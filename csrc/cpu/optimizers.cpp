// Optimizer updates: one pass over the parameter, its gradient and its state. Bound by memory.
#include <algorithm>

#include "cpu/rows.h"
#include "cpu/threads.h"
// After the functions that it is written on.
#include "formulas/optimizers.h"

namespace gemmlet {
namespace {

template <class T, class Rule>
void update(T* param, const T* grad, T* const* state, const double* values, Index n) {
  using V = Vec<T>;
  V hyperparameters[Rule::hyperparameter_count];
  for (int s = 0; s < Rule::hyperparameter_count; ++s) hyperparameters[s] = constant<V>(values[s]);
  // First all loads, then all stores: a load waits for an earlier store that is a multiple of a page away, which large
  // arrays often are from each other.
  const auto part = [&]<int vectors>(Index at, int lane_count) {
    V p[vectors], kept[vectors][std::max(Rule::state_count, 1)];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      const Index i = at + v * lanes<T>;
      p[v] = load_lanes(param + i, lane_count);
      for (int s = 0; s < Rule::state_count; ++s) kept[v][s] = load_lanes(state[s] + i, lane_count);
      Rule::apply(p[v], load_lanes(grad + i, lane_count), kept[v], hyperparameters);
    }
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      const Index i = at + v * lanes<T>;
      for (int s = 0; s < Rule::state_count; ++s) store_lanes(state[s] + i, kept[v][s], lane_count);
      store_lanes(param + i, p[v], lane_count);
    }
  };
  constexpr int vectors = tuning::update_vectors;
  constexpr Index block = vectors * lanes<T>;
  parallel_chunks(n, [&](Index begin, Index end) {
    Index i = begin;
    for (; i + block <= end; i += block) part.template operator()<vectors>(i, lanes<T>);
    for_lanes<T>(end - i, [&](Index j, int lane_count) { part.template operator()<1>(i + j, lane_count); });
  });
}

}  // namespace

template <class T>
void optimizer_update(int rule, T* param, const T* grad, T* const* state, const double* hyperparameters, Index n) {
  using Function = void (*)(T*, const T*, T* const*, const double*, Index);
#define GEMMLET_ENTRY(name) &update<T, optimizers::name>,
  static constexpr Function table[] = {GEMMLET_OPTIMIZER_RULES(GEMMLET_ENTRY)};
#undef GEMMLET_ENTRY
  table[rule](param, grad, state, hyperparameters, n);
}

int optimizer_state_count(int rule) {
#define GEMMLET_ENTRY(name) optimizers::name::state_count,
  static constexpr int counts[] = {GEMMLET_OPTIMIZER_RULES(GEMMLET_ENTRY)};
#undef GEMMLET_ENTRY
  return counts[rule];
}

int optimizer_hyperparameter_count(int rule) {
#define GEMMLET_ENTRY(name) optimizers::name::hyperparameter_count,
  static constexpr int counts[] = {GEMMLET_OPTIMIZER_RULES(GEMMLET_ENTRY)};
#undef GEMMLET_ENTRY
  return counts[rule];
}

std::vector<std::string> optimizer_rule_names() {
#define GEMMLET_ENTRY(name) #name,
  return {GEMMLET_OPTIMIZER_RULES(GEMMLET_ENTRY)};
#undef GEMMLET_ENTRY
}

template void optimizer_update(int, float*, const float*, float* const*, const double*, Index);
template void optimizer_update(int, double*, const double*, double* const*, const double*, Index);

}  // namespace gemmlet
