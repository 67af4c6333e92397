// Shared by the backends: an op's checked arguments, and the gradients that are GEMMs over all
// steps at once.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>

#include <array>
#include <vector>

#include "cells.h"
#include "ops.h"
#include "sequence.h"

namespace fusedrnn {

/// A cell's constants (cells.h) as values.
struct CellInfo {
  const char* name;
  int index;  ///< in scalar::Cells
  int64_t gates, preacts, saved;
  std::array<int64_t, 4> hidden_preact;  ///< [gates]
  bool has_cell_state, has_projection, has_candidate, is_bounded;

  /// States that a cell carries from step to step: h, and c if it has one.
  int64_t states() const { return 1 + has_cell_state; }

  template <class Cell>
  static constexpr CellInfo of() {
    CellInfo info{Cell::kName,         scalar::Cells::index_of<Cell>(),
                  Cell::kGates,        Cell::kPreacts,
                  Cell::kSaved,        {},
                  Cell::kHasCellState, Cell::kHasProjection,
                  Cell::kHasCandidate, Cell::kIsBounded};
    for (int g = 0; g < Cell::kGates; ++g) {
      info.hidden_preact[size_t(g)] = Cell::hidden_preact[g];
      // layer_gradients relies on it: the input's pre-activations come first, gate by gate.
      if (Cell::input_preact[g] != g) throw "input_preact must be 0, 1, 2, ...";
    }
    return info;
  }
};

/// The cell with this index in scalar::Cells.
const CellInfo& cell_info(int index);

/// t.to(type), without calling the dispatcher if t has the type already.
inline Tensor in_type(const Tensor& t, at::ScalarType type) {
  return t.scalar_type() == type ? t : t.to(type);
}

/// One direction's weights in the operands' type, contiguous; undefined where absent.
struct DirectionWeights {
  Tensor ih, hh, bias_ih, bias_hh, hr;
};

/// The tensors that a backend's kernels read in the arguments' type; others get compute_type.
/// Operands: input and weights. All: the states too, and the gradients of output and states.
enum class KeepType { none, operands, all };

/// What frozen weights tell of their layer.
struct FrozenSizes {
  int64_t I, H, P, D;
  bool has_bias, has_projection;
};

/// An op's arguments, checked, in the kernels' types.
struct Layer {
  /// Throws on anything outside the contract in ops.cpp. With frozen weights args has none.
  Layer(const CellInfo& cell, const LayerArgs& args, KeepType keep_type = KeepType::none,
        const FrozenSizes* frozen = nullptr);

  const CellInfo& cell;
  at::ScalarType type, compute_type;  ///< the tensors' type; float32 for the half types
  at::ScalarType state_type;          ///< of h0 and c0, and of OutputGradients but `saved`
  int64_t T, B, N, I, H, P, D;
  bool packed, has_bias, has_projection;
  Tensor input;   ///< [T, B, I] or [N, I], features contiguous
  Tensor h0, c0;  ///< [D, B, P], [D, B, H], features contiguous; undefined: zeros
  c10::SmallVector<DirectionWeights, 2> weights;
  std::vector<int64_t> batch_sizes;  ///< packed only
  Tensor lengths;                    ///< [B] int64 contiguous; undefined: all T

  int64_t weights_per_direction() const { return 2 + 2 * has_bias + has_projection; }
  at::TensorOptions options() const { return input.options(); }
  /// The input as [N, its features], contiguous.
  Tensor flat_input() const;
  /// A tensor's shape with `features` per token: [T, B, features] or [N, features].
  std::vector<int64_t> shape(int64_t features) const;

 private:
  void read_batch_sizes(const Tensor& sizes, int64_t rows);
  void read_lengths(const Tensor& lengths, const Tensor& input);
  void read_weights(const Tensor& input, at::TensorList list, at::ScalarType operand_type);
};

/// A variant's arguments, checked, in the kernels' types (ops.cpp). Undefined where absent.
struct LayerVariant {
  /// keeps_states: whether `saved` has the states after each step, also where they follow from the
  /// cell's own values.
  LayerVariant(const Layer& layer, const VariantArgs& args, bool keeps_states);

  Tensor reset_mask, hidden_mask, candidate_mask, zoneout_h_mask, zoneout_c_mask;
  bool reset_to_initial;
  double candidate_scale, zoneout_h, zoneout_c;
  struct Norms {
    Tensor ih, hh, c, c_bias;
  };
  c10::SmallVector<Norms, 2> norms;  ///< a direction's each, or empty
  SavedVariant saved;

