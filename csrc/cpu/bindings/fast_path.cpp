// The fast path of the public kernels: argument checks, allocation of the result and the kernel in one C function.
//
// Contract
//   A fast path takes the arguments of a call of gemmlet.kernels and returns the result; or None, having written nothing,
//   where anything is unusual. Then kernels.py takes the general path, which computes the same bits or raises the error:
//   there are no error messages here.
//   Usual are np.ndarray itself (no subclass), one dtype, float32 or float64 in native byte order, aligned; for
//   elementwise and row functions contiguous in one order, for matmul matrices of any strides; an output that is new,
//   equals an input or overlaps none. So nothing is copied here.
//   Releasing and reacquiring the GIL costs about 0.1 us, more under contention, so short calls keep it.
//   Once it is released another thread may set the shape or the dtype of any array: whatever a kernel reads of an array,
//   sizes, strides and pointers, is taken before.
//   pybind11 is bypassed for the call: its conversion of arguments costs more than a small kernel. The functions are
//   METH_FASTCALL, and their `self` is the formula.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <exception>
#include <initializer_list>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "cpu/bindings/extent.h"
#include "cpu/bindings/run.h"
#include "cpu/kernels.h"

namespace gemmlet {
namespace {

namespace py = pybind11;
using Api = py::detail::npy_api;
using Array = py::detail::PyArray_Proxy;
using Arguments = PyObject* const*;

constexpr int c_order = Api::NPY_ARRAY_C_CONTIGUOUS_, f_order = Api::NPY_ARRAY_F_CONTIGUOUS_;

// The formula of a fast path; its `self`.
struct Formula {
  int number;
  double parameter;  // the default
  bool takes_parameter, needs_x, unit_interval;
};

constexpr const char* capsule_name = "gemmlet formula";

// Arrays.

// Set before the first fast path is made, not where they are used: Api::get() or a static local variable may wait for another
// thread, which needs the GIL to proceed.
const Api* numpy = nullptr;
PyTypeObject* array_type = nullptr;

int type_number(const Array* a) { return py::detail::array_descriptor_proxy(a->descr)->type_num; }

// `object` as an array, or null if it is unusual.
const Array* usual(PyObject* object) {
  if (Py_TYPE(object) != array_type) return nullptr;
  const Array* a = py::detail::array_proxy(object);
  const auto* dtype = py::detail::array_descriptor_proxy(a->descr);
  const bool fits = (dtype->type_num == Api::NPY_FLOAT_ || dtype->type_num == Api::NPY_DOUBLE_) &&
                    dtype->byteorder == '=' && (a->flags & Api::NPY_ARRAY_ALIGNED_) != 0;
  return fits ? a : nullptr;
}

const Array* usual(PyObject* object, int type) {
  const Array* a = usual(object);
  return a != nullptr && type_number(a) == type ? a : nullptr;
}

bool same_shape(const Array* a, const Array* b) {
  return a->nd == b->nd && std::equal(a->dimensions, a->dimensions + a->nd, b->dimensions);
}

bool writable(const Array* a) { return (a->flags & Api::NPY_ARRAY_WRITEABLE_) != 0; }

template <class T>
T* data(const Array* a) {
  return reinterpret_cast<T*>(a->data);
}

Extent extent(const Array* a, Index item) { return {a->data, item, a->nd, a->dimensions, a->strides}; }

PyObject* new_array(const Array* like, int nd, const Py_intptr_t* shape, bool fortran) {
  Py_INCREF(like->descr);  // it is taken over
  return numpy->PyArray_NewFromDescr_(array_type, like->descr, nd, shape, nullptr, nullptr, fortran ? f_order : 0,
                                      nullptr);
}

// The arrays of one call that have one shape, dtype and order.
class Alike {
 public:
  explicit Alike(PyObject* first, int orders = c_order | f_order) : first_(usual(first)) {
    if (first_ == nullptr) return;
    type_ = type_number(first_);
    orders_ = first_->flags & orders;
    for (int i = 0; i < first_->nd; ++i) size_ *= first_->dimensions[i];
    inputs_[count_++] = first_;
  }
  bool fits() const { return orders_ != 0; }
  bool is_float() const { return type_ == Api::NPY_FLOAT_; }
  Index size() const { return size_; }
  int dimensions() const { return first_->nd; }
  Index columns() const { return first_->dimensions[first_->nd - 1]; }
  const Array* first() const { return first_; }

