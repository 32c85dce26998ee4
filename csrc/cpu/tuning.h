// Every tuned number of the CPU kernels.
//
// Contract
//   Constants alone, for bindings and kernels of any instruction set. Those marked "order" fix the order of a sum: to change
//   one changes results.
//   Machine: AMD EPYC (Zen 4), 2 processors, caches of 32 KiB, 1 MiB and 32 MiB, GCC 12. Commands: `gemmlet bench matmul
//   linear` for matmul, `gemmlet bench epoch wide gan` for training, `gemmlet bench activations losses` for the rest; --threads 1
//   for cache and register blocks, 2 for parallel_work and chunks. Both variants alternate in one process.
#pragma once

#include <cstdint>

namespace gemmlet::tuning {

// Matmul: register tile and cache blocks, named as in BLIS; x is its A, w its B.

// mr x nr_vectors accumulators, one register each, with nr_vectors registers of w and one of x: 16 registers (x86-64
// before AVX-512) or 32. On x86-64-v3 that is 12 + 2 + 1.
// A block of dot products has dot_product_block accumulators. Up to dot_product_max_rows rows of x, packing a transposed w
// costs more than the dot-product kernel (order).
// small_k_block rows of x share each load of w in the small-K kernel.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int mr = 12, dot_product_max_rows = 16, dot_product_block = 16, small_k_block = 2;
#else
constexpr int mr = 6, dot_product_max_rows = 8, dot_product_block = 8, small_k_block = 1;
#endif
constexpr int nr_vectors = 2;
// Rows of a tile given by pointers that are kept in registers: beside eight of them the loop needs none of the stack.
constexpr int max_row_pointers = 8;
// K is cut into blocks of nearly equal size, at most kc: an mr x kc part of x (20 KiB for float) stays in the first-level
// cache while panel after panel of w passes (order). 256 instead of 416: y is read and written more often, 3 to 8 % slower.
constexpr int kc = 416;
// A kc x nc block of w (208 KiB for float) is packed at a time, for the second-level cache, once for all task_mc rows. Where
// x is packed too, all of these rows are packed before (2 MiB), for the third-level cache. Blocks of w for the third-level
// cache (nc = 1024), with 96 rows of x packed at a time, were as fast on x86-64-v4 and 1 to 5 % slower on v3, which reads
// them twice as often.
constexpr int nc = 128, task_mc = 1152;
// Columns of w from which packing x pays: for rows of x, and for an x that lies column by column and is transposed.
constexpr int pack_x_min_columns = 512, pack_transposed_x_min_columns = 128;
// Up to this K writing y dominates: the small-K kernel. From small_k_min_rows rows on that holds for a transposed w too.
constexpr int small_k_max = 10, small_k_min_rows = 4;
// Multiply-adds below which a second thread costs more than it saves: some 20 microseconds.
constexpr double matmul_parallel_work = 500e3;
// Rows ahead that packing prefetches: each row of w is on a page of its own, which the hardware prefetcher does not follow.
constexpr std::int64_t pack_prefetch_rows = 8;

// Elementwise functions, losses, sums of columns.

// Elements of a chunk of parallel_chunks (order, for losses); small arrays are one task.
constexpr std::int64_t chunk_elements = 8192;
// Elements of a task, some 5 microseconds: of functions with an exponential, root or quotient, and of those that are as
// fast as memory, where a second thread for 16,384 elements cost more than it saved.
constexpr std::int64_t costly_chunk = 4096, cheap_chunk = 32768;
// The same for NumPy's functions. Between two calls of a program the workers sleep, and to wake one costs 5 to 10 us: with the
// two chunks above, programs of arrays of 10,000 elements took 10 % longer with two threads than with one.
constexpr std::int64_t ufunc_costly_chunk = 16384, ufunc_cheap_chunk = 65536;
// Products that are added up before their sum is added to those before: in float32 a million in one sum lose four digits
// (order).
constexpr std::int64_t dot_block = 4096;
// Longer rows are about as fast along their vectors, and need no transposed copy (order).
constexpr std::int64_t across_max_columns = 64;
// Vectors of each array that an optimizer's update takes at a time: momentum and Adam of 2 million parameters some 10 % faster
// than with one.
constexpr int update_vectors = 4;
// Columns of column_sum that one pass over the rows adds up.
constexpr std::int64_t column_sum_block = 64;
// Pixels of the images of a task of `augment`: 25 to 100 microseconds.
constexpr std::int64_t augment_chunk_pixels = 1 << 16;

// Threads and bindings.

// How long a thread spins before it sleeps: longer than the gap between the phases of a call, too short for processor load.
constexpr int spin_microseconds = 30;
// Work from which a call releases the GIL, in elements of an elementwise function (some microseconds); a multiply-add of a
// matmul counts as 1 / multiply_adds_per_element of one.
constexpr std::int64_t gil_release_elements = 2048, multiply_adds_per_element = 16;

// Training.

// Multiply-adds of a mini-batch's forward pass below which a second thread costs more than it saves.
constexpr double training_parallel_work = 200e3;
// Rows of the mini-batch that pass through all layers together: their activations stay in the second-level cache.
constexpr std::int64_t row_block = 48;
// Row stride of the weights, in bytes, from which they are packed for several rows of x, packed_kc rows at a time: each row
// is on a page of its own, and many of them share a set of the cache.
constexpr std::int64_t pack_min_stride = 4096, packed_kc = 256;
// Bytes of all weights from which a plan's layers are computed one by one, by all threads together, each for all rows of
// the mini-batch.
constexpr double by_layers_min_bytes = 1 << 20;
// Bytes of the panels that are packed at a time where a layer takes all rows of the mini-batch at once. They are read in the
// order they lie in, for which the third-level cache is fast enough; more panels share each packed tile of x.
constexpr std::int64_t packed_bytes = 2 << 20;
// Rows up to which such a layer computes the transpose of grad_x: its weights are then read in place.
constexpr std::int64_t transposed_max_rows = 48;
// Mini-batch size below which grad_x uses the dot-product kernel: packing the transposed weights would cost more than it
// saves (order).
constexpr std::int64_t tiles_min_rows = 16;
// Blocks of 64 features that all sparse rows of a mini-batch use in turn: the weights stay in the first-level cache.
constexpr std::int64_t sparse_blocks = 2;
// Mini-batches in a call from which a thread copies its own columns of the first layer.
constexpr std::int64_t thread_columns_min_steps = 8;
// Up to this many threads, and rows of a mini-batch, each thread loads all rows of bytes: that is less work than fetching
// what another thread loaded.
constexpr std::int64_t private_loader_max_threads = 4, private_loader_max_rows = 1024;

}  // namespace gemmlet::tuning