  bool has_norms() const { return !norms.empty(); }
  int64_t norms_per_direction(const Layer& layer) const {
    return has_norms() ? 2 + 2 * layer.cell.has_cell_state : 0;
  }
  /// One direction's, without biases, cells and gradients.
  template <class Accum>
  Variant<Accum> of_direction(const Layer& layer, int64_t d) const {
    Variant<Accum> v;
    const auto mask = [&](const Tensor& t, int64_t size) {
      return t.defined() ? t.const_data_ptr<bool>() + d * size : nullptr;
    };
    const auto data = [](const Tensor& t) {
      return t.defined() ? t.const_data_ptr<Accum>() : nullptr;
    };
    v.reset_mask = mask(reset_mask, 0);
    v.reset_to_initial = reset_to_initial;
    if (hidden_mask.defined()) v.hidden_mask = data(hidden_mask) + d * layer.B * layer.P;
    v.candidate_mask = mask(candidate_mask, layer.N * layer.H);
    v.candidate_scale = Accum(candidate_scale);
    v.zoneout_h_mask = mask(zoneout_h_mask, layer.N * layer.P);
    v.zoneout_c_mask = mask(zoneout_c_mask, layer.N * layer.H);
    v.zoneout_h = Accum(zoneout_h);
    v.zoneout_c = Accum(zoneout_c);
    v.has_norms = has_norms();
    v.saved_size = saved.size;
    v.saved_at = saved;
    v.cells_stride = layer.D * layer.H;
    if (has_norms()) {
      const Norms& of = norms[size_t(d)];
      v.norm_ih = data(of.ih);
      v.norm_hh = data(of.hh);
      v.norm_c = data(of.c);
      v.norm_c_bias = data(of.c_bias);
    }
    return v;
  }
};

/// Operands for the weight-gradient GEMMs, all directions, filled by the backward steps. They
/// cover M tokens: all N, or those that layer_gradients is given.
struct GateGradients {
  Tensor dgates;      ///< [D, M, S*H]
  Tensor h_previous;  ///< [D, M, P]
  Tensor dr, h_raw;   ///< [D, M, P], [D, M, H]; with a projection
  /// [D, M, G*H] gradients of the GEMMs with weight_ih and weight_hh; undefined: they are dgates.
  Tensor dinput, dhidden;
};

/// The GEMMs and sums for layer_gradients, from the backend. Matrices are row-major.
struct Gemms {
  virtual ~Gemms() = default;
  /// out = a b, or += with add.
  virtual void multiply(const Tensor& a, const Tensor& b, const Tensor& out, bool add) const = 0;
  /// out = transposed a, b.
  virtual void multiply_transposed(const Tensor& a, const Tensor& b, const Tensor& out) const = 0;
  /// Sums dgates [M, S*H] into the biases' gradients [G*H]; undefined: not wanted.
  virtual void bias_gradients(const Layer& layer, const Tensor& dgates, const Tensor& bias_ih,
                              const Tensor& bias_hh) const;
};

/// A backward op's arguments besides the layer, checked.
struct OutputGradients {
  OutputGradients(const Layer& layer, const BackwardArgs& args);
  OutputGradients(const Layer& layer, const LayerVariant& variant, const VariantBackwardArgs& args);

  Tensor dy;          ///< [T, B, D*P] or [N, D*P], contiguous; undefined: zeros. The others too
  Tensor dh_n, dc_n;  ///< [D, B, P], [D, B, H]
  Tensor output;      ///< as dy; with a projection
  Tensor saved;       ///< [D, N, A, H]; of a variant [D, N, LayerVariant::saved.size]
  Tensor dcells;      ///< of a variant: [T, B, D*H] or [N, D*H]
  std::vector<bool> output_mask;  ///< input, states, weights

 private:
  OutputGradients(const Layer& layer, const OutputGradientArgs& args, const Tensor& saved,
                  c10::IntArrayRef saved_shape);
  void read_mask(const Layer& layer, const c10::List<bool>& mask, int64_t weights);
  Tensor ready(const Layer& layer, const char* name, const Tensor& t, c10::IntArrayRef shape) const;
};

/// Appends the gradients of the layer norms' parameters: sums over the tokens in the order of
/// `gates`. dnorm_c: [D, M, H] gradients of the normalised c. Unwanted ones are empty. `tokens` as
/// in layer_gradients.
void append_norm_gradients(const Layer& layer, const OutputGradients& g,
                           const LayerVariant& variant, const GateGradients& gates,
                           const Tensor& dnorm_c, std::vector<Tensor>& gradients,
                           const Tensor& tokens = {});

/// A backward op's results: GEMMs for the gradients of input and weights, empty tensors for
/// unwanted ones. The backward steps leave `gates`, dh0 [D, B, P] and dc0 [D, B, H]; dc0 is
/// undefined without a cell state. x: [M, I] the input of the tokens that `gates` covers, finite in
/// the padding. `tokens`: [M] int64, their indices, others have no gradient; undefined: all.
LayerGradients layer_gradients(const Layer& layer, const OutputGradients& g,
                               const GateGradients& gates, const Tensor& dh0, const Tensor& dc0,
                               const Tensor& x, const Gemms& gemms, const Tensor& tokens = {});

}  // namespace fusedrnn
