// The CPU kernels of one instruction set, as a table; dispatch.cpp picks the table.
#pragma once

#include "../sequence.h"

namespace fusedrnn::cpu {

/// One cell and value type. Every function is pure: it touches what its arguments name.
template <class T>
struct Kernel {
  /// Elements of one block of forward panels, and of the whole workspace of a call.
  int64_t (*forward_panel_size)(int64_t input_size, int64_t output_size);
  int64_t (*forward_workspace)(const Sequence<T>&);
  int64_t (*backward_workspace)(const Sequence<T>&);
  /// Packs the weights of one block of units. weights.ih null: without the input's part.
  void (*pack_forward)(const Weights<T>& weights, int64_t input_size, int64_t hidden_size,
                       int64_t output_size, int64_t block, T* panel);
  void (*forward)(const Forward<T>&);
  void (*backward)(const Backward<T>&);
};

/// Panels for the product of rows with a matrix [depth, columns], shared by all cells.
template <class T>
struct Packing {
  int64_t lanes;         ///< units in a block of forward panels
  int64_t block_columns;  ///< columns in a block of product panels
  /// Packs columns [block * block_columns, ...) of the matrix with the given strides.
  void (*pack_product)(const T* matrix, int64_t row_stride, int64_t column_stride, int64_t depth,
                       int64_t columns, int64_t block, T* panels);
};

template <class T>
struct KernelsOf {
  Packing<T> packing;
  Kernel<T> lstm, gru;
};

struct KernelTable {
  const char* isa;
  KernelsOf<float> f32;
  KernelsOf<double> f64;
};

/// The best table that this machine runs; FUSEDRNN_CPU_ISA=baseline|avx2|avx512 asks for less.
const KernelTable& kernels();

}  // namespace fusedrnn::cpu
