// Activations over arrays, functions of rows, and column sums. Bound by memory when arrays are large, by exp when not.
#include "cpu/kernels.h"
#include "cpu/rows.h"
#include "cpu/threads.h"
#include "formulas/activations.h"

namespace gemmlet {
namespace {

// Elements in one task, which shall be worth handing over: some 5 microseconds. What has no exponential, root or
// quotient in it is as fast as memory, and takes a tenth of the time of the rest.
constexpr Index costly_chunk = 4096, cheap_chunk = 32768;

template <class F>
constexpr bool cheap_forward = false;
template <>
constexpr bool cheap_forward<activations::identity> = true;
template <>
constexpr bool cheap_forward<activations::relu> = true;
template <>
constexpr bool cheap_forward<activations::leaky_relu> = true;

// Gradients in terms of y are polynomials, but for this one.
template <class F>
constexpr bool cheap_backward = !F::needs_x;
template <>
constexpr bool cheap_backward<activations::softplus> = false;

template <class T, class F>
void forward(const T* x, T parameter, T* y, Index n) {
  const Vec<T> p = splat<T>(parameter);
  parallel_chunks(
      n,
      [&](Index i, Index end) {
        // The main loop:
        for (; i + lanes<T> <= end; i += lanes<T>) store(y + i, F::forward(load(x + i), p));
        // The tail:
        const int rest = static_cast<int>(end - i);
        if (rest > 0) store_part(y + i, F::forward(load_part(x + i, rest), p), rest);
      },
      cheap_forward<F> ? cheap_chunk : costly_chunk);
}

template <class T, class F>
void backward(const T* grad_y, const T* saved, T parameter, T* grad_x, Index n) {
  const Vec<T> p = splat<T>(parameter);
  parallel_chunks(
      n,
      [&](Index i, Index end) {
        // The main loop:
        for (; i + lanes<T> <= end; i += lanes<T>) store(grad_x + i, F::backward(load(grad_y + i), load(saved + i), p));
        // The tail:
        const int rest = static_cast<int>(end - i);
        if (rest > 0)
          store_part(grad_x + i, F::backward(load_part(grad_y + i, rest), load_part(saved + i, rest), p), rest);
      },
      cheap_backward<F> ? cheap_chunk : costly_chunk);
}

template <class T>
struct softmax {
  static void forward(const T* x, T* y, Index columns) {
    const Vec<T> largest = splat<T>(row_max(x, columns));
    DoubleSum<T> sum;
    for_lanes<T>(columns, [&](Index j, int n) {
      const Vec<T> e = decay(load_lanes(x + j, n) - largest);
      sum.add(e, n);
      store_lanes(y + j, e, n);
    });
    const Vec<T> total = splat<T>(static_cast<T>(sum.total()));
    for_lanes<T>(columns, [&](Index j, int n) { store_lanes(y + j, load_lanes(y + j, n) / total, n); });
  }
  static void backward(const T* grad_y, const T* y, T* grad_x, Index columns) {
    DoubleSum<T> dot;
    for_lanes<T>(columns, [&](Index j, int n) { dot.add_product(load_lanes(grad_y + j, n), load_lanes(y + j, n)); });
    const Vec<T> d = splat<T>(static_cast<T>(dot.total()));
    for_lanes<T>(columns, [&](Index j, int n) {
      store_lanes(grad_x + j, load_lanes(y + j, n) * (load_lanes(grad_y + j, n) - d), n);
    });
  }
};

template <class T>
struct log_softmax {
  static void forward(const T* x, T* y, Index columns) {
    const Vec<T> largest = splat<T>(row_max(x, columns));
    DoubleSum<T> sum;
    for_lanes<T>(columns, [&](Index j, int n) { sum.add(decay(load_lanes(x + j, n) - largest), n); });
    const Vec<T> log_total = splat<T>(static_cast<T>(std::log(sum.total())));
    for_lanes<T>(columns, [&](Index j, int n) { store_lanes(y + j, (load_lanes(x + j, n) - largest) - log_total, n); });
  }
  static void backward(const T* grad_y, const T* y, T* grad_x, Index columns) {
    DoubleSum<T> sum;
    for_lanes<T>(columns, [&](Index j, int n) { sum.add(load_lanes(grad_y + j, n), n); });
    const Vec<T> total = splat<T>(static_cast<T>(sum.total()));
    for_lanes<T>(columns, [&](Index j, int n) {
      store_lanes(grad_x + j, fma(-exp(load_lanes(y + j, n)), total, load_lanes(grad_y + j, n)), n);
    });
  }
};

#define GEMMLET_ROW_FUNCTIONS(X) \
  X(softmax)                     \
  X(log_softmax)

Index rows_per_chunk(Index columns) { return chunk_elements / columns + 1; }

}  // namespace

template <class T>
void activation_forward(int activation, const T* x, T parameter, T* y, Index n) {
  using Function = void (*)(const T*, T, T*, Index);
#define GEMMLET_ENTRY(name) &forward<T, activations::name>,
  static constexpr Function table[] = {GEMMLET_ACTIVATIONS(GEMMLET_ENTRY)};
#undef GEMMLET_ENTRY
  table[activation](x, parameter, y, n);
}

template <class T>
void activation_backward(int activation, const T* grad_y, const T* saved, T parameter, T* grad_x, Index n) {
  using Function = void (*)(const T*, const T*, T, T*, Index);
#define GEMMLET_ENTRY(name) &backward<T, activations::name>,
  static constexpr Function table[] = {GEMMLET_ACTIVATIONS(GEMMLET_ENTRY)};
#undef GEMMLET_ENTRY
  table[activation](grad_y, saved, parameter, grad_x, n);
}

template <class T>
void row_function_forward(int function, const T* x, T* y, Index rows, Index columns) {
  using Function = void (*)(const T*, T*, Index);
#define GEMMLET_ENTRY(name) &name<T>::forward,
  static constexpr Function table[] = {GEMMLET_ROW_FUNCTIONS(GEMMLET_ENTRY)};
#undef GEMMLET_ENTRY
  parallel_chunks(
      rows,
      [&](Index i, Index end) {
        for (; i < end; ++i) table[function](x + i * columns, y + i * columns, columns);
      },
      rows_per_chunk(columns));
}

template <class T>
void row_function_backward(int function, const T* grad_y, const T* y, T* grad_x, Index rows, Index columns) {
  using Function = void (*)(const T*, const T*, T*, Index);
#define GEMMLET_ENTRY(name) &name<T>::backward,
  static constexpr Function table[] = {GEMMLET_ROW_FUNCTIONS(GEMMLET_ENTRY)};
#undef GEMMLET_ENTRY
  parallel_chunks(
      rows,
      [&](Index i, Index end) {
        for (; i < end; ++i) table[function](grad_y + i * columns, y + i * columns, grad_x + i * columns, columns);
      },
      rows_per_chunk(columns));
}

template <class T>
void column_sum(View<T> x, T* sum) {
  // Each column is one sum in double from the first row to the last; threads take columns.
  constexpr Index block = 64;
  const bool large = x.rows * x.columns > 4 * chunk_elements;
  parallel_chunks(
      x.columns,
      [&](Index begin, Index end) {
        for (Index j = begin; j < end; j += block) {
          const Index width = end - j < block ? end - j : block;
          double total[block] = {};
          for (Index i = 0; i < x.rows; ++i) {
            const T* row = x.data + i * x.row_stride + j * x.column_stride;
            if (x.column_stride == 1)
              for (Index c = 0; c < width; ++c) total[c] += static_cast<double>(row[c]);
            else
              for (Index c = 0; c < width; ++c) total[c] += static_cast<double>(row[c * x.column_stride]);
          }
          for (Index c = 0; c < width; ++c) sum[j + c] = static_cast<T>(total[c]);
        }
      },
      large ? block : x.columns + 1);
}

std::vector<std::string> activation_names() {
#define GEMMLET_ENTRY(name) #name,
  return {GEMMLET_ACTIVATIONS(GEMMLET_ENTRY)};
}

std::vector<std::string> row_function_names() {
  return {GEMMLET_ROW_FUNCTIONS(GEMMLET_ENTRY)};
#undef GEMMLET_ENTRY
}

#define GEMMLET_INSTANTIATE(T)                                                    \
  template void activation_forward(int, const T*, T, T*, Index);                  \
  template void activation_backward(int, const T*, const T*, T, T*, Index);       \
  template void row_function_forward(int, const T*, T*, Index, Index);            \
  template void row_function_backward(int, const T*, const T*, T*, Index, Index); \
  template void column_sum(View<T>, T*);
GEMMLET_INSTANTIATE(float)
GEMMLET_INSTANTIATE(double)

}  // namespace gemmlet
