// Shared by the bindings: checks of arrays, and calls without the GIL.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/kernels.h"

namespace gemmlet::bindings {

namespace py = pybind11;

using OptionalArray = std::optional<py::array>;

[[noreturn]] inline void refuse(const char* name, const char* what) {
  throw std::invalid_argument(std::string(name) + ": " + what);
}

template <class T>
void check_dtype(const py::array& a, const char* name) {
  if (!py::dtype::of<T>().is(a.dtype()) && !a.dtype().equal(py::dtype::of<T>())) refuse(name, "wrong dtype");
  if ((py::detail::array_proxy(a.ptr())->flags & py::detail::npy_api::NPY_ARRAY_ALIGNED_) == 0)
    refuse(name, "not aligned");
}

template <class T>
const T* contiguous(const py::array& a, Index size, const char* name) {
  check_dtype<T>(a, name);
  if ((a.flags() & py::array::c_style) == 0) refuse(name, "not C-contiguous");
  if (a.size() != size) refuse(name, "wrong size");
  return static_cast<const T*>(a.data());
}

template <class T>
T* writable(py::array& a, Index size, const char* name) {
  contiguous<T>(a, size, name);
  return static_cast<T*>(a.mutable_data());  // throws if it is read-only
}

template <class T>
View<T> view(const py::array& a, const char* name) {
  check_dtype<T>(a, name);
  if (a.ndim() != 2) refuse(name, "not a matrix");
  const Index item = sizeof(T);
  // The stride of an axis of length 1 is arbitrary.
  const auto stride = [&](int axis) -> Index {
    if (a.shape(axis) < 2) return 0;
    if (a.strides(axis) % item != 0) refuse(name, "a stride that is no multiple of the item size");
    return a.strides(axis) / item;
  };
  return {static_cast<const T*>(a.data()), a.shape(0), a.shape(1), stride(0), stride(1)};
}

inline int checked_index(int value, std::size_t count, const char* name) {
  if (value < 0 || static_cast<std::size_t>(value) >= count) refuse(name, "out of range");
  return value;
}

// call(T) for the dtype of `a`.
template <class Call>
auto for_dtype(const py::array& a, const char* name, Call&& call) {
  if (a.dtype().num() == py::dtype::num_of<float>()) return call(float{});
  if (a.dtype().num() == py::dtype::num_of<double>()) return call(double{});
  refuse(name, "neither float32 nor float64");
}

// Runs `call` without the GIL. Not py::gil_scoped_release, which takes it back in a destructor: where the interpreter is
// about to end, CPython before 3.14 ends a thread that asks for the GIL by unwinding its stack, and to unwind through a
// destructor is to terminate the process.
template <class Call>
auto without_gil(Call&& call) {
  PyThreadState* state = PyEval_SaveThread();
  decltype(call()) result;
  try {
    result = call();
  } catch (...) {
    PyEval_RestoreThread(state);
    throw;
  }
  PyEval_RestoreThread(state);
  return result;
}

template <class Call>
  requires std::is_void_v<std::invoke_result_t<Call>>
void without_gil(Call&& call) {
  without_gil([&] {
    call();
    return 0;
  });
}

// The number of elements of a matrix.
inline Index elements(Index rows, Index columns, const char* name) {
  Index count;
  if (__builtin_mul_overflow(rows, columns, &count)) refuse(name, "more elements than can be counted");
  return count;
}

// The memory of the arrays of a call. What is written may overlap nothing else: indices are checked before training starts.
class Overlaps {
 public:
  void add(const void* data, Index bytes, bool written) {
    const auto begin = reinterpret_cast<std::uintptr_t>(data);
    if (bytes > 0) parts_.push_back({begin, begin + static_cast<std::uintptr_t>(bytes), written});
  }
  void add(const py::array& a, bool written) { add(a.data(), a.nbytes(), written); }

  // Whether something that is written overlaps anything else.
  bool found() {
    std::ranges::sort(parts_, {}, &Part::begin);
    std::uintptr_t end = 0, written_end = 0;
    for (const Part& part : parts_) {
      if (part.begin < (part.written ? end : written_end)) return true;
      end = std::max(end, part.end);
      if (part.written) written_end = std::max(written_end, part.end);
    }
    return false;
  }

 private:
  struct Part {
    std::uintptr_t begin, end;
    bool written;
  };
  std::vector<Part> parts_;
};

// A function of the module, and the names of its arguments.
template <class Function, class... Names>
void def(py::module_& m, const char* name, Function function, Names... names) {
  m.def(name, function, py::arg(names)...);
}

void bind_training(py::module_& m);  // training.cpp
void bind_numpy(py::module_& m);     // numpy/replace.cpp
void bind_torch(py::module_& m);     // torch.cpp

}  // namespace gemmlet::bindings
