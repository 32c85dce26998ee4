// The operands of NumPy's functions, read from Python objects: which are usual, how they broadcast.
//
// Contract
//   Usual are an np.ndarray itself (no subclass) of one to max_axes axes, float32 or float64 in native byte order, aligned,
//   whose dtype has no metadata, and a number: a Python float or a small int, np.float64, np.float32, np.int64. An array of
//   bool or integers, or one of float32 beside float64, is converted to float64 where NumPy would (Converted).
//   Nothing here sets a Python error but what allocates. Readers return false where an operand is unusual: the call is then
//   NumPy's.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

// The C API of NumPy 2.0, in one table for all files of this folder, which replace.cpp has.
#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_2_0_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL gemmlet_numpy_api
#define PY_UFUNC_UNIQUE_SYMBOL gemmlet_ufunc_api
#ifndef GEMMLET_IMPORTS_NUMPY
#define NO_IMPORT_ARRAY
#define NO_IMPORT_UFUNC
#endif
#include <numpy/arrayobject.h>
#include <numpy/arrayscalars.h>
#include <numpy/ufuncobject.h>

#include <cmath>
#include <cstdlib>

#include "cpu/bindings/run.h"
#include "cpu/ufuncs.h"

namespace gemmlet::numpy {

constexpr int max_axes = 4;
constexpr int c_order = NPY_ARRAY_C_CONTIGUOUS, f_order = NPY_ARRAY_F_CONTIGUOUS;

inline const PyArrayObject_fields* fields(PyObject* array) {
  return reinterpret_cast<const PyArrayObject_fields*>(array);
}
inline bool is_array(PyObject* object) { return Py_TYPE(object) == &PyArray_Type; }

// An array whose dtype is neither float64 nor float32: alone, beside another such array, or beside an int, it is not usual,
// but to functions that take integers (`integers`), as a quotient is float64. This is asked first, as all that does not concern
// us comes through here.
template <bool integers = false>
[[gnu::always_inline]] inline bool is_other_array(PyObject* object) {
  if (!is_array(object)) return false;
  const int type = fields(object)->descr->type_num;
  return type != NPY_DOUBLE && type != NPY_FLOAT && !(integers && type < NPY_FLOAT);
}
template <bool integers = false>
[[gnu::always_inline]] inline bool are_others(PyObject* x, PyObject* y) {
  return is_other_array<integers>(x) ? is_other_array<integers>(y) || PyLong_CheckExact(y)
                                     : PyLong_CheckExact(x) && is_other_array<integers>(y);
}

struct Operand {
  const char* data = nullptr;
  const npy_intp *shape = nullptr, *strides = nullptr;  // of an array; in bytes
  int axes = 0, flags = 0;
  int type = NPY_DOUBLE;  // of a number too, unless it is weak
  double number = 0;
  bool array = false;
  bool weak = false;  // a Python number, which takes the dtype of the array

  Index size() const {
    Index n = 1;
    for (int i = 0; i < axes; ++i) n *= shape[i];
    return n;
  }
  Index item() const { return type == NPY_DOUBLE ? 8 : 4; }
  bool in_order(int orders = c_order | f_order) const { return (flags & orders) != 0; }
};

inline bool same_shape(const Operand& a, const Operand& b) {
  if (a.axes != b.axes) return false;
  for (int i = 0; i < a.axes; ++i)
    if (a.shape[i] != b.shape[i]) return false;
  return true;
}

// Native byte order ('|' is that of single bytes), aligned, of some axes, without metadata, which results inherit.
inline bool read_any_array(PyObject* object, Operand& o) {
  if (!is_array(object)) return false;
  const PyArrayObject_fields* a = fields(object);
  const char order = a->descr->byteorder;
  if (a->nd < 1 || a->nd > max_axes || (a->flags & NPY_ARRAY_ALIGNED) == 0 || (order != '=' && order != '|') ||
      PyDataType_METADATA(a->descr) != nullptr)
    return false;
  o.data = a->data;
  o.shape = a->dimensions;
  o.strides = a->strides;
  o.axes = a->nd;
  o.flags = a->flags;
  o.type = a->descr->type_num;
  o.array = true;
  return true;
}

inline bool read_array(PyObject* object, Operand& o) {
  if (!is_array(object)) return false;
  const int type = fields(object)->descr->type_num;
  return (type == NPY_DOUBLE || type == NPY_FLOAT) && read_any_array(object, o);
}

inline bool read_number(PyObject* object, Operand& o) {
  PyTypeObject* const type = Py_TYPE(object);
  if (type == &PyFloat_Type) {
    o.number = PyFloat_AS_DOUBLE(object);
    o.weak = true;
  } else if (type == &PyLong_Type) {
    int too_large;
    const long value = PyLong_AsLongAndOverflow(object, &too_large);
    if (too_large != 0 || value > 1L << 53 || value < -(1L << 53)) return false;
    o.number = static_cast<double>(value);
    o.weak = true;
  } else if (type == &PyDoubleArrType_Type) {
    o.number = PyArrayScalar_VAL(object, Double);
  } else if (type == &PyLongArrType_Type) {
    o.number = static_cast<double>(PyArrayScalar_VAL(object, Long));
  } else if (type == &PyFloatArrType_Type) {
    o.number = static_cast<double>(PyArrayScalar_VAL(object, Float));
    o.type = NPY_FLOAT;
  } else {
    return false;
  }
  return true;
}

// An array of another dtype as float64, in its own order.
class Converted {
 public:
  Converted() = default;
  Converted(const Converted&) = delete;
  Converted& operator=(const Converted&) = delete;
  ~Converted() {
    if (data_ != few_) std::free(data_);
  }

