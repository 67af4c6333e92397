// The CUDA kernels' arguments as plain structs: no torch and no CUDA here.
//
// Element, Accum and shapes are as in sequence.h. Batch rows are not sorted. A row that `lengths`
// or the batch sizes make inactive at a step keeps its state.
#pragma once

#include <cstdint>

#include "../sequence.h"

namespace fusedrnn::cuda {

// ---- stepwise: the kernels between the GEMMs of a step ------------------------------------------

/// One step's rows: [0, rows) have a token; rows where lengths[row] <= t are inactive.
struct StepRows {
  int64_t rows = 0;
  /// The kernel covers [0, all_rows), which is B where the step sets or reads every row's state.
  int64_t all_rows = 0;
  int64_t t = 0, steps = 0;          ///< the step's time; T
  const int64_t* lengths = nullptr;  ///< [rows], null: all are active
  bool is_first = false;             ///< the pass's first step
};

template <class Element, class Accum = Accumulator<Element>>
struct ForwardStepParams : StepRows {
  int64_t hidden_size = 0;
  const Accum* x_product = nullptr;  ///< [rows, G*H] weight_ih x, null: zeros
  const Accum* h_product = nullptr;  ///< [rows, G*H] weight_hh h, null: zeros
  const Element* bias_ih = nullptr;  ///< [G*H], null: zeros
  const Element* bias_hh = nullptr;  ///< [G*H]
  /// [all_rows, H] h before the step, h_before_stride apart; null: zeros. Inactive rows hand it on
  /// to `h`. If both are the same, they keep it.
  const Element* h_before = nullptr;
  int64_t h_before_stride = 0;
  const Element* c0 = nullptr;  ///< [all_rows, H], c0_stride apart, null: zeros; first step
  int64_t c0_stride = 0;
  /// [all_rows, H]. Written, and read except in the first step: there c0 has the state, or h_before
  /// for cells without a cell state. Null in a call of one step.
  Accum* state = nullptr;
  Element* h = nullptr;    ///< [all_rows, H] the output, as the next GEMM's operand
  Element* c_n = nullptr;  ///< [all_rows, H] the state, in the last step
  Element* y = nullptr;    ///< [rows, H] the output, y_stride apart; null if projected
  int64_t y_stride = 0;
  Accum* saved = nullptr;  ///< [rows, A, H], null: not wanted
};

/// A step with its GEMMs. h_before and h must not overlap.
template <class Element>
struct FusedStepParams : ForwardStepParams<Element> {
  const Element* weight_ih = nullptr;  ///< [G*H, I]
  const Element* weight_hh = nullptr;  ///< [G*H, H]
  const Element* x = nullptr;          ///< [rows, I], x_stride apart; null: x_product has its GEMM
  int64_t input_size = 0, x_stride = 0;
};

/// The kernel behind a projection's GEMM.
template <class Element, class Accum = Accumulator<Element>>
struct ProjectionStepParams : StepRows {
  int64_t output_size = 0;
  const Accum* r = nullptr;     ///< [rows, P] the projected output
  const Element* h0 = nullptr;  ///< [all_rows, P], h0_stride apart, null: zeros; first step
  int64_t h0_stride = 0;
  Element* h = nullptr;  ///< [all_rows, P]
  Element* y = nullptr;  ///< [rows, P], y_stride apart
  int64_t y_stride = 0;
};

/// A step's output gradient, F features, is the sum of dy, product and dh. In the first step of the
/// backward pass, the direction's last, dh_n takes the place of dh.
template <class Element, class Accum = Accumulator<Element>>
struct OutputGradientParams : StepRows {
  int64_t previous = -1;        ///< the step before t in the direction's order, -1: none
  int64_t previous_rows = 0;    ///< its rows
  const Element* dy = nullptr;  ///< [rows, F], dy_stride apart; null: zeros
  int64_t dy_stride = 0;
  /// [product_rows, F] through weight_hh from the following step.
  const Accum* product = nullptr;
  int64_t product_rows = 0;
  const Element* dh_n = nullptr;  ///< [all_rows, F], null: zeros; first step
  /// [all_rows, F] gradient carried from h_n. Inactive rows accumulate `product` into it; active
  /// rows consume it and store zeros.
  Accum* dh = nullptr;
};

template <class Element, class Accum = Accumulator<Element>>
struct BackwardStepParams : OutputGradientParams<Element> {
  int64_t hidden_size = 0;
  const Accum* saved = nullptr;           ///< [rows, A, H]
  const Accum* previous_saved = nullptr;  ///< [previous_rows, A, H]
  const Element* h0 = nullptr;            ///< [rows, H] h0_stride apart, null: zeros
  const Element* c0 = nullptr;
  int64_t h0_stride = 0, c0_stride = 0;
  const Accum* dh_raw = nullptr;  ///< projected only: [rows, H] the raw output's gradient
  const Element* dc_n = nullptr;  ///< [all_rows, H], null: zeros; first step
  Accum* dstate = nullptr;        ///< [all_rows, H]; the first step does not read it
  Element* dgates = nullptr;      ///< [rows, S*H] as operands
  /// [rows, G*H] gradients of the pre-activations that weight_hh feeds; null: they are dgates.
  Element* dhidden = nullptr;
  Element* h_previous = nullptr;  ///< [rows, H], null if projected
  Element* h_raw = nullptr;       ///< [rows, H] output before the projection; projected only
};

/// The kernel before the GEMM in a projection's backward pass.
template <class Element, class Accum = Accumulator<Element>>
struct ProjectionBackwardStepParams : OutputGradientParams<Element> {
  int64_t output_size = 0;
  const Element* previous_y = nullptr;  ///< [previous_rows, P], y_stride apart
  int64_t y_stride = 0;
  const Element* h0 = nullptr;  ///< [rows, P], null: zeros
  int64_t h0_stride = 0;
  Element* dr = nullptr;          ///< [rows, P] the output's gradient
  Element* h_previous = nullptr;  ///< [rows, P]
};

/// The kernel behind the backward steps: the initial states' gradients.
template <class Element, class Accum = Accumulator<Element>>
struct InitialGradientParams {
  int64_t rows = 0, hidden_size = 0, output_size = 0;
  const Accum* dh = nullptr;       ///< [rows, P] carried from h_n
  const Accum* product = nullptr;  ///< [rows, P] through weight_hh
  const Accum* dstate = nullptr;   ///< [rows, H]
  bool state_is_h = false;         ///< dstate is another part of dh0
  Element* dh0 = nullptr;          ///< [rows, P], null: not wanted
  Element* dc0 = nullptr;          ///< [rows, H], null: not wanted
};

// ---- variants: the kernels between the GEMMs of a step (ops.cpp, <cell>_variant)
// ------------------
//
// Pointers to [N, ...] begin at token 0.

/// One step's rows and tokens, and the step after it in the direction's order. Around the steps of
/// a pass is one launch with `rows` 0: before the forward steps, and behind the backward ones.
struct VariantStepRows : StepRows {
  int64_t token = 0;       ///< batch row 0's
  int64_t after = -1;      ///< the time of the step after, -1: none
  int64_t after_rows = 0;  ///< its rows
  int64_t after_token = 0;
};

/// The end of a forward step for h, P features.
template <class Element, class Accum = Accumulator<Element>>
struct VariantOutputParams : VariantStepRows {
  int64_t output_size = 0;
  Variant<Accum> variant;
  SavedVariant saved_at;
  const Element* h0 = nullptr;  ///< [all_rows, P] h0_stride apart, null: zeros
  int64_t h0_stride = 0;
  Accum* h = nullptr;          ///< [all_rows, P] before the next step; the first launch only writes
  Element* operand = nullptr;  ///< [all_rows, P] the same, masked, for the GEMM with weight_hh
  Element* h_n = nullptr;      ///< [all_rows, P], in the last step
  Element* y = nullptr;        ///< [N, P], y_stride apart
  int64_t y_stride = 0;
  Accum* saved = nullptr;            ///< [N, variant.saved_size], null: not wanted
  const Accum* projected = nullptr;  ///< [rows, P] the projected output; null: not projected
};

template <class Element, class Accum = Accumulator<Element>>
struct VariantForwardStepParams : VariantOutputParams<Element> {
  int64_t hidden_size = 0;
  const Accum* x_product = nullptr;  ///< [N, G*H] weight_ih x; with layer norms finished
  const Accum* h_product = nullptr;  ///< [rows, G*H] weight_hh h, null: zeros
  const Element* bias_ih = nullptr;  ///< [G*H], null: zeros, or x_product has it
  const Element* bias_hh = nullptr;  ///< [G*H], null: zeros
  const Element* c0 = nullptr;       ///< as h0, h and h_n; cells with a cell state
  int64_t c0_stride = 0;
  Accum* c = nullptr;
  Element* c_n = nullptr;
  Element* cells = nullptr;  ///< [N, H], variant.cells_stride apart
  Accum* scratch = nullptr;  ///< [rows, A+1, H]; with layer norms and a cell state
  Element* raw = nullptr;    ///< [rows, H] output before the projection; projected only
};

/// The layer norm of weight_ih x, and bias_ih. In place.
template <class Element, class Accum = Accumulator<Element>>
struct VariantInputParams {
  int64_t tokens = 0, batch = 0, size = 0;  ///< N; B if padded; G*H
  const int64_t* lengths = nullptr;         ///< [B], null: no token is padding
  Accum* x_product = nullptr;               ///< [N, G*H]
  const Accum* norm = nullptr;              ///< [G*H]
  const Element* bias = nullptr;            ///< [G*H], null: zeros
  Accum* saved = nullptr;                   ///< [N, saved_size], null: not wanted
  int64_t saved_size = 0;
  SavedVariant saved_at;
};

/// h's gradient at the end of a step, P features. It is the sum of dy, dh and, masked, product. In
/// the first launch dh_n takes the place of dh.
template <class Element, class Accum = Accumulator<Element>>
struct VariantGradientParams : VariantStepRows {
  int64_t output_size = 0;
  int64_t previous = -1;  ///< the time of the step before in the direction's order, -1: none
  int64_t previous_rows = 0, previous_token = 0;
  Variant<Accum> variant;
  SavedVariant saved_at;
  const Accum* saved = nullptr;  ///< [N, variant.saved_size]
  const Element* h0 = nullptr;   ///< [all_rows, P] h0_stride apart, null: zeros
  int64_t h0_stride = 0;
  const Element* dh_n = nullptr;   ///< [all_rows, P], null: zeros
  Accum* dh = nullptr;             ///< [all_rows, P] past the gates of the step after
  const Accum* product = nullptr;  ///< [after_rows, P] through weight_hh from the step after
  Accum* reset_dh0 = nullptr;      ///< [all_rows, P] parts of resets to h0; null: there are none
  const Element* dy = nullptr;     ///< [N, P], dy_stride apart; null: zeros
  int64_t dy_stride = 0;
  Element* h_previous = nullptr;  ///< [N, P] the step's operand
  Element* dr = nullptr;          ///< [N, P] the projected output's gradient; projected only
};

template <class Element, class Accum = Accumulator<Element>>
struct VariantBackwardStepParams : VariantGradientParams<Element> {
  int64_t hidden_size = 0;
  const Element* c0 = nullptr;  ///< as h0, dh_n, dh and reset_dh0; cells with a cell state
  int64_t c0_stride = 0;
  const Element* dc_n = nullptr;
  Accum* dc = nullptr;
  Accum* reset_dc0 = nullptr;
  bool wants_dh0 = false;           ///< whether the launch behind the steps has dh0
  const Element* dcells = nullptr;  ///< [N, H], variant.cells_stride apart; null: zeros
  const Accum* dh_raw = nullptr;    ///< [rows, H] the raw output's gradient; projected only
  Element* dgates = nullptr;        ///< [N, S*H] as operands
  /// [rows, G*H] gradients of the GEMM with weight_hh; null: they are dgates.
  Element* dhidden = nullptr;
  Element* dinput = nullptr;  ///< [N, G*H] of the GEMM with weight_ih; layer norms only
  Accum* dnorm_c = nullptr;   ///< [N, H] of the normalised c; layer norms and a cell state only
  Accum* scratch = nullptr;   ///< [rows, S+2, H]; layer norms only
  Element* h_raw = nullptr;   ///< [N, H] output before the projection; projected only
  Element* dh0 = nullptr;     ///< [all_rows, P] in the launch behind the steps; null: not wanted
  Element* dc0 = nullptr;     ///< [all_rows, H]
};

/// A mask of `count` values (random.h).
struct RandomMaskParams {
  const int64_t* seed = nullptr;
  int64_t count = 0;
  uint32_t threshold = 0;
  bool all = false;  ///< all are true: no threshold is large enough
  bool* out = nullptr;
};

// ---- around the time loop -----------------------------------------------------------------------

/// Copies padded tokens [T, B, F], with zeros in the padding.
template <class Element>
struct MaskPaddingParams {
  int64_t steps = 0, rows = 0, features = 0;
  const Element* x = nullptr;  ///< tokens x_stride apart
  int64_t x_stride = 0;
  const int64_t* lengths = nullptr;  ///< [B]
  Element* out = nullptr;
};

/// The biases' gradients are sums of dgates over all tokens.
template <class Element>
struct BiasGradientParams {
  int64_t tokens = 0, hidden_size = 0, preacts = 0, gates = 0;
  int64_t hidden_preact[4] = {};    ///< as in cells.h
  const Element* dgates = nullptr;  ///< [N, S*H]
  Element* bias_ih = nullptr;       ///< [G*H], null: not wanted
  Element* bias_hh = nullptr;       ///< [G*H], null: not wanted
};

// ---- persistent: one kernel for all steps -------------------------------------------------------
//
// A *group* of CTAs runs all hidden units of one direction for a tile of batch rows.

struct PersistentParams {
  int steps = 0, rows = 0, hidden_size = 0, directions = 0, tile_rows = 0;
  const int64_t* lengths = nullptr;      ///< [B], null: all steps
  const int64_t* step_offset = nullptr;  ///< [T + 1] row 0's token; null: padded
  bool prefetches = false;               ///< whether the steps' values come from memory, not L2
};

template <class Element, class Accum = Accumulator<Element>>
struct PersistentForwardParams : PersistentParams {
  struct Direction {
    const Element* weight_hh = nullptr;  ///< [G*H, H]
    const Element* bias_ih = nullptr;
    const Element* bias_hh = nullptr;
    const Accum* x_product = nullptr;  ///< [N, G*H]
    const Element* h0 = nullptr;       ///< [B, H], null: zeros
    const Element* c0 = nullptr;
    Element* y = nullptr;    ///< [N, H], y_stride apart
    Element* h_n = nullptr;  ///< [B, H]
    Element* c_n = nullptr;  ///< [B, H], cells with a cell state only
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
    const Element* h0 = nullptr;
    const Element* c0 = nullptr;
    const Element* dy = nullptr;    ///< [N, H], dy_stride apart; null: zeros
    const Element* dh_n = nullptr;  ///< [B, H], null: zeros
    const Element* dc_n = nullptr;
    Element* dgates = nullptr;      ///< [N, S*H]
    Element* h_previous = nullptr;  ///< [N, H]
    Element* dh0 = nullptr;         ///< [B, H]
    Element* dc0 = nullptr;         ///< [B, H], cells with a cell state only
    /// Operands [kExchangeSlots, groups * tile_rows, max_units * G], all bits set on entry;
    /// persistent_grid only.
    uint32_t* exchange = nullptr;
  } direction[2];
  int64_t h0_stride = 0, c0_stride = 0, dy_stride = 0;
};

}  // namespace fusedrnn::cuda
