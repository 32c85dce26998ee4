#include "cpu/bindings/numpy/entries.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <initializer_list>

#include "cpu/bindings/extent.h"
#include "cpu/bindings/numpy/memory.h"
#include "cpu/bindings/run.h"

namespace gemmlet::numpy {
namespace {

using ufuncs::Binary;
using ufuncs::Comparison;
using ufuncs::Reduction;
using ufuncs::Unary;

PyArray_Descr *float_dtype, *double_dtype, *bool_dtype, *index_dtype;
PyObject *axis_name, *keepdims_name, *out_name;
double sum_start;

PyArray_Descr* dtype_of(int type) {
  return type == NPY_DOUBLE  ? double_dtype
         : type == NPY_FLOAT ? float_dtype
         : type == NPY_BOOL  ? bool_dtype
                             : index_dtype;
}

PyObject* new_array(int type, int axes, const npy_intp* shape, bool fortran = false) {
  PyArray_Descr* dtype = dtype_of(type);
  Py_INCREF(dtype);  // it is taken over
  return PyArray_NewFromDescr(&PyArray_Type, dtype, axes, shape, nullptr, nullptr, fortran ? f_order : 0, nullptr);
}

template <class T>
T* data(PyObject* array) {
  return reinterpret_cast<T*>(fields(array)->data);
}
template <class T>
const T* data(const Operand& o) {
  return reinterpret_cast<const T*>(o.data);
}

template <class T>
PyObject* new_scalar(T value) {
  if constexpr (std::is_same_v<T, double>) {
    PyObject* result = PyArrayScalar_New(Double);
    if (result != nullptr) PyArrayScalar_ASSIGN(result, Double, value);
    return result;
  } else if constexpr (std::is_same_v<T, float>) {
    PyObject* result = PyArrayScalar_New(Float);
    if (result != nullptr) PyArrayScalar_ASSIGN(result, Float, value);
    return result;
  } else {
    PyObject* result = PyArrayScalar_New(Long);
    if (result != nullptr) PyArrayScalar_ASSIGN(result, Long, static_cast<npy_long>(value));
    return result;
  }
}

// Reports floating-point errors as np.errstate says; false if that raised.
bool report(const char* name, unsigned flags) {
  return flags == 0 || PyUFunc_GiveFloatingpointErrors(name, static_cast<int>(flags)) >= 0;
}

template <class F>
auto for_type(int type, F&& call) {
  return type == NPY_DOUBLE ? call(double{}) : call(float{});
}

Extent extent(const Operand& o) { return {o.data, o.item(), o.axes, o.shape, o.strides}; }

// Whether elements of `out` may be written while those of `in` at the same places are read.
bool may_be_output(const Operand& out, const Operand& in) {
  if (!in.array) return true;
  const bool same = in.data == out.data && same_shape(in, out) && in.in_order() &&
                    std::equal(in.strides, in.strides + in.axes, out.strides);
  return same || extent(in).apart_from(extent(out));
}

// Not an array whose first write NumPy warns of, by a flag that its headers do not have.
bool is_writable(const Operand& o) {
  constexpr unsigned warn_on_write = 1u << 31;
  return (static_cast<unsigned>(o.flags) & (NPY_ARRAY_WRITEABLE | warn_on_write)) == NPY_ARRAY_WRITEABLE;
}

// `out` as the contiguous output of these axes and this type.
bool read_output(PyObject* object, int type, int axes, const npy_intp* shape, bool fortran, Operand& o) {
  return read_array(object, o) && o.type == type && is_writable(o) && o.in_order(fortran ? f_order : c_order) &&
         o.axes == axes && std::equal(shape, shape + axes, o.shape);
}

// A new reference to `out`, or if it is null to a new array; null if `out` cannot take a result of these inputs.
PyObject* output(PyObject* out, int type, int axes, const npy_intp* shape, bool fortran,
                 std::initializer_list<const Operand*> inputs) {
  if (out == nullptr) return new_array(type, axes, shape, fortran);
  Operand o;
  if (!read_output(out, type, axes, shape, fortran, o)) return nullptr;
  for (const Operand* input : inputs)
    if (!may_be_output(o, *input)) return nullptr;
  return Py_NewRef(out);
}

// Whether a number becomes one of this type without an error, which NumPy would report.
bool casts(double number, int type) {
  if (type == NPY_DOUBLE) return true;
  const float cast = static_cast<float>(number);
  return std::isnormal(cast) || cast == number;
}

// Two operands of one type, at least one of them an array. `integers_divide`: of integers the result is float64.
bool read_operands(PyObject* x, PyObject* y, bool integers_divide, Operand& a, Operand& b, Converted& converted) {
  const bool a_read = read_array(x, a) || read_number(x, a), b_read = read_array(y, b) || read_number(y, b);
  if (!a_read && !b_read) return false;
  if (!a_read || !b_read) {
    // An array of integers beside one of float64, or beside a number with which it is float64.
    const Operand& known = a_read ? a : b;
    const bool is_float = known.array ? known.type == NPY_DOUBLE
                                      : integers_divide || Py_TYPE(a_read ? x : y) == &PyFloat_Type ||
                                            Py_TYPE(a_read ? x : y) == &PyDoubleArrType_Type;
    if (!is_float || (!known.array && known.type == NPY_FLOAT)) return false;
    if (!converted.read(a_read ? y : x, a_read ? b : a)) return false;
    if (!known.array) (a_read ? a : b).type = NPY_DOUBLE;
    return true;
  }
  if (!a.array && !b.array) return false;
  if (a.array && b.array) {
    if (a.type == b.type) return true;
    return a.type == NPY_FLOAT ? converted.read(x, a) : converted.read(y, b);
  }
  Operand& number = a.array ? b : a;
  const int type = a.array ? a.type : b.type;
  if (type == NPY_FLOAT) {
    if (!number.weak && number.type != NPY_FLOAT) return false;  // the result is of float64
    if (!casts(number.number, type)) return false;
  }
  number.type = type;
  return true;
}

const char* name_of(Binary function) {
#define GEMMLET_ENTRY(name) #name,
  static constexpr const char* names[] = {GEMMLET_BINARY_UFUNCS(GEMMLET_ENTRY)};
  return names[static_cast<int>(function)];
}
const char* name_of(Unary function) {
  static constexpr const char* names[] = {GEMMLET_UNARY_UFUNCS(GEMMLET_ENTRY)};
#undef GEMMLET_ENTRY
  return names[static_cast<int>(function)];
}

// call(T, a, b): pointers to the elements of two operands, numbers among them.
template <class F>
bool for_elements(const Operand& a, const Operand& b, F&& call) {
  return for_type(a.type, [&](auto zero) {
    using T = decltype(zero);
    const T an = static_cast<T>(a.number), bn = static_cast<T>(b.number);
    return call(zero, a.array ? data<T>(a) : &an, b.array ? data<T>(b) : &bn);
  });
}

}  // namespace

bool prepare_entries(double start_of_sums) {
  sum_start = start_of_sums;
  double_dtype = PyArray_DescrFromType(NPY_DOUBLE);
  float_dtype = PyArray_DescrFromType(NPY_FLOAT);
  bool_dtype = PyArray_DescrFromType(NPY_BOOL);
  index_dtype = PyArray_DescrFromType(NPY_INTP);
  axis_name = PyUnicode_InternFromString("axis");
  keepdims_name = PyUnicode_InternFromString("keepdims");
  out_name = PyUnicode_InternFromString("out");
  return axis_name != nullptr && keepdims_name != nullptr && out_name != nullptr;
}

bool is_large_temporary(PyObject* object) {
  if (Py_REFCNT(object) != 1 || !is_array(object)) return false;
  return PyArray_NBYTES(reinterpret_cast<PyArrayObject*>(object)) >= 256 * 1024;
}

PyObject* binary(Binary function, PyObject* x, PyObject* y, PyObject* out) {
  Operand a, b;
  Converted converted;
  if (!read_operands(x, y, function == Binary::divide, a, b, converted)) return nullptr;
  Broadcast result;
  if (!result.read(a, b)) return nullptr;
  out = output(out, a.type, result.axes, result.shape, result.fortran, {&a, &b});
  if (out == nullptr) return nullptr;
  unsigned flags = 0;
  const bool well = for_elements(a, b, [&](auto zero, const auto* ap, const auto* bp) {
    auto* yp = data<decltype(zero)>(out);
    return run(result.grid.rows * result.grid.columns,
               [&] { flags = ufuncs::binary(function, ap, bp, yp, result.grid); });
  });
  return result_if(well && report(name_of(function), flags), out);
}

PyObject* unary(Unary function, PyObject* x, PyObject* out, const char* name) {
  if (name == nullptr) name = name_of(function);
  Operand a;
  if (!read_array(x, a)) {
    // A float64, as the functions take it.
    if (out != nullptr || (Py_TYPE(x) != &PyDoubleArrType_Type && Py_TYPE(x) != &PyFloat_Type) || !read_number(x, a))
      return nullptr;
    double y;
    const unsigned flags = ufuncs::unary(function, &a.number, &y, 1);
    return report(name, flags) ? new_scalar(y) : nullptr;
  }
  const Index n = a.size();
  if (!a.in_order() || n == 0) return nullptr;
  out = output(out, a.type, a.axes, a.shape, !a.in_order(c_order), {&a});
  if (out == nullptr) return nullptr;
  unsigned flags = 0;
  const bool well = for_type(a.type, [&](auto zero) {
    using T = decltype(zero);
    const T* xp = data<T>(a);
    T* yp = data<T>(out);
    return run(n, [&] { flags = ufuncs::unary(function, xp, yp, n); });
  });
  return result_if(well && report(name, flags), out);
}

// The square and the root, which NumPy takes for these Python numbers too.
PyObject* power(PyObject* x, PyObject* y) {
  Operand exponent;
  if (!is_array(x) || !read_number(y, exponent) || !exponent.weak) return nullptr;
  if (exponent.number == 2) {
    // From 2.3 on NumPy squares for a float by the loop of power, which reports errors by that name.
    static const bool float_is_power = PyArray_GetNDArrayCFeatureVersion() >= 0x14;
    return unary(Unary::square, x, nullptr, float_is_power && PyFloat_Check(y) ? "power" : nullptr);
  }
  if (exponent.number == 0.5) return unary(Unary::sqrt, x, nullptr);
  return nullptr;
}

PyObject* compare(PyObject* x, PyObject* y, int comparison) {
  Operand a, b;
  const bool a_read = read_array(x, a), b_read = read_array(y, b);
  if (!a_read || (!b_read && !read_number(y, b))) return nullptr;
  if (b_read ? a.type != b.type : !b.weak && b.type != a.type) return nullptr;
  // A number is compared as it is, not as rounded to float32.
  if (!b_read && a.type == NPY_FLOAT && static_cast<double>(static_cast<float>(b.number)) != b.number) return nullptr;
  b.type = a.type;
  Broadcast result;
  if (!result.read(a, b)) return nullptr;
  PyObject* out = new_array(NPY_BOOL, result.axes, result.shape, result.fortran);
  if (out == nullptr) return nullptr;
  bool* yp = data<bool>(out);
  const bool well = for_elements(a, b, [&](auto, const auto* ap, const auto* bp) {
    return run(result.grid.rows * result.grid.columns,
               [&] { ufuncs::compare(static_cast<Comparison>(comparison), ap, bp, yp, result.grid); });
  });
  return result_if(well, out);
}

namespace {

// A matrix of the last two axes, which are in whole elements.
template <class T>
bool view_of(const Operand& o, View<T>& view) {
  const npy_intp *shape = o.shape + o.axes - 2, *strides = o.strides + o.axes - 2;
  if (strides[0] % o.item() != 0 || strides[1] % o.item() != 0) return false;
  // The stride of an axis of length 1 is arbitrary.
  view = {data<T>(o), shape[0], shape[1], shape[0] < 2 ? 0 : strides[0] / o.item(),
          shape[1] < 2 ? 0 : strides[1] / o.item()};
  return true;
}

template <class T>
PyObject* dot_of_vectors(const Operand& a, const Operand& b) {
  const Index n = a.shape[0];
  if (b.shape[0] != n || a.strides[0] % a.item() != 0 || b.strides[0] % b.item() != 0) return nullptr;
  T value = 0;
  const Index as = a.strides[0] / a.item(), bs = b.strides[0] / b.item();
  unsigned flags = 0;
  const bool well = run(n, [&] {
    clear_float_status();
    value = ufuncs::dot(data<T>(a), as, data<T>(b), bs, n);
    flags = float_status();
  });
  return well && flags == 0 && std::isfinite(value) ? new_scalar(value) : nullptr;
}

// Axes of a and b as matrices; those of the result, and how often there is a matrix. False where shapes do not fit.
template <class T>
struct Product {
  View<T> x, w;
  int axes = 0;
  npy_intp shape[3];
  Index batch = 1, x_step = 0, w_step = 0;

