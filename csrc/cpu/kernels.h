// The CPU kernels of one instruction set, as a table; dispatch.cpp picks the table.
#pragma once

#include "../cells.h"
#include "../sequence.h"

namespace fusedrnn::cpu {

/// One cell and value type T, with operands of type S (sequence.h). A run (sequence.h) is a call of
/// *_begin, then one of *_step for each step in order; a step may be shared out by blocks of units.
template <class T, class S = T>
struct Kernel {
  /// Elements of the panel of one block of units, and of a run's workspace.
  int64_t (*forward_panel_size)(int64_t input_size, int64_t output_size);
  int64_t (*forward_workspace)(const Sequence<T>&);
  int64_t (*backward_workspace)(const Sequence<T>&);
  /// Packs the weights of one block of units. weights.ih null: without the input's part.
  void (*pack_forward)(const Weights<S>& weights, int64_t input_size, int64_t hidden_size,
                       int64_t output_size, int64_t block, T* panel);
  void (*forward_begin)(const Forward<T, S>&);
  void (*forward_step)(const Forward<T, S>&, int64_t i, int64_t block_begin, int64_t block_end);
  // Null where S is not T: a backward pass computes in T throughout.
  void (*backward_begin)(const Backward<T>&);
  void (*backward_step)(const Backward<T>&, int64_t i, int64_t block_begin, int64_t block_end);
};

/// What all cells share: sizes, and products of matrices. Matrices are row-major; strides are of
/// rows unless named otherwise.
template <class T, class S = T>
struct Common {
  int64_t lanes;  ///< units in a block of the forward pass
  int64_t
      block_columns;  ///< columns in a block of product panels, units in one of the backward pass
  int64_t tile_rows;  ///< batch rows that a tile holds
  int64_t unpacked_rows;  ///< rows that a run may have whose weights are not packed
  /// Packs one block of columns of a matrix [depth, columns], one of whose strides is 1; panels
  /// hold whole vectors of columns. Where S is not T, row_stride must be 1.
  void (*pack_product)(const S* matrix, int64_t row_stride, int64_t column_stride, int64_t depth,
                       int64_t columns, int64_t block, T* panels);
  /// out [rows, columns] = a [rows, depth] * the packed matrix, or += with add. With a
  /// matrix_stride `panels` is the matrix as it is; its columns must be whole vectors then, and S
  /// must be T.
  void (*multiply)(int64_t rows, int64_t depth, int64_t columns, const T* panels,
                   int64_t matrix_stride, const S* a, int64_t a_stride, T* out, int64_t out_stride,
                   bool add);
  /// out [rows, columns] = transposed a [depth, rows] * b [depth, columns]. Null where S is not T.
  void (*multiply_transposed)(int64_t depth, int64_t rows, int64_t columns, const T* a,
                              int64_t a_stride, const T* b, int64_t b_stride, T* out,
                              int64_t out_stride);
};

template <class T, class S = T>
struct KernelsOf {
  Common<T, S> common;
  Kernel<T, S> cells[kCells];
};

struct KernelTable {
  const char* isa;
  KernelsOf<float> f32;
  KernelsOf<double> f64;
  const KernelsOf<float, BFloat16>* bf16;  ///< null: no instructions for it, convert to float32
};

/// The best table that this machine runs; FUSEDRNN_CPU_ISA=baseline|avx2|avx512|avx512bf16 asks for
/// less.
const KernelTable& kernels();

}  // namespace fusedrnn::cpu
