// The CUDA kernels' arguments as plain structs: no torch and no CUDA here.
//
// Element, Accum and shapes are as in sequence.h. Batch rows are not sorted. A row that `lengths`
// or the batch sizes make inactive at a step keeps its state.
#pragma once

#include <cstdint>

#include "../sequence.h"

namespace fusedrnn::cuda {

// ---- stepwise: the kernels between the GEMMs of a step ------------------------------------------

/// One step's rows: [0, rows), except rows where lengths[row] <= t.
struct StepRows {
  int64_t rows = 0, t = 0;
  const int64_t* lengths = nullptr;  ///< [rows], null: all are active
};

template <class Element, class Accum = Accumulator<Element>>
struct ForwardStepParams : StepRows {
  int64_t hidden_size = 0;
  const Accum* x_product = nullptr;  ///< [rows, G*H] weight_ih x
  const Accum* h_product = nullptr;  ///< [rows, G*H] weight_hh h, null: zeros
  const Element* bias_ih = nullptr;  ///< [G*H], null: zeros
  const Element* bias_hh = nullptr;  ///< [G*H]
  Accum* state = nullptr;            ///< [rows, H] read and written
  Element* h = nullptr;              ///< [rows, H] the output, as the next GEMM's operand
  Element* y = nullptr;              ///< [rows, H] the output, y_stride apart; null if projected
  int64_t y_stride = 0;
  Accum* saved = nullptr;  ///< [rows, A, H], null: not wanted
};

/// The kernel behind a projection's GEMM.
template <class Element, class Accum = Accumulator<Element>>
struct ProjectionStepParams : StepRows {
  int64_t output_size = 0;
  const Accum* r = nullptr;  ///< [rows, P] the projected output
  Element* h = nullptr;      ///< [rows, P]
  Element* y = nullptr;      ///< [rows, P], y_stride apart
  int64_t y_stride = 0;
};

/// A step's output gradient, F features, is the sum of dy, product and dh.
template <class Accum>
struct OutputGradientParams : StepRows {
  int64_t previous = -1;      ///< the step before t in the direction's order, -1: none
  int64_t previous_rows = 0;  ///< its rows
  const Accum* dy = nullptr;  ///< [rows, F], dy_stride apart; null: zeros
  int64_t dy_stride = 0;
  /// [rows, F] through weight_hh from the following step, zeros without one.
  const Accum* product = nullptr;
  /// [rows, F] gradient carried from h_n. Inactive rows accumulate `product` into it; active rows
  /// consume it and store zeros.
  Accum* dh = nullptr;
};

template <class Element, class Accum = Accumulator<Element>>
struct BackwardStepParams : OutputGradientParams<Accum> {
  int64_t hidden_size = 0;
  const Accum* saved = nullptr;           ///< [rows, A, H]
  const Accum* previous_saved = nullptr;  ///< [previous_rows, A, H]
  const Accum* h0 = nullptr;              ///< [rows, H] h0_stride apart, null: zeros
  const Accum* c0 = nullptr;
  int64_t h0_stride = 0, c0_stride = 0;
  const Accum* dh_raw = nullptr;  ///< projected only: [rows, H] the raw output's gradient
  Accum* dstate = nullptr;        ///< [rows, H]
  Element* dgates = nullptr;      ///< [rows, S*H] as operands, zero on entry
  /// [rows, G*H] gradients of the pre-activations that weight_hh feeds; null: they are dgates.
  Element* dhidden = nullptr;
  Element* h_previous = nullptr;  ///< [rows, H], null if projected
  Element* h_raw = nullptr;       ///< [rows, H] output before the projection
};

/// The kernel before the GEMM in a projection's backward pass.
template <class Element, class Accum = Accumulator<Element>>
struct ProjectionBackwardStepParams : OutputGradientParams<Accum> {
  int64_t output_size = 0;
  const Accum* previous_y = nullptr;  ///< [previous_rows, P], y_stride apart
  int64_t y_stride = 0;
  const Accum* h0 = nullptr;  ///< [rows, P], null: zeros
  int64_t h0_stride = 0;
  Element* dr = nullptr;          ///< [rows, P] the output's gradient, zero on entry
  Element* h_previous = nullptr;  ///< [rows, P]
};

// ---- persistent: one kernel for all steps -------------------------------------------------------
//
// A *group* of CTAs runs all hidden units of one direction for a tile of batch rows.

struct PersistentParams {
  int steps = 0, rows = 0, hidden_size = 0, directions = 0, tile_rows = 0;
  const int64_t* lengths = nullptr;      ///< [B], null: all steps
  const int64_t* step_offset = nullptr;  ///< [T + 1] row 0's token; null: padded
};

template <class Element, class Accum = Accumulator<Element>>
struct PersistentForwardParams : PersistentParams {
  struct Direction {
    const Element* weight_hh = nullptr;  ///< [G*H, H]
    const Element* bias_ih = nullptr;
    const Element* bias_hh = nullptr;
    const Accum* x_product = nullptr;  ///< [N, G*H]
    const Accum* h0 = nullptr;         ///< [B, H], null: zeros
    const Accum* c0 = nullptr;
    Element* y = nullptr;    ///< [N, H], y_stride apart
    Element* h_n = nullptr;  ///< [B, H]
    Accum* c_n = nullptr;    ///< [B, H], cells with a cell state only
    Accum* saved = nullptr;  ///< [N, A, H], null: not wanted
    /// Operands [kExchangeSlots, groups * tile_rows, max_units], all bits set on entry;
    /// persistent_grid only.
    uint32_t* exchange = nullptr;
  } direction[2];
  int64_t h0_stride = 0, c0_stride = 0, y_stride = 0;
};

template <class Element, class Accum = Accumulator<Element>>
struct PersistentBackwardParams : PersistentParams {
  struct Direction {
    const Element* weight_hh = nullptr;
    const Accum* saved = nullptr;
    const Accum* h0 = nullptr;
    const Accum* c0 = nullptr;
    const Accum* dy = nullptr;    ///< [N, H], dy_stride apart; null: zeros
    const Accum* dh_n = nullptr;  ///< [B, H], null: zeros
    const Accum* dc_n = nullptr;
    Element* dgates = nullptr;      ///< [N, S*H]
    Element* h_previous = nullptr;  ///< [N, H]
    Accum* dh0 = nullptr;           ///< [B, H]
    Accum* dc0 = nullptr;           ///< [B, H], cells with a cell state only
    /// Operands [kExchangeSlots, groups * tile_rows, max_units * G], all bits set on entry;
    /// persistent_grid only.
    uint32_t* exchange = nullptr;
  } direction[2];
  int64_t h0_stride = 0, c0_stride = 0, dy_stride = 0;
};

}  // namespace fusedrnn::cuda
