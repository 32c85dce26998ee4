// The bindings: checks that protect memory, then the call without the GIL. No maths. The checks of user arguments are in
// python/gemmlet/_arguments.py; those here are for callers inside the package.
#include "cpu/bindings/bindings.h"

#include <functional>

#include "cpu/roofline.h"
#include "cpu/threads.h"

namespace py = pybind11;

namespace gemmlet {
void add_fast_paths(py::module_& m);  // fast_path.cpp
extern const int vector_bytes;        // isa.cpp
}  // namespace gemmlet

namespace {

using gemmlet::Index;
using gemmlet::View;
using namespace gemmlet::bindings;

const std::size_t activation_count = gemmlet::activation_names().size();
const std::size_t row_function_count = gemmlet::row_function_names().size();
const std::size_t loss_count = gemmlet::loss_names().size();
const std::size_t row_loss_count = gemmlet::row_loss_names().size();
const std::size_t rule_count = gemmlet::optimizer_rule_names().size();

void linear(const py::array& x, const py::array& w, const OptionalArray& b, int activation, double parameter,
            py::array& y, std::optional<py::array>& z) {
  if (activation != -1) checked_index(activation, activation_count, "activation");
  for_dtype(x, "x", [&](auto zero) {
    using T = decltype(zero);
    const View<T> xv = view<T>(x, "x"), wv = view<T>(w, "w");
    if (wv.rows != xv.columns) refuse("w", "rows differ from the columns of x");
    const T* bias = b ? contiguous<T>(*b, wv.columns, "b") : nullptr;
    const Index size = elements(xv.rows, wv.columns, "y");
    T* yp = writable<T>(y, size, "y");
    T* zp = z ? writable<T>(*z, size, "z") : nullptr;
    without_gil([&] { gemmlet::linear<T>(xv, wv, bias, activation, static_cast<T>(parameter), yp, zp); });
  });
}

void column_sum(const py::array& x, py::array& out) {
  for_dtype(x, "x", [&](auto zero) {
    using T = decltype(zero);
    const View<T> xv = view<T>(x, "x");
    T* sum = writable<T>(out, xv.columns, "out");
    without_gil([&] { gemmlet::column_sum<T>(xv, sum); });
  });
}

void activation_forward(int activation, const py::array& x, double parameter, py::array& out) {
  checked_index(activation, activation_count, "activation");
  for_dtype(x, "x", [&](auto zero) {
    using T = decltype(zero);
    const T* xp = contiguous<T>(x, x.size(), "x");
    T* yp = writable<T>(out, x.size(), "out");
    const Index n = x.size();
    without_gil([&] { gemmlet::activation_forward<T>(activation, xp, static_cast<T>(parameter), yp, n); });
  });
}

void activation_backward(int activation, const py::array& grad_y, const py::array& saved, double parameter,
                         py::array& out) {
  checked_index(activation, activation_count, "activation");
  for_dtype(grad_y, "grad_y", [&](auto zero) {
    using T = decltype(zero);
    const Index n = grad_y.size();
    const T* gp = contiguous<T>(grad_y, n, "grad_y");
    const T* sp = contiguous<T>(saved, n, "saved");
    T* op = writable<T>(out, n, "out");
    without_gil([&] { gemmlet::activation_backward<T>(activation, gp, sp, static_cast<T>(parameter), op, n); });
  });
}

// The rows and columns of a contiguous matrix that has both.
std::pair<Index, Index> shape_of_rows(const py::array& x, const char* name) {
  if (x.ndim() != 2 || x.shape(0) == 0 || x.shape(1) == 0) refuse(name, "not a matrix with rows and columns");
  return {x.shape(0), x.shape(1)};
}

void row_function_forward(int function, const py::array& x, py::array& out) {
  checked_index(function, row_function_count, "function");
  const auto [rows, columns] = shape_of_rows(x, "x");
  for_dtype(x, "x", [&, rows = rows, columns = columns](auto zero) {
    using T = decltype(zero);
    const T* xp = contiguous<T>(x, rows * columns, "x");
    T* yp = writable<T>(out, rows * columns, "out");
    without_gil([&] { gemmlet::row_function_forward<T>(function, xp, yp, rows, columns); });
  });
}

void row_function_backward(int function, const py::array& grad_y, const py::array& y, py::array& out) {
  checked_index(function, row_function_count, "function");
  const auto [rows, columns] = shape_of_rows(grad_y, "grad_y");
  for_dtype(grad_y, "grad_y", [&, rows = rows, columns = columns](auto zero) {
    using T = decltype(zero);
    const T* gp = contiguous<T>(grad_y, rows * columns, "grad_y");
    const T* yp = contiguous<T>(y, rows * columns, "y");
    T* op = writable<T>(out, rows * columns, "out");
    without_gil([&] { gemmlet::row_function_backward<T>(function, gp, yp, op, rows, columns); });
  });
}

double row_loss(int loss, const py::array& logits, const py::array& labels, double smoothing, py::array& out) {
  checked_index(loss, row_loss_count, "loss");
  const auto [rows, columns] = shape_of_rows(logits, "logits");
  return for_dtype(logits, "logits", [&, rows = rows, columns = columns](auto zero) {
    using T = decltype(zero);
    const T* zp = contiguous<T>(logits, rows * columns, "logits");
    T* gp = writable<T>(out, rows * columns, "out");
    const Index* indices = nullptr;
    const T* targets = nullptr;
    if (labels.ndim() == 1) {
      indices = contiguous<Index>(labels, rows, "labels");
      for (Index i = 0; i < rows; ++i)
        if (indices[i] < 0 || indices[i] >= columns) refuse("labels", "a class index that is out of range");
      // They are read while the gradient is written.
      const void *labels_end = indices + rows, *gradient_end = gp + rows * columns;
      if (std::less<>{}(indices, gradient_end) && std::less<>{}(gp, labels_end)) refuse("out", "overlaps the labels");
    } else {
      targets = contiguous<T>(labels, rows * columns, "labels");
      if (targets == gp) refuse("out", "may not be the labels");
    }
    return without_gil([&] { return gemmlet::row_loss<T>(loss, zp, indices, targets, smoothing, gp, rows, columns); });
  });
}

double elementwise_loss(int loss, const py::array& prediction, const py::array& target, double parameter,
                        py::array& out) {
  checked_index(loss, loss_count, "loss");
  const Index n = prediction.size();
  if (n == 0) refuse("prediction", "no elements");
  return for_dtype(prediction, "prediction", [&](auto zero) {
    using T = decltype(zero);
    const T* pp = contiguous<T>(prediction, n, "prediction");
    const T* tp = contiguous<T>(target, n, "target");
    T* gp = writable<T>(out, n, "out");
    return without_gil([&] { return gemmlet::elementwise_loss<T>(loss, pp, tp, static_cast<T>(parameter), gp, n); });
  });
}

void optimizer_update(int rule, py::array& param, const py::array& grad, std::vector<py::array> state,
                      const std::vector<double>& scalars) {
  checked_index(rule, rule_count, "rule");
  if (static_cast<int>(state.size()) != gemmlet::optimizer_state_count(rule)) refuse("state", "wrong number of arrays");
  if (static_cast<int>(scalars.size()) != gemmlet::optimizer_scalar_count(rule)) refuse("scalars", "wrong number");
  for_dtype(param, "param", [&](auto zero) {
    using T = decltype(zero);
    const Index n = param.size();
    T* pp = writable<T>(param, n, "param");
    const T* gp = contiguous<T>(grad, n, "grad");
    std::vector<T*> kept;
    for (py::array& s : state) kept.push_back(writable<T>(s, n, "state"));
    without_gil([&] { gemmlet::optimizer_update<T>(rule, pp, gp, kept.data(), scalars.data(), n); });
  });
}

double fma_loop(bool is_double, std::int64_t steps) {
  if (steps < 1) refuse("steps", "below 1");
  return without_gil([&] { return is_double ? gemmlet::fma_loop<double>(steps) : gemmlet::fma_loop<float>(steps); });
}

}  // namespace

