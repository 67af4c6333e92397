// One run of a layer, as the kernels see it: sizes, pointers, strides. No torch here.
//
// Shapes: T time steps, B batch rows, I input_size, H hidden_size, P output size (proj_size or H),
// G gates, S pre-activations, A saved values of the cell (cells.h). A *token* is one (step, row)
// pair in a batch; N tokens: t * B + b when padded, step_offset[t] + b when packed.
//
// Element is the operands' type: weights, input and output. Accum is the type that kernels compute
// in. They differ for bfloat16 where the machine multiplies it into float32. Weight is the type of
// prepacked weights. It differs from Element for frozen weights alone (cpu/frozen.h).
#pragma once

#include <cstdint>
#include <type_traits>

namespace fusedrnn {

/// bfloat16 as stored: the upper half of a float32.
struct BFloat16 {
  uint16_t bits;
};
/// IEEE 754 binary16 as stored.
struct Float16 {
  uint16_t bits;
};
/// A row of integers with one scale: values quantised from float32.
struct Int16 {
  int16_t value;
};
/// An integer from -128 to 127, plus 128: values quantised from float32, with one scale for a row.
struct UInt8 {
  uint8_t value;
};
/// Weights with a scale for each row block and unit.
struct Int8 {
  int8_t value;
};

/// The type that sums Elements' products.
template <class Element>
using Accumulator = std::conditional_t<sizeof(Element) <= 2, float, Element>;

/// The output's type for operands of type Element.
template <class Element>
using OutputOf = std::conditional_t<std::is_same_v<Element, Int16>, float, Element>;

/// The input's type beside states of type Element. Beside int16 states, kernels choose between
/// int16 and bytes (Common::x_bytes).
template <class Element>
using StoredInput = std::conditional_t<std::is_same_v<Element, Int16>, void, Element>;

/// The largest operand that is multiplied by int8 weights. K products of it and 127 fit an int32:
/// K 1024 allows 16512.
constexpr int32_t largest_operand(int64_t K) {
  return K < 517 ? 32767 : int32_t(INT32_MAX / 127 / K);
}

/// One direction of one layer over some batch rows.
///
/// Rows come longest sequence first, so the rows active at step t are the first active[t]. The
/// reverse direction starts each row at its own last step.
template <class Accum>
struct Sequence {
  int64_t steps = 0, rows = 0;
  int64_t input_size = 0, hidden_size = 0, output_size = 0;
  bool reverse = false;
  const int64_t* row = nullptr;          ///< [rows] index in the batch
  const int64_t* active = nullptr;       ///< [steps] active rows, never increasing
  const int64_t* step_offset = nullptr;  ///< [steps] batch row 0's token

  Accum* workspace = nullptr;  ///< workspace_size elements, 64-byte aligned
};

/// One direction's weights, row-major and contiguous as in torch.nn.LSTM; null where absent.
template <class Element>
struct Weights {
  const Element* ih = nullptr;       ///< [G*H, I]
  const Element* hh = nullptr;       ///< [G*H, P]
  const Element* bias_ih = nullptr;  ///< [G*H]
  const Element* bias_hh = nullptr;  ///< [G*H]
  const Element* hr = nullptr;       ///< [P, H] the projection
};

inline constexpr double kNormEps = 1e-5;  ///< of the layer norms

/// Where a token's saved values lie, in values: the cell's own A*H, then h after the step and c, if
/// they don't follow from the cell's values, and with layer norms the normalised GEMMs, the
/// normalised c, and the reciprocals of the standard deviations of weight_ih x, weight_hh h and c.
struct SavedVariant {
  int64_t h = 0, c = 0, input = 0, hidden = 0, norm_c = 0, rstd = 0, size = 0;
  bool keeps_h = true, keeps_c = true;
  constexpr SavedVariant() = default;
  constexpr SavedVariant(int64_t H, int64_t P, int64_t gates, int64_t saved, bool has_cell_state,
                         bool has_norms, bool keeps_h, bool keeps_c)
      : h(saved * H),
        c(h + keeps_h * P),
        input(c + (has_cell_state && keeps_c) * H),
        hidden(input + has_norms * gates * H),
        norm_c(hidden + has_norms * gates * H),
        rstd(norm_c + (has_norms && has_cell_state) * H),
        size(rstd + has_norms * (2 + has_cell_state)),
        keeps_h(keeps_h),
        keeps_c(keeps_c) {}
};

/// What a direction's steps have beyond the plain cell's (ops.cpp, <cell>_variant); null: none.
template <class Accum>
struct Variant {
  const bool* reset_mask = nullptr;      ///< [N] a token's row begins again before the step
  bool reset_to_initial = false;         ///< from h0 and c0, not from zeros
  const Accum* hidden_mask = nullptr;    ///< [B, P] factors of h as weight_hh's operand
  const bool* candidate_mask = nullptr;  ///< [N, H] false: the candidate is zero
  Accum candidate_scale = 1;             ///< of other candidates
  const bool* zoneout_h_mask = nullptr;  ///< [N, P] true: h stays as before the step
  const bool* zoneout_c_mask = nullptr;  ///< [N, H]
  Accum zoneout_h = 0, zoneout_c = 0;    ///< without a mask: the share of the value before
  bool has_norms = false;                ///< whether the layer norms below are there
  const Accum* norm_ih = nullptr;        ///< [G*H], of weight_ih x
  const Accum* norm_hh = nullptr;        ///< [G*H], of weight_hh h
  const Accum* bias_ih = nullptr;        ///< [G*H], added after the norms; on the CPU
  const Accum* bias_hh = nullptr;
  const Accum* norm_c = nullptr;       ///< [H], of c; cells with a cell state
  const Accum* norm_c_bias = nullptr;  ///< [H]
  int64_t saved_size = 0;              ///< values of a token in `saved`
  SavedVariant saved_at;
  Accum* cells = nullptr;         ///< [N, H] c after each step; cells with a cell state
  const Accum* dcells = nullptr;  ///< its gradient; null: zeros
  int64_t cells_stride = 0;       ///< between tokens, of both
  /// Backward, with layer norms: operands of the GEMMs in the gradients' places, [M, G*H], and the
  /// gradient of the normalised c, [M, H]. Rows are compact.
  Accum* dinput = nullptr;
  Accum* dhidden = nullptr;
  Accum* dnorm_c = nullptr;
  /// On the CPU: [B, 2*G*H (+ 2*H)] each row's part of the gradients of norm_ih, norm_hh, norm_c
  /// and norm_c_bias. A row's sum has one order for any threads.
  Accum* dnorms = nullptr;
  int64_t dnorms_size = 0;
};

template <class Accum, class Element = Accum>
struct Forward : Sequence<Accum> {
  Weights<Element> weights;
  const Accum* panels = nullptr;  ///< from prepack_forward; null: read `weights` in place
  const Accum* projection_panels = nullptr;  ///< weights.hr transposed, from prepack_gemm