  bool read(PyObject* object, Operand& o) {
    // Of three axes NumPy orders the result as its iterator does, which casts.
    if (!read_any_array(object, o) || !o.in_order(o.axes > 2 ? c_order : c_order | f_order)) return false;
    switch (o.type) {
      case NPY_BOOL:
        return convert(o, ufuncs::convert_bools);
      case NPY_UINT8:
        return convert(o, ufuncs::convert<std::uint8_t>);
      case NPY_INT8:
        return convert(o, ufuncs::convert<std::int8_t>);
      case NPY_INT32:
        return convert(o, ufuncs::convert<std::int32_t>);
      case NPY_INT64:
        return convert(o, ufuncs::convert<std::int64_t>);
      case NPY_FLOAT:
        return convert(o, ufuncs::convert<float>);
      default:
        return false;
    }
  }

 private:
  template <class From>
  bool convert(Operand& o, void (*to_double)(const From*, double*, Index)) {
    const Index n = o.size();
    if (n > static_cast<Index>(std::size(few_)))
      data_ = static_cast<double*>(std::malloc(static_cast<std::size_t>(n) * 8));
    if (data_ == nullptr) return data_ = few_, false;
    if (!run(n, [&] { to_double(reinterpret_cast<const From*>(o.data), data_, n); })) return false;
    npy_intp stride = 8;
    for (int i = 0; i < o.axes; ++i) {
      const int axis = o.in_order(c_order) ? o.axes - 1 - i : i;
      strides_[axis] = stride;
      stride *= o.shape[axis];
    }
    o.data = reinterpret_cast<const char*>(data_);
    o.strides = strides_;
    o.type = NPY_DOUBLE;
    return true;
  }

  double few_[32];
  double* data_ = few_;
  npy_intp strides_[max_axes];
};

// The shape and order of the result of two operands, and the loop over it: all axes as two.
struct Broadcast {
  int axes = 0;
  npy_intp shape[max_axes];
  bool fortran = false;
  ufuncs::Grid grid{1, 1, 0, 0, 0, 0, 0};

  // False where shapes differ, or two axes are too few.
  bool read(const Operand& a, const Operand& b) {
    axes = a.axes > b.axes ? a.axes : b.axes;
    if (a.array && b.array ? same_shape(a, b) && (a.flags & b.flags & (c_order | f_order)) != 0
                           : (a.array ? a : b).in_order()) {
      const Operand& like = a.array ? a : b;
      const int orders = a.array && b.array ? a.flags & b.flags : like.flags;
      for (int i = 0; i < axes; ++i) shape[i] = like.shape[i];
      fortran = (orders & c_order) == 0;
      const Index n = like.size();
      grid = {1, n, 0, a.array, 0, b.array, n};
      return n > 0;
    }
    npy_intp sa[max_axes], sb[max_axes];
    for (int i = 0; i < axes; ++i) {
      const int ia = i - (axes - a.axes), ib = i - (axes - b.axes);
      const npy_intp la = ia < 0 ? 1 : a.shape[ia], lb = ib < 0 ? 1 : b.shape[ib];
      if (la != lb && la != 1 && lb != 1) return false;
      shape[i] = la == 1 ? lb : la;
      if (shape[i] == 0) return false;
      sa[i] = la == 1 ? 0 : a.strides[ia];
      sb[i] = lb == 1 ? 0 : b.strides[ib];
      if (sa[i] % a.item() != 0 || sb[i] % b.item() != 0) return false;
      sa[i] /= a.item();
      sb[i] /= b.item();
    }
    if (axes == 2) {
      // NumPy's order "K": Fortran's only where some operand prefers it, and none C's.
      const int votes_a = prefers_fortran(sa, shape), votes_b = prefers_fortran(sb, shape);
      fortran = votes_a >= 0 && votes_b >= 0 && votes_a + votes_b > 0;
    } else if (axes > 2 && !((!a.array || a.in_order(c_order)) && (!b.array || b.in_order(c_order)))) {
      return false;
    }
    // Axes of length 1 are left out, and those that lie in memory as one are one; rows and columns remain.
    struct Axis {
      npy_intp length = 1, a = 0, b = 0;
    } merged[max_axes];
    int count = 0;
    for (int i = 0; i < axes; ++i) {
      const int axis = fortran ? axes - 1 - i : i;
      const Axis next{shape[axis], sa[axis], sb[axis]};
      if (next.length == 1) continue;
      Axis& last = merged[count > 0 ? count - 1 : 0];
      if (count > 0 && last.a == next.a * next.length && last.b == next.b * next.length)
        last = {last.length * next.length, next.a, next.b};
      else
        merged[count++] = next;
    }
    if (count > 2) return false;
    const Axis row = count == 2 ? merged[0] : Axis{}, column = count == 0 ? Axis{} : merged[count - 1];
    grid = {row.length, column.length, row.a, column.a, row.b, column.b, column.length};
    return true;
  }

 private:
  static int prefers_fortran(const npy_intp* strides, const npy_intp* shape) {
    const npy_intp row = std::abs(strides[0]), column = std::abs(strides[1]);
    if (shape[0] == 1 || shape[1] == 1 || row == 0 || column == 0) return 0;
    return row < column ? 1 : -1;
  }
};

}  // namespace gemmlet::numpy