// threadpoolctl calls these through ctypes.
extern "C" {
__attribute__((visibility("default"))) void gemmlet_set_num_threads(int count) {
  gemmlet::set_num_threads(count < 1 ? 1 : count);
}
__attribute__((visibility("default"))) int gemmlet_get_num_threads() { return gemmlet::get_num_threads(); }
}

// Python finds it under the name in isa.cpp.
PYBIND11_MODULE(_cpu, m, py::mod_gil_not_used()) {
  m.doc() = "The kernels of gemmlet, compiled for one instruction set.";
  m.attr("compiler") = __VERSION__;
  m.attr("vector_bytes") = gemmlet::vector_bytes;
  m.def("activations", &gemmlet::activation_names, "Names, in the order of their numbers.");
  m.def("row_functions", &gemmlet::row_function_names, "Names, in the order of their numbers.");
  m.def("losses", &gemmlet::loss_names, "Names, in the order of their numbers.");
  m.def("row_losses", &gemmlet::row_loss_names, "Names, in the order of their numbers.");
  m.def("optimizer_rules", &gemmlet::optimizer_rule_names, "Names, in the order of their numbers.");
  // Waits for a running call that uses the pool.
  m.def("set_num_threads", [](int count) { without_gil([&] { gemmlet_set_num_threads(count); }); }, py::arg("count"));
  m.def("get_num_threads", &gemmlet_get_num_threads);
  m.def("fma_loop", &fma_loop, py::arg("is_double"), py::arg("steps"));
  m.def("mark", &gemmlet_mark);
  m.def("linear", &linear, py::arg("x"), py::arg("w"), py::arg("b"), py::arg("activation"), py::arg("parameter"),
        py::arg("y"), py::arg("z"));
  m.def("column_sum", &column_sum, py::arg("x"), py::arg("out"));
  m.def("activation_forward", &activation_forward, py::arg("activation"), py::arg("x"), py::arg("parameter"),
        py::arg("out"));
  m.def("activation_backward", &activation_backward, py::arg("activation"), py::arg("grad_y"), py::arg("saved"),
        py::arg("parameter"), py::arg("out"));
  m.def("row_function_forward", &row_function_forward, py::arg("function"), py::arg("x"), py::arg("out"));
  m.def("row_function_backward", &row_function_backward, py::arg("function"), py::arg("grad_y"), py::arg("y"),
        py::arg("out"));
  m.def("row_loss", &row_loss, py::arg("loss"), py::arg("logits"), py::arg("labels"), py::arg("smoothing"),
        py::arg("out"));
  m.def("elementwise_loss", &elementwise_loss, py::arg("loss"), py::arg("prediction"), py::arg("target"),
        py::arg("parameter"), py::arg("out"));
  m.def("optimizer_update", &optimizer_update, py::arg("rule"), py::arg("param"), py::arg("grad"), py::arg("state"),
        py::arg("scalars"));
  bind_training(m);
  gemmlet::add_fast_paths(m);
}