  /// Either the input, whose features are contiguous (and even in number for bfloat16), ...
  const StoredInput<Element>* x = nullptr;
  const int64_t* x_offset = nullptr;  ///< [steps] values from x to the step's batch row 0
  int64_t x_row_stride = 0;
  const float* x_scale = nullptr;  ///< [N] scales of a quantised x
  const float* h_scale = nullptr;  ///< [B] scales of an int16 h
  /// ... or, when not null, the GEMM weight_ih x with the biases: [N, G*H].
  const Accum* x_product = nullptr;
  int64_t x_product_stride = 0;    ///< between its rows
  bool panels_have_input = false;  ///< whether the panels hold weight_ih beside an x_product too

  const Accum* h0 = nullptr;  ///< [B, P], null: zeros
  const Accum* c0 = nullptr;  ///< [B, H], null: zeros
  int64_t h0_stride = 0, c0_stride = 0;

  OutputOf<Element>* y = nullptr;  ///< [N, P] with rows y_stride apart
  int64_t y_stride = 0;
  Accum* h_n = nullptr;    ///< [B, P]
  Accum* c_n = nullptr;    ///< [B, H], cells with a cell state only
  Accum* saved = nullptr;  ///< [N, A, H], null: not wanted

  const Variant<Accum>* variant = nullptr;  ///< for a variant's kernels alone
};

template <class Accum>
struct Backward : Sequence<Accum> {
  const Accum* panels = nullptr;  ///< weight_hh from prepack_gemm
  int64_t matrix_stride = 0;      ///< not 0: `panels` is weight_hh itself, rows this far apart
  const Accum* projection_panels = nullptr;  ///< weights.hr from prepack_gemm

  const Accum* h0 = nullptr;  ///< as in Forward
  const Accum* c0 = nullptr;
  int64_t h0_stride = 0, c0_stride = 0;
  const Accum* saved = nullptr;
  const Accum* y = nullptr;  ///< projection only
  int64_t y_stride = 0;

  const Accum* dy = nullptr;  ///< [N, P] with rows dy_stride apart, null: zeros
  int64_t dy_stride = 0;
  const Accum* dh_n = nullptr;  ///< [B, P], null: zeros
  const Accum* dc_n = nullptr;  ///< [B, H], null: zeros

  /// Operands of the weight-gradient GEMMs are compact: M rows, one per valid (step, row), by step,
  /// then by descending length.
  const int64_t* sorted_index = nullptr;    ///< [rows] place among the rows sorted by length
  const int64_t* compact_offset = nullptr;  ///< [steps] sorted row 0's compact row
  Accum* dgates = nullptr;                  ///< [M, S, H] pre-activation gradients
  Accum* h_previous = nullptr;  ///< [M, P] previous step's output, for weight_hh's gradient
  Accum* dr = nullptr;          ///< [M, P] the projected output's gradient; projection only
  Accum* h_raw = nullptr;       ///< [M, H] output before the projection; projection only
  Accum* dh0 = nullptr;         ///< [B, P]
  Accum* dc0 = nullptr;         ///< [B, H], cells with a cell state only

  const Variant<Accum>* variant = nullptr;  ///< for a variant's kernels alone
};

}  // namespace fusedrnn