  bool read(Operand a, Operand b, bool ufunc) {
    npy_intp row_shape[2], row_strides[2], column_shape[2], column_strides[2];
    if (a.axes == 3 || b.axes == 3) {
      if (!ufunc || a.axes != 3) return false;
      shape[axes++] = batch = a.shape[0];
      x_step = a.strides[0] / a.item();
      if (b.axes == 3) {
        if (b.shape[0] != batch) return false;
        w_step = b.strides[0] / b.item();
        if (b.strides[0] % b.item() != 0) return false;
      } else if (b.axes != 2) {
        return false;
      }
      if (a.strides[0] % a.item() != 0) return false;
    } else if (a.axes > 3 || b.axes > 3) {
      return false;
    }
    if (a.axes > 1) shape[axes++] = a.shape[a.axes - 2];
    if (b.axes > 1) shape[axes++] = b.shape[b.axes - 1];
    if (a.axes == 1) {
      row_shape[0] = 1, row_shape[1] = a.shape[0];
      row_strides[0] = 0, row_strides[1] = a.strides[0];
      a.shape = row_shape, a.strides = row_strides, a.axes = 2;
    }
    if (b.axes == 1) {
      column_shape[0] = b.shape[0], column_shape[1] = 1;
      column_strides[0] = b.strides[0], column_strides[1] = 0;
      b.shape = column_shape, b.strides = column_strides, b.axes = 2;
    }
    if (!view_of(a, x) || !view_of(b, w)) return false;
    return x.columns == w.rows && batch > 0 && x.rows > 0 && x.columns > 0 && w.columns > 0;
  }
};

template <class T>
PyObject* product(const Operand& a, const Operand& b, PyObject* out, bool ufunc) {
  if (a.axes == 1 && b.axes == 1)
    return out == nullptr && (ufunc || a.shape[0] > 1) ? dot_of_vectors<T>(a, b) : nullptr;
  Product<T> p;
  if (!p.read(a, b, ufunc)) return nullptr;
  const Index size = p.x.rows * p.w.columns, work = p.batch * size * p.x.columns;
  // Of two numbers np.dot is no sum, but their product, which may be -0.
  if (!ufunc && work == 1) return nullptr;
  Operand o;
  if (out != nullptr && !read_output(out, a.type, p.axes, p.shape, false, o)) return nullptr;
  PyObject* result = new_array(a.type, p.axes, p.shape);
  if (result == nullptr) return nullptr;
  T* y = data<T>(result);
  unsigned flags = 0;
  const auto compute = [&] {
    clear_float_status();
    for (Index i = 0; i < p.batch; ++i) {
      View<T> x = p.x, w = p.w;
      x.data += i * p.x_step;
      w.data += i * p.w_step;
      ufuncs::matmul(x, w, y + i * size);
    }
    flags = float_status();
  };
  bool well = run(work / tuning::multiply_adds_per_element, compute);
  if (!well && PyErr_ExceptionMatches(PyExc_MemoryError)) {
    // Packed matrices need some.
    PyErr_Clear();
    give_back_memory();
    well = run(work / tuning::multiply_adds_per_element, compute);
  }
  // What is reported depends on the order of the sums, and by np.dot on the version: it is NumPy's to say.
  if (well && flags != 0 && (!ufunc || flags != underflow || !report("matmul", flags))) {
    Py_DECREF(result);
    return nullptr;
  }
  if (well && out != nullptr) {
    // By way of an array of its own, as `out` may be an operand.
    std::copy(y, y + p.batch * size, data<T>(out));
    Py_INCREF(out);
    Py_DECREF(result);
    return out;
  }
  return result_if(well, result);
}

}  // namespace

PyObject* matmul(PyObject* x, PyObject* y, PyObject* out, bool ufunc) {
  Operand a, b;
  Converted converted;
  if (!is_array(x) || !is_array(y) || !read_operands(x, y, false, a, b, converted)) return nullptr;
  return a.type == NPY_DOUBLE ? product<double>(a, b, out, ufunc) : product<float>(a, b, out, ufunc);
}

namespace {

bool assign_by_mask(PyObject* array, PyObject* key, PyObject* value) {
  Operand a, mask, v;
  if (fields(key)->descr->type_num != NPY_BOOL || !read_any_array(key, mask) || !read_array(array, a) ||
      !is_writable(a) || !read_number(value, v) || !same_shape(a, mask) || (a.flags & mask.flags & c_order) == 0)
    return false;
  const Index n = a.size();
  if (!casts(v.number, a.type) || n == 0) return false;
  if (!Extent(mask.data, 1, mask.axes, mask.shape, mask.strides).apart_from(extent(a))) return false;
  return for_type(a.type, [&](auto zero) {
    using T = decltype(zero);
    T* p = data<T>(array);
    const auto* flags = data<std::uint8_t>(mask);
    const T number = static_cast<T>(v.number);
    return run(n, [&] { ufuncs::fill_where(flags, number, p, n); });
  });
}

// Indices along an axis: of an array of int64, or of a range.
struct Indices {
  const char* data = nullptr;
  Index stride = 0, count = -1, start = 0, step = 1;