  // One more array of this shape and dtype; in the same order too, unless it is not read.
  const Array* add(PyObject* object, bool read = true) {
    const Array* a = usual(object, type_);
    if (a == nullptr || !same_shape(a, first_)) return nullptr;
    if (!read) return a;
    orders_ &= a->flags;
    return fits() ? inputs_[count_++] = a : nullptr;
  }

  // Whether the array added last shares no memory with those before it.
  bool last_is_apart() const {
    for (int i = 0; i + 1 < count_; ++i)
      if (overlap(inputs_[count_ - 1], inputs_[i])) return false;
    return true;
  }

  // `out`, or a new array for None: a new reference; null if `out` is unusual.
  PyObject* output(PyObject* out) {
    if (out == Py_None) return new_array(first_, first_->nd, first_->dimensions, (orders_ & c_order) == 0);
    const Array* a = usual(out, type_);
    if (a == nullptr || !same_shape(a, first_) || (orders_ & a->flags) == 0 || !writable(a)) return nullptr;
    for (int i = 0; i < count_; ++i)
      if (a->data != inputs_[i]->data && overlap(a, inputs_[i])) return nullptr;
    return Py_NewRef(out);
  }

 private:
  bool overlap(const Array* a, const Array* b) const {
    const Index bytes = size_ * (is_float() ? 4 : 8);
    return a->data < b->data + bytes && b->data < a->data + bytes;
  }

