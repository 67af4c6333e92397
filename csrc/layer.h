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

namespace fusedrnn {

/// A cell's constants (cells.h) as values.
struct CellInfo {
  const char* name;
  int index;  ///< in scalar::Cells
  int64_t gates, preacts, saved;
  std::array<int64_t, 4> hidden_preact;  ///< [gates]
  bool has_cell_state, has_projection, is_bounded;

  /// States that a cell carries from step to step: h, and c if it has one.
  int64_t states() const { return 1 + has_cell_state; }

  template <class Cell>
  static constexpr CellInfo of() {
    CellInfo info{Cell::kName,         scalar::Cells::index_of<Cell>(),
                  Cell::kGates,        Cell::kPreacts,
                  Cell::kSaved,        {},
                  Cell::kHasCellState, Cell::kHasProjection,
                  Cell::kIsBounded};
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

/// Operands for the weight-gradient GEMMs, all directions, filled by the backward steps. They
/// cover M tokens: all N, or those that layer_gradients is given.
struct GateGradients {
  Tensor dgates;      ///< [D, M, S*H]
  Tensor h_previous;  ///< [D, M, P]
  Tensor dr, h_raw;   ///< [D, M, P], [D, M, H]; with a projection
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

  Tensor dy;          ///< [T, B, D*P] or [N, D*P], contiguous; undefined: zeros. The others too
  Tensor dh_n, dc_n;  ///< [D, B, P], [D, B, H]
  Tensor output;      ///< as dy; with a projection
  Tensor saved;       ///< [D, N, A, H]
  std::vector<bool> output_mask;  ///< input, states, weights
};

/// A backward op's results: GEMMs for the gradients of input and weights, empty tensors for
/// unwanted ones. The backward steps leave `gates`, dh0 [D, B, P] and dc0 [D, B, H]; dc0 is
/// undefined without a cell state. x: [M, I] the input of the tokens that `gates` covers, finite in
/// the padding. `tokens`: [M] int64, their indices, others have no gradient; undefined: all.
LayerGradients layer_gradients(const Layer& layer, const OutputGradients& g,
                               const GateGradients& gates, const Tensor& dh0, const Tensor& dc0,
                               const Tensor& x, const Gemms& gemms, const Tensor& tokens = {});

}  // namespace fusedrnn