  bool read(PyObject* object) {
    if (is_array(object)) {
      Operand o;
      if (fields(object)->descr->type_num != NPY_INT64 || !read_any_array(object, o) || o.axes != 1) return false;
      data = o.data;
      stride = o.strides[0];
      count = o.shape[0];
      return true;
    }
    if (Py_TYPE(object) != &PyRange_Type) return false;
    count = PyObject_Size(object);
    Index first[2] = {0, 1};
    for (Index i = 0; i < std::min<Index>(count, 2); ++i) {
      PyObject* item = PySequence_GetItem(object, i);
      if (item == nullptr) break;
      first[i] = PyLong_AsLongLong(item);
      Py_DECREF(item);
    }
    if (PyErr_Occurred() != nullptr) {
      PyErr_Clear();
      return false;
    }
    start = first[0];
    step = count > 1 ? first[1] - first[0] : 1;
    return true;
  }
  Extent extent() const { return {data, 8, 1, &count, &stride}; }
  // The i-th, from the end if it is negative; -1 if it is outside.
  Index at(Index i, Index length) const {
    Index index = data == nullptr ? start + i * step : *reinterpret_cast<const std::int64_t*>(data + i * stride);
    if (index < 0) index += length;
    return index < 0 || index >= length ? -1 : index;
  }
};

// Arrays of plain elements, which may be copied as bytes.
bool has_plain_elements(PyObject* array) { return !PyDataType_REFCHK(fields(array)->descr); }

PyObject* take_rows(PyObject* array, PyObject* key) {
  Operand a;
  Indices rows;
  if (!read_any_array(array, a) || !a.in_order(c_order) || !has_plain_elements(array) || !rows.read(key) ||
      rows.count < 1)
    return nullptr;
  npy_intp shape[max_axes] = {rows.count};
  Index bytes = PyDataType_ELSIZE(fields(array)->descr);
  for (int i = a.axes - 1; i > 0; --i) {
    // An axis of length 1 may have any stride, by which NumPy orders those of the result.
    if (a.axes > 2 && a.strides[i] != bytes) return nullptr;
    bytes *= shape[i] = a.shape[i];
  }
  const Index length = a.shape[0];
  if (bytes == 0) return nullptr;
  PyArray_Descr* dtype = fields(array)->descr;
  Py_INCREF(dtype);  // it is taken over
  PyObject* out = PyArray_NewFromDescr(&PyArray_Type, dtype, a.axes, shape, nullptr, nullptr, 0, nullptr);
  if (out == nullptr) return nullptr;
  char* to = data<char>(out);
  for (Index i = 0; i < rows.count; ++i, to += bytes) {
    const Index row = rows.at(i, length);
    if (row < 0) return result_if(false, out);
    if (bytes == 8)
      std::memcpy(to, a.data + row * 8, 8);
    else
      std::memcpy(to, a.data + row * bytes, static_cast<std::size_t>(bytes));
  }
  return out;
}

// A matrix of float64 or float32, and indices of rows and columns of one length.
struct Pairs {
  Operand a;
  Indices rows, columns;