  const Array* first_;
  int type_ = 0, orders_ = 0, count_ = 0;
  Index size_ = 1;
  std::array<const Array*, 8> inputs_;
};

template <class T>
T* data(PyObject* array) {
  return data<T>(py::detail::array_proxy(array));
}

// call(T) for the dtype.
template <class Call>
PyObject* for_type(bool is_float, Call&& call) {
  return is_float ? call(float{}) : call(double{});
}

// The parameter of the formula; None where it takes none.
template <class T>
bool parameter(const Formula& formula, PyObject* given, T& result) {
  result = T(0);
  if (!formula.takes_parameter) return given == Py_None;
  if (!PyFloat_Check(given)) return false;
  const double value = PyFloat_AS_DOUBLE(given);
  result = static_cast<T>(value);
  return value > 0 && value <= static_cast<double>(std::numeric_limits<T>::max());
}

// The functions. Null without an exception is None: "unusual".

constexpr PyObject* unusual = nullptr;

// call(data of the first array, data of `second` or null, parameter, data of the result), without the GIL if there is
// much to do. `out`, or a new array.
template <class Call>
PyObject* result_of(Alike& arrays, const Array* second, const Formula& formula, PyObject* given, PyObject* out,
                    Call&& call) {
  return for_type(arrays.is_float(), [&](auto zero) -> PyObject* {
    using T = decltype(zero);
    T number;
    if (!parameter(formula, given, number)) return unusual;
    PyObject* result = arrays.output(out);
    if (result == nullptr) return unusual;
    const T *first = data<T>(arrays.first()), *other = second == nullptr ? nullptr : data<T>(second);
    T* to = data<T>(result);
    const bool well = run(arrays.size(), [&] { call(first, other, number, to); });
    return result_if(well, result);
  });
}

// x, parameter, out
PyObject* activation(const Formula& formula, Arguments a) {
  Alike arrays(a[0]);
  if (!arrays.fits()) return unusual;
  return result_of(arrays, nullptr, formula, a[1], a[2], [&]<class T>(const T* x, const T*, T number, T* y) {
    activation_forward(formula.number, x, number, y, arrays.size());
  });
}

// grad_y, x, y, parameter, out
PyObject* activation_gradient(const Formula& formula, Arguments a) {
  Alike arrays(a[0]);
  PyObject* const other = a[formula.needs_x ? 2 : 1];
  const Array* saved = arrays.fits() ? arrays.add(a[formula.needs_x ? 1 : 2]) : nullptr;
  if (saved == nullptr || (other != Py_None && arrays.add(other, false) == nullptr)) return unusual;
  return result_of(arrays, saved, formula, a[3], a[4], [&]<class T>(const T* grad_y, const T* s, T number, T* grad_x) {
    activation_backward(formula.number, grad_y, s, number, grad_x, arrays.size());
  });
}

// x, None, out
PyObject* row_function(const Formula& formula, Arguments a) {
  Alike arrays(a[0], c_order);
  if (!arrays.fits() || arrays.dimensions() == 0 || arrays.size() == 0) return unusual;
  const Index columns = arrays.columns(), rows = arrays.size() / columns;
  return result_of(arrays, nullptr, formula, a[1], a[2], [&]<class T>(const T* x, const T*, T, T* y) {
    row_function_forward(formula.number, x, y, rows, columns);
  });
}

// grad_y, x, y, None, out
PyObject* row_function_gradient(const Formula& formula, Arguments a) {
  Alike arrays(a[0], c_order);
  if (!arrays.fits() || arrays.dimensions() == 0 || arrays.size() == 0) return unusual;
  const Array* y = arrays.add(a[2]);
  if (y == nullptr || (a[1] != Py_None && arrays.add(a[1], false) == nullptr)) return unusual;
  const Index columns = arrays.columns(), rows = arrays.size() / columns;
  return result_of(arrays, y, formula, a[3], a[4], [&]<class T>(const T* grad_y, const T* saved, T, T* grad_x) {
    row_function_backward(formula.number, grad_y, saved, grad_x, rows, columns);
  });
}

// A tuple that takes over the references, which may be null if an error is set.
template <class... Objects>
PyObject* tuple_of(Objects*... objects) {
  PyObject* result = (... && (objects != nullptr)) ? PyTuple_Pack(sizeof...(objects), objects...) : nullptr;
  (Py_XDECREF(objects), ...);
  return result;
}

// prediction, targets, parameter, out
PyObject* loss(const Formula& formula, Arguments a) {
  Alike arrays(a[0], c_order);
  if (!arrays.fits() || arrays.size() == 0) return unusual;
  const Array* target = arrays.add(a[1]);
  if (target == nullptr) return unusual;
  const Index n = arrays.size();
  bool inside = true;
  double value = 0;
  const auto evaluate = [&]<class T>(const T* prediction, const T* t, T number, T* to) {
    if (formula.unit_interval) inside = within_unit_interval(prediction, n);
    if (inside) value = elementwise_loss(formula.number, prediction, t, number, to, n);
  };
  PyObject* gradient = result_of(arrays, target, formula, a[2], a[3], evaluate);
  gradient = result_if(inside, gradient);
  return gradient == nullptr ? unusual : tuple_of(PyFloat_FromDouble(value), gradient);
}

// A copy of class indices: another thread may change those that were given.
class Labels {
 public:
  Labels(const Index* given, Index count) : count_(count) {
    if (count > few) memory_.reset(new Index[static_cast<std::size_t>(count)]);
    own_ = count > few ? memory_.get() : here_;
    std::copy_n(given, count, own_);
    asm volatile("" ::: "memory");  // a compiler, which thinks both the same, would check those given
  }
  Labels(const Labels&) = delete;
  Labels& operator=(const Labels&) = delete;

  const Index* get() const { return own_; }
  bool below(Index columns) const {
    bool outside = false;
    for (Index i = 0; i < count_; ++i)  // as unsigned numbers, negative ones are large
      outside |= static_cast<std::uint64_t>(own_[i]) >= static_cast<std::uint64_t>(columns);
    return !outside;
  }

