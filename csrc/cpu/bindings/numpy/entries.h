// The usual case of NumPy's operators, functions and methods, in one C function each.
//
// Contract
//   An entry returns its result; null without a Python error where a call is not the usual case, having written nothing:
//   then the call is NumPy's; null with an error where NumPy raises it as well (a floating-point error under np.errstate),
//   or where memory is short.
#pragma once

#include "cpu/bindings/numpy/operands.h"

namespace gemmlet::numpy {

// Of a vectorcall: n positional arguments, then those by keyword, whose names are in the tuple `names`, or null.
using Call = PyObject* (*)(PyObject* const* arguments, Py_ssize_t n, PyObject* names);

// Operators. `out`, if not null, takes the result and is returned.
PyObject* binary(ufuncs::Binary function, PyObject* x, PyObject* y, PyObject* out);
// `name`, if not null, is the one in messages.
PyObject* unary(ufuncs::Unary function, PyObject* x, PyObject* out, const char* name = nullptr);
PyObject* power(PyObject* x, PyObject* y);
PyObject* compare(PyObject* x, PyObject* y, int comparison);
PyObject* matmul(PyObject* x, PyObject* y, PyObject* out, bool ufunc);
// array[key] = value, where the key is a mask, or a pair of indices; false: not the usual case.
bool assign(PyObject* array, PyObject* key, PyObject* value);
// array[key], where the key is an array of rows' indices, or a pair of indices.
PyObject* subscript(PyObject* array, PyObject* key);
// A key with its ranges as arrays; null if there are none, or one that makes no array.
PyObject* without_ranges(PyObject* key);

// An operand so large, and held by nobody else, that NumPy computes in place.
bool is_large_temporary(PyObject* object);

// Functions and methods.
template <ufuncs::Binary function>
PyObject* binary_call(PyObject* const* arguments, Py_ssize_t n, PyObject* names);
template <ufuncs::Unary function>
PyObject* unary_call(PyObject* const* arguments, Py_ssize_t n, PyObject* names);
template <ufuncs::Reduction reduction>
PyObject* reduce_call(PyObject* const* arguments, Py_ssize_t n, PyObject* names);
template <bool smallest>
PyObject* arg_extreme_call(PyObject* const* arguments, Py_ssize_t n, PyObject* names);
template <bool ufunc>
PyObject* matmul_call(PyObject* const* arguments, Py_ssize_t n, PyObject* names);
PyObject* power_call(PyObject* const* arguments, Py_ssize_t n, PyObject* names);
PyObject* clip_call(PyObject* const* arguments, Py_ssize_t n, PyObject* names);
PyObject* where_call(PyObject* const* arguments, Py_ssize_t n, PyObject* names);
PyObject* outer_call(PyObject* const* arguments, Py_ssize_t n, PyObject* names);
template <bool ones>
PyObject* filled_like_call(PyObject* const* arguments, Py_ssize_t n, PyObject* names);
PyObject* norm_call(PyObject* const* arguments, Py_ssize_t n, PyObject* names);

// Once, before the first call: 0.0 or -0.0, with which NumPy's sums begin. False with an error set.
bool prepare_entries(double start_of_sums);

}  // namespace gemmlet::numpy