  bool read(PyObject* array, PyObject* key) {
    return PyTuple_GET_SIZE(key) == 2 && read_array(array, a) && a.axes == 2 && rows.read(PyTuple_GET_ITEM(key, 0)) &&
           columns.read(PyTuple_GET_ITEM(key, 1)) && rows.count == columns.count && rows.count > 0;
  }
  const char* at(Index i) const {
    const Index row = rows.at(i, a.shape[0]), column = columns.at(i, a.shape[1]);
    return row < 0 || column < 0 ? nullptr : a.data + row * a.strides[0] + column * a.strides[1];
  }
};

PyObject* take_pairs(PyObject* array, PyObject* key) {
  Pairs pairs;
  if (!pairs.read(array, key)) return nullptr;
  const npy_intp shape[] = {pairs.rows.count};
  PyObject* out = new_array(pairs.a.type, 1, shape);
  if (out == nullptr) return nullptr;
  return for_type(pairs.a.type, [&](auto zero) {
    auto* y = data<decltype(zero)>(out);
    for (Index i = 0; i < pairs.rows.count; ++i) {
      const char* from = pairs.at(i);
      if (from == nullptr) return result_if(false, out);
      std::memcpy(y + i, from, sizeof *y);
    }
    return out;
  });
}

bool assign_pairs(PyObject* array, PyObject* key, PyObject* value) {
  Pairs pairs;
  Operand v;
  if (!pairs.read(array, key) || !is_writable(pairs.a)) return false;
  const Index n = pairs.rows.count;
  if (read_array(value, v)) {
    if (v.type != pairs.a.type || v.axes != 1 || v.shape[0] != n || v.strides[0] % v.item() != 0 ||
        !extent(v).apart_from(extent(pairs.a)))
      return false;
  } else if (!read_number(value, v) || !casts(v.number, pairs.a.type)) {
    return false;
  }
  for (Index i = 0; i < n; ++i)
    if (pairs.at(i) == nullptr) return false;
  const Extent written = extent(pairs.a);
  for (const Indices* indices : {&pairs.rows, &pairs.columns})
    if (indices->data != nullptr && !indices->extent().apart_from(written)) return false;
  return for_type(pairs.a.type, [&](auto zero) {
    using T = decltype(zero);
    for (Index i = 0; i < n; ++i) {
      const T element = v.array ? *reinterpret_cast<const T*>(v.data + i * v.strides[0]) : static_cast<T>(v.number);
      std::memcpy(const_cast<char*>(pairs.at(i)), &element, sizeof element);
    }
    return true;
  });
}

}  // namespace

bool assign(PyObject* array, PyObject* key, PyObject* value) {
  if (value == nullptr) return false;
  return is_array(key) ? assign_by_mask(array, key, value) : assign_pairs(array, key, value);
}

PyObject* subscript(PyObject* array, PyObject* key) {
  return is_array(key) ? take_rows(array, key) : take_pairs(array, key);
}

namespace {

// Ints of which a difference is exact in float64, by which NumPy counts the elements of a range.
bool are_small(std::initializer_list<PyObject*> ints) {
  return std::all_of(ints.begin(), ints.end(), [](PyObject* each) {
    int too_large;
    const long value = PyLong_AsLongAndOverflow(each, &too_large);
    return too_large == 0 && value < 1L << 31 && value > -(1L << 31);
  });
}

}  // namespace

PyObject* without_ranges(PyObject* key) {
  if (!PyTuple_CheckExact(key)) return nullptr;
  const Py_ssize_t n = PyTuple_GET_SIZE(key);
  bool any = false;
  for (Py_ssize_t i = 0; i < n; ++i) any |= Py_TYPE(PyTuple_GET_ITEM(key, i)) == &PyRange_Type;
  if (!any) return nullptr;
  PyObject* result = PyTuple_New(n);
  for (Py_ssize_t i = 0; result != nullptr && i < n; ++i) {
    PyObject* item = PyTuple_GET_ITEM(key, i);
    PyObject* taken = nullptr;
    if (Py_TYPE(item) == &PyRange_Type) {
      PyObject *start = PyObject_GetAttrString(item, "start"), *stop = PyObject_GetAttrString(item, "stop"),
               *step = PyObject_GetAttrString(item, "step");
      if (start != nullptr && stop != nullptr && step != nullptr && are_small({start, stop, step}))
        taken = PyArray_ArangeObj(start, stop, step, index_dtype);
      Py_XDECREF(start);
      Py_XDECREF(stop);
      Py_XDECREF(step);
    } else {
      taken = Py_NewRef(item);
    }
    if (taken == nullptr) {
      PyErr_Clear();  // a range of larger numbers, say: NumPy has its own error
      Py_CLEAR(result);
    } else {
      PyTuple_SET_ITEM(result, i, taken);
    }
  }
  return result;
}

namespace {

// out=, as the one argument by keyword or the one after `operands`. False: there is another one.
bool read_out(PyObject* const* arguments, Py_ssize_t n, PyObject* names, Py_ssize_t operands, PyObject*& out) {
  const Py_ssize_t named = names == nullptr ? 0 : PyTuple_GET_SIZE(names);
  out = nullptr;
  if (n + named == operands) return named == 0;
  if (n + named != operands + 1 || n < operands) return false;
  if (named == 1 && PyTuple_GET_ITEM(names, 0) != out_name) return false;
  out = arguments[operands];
  return true;
}

}  // namespace

template <Binary function>
PyObject* binary_call(PyObject* const* arguments, Py_ssize_t n, PyObject* names) {
  PyObject* out;
  // NumPy warns of these with out= as a third positional argument.
  if ((function == Binary::maximum || function == Binary::minimum) && n > 2) return nullptr;
  if (!read_out(arguments, n, names, 2, out)) return nullptr;
  return binary(function, arguments[0], arguments[1], out);
}

template <Unary function>
PyObject* unary_call(PyObject* const* arguments, Py_ssize_t n, PyObject* names) {
  PyObject* out;
  if (!read_out(arguments, n, names, 1, out)) return nullptr;
  return unary(function, arguments[0], out);
}

template <bool ufunc>
PyObject* matmul_call(PyObject* const* arguments, Py_ssize_t n, PyObject* names) {
  PyObject* out;
  if (!read_out(arguments, n, names, 2, out)) return nullptr;
  return matmul(arguments[0], arguments[1], out, ufunc);
}

PyObject* power_call(PyObject* const* arguments, Py_ssize_t n, PyObject* names) {
  Operand exponent;
  if (n != 2 || names != nullptr || !is_array(arguments[0]) || !read_number(arguments[1], exponent)) return nullptr;
  if (exponent.number != 2 || (!exponent.weak && exponent.type != fields(arguments[0])->descr->type_num))
    return nullptr;
  return unary(Unary::square, arguments[0], nullptr, "power");
}

namespace {

// The loop of a reduction: y(o, i) over k of x(o, k, i).
struct Axes {
  Index outer = 1, n = 1, inner = 1;
  int axes = 0;  // of the result; 0 is a scalar
  npy_intp shape[max_axes];
  bool fortran = false;