 private:
  static constexpr Index few = 256;
  Index count_, here_[few];
  Index* own_;
  std::unique_ptr<Index[]> memory_;
};

// logits, labels, label_smoothing, out
PyObject* row_loss_and_gradient(const Formula& formula, Arguments a) {
  Alike arrays(a[0], c_order);
  if (!arrays.fits() || arrays.dimensions() != 2 || arrays.size() == 0 || !PyFloat_Check(a[2])) return unusual;
  const double smoothing = PyFloat_AS_DOUBLE(a[2]);
  if (!(smoothing >= 0 && smoothing <= 1) || Py_TYPE(a[1]) != Py_TYPE(a[0])) return unusual;
  const Index columns = arrays.columns(), rows = arrays.size() / columns;
  const Array *labels = py::detail::array_proxy(a[1]), *soft = nullptr;
  const Index* indices = nullptr;
  if (labels->nd == 1) {
    const auto* dtype = py::detail::array_descriptor_proxy(labels->descr);
    constexpr int wanted = Api::NPY_ARRAY_ALIGNED_ | c_order;
    if (dtype->type_num != Api::NPY_INT64_ || dtype->byteorder != '=' || (labels->flags & wanted) != wanted ||
        labels->dimensions[0] != rows)
      return unusual;
    indices = data<Index>(labels);
  } else {
    soft = arrays.add(a[1]);
    if (soft == nullptr) return unusual;
  }
  bool is_usual = true;
  double value = 0;
  const auto evaluate = [&]<class T>(const T* logits, const T* targets, T, T* to) {
    if (indices == nullptr) {
      // They are read after the gradient has been written to.
      is_usual = to + arrays.size() <= targets || targets + arrays.size() <= to;
      if (is_usual) value = row_loss<T>(formula.number, logits, nullptr, targets, smoothing, to, rows, columns);
      return;
    }
    const Labels own(indices, rows);
    is_usual = own.below(columns);
    if (is_usual) value = row_loss<T>(formula.number, logits, own.get(), nullptr, smoothing, to, rows, columns);
  };
  PyObject* gradient = result_of(arrays, soft, Formula{}, Py_None, a[3], evaluate);
  gradient = result_if(is_usual, gradient);
  return gradient == nullptr ? unusual : tuple_of(PyFloat_FromDouble(value), gradient);
}

// param, grad, the tuple of states, the tuple of hyperparameters; True when done
PyObject* update(const Formula& formula, Arguments a) {
  constexpr int max_states = 2, max_hyperparameters = 9;
  const int states = optimizer_state_count(formula.number),
            hyperparameter_count = optimizer_hyperparameter_count(formula.number);
  if (states > max_states || hyperparameter_count > max_hyperparameters || !PyTuple_CheckExact(a[2]) ||
      !PyTuple_CheckExact(a[3]) || PyTuple_GET_SIZE(a[2]) != states || PyTuple_GET_SIZE(a[3]) != hyperparameter_count)
    return unusual;
  Alike arrays(a[0]);
  if (!arrays.fits() || !writable(arrays.first())) return unusual;
  const Array* gradient = arrays.add(a[1]);
  if (gradient == nullptr || !arrays.last_is_apart()) return unusual;
  std::array<const Array*, max_states> state{};
  for (int s = 0; s < states; ++s) {
    state[s] = arrays.add(PyTuple_GET_ITEM(a[2], s));
    if (state[s] == nullptr || !writable(state[s]) || !arrays.last_is_apart()) return unusual;
  }
  std::array<double, max_hyperparameters> hyperparameters{};
  for (int s = 0; s < hyperparameter_count; ++s) {
    PyObject* number = PyTuple_GET_ITEM(a[3], s);
    if (!PyFloat_Check(number)) return unusual;
    hyperparameters[s] = PyFloat_AS_DOUBLE(number);
  }
  return for_type(arrays.is_float(), [&](auto zero) -> PyObject* {
    using T = decltype(zero);
    std::array<T*, max_states> kept{};
    for (int s = 0; s < states; ++s) kept[s] = data<T>(state[s]);
    T* const param = data<T>(arrays.first());
    const T* const grad = data<T>(gradient);
    const bool well = run(arrays.size(), [&] {
      optimizer_update(formula.number, param, grad, kept.data(), hyperparameters.data(), arrays.size());
    });
    return well ? Py_NewRef(Py_True) : nullptr;
  });
}

// linear. The `self` is a dict from the names of activations to their formulas.

// A matrix of the usual kind, with elements, whose strides are whole elements.
const Array* matrix(PyObject* object, int type) {
  const Array* a = usual(object, type);
  if (a == nullptr || a->nd != 2 || a->dimensions[0] == 0 || a->dimensions[1] == 0) return nullptr;
  const Index item = type == Api::NPY_FLOAT_ ? 4 : 8;
  return a->strides[0] % item == 0 && a->strides[1] % item == 0 ? a : nullptr;
}

template <class T>
View<T> view(const Array* a) {
  constexpr Index item = sizeof(T);
  return {data<T>(a), a->dimensions[0], a->dimensions[1], a->dimensions[0] < 2 ? 0 : a->strides[0] / item,
          a->dimensions[1] < 2 ? 0 : a->strides[1] / item};
}

bool contiguous(const Array* a) { return (a->flags & c_order) != 0; }

// The formula of an activation: null for None; false if there is none of that name.
bool find_formula(PyObject* formulas, PyObject* name, const Formula*& formula) {
  formula = nullptr;
  if (name == Py_None) return true;
  if (!PyUnicode_CheckExact(name)) return false;
  PyObject* capsule = PyDict_GetItemWithError(formulas, name);
  if (capsule == nullptr) return false;
  formula = static_cast<const Formula*>(PyCapsule_GetPointer(capsule, capsule_name));
  return formula != nullptr;
}

// x, w, b, activation, return_preactivation, out
PyObject* linear_forward(PyObject* formulas, Arguments a) {
  const Array* x = usual(a[0]);
  const int type = x == nullptr ? 0 : type_number(x);
  x = matrix(a[0], type);
  const Array* w = matrix(a[1], type);
  const Formula* formula;
  if (x == nullptr || w == nullptr || x->dimensions[1] != w->dimensions[0] || !PyBool_Check(a[4]) ||
      !find_formula(formulas, a[3], formula))
    return unusual;
  const Array* b = nullptr;
  if (a[2] != Py_None) {
    b = usual(a[2], type);
    if (b == nullptr || b->nd != 1 || b->dimensions[0] != w->dimensions[1] || !contiguous(b)) return unusual;
  }
  const Py_intptr_t shape[] = {x->dimensions[0], w->dimensions[1]};
  return for_type(type == Api::NPY_FLOAT_, [&](auto zero) -> PyObject* {
    using T = decltype(zero);
    PyObject *y = nullptr, *z = nullptr;
    if (a[5] == Py_None) {
      y = new_array(x, 2, shape, false);
    } else {
      const Array* out = matrix(a[5], type);
      if (out == nullptr || !contiguous(out) || !writable(out) || !std::equal(shape, shape + 2, out->dimensions))
        return unusual;
      const Extent written = extent(out, sizeof(T));
      for (const Array* read : {x, w, b})
        if (read != nullptr && !written.apart_from(extent(read, sizeof(T)))) return unusual;
      y = Py_NewRef(a[5]);
    }
    if (y == nullptr) return nullptr;
    const bool keep_z = a[4] == Py_True;
    if (keep_z && (z = new_array(x, 2, shape, false)) == nullptr) return result_if(false, y);
    const View<T> xv = view<T>(x), wv = view<T>(w);
    const T* bias = b == nullptr ? nullptr : data<T>(b);
    T *yp = data<T>(y), *zp = keep_z ? data<T>(z) : nullptr;
    const Index work = xv.rows * wv.columns * (xv.columns / tuning::multiply_adds_per_element + 1);
    const bool well = run(work, [&] {
      linear(xv, wv, bias, formula == nullptr ? -1 : formula->number,
             formula == nullptr ? T(0) : static_cast<T>(formula->parameter), yp, zp);
    });
    if (!keep_z) return result_if(well, y);
    return tuple_of(result_if(well, y), result_if(well, z));
  });
}

// grad_y, x, w, y, activation, z, need_x, need_w, need_b
PyObject* linear_gradient(PyObject* formulas, Arguments a) {
  Alike arrays(a[0], c_order);
  const Formula* formula;
  if (!arrays.fits() || arrays.dimensions() != 2 || arrays.size() == 0 || !find_formula(formulas, a[4], formula))
    return unusual;
  for (int i = 6; i < 9; ++i)
    if (!PyBool_Check(a[i])) return unusual;
  const bool need_x = a[6] == Py_True, need_w = a[7] == Py_True, need_b = a[8] == Py_True;
  const Array* grad_y = arrays.first();
  const int type = type_number(grad_y);
  const Array *x = nullptr, *w = nullptr, *saved = nullptr;
  if (a[1] != Py_None) {
    x = matrix(a[1], type);
    if (x == nullptr || x->dimensions[0] != grad_y->dimensions[0]) return unusual;
  }
  if (a[2] != Py_None) {
    w = matrix(a[2], type);
    if (w == nullptr || w->dimensions[1] != grad_y->dimensions[1]) return unusual;
  }
  if ((need_x && w == nullptr) || (need_w && x == nullptr)) return unusual;
  if (x != nullptr && w != nullptr && x->dimensions[1] != w->dimensions[0]) return unusual;
  for (const int i : {3, 5}) {
    const bool read = formula != nullptr && formula->needs_x == (i == 5);
    const Array* given = a[i] == Py_None ? nullptr : arrays.add(a[i], read);
    if (given == nullptr && (read || a[i] != Py_None)) return unusual;
    if (read) saved = given;
  }
  return for_type(arrays.is_float(), [&](auto zero) -> PyObject* {
    using T = decltype(zero);
    const auto result = [&](bool needed, int nd, Index rows, Index columns) {
      const Py_intptr_t shape[] = {rows, columns};
      return needed ? new_array(grad_y, nd, shape, false) : Py_NewRef(Py_None);
    };
    PyObject* grad_x = result(need_x, 2, grad_y->dimensions[0], need_x ? w->dimensions[0] : 0);
    PyObject* grad_w = result(need_w, 2, need_w ? x->dimensions[1] : 0, grad_y->dimensions[1]);
    PyObject* grad_b = result(need_b, 1, grad_y->dimensions[1], 0);
    if (grad_x == nullptr || grad_w == nullptr || grad_b == nullptr) return tuple_of(grad_x, grad_w, grad_b);
    const Index inner = need_x ? w->dimensions[0] : need_w ? x->dimensions[1] : 1;
    View<T> grad_z = view<T>(grad_y);
    const View<T> xt = need_w ? view<T>(x).transposed() : View<T>{}, wt = need_x ? view<T>(w).transposed() : View<T>{};
    const T* kept = saved == nullptr ? nullptr : data<T>(saved);
    T *const to_x = need_x ? data<T>(grad_x) : nullptr, *const to_w = need_w ? data<T>(grad_w) : nullptr,
             *const to_b = need_b ? data<T>(grad_b) : nullptr;
    const bool well = run(arrays.size() * (inner / tuning::multiply_adds_per_element + 1), [&] {
      std::unique_ptr<T[]> memory;
      if (formula != nullptr) {
        memory.reset(new T[static_cast<std::size_t>(arrays.size())]);
        activation_backward(formula->number, grad_z.data, kept, static_cast<T>(formula->parameter), memory.get(),
                            arrays.size());
        grad_z.data = memory.get();
      }
      if (need_x) linear<T>(grad_z, wt, nullptr, -1, T(0), to_x, nullptr);
      if (need_w) linear<T>(xt, grad_z, nullptr, -1, T(0), to_w, nullptr);
      if (need_b) column_sum(grad_z, to_b);
    });
    return tuple_of(result_if(well, grad_x), result_if(well, grad_w), result_if(well, grad_b));
  });
}

// To Python.

// `function` behind METH_FASTCALL: the number of arguments is checked, null without an exception becomes None.
template <auto function, int count>
PyObject* entry(PyObject* self, PyObject* const* arguments, Py_ssize_t given) {
  if (given != count) return PyErr_Format(PyExc_TypeError, "%d arguments expected, got %zd", count, given);
  PyObject* result;
  if constexpr (std::is_invocable_v<decltype(function), const Formula&, Arguments>)
    result = function(*static_cast<const Formula*>(PyCapsule_GetPointer(self, capsule_name)), arguments);
  else
    result = function(self, arguments);
  if (result != nullptr || PyErr_Occurred() != nullptr) return result;
  Py_RETURN_NONE;
}

template <auto function, int count>
py::object made(const py::object& self) {
  static PyMethodDef definition = {"fast_path",
                                   reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&entry<function, count>)),
                                   METH_FASTCALL, "The result, or None if anything about the arguments is unusual."};
  return py::reinterpret_steal<py::object>(PyCFunction_New(&definition, self.ptr()));
}

