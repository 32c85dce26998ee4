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
  parallel_chunks(n, [&](Index begin, Index end) {
    for_lanes<T>(end - begin, [&](Index j, int lane_count) {
      const Index i = begin + j;
      V p = load_lanes(param + i, lane_count);
      V kept[std::max(Rule::state_count, 1)];
      for (int s = 0; s < Rule::state_count; ++s) kept[s] = load_lanes(state[s] + i, lane_count);
      Rule::apply(p, load_lanes(grad + i, lane_count), kept, hyperparameters);
      for (int s = 0; s < Rule::state_count; ++s) store_lanes(state[s] + i, kept[s], lane_count);
      store_lanes(param + i, p, lane_count);
    });
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
