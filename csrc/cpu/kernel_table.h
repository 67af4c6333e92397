// One instruction set's CPU kernels as a table. dispatch.cpp chooses the table.
#pragma once

#include "../cells.h"
#include "../sequence.h"

namespace fusedrnn::cpu {

/// One cell's kernels for operands of type Element and accumulators of type Accum.
///
/// A run (sequence.h) is one *_begin call, then one *_step call per step, in order. Threads may
/// share a step by blocks of units.
template <class Accum, class Element = Accum>
struct Kernel {
  /// Neighbouring blocks that forward_step may compute at once: 4 for a cell of one pre-activation.
  /// Their vectors then fill a tile as an LSTM's four gates do.
  int64_t blocks_per_tile;
  /// Elements in one unit block's panel.
  int64_t (*forward_panel_size)(int64_t input_size, int64_t output_size);
  /// Elements in a run's workspace.
  int64_t (*forward_workspace)(const Sequence<Accum>&);
  int64_t (*backward_workspace)(const Sequence<Accum>&);
  /// Prepacks one unit block's weights. weights.ih null: without the input's part. Null for frozen
  /// weights (frozen.h).
  void (*prepack_forward)(const Weights<Element>& weights, int64_t input_size, int64_t hidden_size,
                          int64_t output_size, int64_t block, Accum* panel);
  /// The biases and the input's part of the pre-activations of unit blocks [block_begin,
  /// block_end), for rows [begin, end) of x [N, I]: out [N, G*H]. The panels hold weight_ih.
  void (*forward_input)(const Forward<Accum, Element>&, int64_t block_begin, int64_t block_end,
                        int64_t begin, int64_t end, Accum* out, int64_t out_stride);
  void (*forward_begin)(const Forward<Accum, Element>&);
  void (*forward_step)(const Forward<Accum, Element>&, int64_t i, int64_t block_begin,
                       int64_t block_end);
  // Null where Element is not Accum: a backward pass computes in Accum throughout.
  void (*backward_begin)(const Backward<Accum>&);
  void (*backward_step)(const Backward<Accum>&, int64_t i, int64_t block_begin, int64_t block_end);
  /// The same for variants (ops.cpp, <cell>_variant); likewise null.
  struct Variants {
    int64_t (*forward_workspace)(const Sequence<Accum>&);
    int64_t (*backward_workspace)(const Sequence<Accum>&);
    /// The layer norm of tokens [begin, end) of weight_ih x, in place, and the biases.
    void (*input)(const Forward<Accum>&, Accum* x_product, int64_t begin, int64_t end);
    void (*forward_begin)(const Forward<Accum>&);
    void (*forward_step)(const Forward<Accum>&, int64_t i, int64_t block_begin, int64_t block_end);
    void (*backward_begin)(const Backward<Accum>&);
    void (*backward_step)(const Backward<Accum>&, int64_t i, int64_t block_begin,
                          int64_t block_end);
  } variants;
};

/// Sizes and GEMMs shared by all cells. Matrices are row-major; a stride is the distance between
/// two rows unless named otherwise.
template <class Accum, class Element = Accum>
struct Common {
  int64_t lanes;          ///< units in a forward block
  int64_t block_columns;  ///< columns in a GEMM panel block, units in a backward block
  int64_t tile_rows;      ///< batch rows in a tile
  int64_t in_place_rows;  ///< most rows of a run with weights in place
  int64_t per_lane;       ///< neighbours along K in a lane of weights
  /// Prepacks one column block of a matrix [K, columns] with stride 1 along K or columns. Panels
  /// hold whole column vectors. Where Element is not Accum, row_stride must be 1.
  void (*prepack_gemm)(const Element* matrix, int64_t row_stride, int64_t column_stride, int64_t K,
                       int64_t columns, int64_t block, Accum* panels);
  /// out [rows, columns] = a [rows, K] * the prepacked matrix, or += with add. With a
  /// matrix_stride, `panels` is the matrix itself: its columns must be whole vectors then, and
  /// Element must be Accum.
  void (*gemm)(int64_t rows, int64_t K, int64_t columns, const Accum* panels, int64_t matrix_stride,
               const Element* a, int64_t a_stride, Accum* out, int64_t out_stride, bool add);
  /// out [rows, columns] = transposed a [K, rows] * b [K, columns]. Null where Element is not
  /// Accum.
  void (*gemm_transposed)(int64_t K, int64_t rows, int64_t columns, const Accum* a,
                          int64_t a_stride, const Accum* b, int64_t b_stride, Accum* out,
                          int64_t out_stride);
  // For int16 operands alone.
  int64_t x_bytes;    ///< of a quantised input value
  int32_t largest_x;  ///< of quantised input values, in size; largest_operand may be smaller
  /// Quantises n input values to integers of at most `largest` in size; gives their scale, NaN if
  /// one is not finite. Writes whole vectors.
  float (*quantise_row)(const float* values, int64_t n, int32_t largest, void* out);
};

template <class Accum, class Element = Accum>
struct KernelsOf {
  Common<Accum, Element> common;
  Kernel<Accum, Element> cells[kCells];
};

struct KernelTable {
  const char* isa;
  /// A random mask's values [first, first + count), `first` a multiple of mask_block: each true
  /// with probability threshold / 2^32.
  void (*random_mask)(uint64_t seed, int64_t first, int64_t count, uint32_t threshold, bool* out);
  int64_t mask_block;
  KernelsOf<float> f32;
  KernelsOf<double> f64;
  const KernelsOf<float, BFloat16>* bf16;  ///< null: convert bfloat16 to float32
  KernelsOf<float> frozen_bf16;            ///< float32 operands and bfloat16 weights
  KernelsOf<float, Int16> frozen_int8;     ///< int16 states and int8 weights
};

/// The best table for this machine. FUSEDRNN_CPU_ISA=baseline|avx2|avx512|avx512vnni|avx512bf16
/// asks for a lesser one.
const KernelTable& kernels();

}  // namespace fusedrnn::cpu
