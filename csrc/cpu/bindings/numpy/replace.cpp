// Which pointers of NumPy are replaced, and how: each by one function that takes the usual case (entries.h) and hands
// everything else to the function that stood there.
//
// Contract
//   Places are public structures: the number, mapping and comparison slots of ndarray's type, the vectorcall pointer of a
//   ufunc or of a function with an array dispatcher, and the C function in the definition of a method. So identity, names,
//   documentation and signatures stay, and names that a program has bound before work as well.
//   prepare() finds the places; one that is not as expected is left out. replace() and restore() write pointers alone, with
//   the GIL held. Not for: free-threaded Python, other NumPy than 2.x (python/gemmlet/integrations/numpy.py refuses them).
#define GEMMLET_IMPORTS_NUMPY
#include <pybind11/pybind11.h>

#include <array>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "cpu/bindings/bindings.h"
#include "cpu/bindings/numpy/entries.h"
#include "cpu/bindings/numpy/memory.h"

namespace gemmlet::numpy {
namespace {

namespace py = pybind11;
using ufuncs::Binary;
using ufuncs::Reduction;
using ufuncs::Unary;

// Operators, which are in place too: the name of ndarray's slot, that in Python, and what computes it.
#define GEMMLET_OPERATORS(X)   \
  X(add, "add", add)           \
  X(subtract, "sub", subtract) \
  X(multiply, "mul", multiply) \
  X(true_divide, "truediv", divide)
// Functions: an identifier, the path below numpy, and what computes it.
#define GEMMLET_FUNCTIONS(X)                             \
  X(add, "add", binary_call<Binary::add>)                \
  X(subtract, "subtract", binary_call<Binary::subtract>) \
  X(multiply, "multiply", binary_call<Binary::multiply>) \
  X(divide, "divide", binary_call<Binary::divide>)       \
  X(maximum, "maximum", binary_call<Binary::maximum>)    \
  X(minimum, "minimum", binary_call<Binary::minimum>)    \
  X(power, "power", power_call)                          \
  X(matmul, "matmul", matmul_call<true>)                 \
  X(negative, "negative", unary_call<Unary::negative>)   \
  X(absolute, "absolute", unary_call<Unary::absolute>)   \
  X(square, "square", unary_call<Unary::square>)         \
  X(sqrt, "sqrt", unary_call<Unary::sqrt>)               \
  X(sign, "sign", unary_call<Unary::sign>)               \
  X(exp, "exp", unary_call<Unary::exp>)                  \
  X(log, "log", unary_call<Unary::log>)                  \
  X(tanh, "tanh", unary_call<Unary::tanh>)               \
  X(dot, "dot", matmul_call<false>)                      \
  X(sum, "sum", reduce_call<Reduction::sum>)             \
  X(mean, "mean", reduce_call<Reduction::mean>)          \
  X(max, "max", reduce_call<Reduction::max>)             \
  X(min, "min", reduce_call<Reduction::min>)             \
  X(argmax, "argmax", arg_extreme_call<false>)           \
  X(argmin, "argmin", arg_extreme_call<true>)            \
  X(clip, "clip", clip_call)                             \
  X(where, "where", where_call)                          \
  X(outer, "outer", outer_call)                          \
  X(zeros_like, "zeros_like", filled_like_call<false>)   \
  X(ones_like, "ones_like", filled_like_call<true>)      \
  X(norm, "linalg.norm", norm_call)
// Methods of ndarray: the name, and what computes it with the array as the first argument.
#define GEMMLET_METHODS(X)              \
  X(dot, matmul_call<false>)            \
  X(sum, reduce_call<Reduction::sum>)   \
  X(mean, reduce_call<Reduction::mean>) \
  X(max, reduce_call<Reduction::max>)   \
  X(min, reduce_call<Reduction::min>)   \
  X(argmax, arg_extreme_call<false>)    \
  X(argmin, arg_extreme_call<true>)

enum Number {
#define GEMMLET_ENTRY(slot, name, function) operator_##slot, inplace_##slot,
  GEMMLET_OPERATORS(GEMMLET_ENTRY)
#undef GEMMLET_ENTRY
      operator_negative,
  operator_power,
  operator_matmul,
  operator_compare,
  operator_subscript,
  operator_assign,
#define GEMMLET_ENTRY(identifier, path, call) function_##identifier,
  GEMMLET_FUNCTIONS(GEMMLET_ENTRY)
#undef GEMMLET_ENTRY
#define GEMMLET_ENTRY(name, call) method_##name,
      GEMMLET_METHODS(GEMMLET_ENTRY)
#undef GEMMLET_ENTRY
          entry_count
};

enum class Kind { unary, binary, inplace, power, compare, subscript, assign, function, method };

struct Entry {
  const char* name;
  Kind kind;
  void* ours;
  void** place = nullptr;  // in NumPy; null if it is not as expected
  void* theirs = nullptr;
  PyObject* object = nullptr;  // the function
  bool replaced = false;
  long taken = 0, handed_on = 0;
};

extern std::array<Entry, entry_count> entries;

template <class F>
F theirs(Number number) {
  return reinterpret_cast<F>(entries[number].theirs);
}

// Theirs, for a call that is theirs at first sight.
template <class F>
F hand_on(Number number) {
  ++entries[number].handed_on;
  return theirs<F>(number);
}

// Counts a call, and says whether it is over.
inline bool is_over(Number number, bool taken) {
  const bool over = taken || PyErr_Occurred() != nullptr;
  ++(over ? entries[number].taken : entries[number].handed_on);
  return over;
}

// The functions that stand in NumPy's places. The last call of an operator is a jump: NumPy, which computes in place on large
// temporaries of the interpreter, looks at who calls it.

template <Number number, Binary function>
[[gnu::noinline]] PyObject* operator_call(PyObject* x, PyObject* y) {
  PyObject* result = is_large_temporary(x) || is_large_temporary(y) ? nullptr : binary(function, x, y, nullptr);
  return is_over(number, result != nullptr) ? result : theirs<binaryfunc>(number)(x, y);
}

template <Number number, Binary function>
PyObject* operator_entry(PyObject* x, PyObject* y) {
  return are_others<function == Binary::divide>(x, y) ? hand_on<binaryfunc>(number)(x, y)
                                                      : operator_call<number, function>(x, y);
}

template <Number number, Binary function>
PyObject* inplace_entry(PyObject* x, PyObject* y) {
  if (!is_array(x) || are_others(x, y)) return hand_on<binaryfunc>(number)(x, y);
  PyObject* result = binary(function, x, y, x);
  return is_over(number, result != nullptr) ? result : theirs<binaryfunc>(number)(x, y);
}

PyObject* negative_entry(PyObject* x) {
  if (is_other_array(x)) return hand_on<unaryfunc>(operator_negative)(x);
  PyObject* result = is_large_temporary(x) ? nullptr : unary(Unary::negative, x, nullptr);
  return is_over(operator_negative, result != nullptr) ? result : theirs<unaryfunc>(operator_negative)(x);
}

PyObject* power_entry(PyObject* x, PyObject* y, PyObject* modulo) {
  if (is_other_array(x)) return hand_on<ternaryfunc>(operator_power)(x, y, modulo);
  PyObject* result = modulo == Py_None && !is_large_temporary(x) ? power(x, y) : nullptr;
  return is_over(operator_power, result != nullptr) ? result : theirs<ternaryfunc>(operator_power)(x, y, modulo);
}

PyObject* matmul_entry(PyObject* x, PyObject* y) {
  if (are_others(x, y)) return hand_on<binaryfunc>(operator_matmul)(x, y);
  PyObject* result = matmul(x, y, nullptr, true);
  return is_over(operator_matmul, result != nullptr) ? result : theirs<binaryfunc>(operator_matmul)(x, y);
}

PyObject* compare_entry(PyObject* x, PyObject* y, int comparison) {
  if (is_other_array(x)) return hand_on<richcmpfunc>(operator_compare)(x, y, comparison);
  PyObject* result = compare(x, y, comparison);
  return is_over(operator_compare, result != nullptr) ? result
                                                      : theirs<richcmpfunc>(operator_compare)(x, y, comparison);
}

PyObject* subscript_entry(PyObject* array, PyObject* key) {
  // Not of an index or a slice, which cost NumPy less than to look at them twice.
  if (!is_array(key) && !PyTuple_CheckExact(key)) return theirs<binaryfunc>(operator_subscript)(array, key);
  if (PyObject* result = subscript(array, key)) {
    ++entries[operator_subscript].taken;
    return result;
  }
  PyObject* arrays = PyErr_Occurred() != nullptr ? nullptr : without_ranges(key);
  if (!is_over(operator_subscript, arrays != nullptr)) return theirs<binaryfunc>(operator_subscript)(array, key);
  if (arrays == nullptr) return nullptr;
  PyObject* result = theirs<binaryfunc>(operator_subscript)(array, arrays);
  Py_DECREF(arrays);
  return result;
}

int assign_entry(PyObject* array, PyObject* key, PyObject* value) {
  if (!is_array(key) && !PyTuple_CheckExact(key)) return theirs<objobjargproc>(operator_assign)(array, key, value);
  if (is_over(operator_assign, assign(array, key, value))) return PyErr_Occurred() != nullptr ? -1 : 0;
  return theirs<objobjargproc>(operator_assign)(array, key, value);
}

// Whether a call of a function, or of a method with its array first, is none of ours at first sight.
template <Number number>
bool is_other_call(PyObject* const* arguments, Py_ssize_t n) {
  if (n == 0 || number == function_where) return false;  // which takes a mask
  if (n == 1) return is_other_array(arguments[0]);
  return are_others<number == function_divide>(arguments[0], arguments[1]);
}

template <Number number, Call call>
[[gnu::noinline]] PyObject* function_call(PyObject* self, PyObject* const* arguments, std::size_t n, PyObject* names) {
  PyObject* result = call(arguments, PyVectorcall_NARGS(n), names);
  return is_over(number, result != nullptr) ? result : theirs<vectorcallfunc>(number)(self, arguments, n, names);
}

template <Number number, Call call>
PyObject* function_entry(PyObject* self, PyObject* const* arguments, std::size_t n, PyObject* names) {
  return is_other_call<number>(arguments, PyVectorcall_NARGS(n))
             ? hand_on<vectorcallfunc>(number)(self, arguments, n, names)
             : function_call<number, call>(self, arguments, n, names);
}

using Method = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t, PyObject*);

template <Number number, Call call>
PyObject* method_entry(PyObject* self, PyObject* const* arguments, Py_ssize_t n, PyObject* names) {
  constexpr Py_ssize_t most = 3;
  if (n == 0 ? is_other_array(self) : are_others(self, arguments[0]))
    return hand_on<Method>(number)(self, arguments, n, names);
  const Py_ssize_t all = n + (names == nullptr ? 0 : PyTuple_GET_SIZE(names));
  PyObject* result = nullptr;
  if (all <= most) {
    PyObject* with_self[most + 1] = {self};
    for (Py_ssize_t i = 0; i < all; ++i) with_self[i + 1] = arguments[i];
    result = call(with_self, n + 1, names);
  }
  return is_over(number, result != nullptr) ? result : theirs<Method>(number)(self, arguments, n, names);
}

template <class F>
void* address(F* function) {
  return reinterpret_cast<void*>(function);
}

std::array<Entry, entry_count> entries{{
#define GEMMLET_ENTRY(slot, name, function)                                                            \
  {"ndarray.__" name "__", Kind::binary, address(&operator_entry<operator_##slot, Binary::function>)}, \
      {"ndarray.__i" name "__", Kind::inplace, address(&inplace_entry<inplace_##slot, Binary::function>)},
    GEMMLET_OPERATORS(GEMMLET_ENTRY)
#undef GEMMLET_ENTRY
        {"ndarray.__neg__", Kind::unary, address(&negative_entry)},
    {"ndarray.__pow__", Kind::power, address(&power_entry)},
    {"ndarray.__matmul__", Kind::binary, address(&matmul_entry)},
    {"ndarray comparisons", Kind::compare, address(&compare_entry)},
    {"ndarray.__getitem__", Kind::subscript, address(&subscript_entry)},
    {"ndarray.__setitem__", Kind::assign, address(&assign_entry)},
#define GEMMLET_ENTRY(identifier, path, call) \
  {"numpy." path, Kind::function, address(&function_entry<function_##identifier, &call>)},
    GEMMLET_FUNCTIONS(GEMMLET_ENTRY)
#undef GEMMLET_ENTRY
#define GEMMLET_ENTRY(name, call) {"ndarray." #name, Kind::method, address(&method_entry<method_##name, &call>)},
        GEMMLET_METHODS(GEMMLET_ENTRY)
#undef GEMMLET_ENTRY
}};

template <class F>
void** place_of(F*& slot) {
  return slot == nullptr ? nullptr : reinterpret_cast<void**>(&slot);
}

void** place_of_function(Entry& entry) {
  py::object object = py::module_::import("numpy");
  std::string path = entry.name;
  path += '.';
  std::size_t begin = path.find('.') + 1;
  for (std::size_t end; (end = path.find('.', begin)) != std::string::npos; begin = end + 1) {
    object = py::getattr(object, path.substr(begin, end - begin).c_str(), py::none());
    if (object.is_none()) return nullptr;
  }
  PyTypeObject* const type = Py_TYPE(object.ptr());
  // NumPy's own, not what a program may have put there: a Python function has a vectorcall pointer, too.
  if (type != &PyUFunc_Type && std::string_view(type->tp_name) != "numpy._ArrayFunctionDispatcher") return nullptr;
  if ((type->tp_flags & Py_TPFLAGS_HAVE_VECTORCALL) == 0 || type->tp_vectorcall_offset <= 0) return nullptr;
  void** place = reinterpret_cast<void**>(reinterpret_cast<char*>(object.ptr()) + type->tp_vectorcall_offset);
  if (*place == nullptr) return nullptr;
  entry.object = object.release().ptr();
  return place;
}

void** place_of_method(const Entry& entry) {
  PyObject* descriptor = PyDict_GetItemString(PyArray_Type.tp_dict, entry.name + std::string("ndarray.").size());
  if (descriptor == nullptr || Py_TYPE(descriptor) != &PyMethodDescr_Type) return nullptr;
  PyMethodDef* definition = reinterpret_cast<PyMethodDescrObject*>(descriptor)->d_method;
  if (definition->ml_flags != (METH_FASTCALL | METH_KEYWORDS)) return nullptr;
  return reinterpret_cast<void**>(&definition->ml_meth);
}

// The names of the entries; where NumPy has no such place, None.
std::vector<py::object> prepare() {
  static bool prepared = false;
  if (!prepared) {
    if (_import_array() < 0 || _import_umath() < 0) throw py::error_already_set();
    const py::module_ np = py::module_::import("numpy");
    const double sum = np.attr("sum")(np.attr("array")(py::make_tuple(-0.0))).cast<double>();
    if (!prepare_entries(std::signbit(sum) ? -0.0 : 0.0)) throw py::error_already_set();
    PyNumberMethods* number = PyArray_Type.tp_as_number;
    PyMappingMethods* mapping = PyArray_Type.tp_as_mapping;
#define GEMMLET_ENTRY(slot, name, function)                     \
  entries[operator_##slot].place = place_of(number->nb_##slot); \
  entries[inplace_##slot].place = place_of(number->nb_inplace_##slot);
    GEMMLET_OPERATORS(GEMMLET_ENTRY)
#undef GEMMLET_ENTRY
    entries[operator_negative].place = place_of(number->nb_negative);
    entries[operator_power].place = place_of(number->nb_power);
    entries[operator_matmul].place = place_of(number->nb_matrix_multiply);
    entries[operator_compare].place = place_of(PyArray_Type.tp_richcompare);
    entries[operator_subscript].place = place_of(mapping->mp_subscript);
    entries[operator_assign].place = place_of(mapping->mp_ass_subscript);
    for (Entry& entry : entries) {
      if (entry.kind == Kind::function) entry.place = place_of_function(entry);
      if (entry.kind == Kind::method) entry.place = place_of_method(entry);
    }
    prepared = true;
  }
  std::vector<py::object> names;
  for (Entry& entry : entries) {
    if (!entry.replaced && entry.place != nullptr) entry.theirs = *entry.place;  // somebody else's, it may be
    names.push_back(entry.place == nullptr ? py::object(py::none()) : py::str(entry.name));
  }
  return names;
}

Entry& entry_at(std::size_t index) {
  if (index >= entries.size() || entries[index].theirs == nullptr) throw std::invalid_argument("index: no such entry");
  return entries[index];
}

// What an entry gives for these arguments, replaced or not. An operator takes what its slot does.
py::object call(std::size_t index, const py::tuple& arguments) {
  const Entry& entry = entry_at(index);
  std::vector<PyObject*> all;
  for (const auto& argument : arguments) all.push_back(argument.ptr());
  const Kind kind = entry.kind;
  const bool is_call = kind == Kind::function || kind == Kind::method;
  const bool takes_three = kind == Kind::power || kind == Kind::compare || kind == Kind::assign;
  if (is_call ? all.empty() : all.size() != (kind == Kind::unary ? 1u : takes_three ? 3u : 2u))
    throw std::invalid_argument("arguments: not as many as the entry takes");
  PyObject* result = nullptr;
  switch (entry.kind) {
    case Kind::unary:
      result = reinterpret_cast<unaryfunc>(entry.ours)(all[0]);
      break;
    case Kind::binary:
    case Kind::inplace:
    case Kind::subscript:
      result = reinterpret_cast<binaryfunc>(entry.ours)(all[0], all[1]);
      break;
    case Kind::power:
      result = reinterpret_cast<ternaryfunc>(entry.ours)(all[0], all[1], all[2]);
      break;
    case Kind::compare:
      result = reinterpret_cast<richcmpfunc>(entry.ours)(all[0], all[1], static_cast<int>(PyLong_AsLong(all[2])));
      break;
    case Kind::assign:
      if (reinterpret_cast<objobjargproc>(entry.ours)(all[0], all[1], all[2]) == 0) result = Py_NewRef(all[0]);
      break;
    case Kind::function:
      result = reinterpret_cast<vectorcallfunc>(entry.ours)(entry.object, all.data(), all.size(), nullptr);
      break;
    case Kind::method:
      result = reinterpret_cast<Method>(entry.ours)(all[0], all.data() + 1, static_cast<Py_ssize_t>(all.size()) - 1,
                                                    nullptr);
      break;
  }
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

void replace(const std::vector<std::size_t>& indices) {
  for (const std::size_t index : indices) {
    Entry& entry = entry_at(index);
    *entry.place = entry.ours;
    entry.replaced = true;
  }
  PyType_Modified(&PyArray_Type);
}

void restore() {
  for (Entry& entry : entries) {
    if (!entry.replaced) continue;
    if (*entry.place == entry.ours)
      *entry.place = entry.theirs;
    else
      entry.place = nullptr;  // what somebody else has put there since may call ours, which calls theirs from now on
    entry.replaced = false;
  }
  PyType_Modified(&PyArray_Type);
}

std::vector<std::pair<long, long>> counts() {
  std::vector<std::pair<long, long>> result;
  for (const Entry& entry : entries) result.emplace_back(entry.taken, entry.handed_on);
  return result;
}

}  // namespace
}  // namespace gemmlet::numpy

void gemmlet::bindings::bind_numpy(py::module_& m) {
  m.def("numpy_prepare", &numpy::prepare,
        "Names of the entries, in the order of their indices; None is not to be had.");
  def(m, "numpy_call", &numpy::call, "index", "arguments");
  def(m, "numpy_replace", &numpy::replace, "indices");
  m.def("numpy_restore", &numpy::restore);
  m.def("numpy_counts", &numpy::counts, "Of each entry, the calls taken and those handed on.");
  def(m, "numpy_keep_memory", &numpy::keep_memory, "most_bytes");
}
