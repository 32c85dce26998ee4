// NumPy's elementwise functions and reductions, for T = float and double: what bindings/numpy puts under NumPy itself.
//
// Contract
//   Results are NumPy's: the same bits where an operation is exactly rounded, and of sums, which are added in its order
//   (pairwise, Higham 1993, in blocks of 128 with 8 accumulators); exp, log and tanh within the errors of formulas/math.h.
//   Each function returns the floating-point status that NumPy's loop raises (float_status.h); 0 is none. As after NumPy's,
//   those flags are set in the thread, and no others; arg_extreme leaves those that were. dot and matmul add theirs.
//   y may be an input, element for element; beyond that nothing overlaps. Sizes are above 0.
//   Not for: other dtypes, and outputs whose columns are not contiguous.
#pragma once

#include "cpu/float_status.h"
#include "cpu/kernels.h"

namespace gemmlet::ufuncs {

#define GEMMLET_BINARY_UFUNCS(X) X(add) X(subtract) X(multiply) X(divide) X(maximum) X(minimum)
#define GEMMLET_UNARY_UFUNCS(X) X(negative) X(absolute) X(square) X(sqrt) X(sign) X(exp) X(log) X(tanh)

#define GEMMLET_ENTRY(name) name,
enum class Binary { GEMMLET_BINARY_UFUNCS(GEMMLET_ENTRY) };
enum class Unary { GEMMLET_UNARY_UFUNCS(GEMMLET_ENTRY) };
#undef GEMMLET_ENTRY
enum class Comparison { less, less_equal, equal, not_equal, greater, greater_equal };  // the order of Py_LT ... Py_GE
enum class Reduction { sum, mean, max, min };

// y[i * row_stride + j] = a(i, j) . b(i, j) for i < rows, j < columns. Strides of a and b count elements, 0 broadcasts.
struct Grid {
  Index rows, columns;
  Index a_row, a_column, b_row, b_column, y_row;
};
template <class T>
unsigned binary(Binary function, const T* a, const T* b, T* y, const Grid& grid);
template <class T>
void compare(Comparison comparison, const T* a, const T* b, bool* y, const Grid& grid);

template <class T>
unsigned unary(Unary function, const T* x, T* y, Index n);

// min(max(x, low), high); neither is NaN.
template <class T>
void clip(const T* x, T low, T high, T* y, Index n);

// y = mask ? a : b. Any byte of a mask that is not 0 is true: a view may have made it of another dtype. A step of 0
// broadcasts a number, 1 goes along with the mask.
template <class T>
void where(const std::uint8_t* mask, const T* a, Index a_step, const T* b, Index b_step, T* y, Index n);

// y = x, as float64; of bytes that are bools, 1 or 0.
template <class From>
void convert(const From* x, double* y, Index n);
void convert_bools(const std::uint8_t* x, double* y, Index n);

template <class T>
void fill(T value, T* y, Index n);

// y = value where the mask is true; other elements are not written.
template <class T>
void fill_where(const std::uint8_t* mask, T value, T* y, Index n);

// y(o, i) over k of x(o, k, i), all contiguous. `zero` is what a sum begins with: of either sign, which sums of -0.0 have.
template <class T>
unsigned reduce(Reduction reduction, T zero, const T* x, T* y, Index outer, Index n, Index inner);

// The first index of the largest element (the smallest, if `smallest`) of each row, or that of the first NaN.
template <class T>
void arg_extreme(const T* x, bool smallest, Index* y, Index rows, Index columns);

// x y of two vectors; strides count elements.
template <class T>
T dot(const T* x, Index x_stride, const T* y, Index y_stride, Index n);

// y = a b, as linear() does it, and matrices too small for a register tile at once.
template <class T>
void matmul(View<T> a, View<T> b, T* y);

}  // namespace gemmlet::ufuncs
