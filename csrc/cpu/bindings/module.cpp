// The bindings: checks that protect memory, then the call without the GIL. No maths. The checks of user arguments are in
// python/gemmlet/_arguments.py; those here are for callers inside the package.
#include "cpu/bindings/bindings.h"

#include <functional>

#include "cpu/augment.h"
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

struct Input {
  const py::array& array;
  const char* name;
};

// call(inputs, output, size) without the GIL, for contiguous arrays of one size and dtype.
template <class Call, class... More>
auto for_alike(py::array& out, Call&& call, Input first, More... more) {
  return for_dtype(first.array, first.name, [&](auto zero) {
    using T = decltype(zero);
    const Index n = first.array.size();
    const T* const inputs[] = {contiguous<T>(first.array, n, first.name), contiguous<T>(more.array, n, more.name)...};
    T* const output = writable<T>(out, n, "out");
    return without_gil([&] { return call(inputs, output, n); });
  });
}

void activation_forward(int activation, const py::array& x, double parameter, py::array& out) {
  checked_index(activation, activation_count, "activation");
  const auto call = [&]<class T>(const T* const* in, T* y, Index n) {
    gemmlet::activation_forward<T>(activation, in[0], static_cast<T>(parameter), y, n);
  };
  for_alike(out, call, Input{x, "x"});
}

void activation_backward(int activation, const py::array& grad_y, const py::array& saved, double parameter,
                         py::array& out) {
  checked_index(activation, activation_count, "activation");
  const auto call = [&]<class T>(const T* const* in, T* grad_x, Index n) {
    gemmlet::activation_backward<T>(activation, in[0], in[1], static_cast<T>(parameter), grad_x, n);
  };
  for_alike(out, call, Input{grad_y, "grad_y"}, Input{saved, "saved"});
}

// The columns of a matrix that has some, and rows.
Index columns_of(const py::array& x, const char* name) {
  if (x.ndim() != 2 || x.size() == 0) refuse(name, "not a matrix with rows and columns");
  return x.shape(1);
}

void row_function_forward(int function, const py::array& x, py::array& out) {
  checked_index(function, row_function_count, "function");
  const auto call = [&, columns = columns_of(x, "x")]<class T>(const T* const* in, T* y, Index n) {
    gemmlet::row_function_forward<T>(function, in[0], y, n / columns, columns);
  };
  for_alike(out, call, Input{x, "x"});
}

void row_function_backward(int function, const py::array& grad_y, const py::array& y, py::array& out) {
  checked_index(function, row_function_count, "function");
  const auto call = [&, columns = columns_of(grad_y, "grad_y")]<class T>(const T* const* in, T* grad_x, Index n) {
    gemmlet::row_function_backward<T>(function, in[0], in[1], grad_x, n / columns, columns);
  };
  for_alike(out, call, Input{grad_y, "grad_y"}, Input{y, "y"});
}

double row_loss(int loss, const py::array& logits, const py::array& labels, double smoothing, py::array& out) {
  checked_index(loss, row_loss_count, "loss");
  const Index columns = columns_of(logits, "logits"), rows = logits.shape(0);
  return for_dtype(logits, "logits", [&](auto zero) {
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
  if (prediction.size() == 0) refuse("prediction", "no elements");
  const auto call = [&]<class T>(const T* const* in, T* gradient, Index n) {
    return gemmlet::elementwise_loss<T>(loss, in[0], in[1], static_cast<T>(parameter), gradient, n);
  };
  return for_alike(out, call, Input{prediction, "prediction"}, Input{target, "target"});
}

void optimizer_update(int rule, py::array& param, const py::array& grad, std::vector<py::array> state,
                      const std::vector<double>& hyperparameters) {
  checked_index(rule, rule_count, "rule");
  if (static_cast<int>(state.size()) != gemmlet::optimizer_state_count(rule)) refuse("state", "wrong number of arrays");
  if (static_cast<int>(hyperparameters.size()) != gemmlet::optimizer_hyperparameter_count(rule))
    refuse("hyperparameters", "wrong number");
  for_dtype(param, "param", [&](auto zero) {
    using T = decltype(zero);
    const Index n = param.size();
    T* pp = writable<T>(param, n, "param");
    const T* gp = contiguous<T>(grad, n, "grad");
    std::vector<T*> kept;
    for (py::array& s : state) kept.push_back(writable<T>(s, n, "state"));
    without_gil([&] { gemmlet::optimizer_update<T>(rule, pp, gp, kept.data(), hyperparameters.data(), n); });
  });
}

void augment(const py::array& images, const std::vector<double>& settings, std::uint64_t seed, Index epoch,
             const py::array& samples, const OptionalArray& rows, py::array& out) {
  if (images.ndim() != 3) refuse("images", "not of three dimensions");
  const Index all = images.shape(0), height = images.shape(1), width = images.shape(2);
  const Index count = rows ? rows->size() : all;
  if (std::min(height, width) < 1 || std::max(height, width) > gemmlet::augment_max_side)
    refuse("images", "too small or too large");
  double by[gemmlet::augment_setting_count];
  if (settings.size() != std::size(by)) refuse("settings", "wrong number");
  for (std::size_t i = 0; i < settings.size(); ++i)
    if (!(settings[i] >= 0 && settings[i] <= gemmlet::augment_largest[i])) refuse("settings", "a number out of range");
  std::ranges::copy(settings, by);
  const auto* from = contiguous<std::uint8_t>(images, images.size(), "images");
  const auto* of_image = contiguous<Index>(samples, count, "samples");
  const Index* at = rows ? contiguous<Index>(*rows, count, "rows") : nullptr;
  for (Index i = 0; at != nullptr && i < count; ++i)
    if (at[i] < 0 || at[i] >= all) refuse("rows", "out of range");
  auto* to = writable<std::uint8_t>(out, elements(count, height * width, "rows"), "out");
  without_gil([&] { gemmlet::augment(by, from, count, height, width, seed, epoch, of_image, at, to); });
}

// For the tests.
void random_words(std::uint64_t seed, unsigned stream, std::uint64_t step, std::uint64_t row, Index first_block,
                  py::array& out) {
  auto* words = writable<std::uint32_t>(out, out.size(), "out");
  gemmlet::random_blocks(seed, stream, step, row, first_block, out.size() / 4, words);
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
  def(m, "fma_loop", &fma_loop, "is_double", "steps");
  def(m, "mark", &gemmlet_mark);
  def(m, "linear", &linear, "x", "w", "b", "activation", "parameter", "y", "z");
  def(m, "column_sum", &column_sum, "x", "out");
  def(m, "activation_forward", &activation_forward, "activation", "x", "parameter", "out");
  def(m, "activation_backward", &activation_backward, "activation", "grad_y", "saved", "parameter", "out");
  def(m, "row_function_forward", &row_function_forward, "function", "x", "out");
  def(m, "row_function_backward", &row_function_backward, "function", "grad_y", "y", "out");
  def(m, "row_loss", &row_loss, "loss", "logits", "labels", "smoothing", "out");
  def(m, "elementwise_loss", &elementwise_loss, "loss", "prediction", "target", "parameter", "out");
  def(m, "optimizer_update", &optimizer_update, "rule", "param", "grad", "state", "hyperparameters");
  def(m, "augment", &augment, "images", "settings", "seed", "epoch", "samples", "rows", "out");
  def(m, "random_words", &random_words, "seed", "stream", "step", "row", "first_block", "out");
  bind_training(m);
  bind_numpy(m);
  bind_torch(m);
  gemmlet::add_fast_paths(m);
}