  // x, axis=None, keepdims=False. False where there is more, or the axis is none.
  bool read(PyObject* const* arguments, Py_ssize_t count, PyObject* names, Operand& a) {
    PyObject* axis_object = count > 1 ? arguments[1] : nullptr;
    bool keep = false;
    if (count < 1 || count > 2) return false;
    for (Py_ssize_t i = 0; names != nullptr && i < PyTuple_GET_SIZE(names); ++i) {
      PyObject *name = PyTuple_GET_ITEM(names, i), *value = arguments[count + i];
      if (name == axis_name && axis_object == nullptr)
        axis_object = value;
      else if (name == keepdims_name && (value == Py_True || value == Py_False))
        keep = value == Py_True;
      else
        return false;
    }
    if (!read_array(arguments[0], a) || !a.in_order() || a.size() == 0) return false;
    fortran = !a.in_order(c_order);
    const bool all = axis_object == nullptr || axis_object == Py_None;
    if (all) {
      n = a.size();
      for (int i = 0; keep && i < a.axes; ++i) shape[axes++] = 1;
      return true;
    }
    if (Py_TYPE(axis_object) != &PyLong_Type) return false;
    int too_large;
    long axis = PyLong_AsLongAndOverflow(axis_object, &too_large);
    if (axis < 0) axis += a.axes;
    if (too_large != 0 || axis < 0 || axis >= a.axes || (fortran && a.axes > 2)) return false;
    n = a.shape[axis];
    for (int i = 0; i < a.axes; ++i) {
      if (i != axis) (fortran ? i > axis : i < axis) ? outer *= a.shape[i] : inner *= a.shape[i];
      if (i != axis || keep) shape[axes++] = i == axis ? 1 : a.shape[i];
    }
    return true;
  }
};

}  // namespace

template <Reduction reduction>
PyObject* reduce_call(PyObject* const* arguments, Py_ssize_t count, PyObject* names) {
  Operand a;
  Axes loop;
  if (!loop.read(arguments, count, names, a)) return nullptr;
  return for_type(a.type, [&](auto zero) -> PyObject* {
    using T = decltype(zero);
    const T* x = data<T>(a);
    T value = 0;
    PyObject* out = nullptr;
    if (loop.axes > 0) {
      out = new_array(a.type, loop.axes, loop.shape, loop.fortran);
      if (out == nullptr) return nullptr;
    }
    T* y = out == nullptr ? &value : data<T>(out);
    unsigned flags = 0;
    const bool well = run(loop.outer * loop.n * loop.inner, [&] {
      flags = ufuncs::reduce(reduction, static_cast<T>(sum_start), x, y, loop.outer, loop.n, loop.inner);
    });
    // Which function reports an error, and which, is NumPy's to say.
    if (!well || flags != 0) return result_if(false, out);
    return out != nullptr ? out : new_scalar(value);
  });
}

template <bool smallest>
PyObject* arg_extreme_call(PyObject* const* arguments, Py_ssize_t count, PyObject* names) {
  Operand a;
  Axes loop;
  if (!loop.read(arguments, count, names, a) || loop.fortran || loop.inner != 1) return nullptr;
  return for_type(a.type, [&](auto zero) -> PyObject* {
    using T = decltype(zero);
    const T* x = data<T>(a);
    Index value = 0;
    PyObject* out = nullptr;
    if (loop.axes > 0) {
      out = new_array(NPY_INTP, loop.axes, loop.shape);
      if (out == nullptr) return nullptr;
    }
    Index* y = out == nullptr ? &value : data<Index>(out);
    const bool well = run(loop.outer * loop.n, [&] { ufuncs::arg_extreme(x, smallest, y, loop.outer, loop.n); });
    if (!well) return result_if(false, out);
    return out != nullptr ? out : new_scalar(value);
  });
}

PyObject* clip_call(PyObject* const* arguments, Py_ssize_t n, PyObject* names) {
  Operand a, low, high;
  PyObject* out;
  if (!read_out(arguments, n, names, 3, out) || !read_array(arguments[0], a) || !read_number(arguments[1], low) ||
      !read_number(arguments[2], high) || !a.in_order() || a.size() == 0 || !(low.number <= high.number))
    return nullptr;
  const auto fits = [&](const Operand& bound) {
    return a.type == NPY_DOUBLE || (bound.weak && casts(bound.number, a.type));
  };
  if (!fits(low) || !fits(high)) return nullptr;
  out = output(out, a.type, a.axes, a.shape, !a.in_order(c_order), {&a});
  if (out == nullptr) return nullptr;
  const Index size = a.size();
  const bool well = for_type(a.type, [&](auto zero) {
    using T = decltype(zero);
    const T* x = data<T>(a);
    T* y = data<T>(out);
    const T l = static_cast<T>(low.number), h = static_cast<T>(high.number);
    return run(size, [&] { ufuncs::clip(x, l, h, y, size); });
  });
  return result_if(well, out);
}

PyObject* where_call(PyObject* const* arguments, Py_ssize_t n, PyObject* names) {
  Operand mask, a, b;
  if (n != 3 || names != nullptr || !is_array(arguments[0]) || fields(arguments[0])->descr->type_num != NPY_BOOL ||
      !read_any_array(arguments[0], mask) || !mask.in_order(c_order) || mask.size() == 0)
    return nullptr;
  const auto fits = [&](PyObject* object, Operand& o) {
    if (read_array(object, o)) return o.in_order(c_order) && same_shape(o, mask);
    return read_number(object, o);
  };
  if (!fits(arguments[1], a) || !fits(arguments[2], b)) return nullptr;
  const Index size = mask.size();
  if (!a.array && !b.array) {
    // Python numbers: of ints the result is int64.
    if (!a.weak || !b.weak) return nullptr;
    const bool integers = PyLong_CheckExact(arguments[1]) && PyLong_CheckExact(arguments[2]);
    PyObject* out = new_array(integers ? NPY_INTP : NPY_DOUBLE, mask.axes, mask.shape);
    if (out == nullptr) return nullptr;
    const auto* flags = data<std::uint8_t>(mask);
    double* y = data<double>(out);
    // int64 as the float64 of the same bits: where() copies.
    const double first = integers ? std::bit_cast<double>(static_cast<std::int64_t>(a.number)) : a.number,
                 second = integers ? std::bit_cast<double>(static_cast<std::int64_t>(b.number)) : b.number;
    return result_if(run(size, [&] { ufuncs::where(flags, &first, 0, &second, 0, y, size); }), out);
  }
  const int type = a.array ? a.type : b.type;
  for (const Operand* o : {&a, &b}) {
    if (o->array ? o->type != type : type == NPY_FLOAT && !o->weak && o->type != NPY_FLOAT) return nullptr;
    if (!o->array && !casts(o->number, type)) return nullptr;
  }
  a.type = b.type = type;
  PyObject* out = new_array(type, mask.axes, mask.shape);
  if (out == nullptr) return nullptr;
  const auto* flags = data<std::uint8_t>(mask);
  const bool well = for_elements(a, b, [&](auto zero, const auto* ap, const auto* bp) {
    auto* y = data<decltype(zero)>(out);
    return run(size, [&] { ufuncs::where(flags, ap, a.array, bp, b.array, y, size); });
  });
  return result_if(well, out);
}

template <bool ones>
PyObject* filled_like_call(PyObject* const* arguments, Py_ssize_t n, PyObject* names) {
  Operand a;
  if (n != 1 || names != nullptr || !read_array(arguments[0], a)) return nullptr;
  PyObject* out = PyArray_NewLikeArray(reinterpret_cast<PyArrayObject*>(arguments[0]), NPY_KEEPORDER, nullptr, 0);
  if (out == nullptr) return nullptr;
  const Index size = a.size();
  const bool well = for_type(a.type, [&](auto zero) {
    using T = decltype(zero);
    T* y = data<T>(out);
    return run(size, [&] { ufuncs::fill(T(ones), y, size); });
  });
  return result_if(well, out);
}

PyObject* outer_call(PyObject* const* arguments, Py_ssize_t n, PyObject* names) {
  Operand a, b;
  if (n != 2 || names != nullptr || !read_array(arguments[0], a) || !read_array(arguments[1], b) || a.type != b.type ||
      !a.in_order(c_order) || !b.in_order(c_order) || a.size() == 0 || b.size() == 0)
    return nullptr;
  const npy_intp shape[] = {a.size(), b.size()};
  PyObject* out = new_array(a.type, 2, shape);
  if (out == nullptr) return nullptr;
  unsigned flags = 0;
  const bool well = for_elements(a, b, [&](auto zero, const auto* ap, const auto* bp) {
    auto* y = data<decltype(zero)>(out);
    const ufuncs::Grid grid{shape[0], shape[1], 1, 0, 0, 1, shape[1]};
    return run(shape[0] * shape[1], [&] { flags = ufuncs::binary(Binary::multiply, ap, bp, y, grid); });
  });
  return result_if(well && flags == 0, out);  // NumPy's warning names a line of its own
}

PyObject* norm_call(PyObject* const* arguments, Py_ssize_t n, PyObject* names) {
  Operand a;
  if (n != 1 || names != nullptr || !read_array(arguments[0], a) || a.type != NPY_DOUBLE || !a.in_order())
    return nullptr;
  const Index size = a.size();
  double square = 0;
  const double* x = data<double>(a);
  unsigned flags = 0;
  const bool well = run(size, [&] {
    clear_float_status();
    square = ufuncs::dot(x, 1, x, 1, size);
    flags = float_status();
  });
  return well && flags == 0 && std::isfinite(square) ? new_scalar(std::sqrt(square)) : nullptr;
}

#define GEMMLET_ENTRY(name) template PyObject* binary_call<Binary::name>(PyObject* const*, Py_ssize_t, PyObject*);
GEMMLET_BINARY_UFUNCS(GEMMLET_ENTRY)
#undef GEMMLET_ENTRY
#define GEMMLET_ENTRY(name) template PyObject* unary_call<Unary::name>(PyObject* const*, Py_ssize_t, PyObject*);
GEMMLET_UNARY_UFUNCS(GEMMLET_ENTRY)
#undef GEMMLET_ENTRY
template PyObject* reduce_call<Reduction::sum>(PyObject* const*, Py_ssize_t, PyObject*);
template PyObject* reduce_call<Reduction::mean>(PyObject* const*, Py_ssize_t, PyObject*);
template PyObject* reduce_call<Reduction::max>(PyObject* const*, Py_ssize_t, PyObject*);
template PyObject* reduce_call<Reduction::min>(PyObject* const*, Py_ssize_t, PyObject*);
template PyObject* filled_like_call<false>(PyObject* const*, Py_ssize_t, PyObject*);
template PyObject* filled_like_call<true>(PyObject* const*, Py_ssize_t, PyObject*);
template PyObject* arg_extreme_call<false>(PyObject* const*, Py_ssize_t, PyObject*);
template PyObject* arg_extreme_call<true>(PyObject* const*, Py_ssize_t, PyObject*);
template PyObject* matmul_call<false>(PyObject* const*, Py_ssize_t, PyObject*);
template PyObject* matmul_call<true>(PyObject* const*, Py_ssize_t, PyObject*);

}  // namespace gemmlet::numpy