// The capsule of a formula of a list of `count`.
void check_formula(const py::object& self, std::size_t count) {
  if (PyCapsule_IsValid(self.ptr(), capsule_name) == 0) throw py::type_error("formula: not what formula() returns");
  const int number = static_cast<const Formula*>(PyCapsule_GetPointer(self.ptr(), capsule_name))->number;
  if (number < 0 || static_cast<std::size_t>(number) >= count)
    throw py::value_error("formula: its number is too large");
}

py::capsule make_formula(int number, double parameter, bool takes_parameter, bool needs_x, bool unit_interval) {
  auto made = std::make_unique<Formula>(Formula{number, parameter, takes_parameter, needs_x, unit_interval});
  py::capsule capsule(made.get(), capsule_name,
                      [](PyObject* c) { delete static_cast<Formula*>(PyCapsule_GetPointer(c, capsule_name)); });
  made.release();
  return capsule;
}

// The fast path of a kind for a formula, or for a dict from names to formulas of activations.
py::object make_fast_path(const std::string& kind, const py::object& formula) {
  const bool takes_dict = kind == "linear" || kind == "linear_backward";
  if (takes_dict) {
    if (!py::isinstance<py::dict>(formula)) throw py::type_error("formula: not a dict");
    for (const auto& item : py::reinterpret_borrow<py::dict>(formula))
      check_formula(py::reinterpret_borrow<py::object>(item.second), activation_names().size());
    // A copy that no caller can change.
    const py::object own = py::reinterpret_steal<py::object>(PyDict_Copy(formula.ptr()));
    return kind == "linear" ? made<&linear_forward, 6>(own) : made<&linear_gradient, 9>(own);
  }
  const auto is = [&](const char* name, const std::vector<std::string>& list) {
    if (kind != name) return false;
    check_formula(formula, list.size());
    return true;
  };
  if (is("activation", activation_names())) return made<&activation, 3>(formula);
  if (is("activation_backward", activation_names())) return made<&activation_gradient, 5>(formula);
  if (is("row_function", row_function_names())) return made<&row_function, 3>(formula);
  if (is("row_function_backward", row_function_names())) return made<&row_function_gradient, 5>(formula);
  if (is("loss", loss_names())) return made<&loss, 4>(formula);
  if (is("row_loss", row_loss_names())) return made<&row_loss_and_gradient, 4>(formula);
  if (is("update", optimizer_rule_names())) return made<&update, 4>(formula);
  throw py::value_error("kind: none is called " + kind);
}

}  // namespace

void add_fast_paths(py::module_& m) {
  numpy = &Api::get();
  array_type = numpy->PyArray_Type_;
  m.def("formula", &make_formula, py::arg("number"), py::arg("parameter"), py::arg("takes_parameter"),
        py::arg("needs_x"), py::arg("unit_interval"));
  m.def("fast_path", &make_fast_path, py::arg("kind"), py::arg("formula"));
}

}  // namespace gemmlet
