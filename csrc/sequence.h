// One run of a layer, as the kernels see it: sizes, pointers, strides. No torch here.
//
// Shapes: T steps, B batch rows, I input_size, H hidden_size, P output size (proj_size or H),
// G gates, S sums, A saved values of the cell (cells.h). A *position* numbers the (step, row)
// pairs of a batch: t * B + b when padded, offset[t] + b when packed; there are N of them.
#pragma once

#include <cstdint>
#include <type_traits>

namespace fusedrnn {

/// bfloat16 as it is stored: the upper half of a float32.
struct BFloat16 {
  uint16_t bits;
};
/// IEEE 754's binary16 as it is stored.
struct Float16 {
  uint16_t bits;
};

/// The type that sums of products of operands of type S have.
template <class S>
using SumOf = std::conditional_t<sizeof(S) == 2, float, S>;

// T is the type that a kernel computes in, S the type of the operands of its products: weights,
// input and output. They differ for bfloat16 where the machine multiplies it (S) into float32 (T).

/// One direction of one layer over some rows of the batch.
///
/// Rows come longest sequence first, so those that take part in a step are the first active[t].
/// The reverse direction starts each row at its own last step.
template <class T>
struct Sequence {
  int64_t steps = 0, rows = 0;
  int64_t input_size = 0, hidden_size = 0, output_size = 0;
  bool reverse = false;
  const int64_t* row = nullptr;       ///< [rows] index in the batch
  const int64_t* active = nullptr;    ///< [steps] rows that take part, never increasing
  const int64_t* position = nullptr;  ///< [steps] position of batch row 0

  T* workspace = nullptr;  ///< workspace_size elements, 64-byte aligned
};

/// Weights of one direction, row-major and contiguous as in torch.nn.LSTM; null where absent.
template <class S>
struct Weights {
  const S* ih = nullptr;       ///< [G*H, I]
  const S* hh = nullptr;       ///< [G*H, P]
  const S* bias_ih = nullptr;  ///< [G*H]
  const S* bias_hh = nullptr;  ///< [G*H]
  const S* hr = nullptr;       ///< [P, H] the projection
};

template <class T, class S = T>
struct Forward : Sequence<T> {
  Weights<S> weights;
  const T* panels = nullptr;             ///< pack_forward's; null: read `weights` as they are
  const T* projection_panels = nullptr;  ///< pack_product's, of weights.hr transposed

  /// Either the input, whose features are contiguous (and even in number for bfloat16), ...
  const S* x = nullptr;
  const int64_t* x_offset = nullptr;  ///< [steps] elements from x to batch row 0 of the step
  int64_t x_row_stride = 0;
  /// ... or, when not null, the product weight_ih x: [N, G*H].
  const T* x_product = nullptr;
  int64_t x_product_stride = 0;  ///< of its rows

  const T* h0 = nullptr;  ///< [B, P], null: zeros
  const T* c0 = nullptr;  ///< [B, H], null: zeros
  int64_t h0_stride = 0, c0_stride = 0;

  S* y = nullptr;  ///< [N, P] with rows y_stride apart
  int64_t y_stride = 0;
  T* h_n = nullptr;    ///< [B, P]
  T* c_n = nullptr;    ///< [B, H], LSTM only
  T* saved = nullptr;  ///< [N, A, H], null: not wanted
};

template <class T>
struct Backward : Sequence<T> {
  const T* panels = nullptr;  ///< pack_product's, of weight_hh
  int64_t matrix_stride = 0;  ///< not 0: `panels` is weight_hh itself, rows this far apart
  const T* projection_panels = nullptr;  ///< pack_product's, of weights.hr

  const T* h0 = nullptr;  ///< as in Forward
  const T* c0 = nullptr;
  int64_t h0_stride = 0, c0_stride = 0;
  const T* saved = nullptr;
  const T* y = nullptr;  ///< projection only
  int64_t y_stride = 0;

  const T* dy = nullptr;  ///< [N, P] with rows dy_stride apart, null: zeros
  int64_t dy_stride = 0;
  const T* dh_n = nullptr;  ///< [B, P], null: zeros
  const T* dc_n = nullptr;  ///< [B, H], null: zeros

  /// What the products of the weights' gradients read leaves no position out: M of them, those that
  /// rows take part in, the rows of a step one after the other, longest first.
  const int64_t* rank = nullptr;             ///< [rows] place among the rows of the batch
  const int64_t* packed_position = nullptr;  ///< [steps] of rank 0
  T* dsums = nullptr;                        ///< [M, S, H] gradients of the sums
  T* h_previous = nullptr;  ///< [M, P] output of the step before, for the gradient of weight_hh
  T* dr = nullptr;          ///< [M, P] gradient of the projected output; projection only
  T* h_raw = nullptr;       ///< [M, H] output before the projection; projection only
  T* dh0 = nullptr;         ///< [B, P]
  T* dc0 = nullptr;         ///< [B, H], LSTM only
};

}  // namespace fusedrnn
