// What every backend shares: the checked arguments of an op, and the gradients that are products
// over all steps at once.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>

#include <array>
#include <optional>
#include <vector>

#include "cells.h"

namespace fusedrnn {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

/// The constants of a cell (cells.h) as values.
struct CellInfo {
  const char* name;
  int64_t gates, sums, saved;
  std::array<int64_t, 4> hidden_sum;
  bool has_c;

  template <class Cell>
  static CellInfo of(const char* name) {
    CellInfo info{name, Cell::kGates, Cell::kSums, Cell::kSaved, {}, !Cell::kStateIsOutput};
    // weight_gradients relies on it: the input's sums come first, in the order of the gates.
    static_assert(Cell::input_sum[0] == 0 && Cell::input_sum[1] == 1 && Cell::input_sum[2] == 2 &&
                  Cell::input_sum[Cell::kGates - 1] == Cell::kGates - 1);
    for (int64_t g = 0; g < Cell::kGates; ++g) info.hidden_sum[g] = Cell::hidden_sum[g];
    return info;
  }
};

/// t.to(type), without a call of the dispatcher where there is nothing to convert.
inline Tensor in_type(const Tensor& t, at::ScalarType type) {
  return t.scalar_type() == type ? t : t.to(type);
}

/// Weights of one direction in the type of the kernels' operands, contiguous; undefined where
/// absent.
struct DirectionWeights {
  Tensor ih, hh, bias_ih, bias_hh, hr;
};

/// The arguments of an op, checked, in the types that the kernels want.
struct Layer {
  /// Throws on anything that the contract in ops.cpp does not allow. With keep_type, input and
  /// weights stay in the type that they have; else they are converted to compute_type.
  Layer(const CellInfo& cell, const Tensor& input, const OptionalTensor& h0,
        const OptionalTensor& c0, at::TensorList weights, bool bidirectional,
        const OptionalTensor& batch_sizes, const OptionalTensor& lengths, bool keep_type = false);

  CellInfo cell;
  at::ScalarType type, compute_type;  ///< of the tensors; float32 for the half types
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
  /// The shape of a tensor of `features` for each position: [T, B, features] or [N, features].
  std::vector<int64_t> shape(int64_t features) const;
};

/// Gradients of one direction that the recurrence leaves behind, over M positions: all N of them,
/// or those that weight_gradients is told.
struct DirectionGradients {
  Tensor dsums;       ///< [M, S*H]
  Tensor h_previous;  ///< [M, P]
  Tensor dr, h_raw;   ///< [M, P], [M, H]; with a projection
};

/// The products of weight_gradients, which each backend brings. Matrices are row-major.
struct Products {
  virtual ~Products() = default;
  /// out = a b, or += with add.
  virtual void multiply(const Tensor& a, const Tensor& b, const Tensor& out, bool add) const = 0;
  /// out = transposed a, b.
  virtual void multiply_transposed(const Tensor& a, const Tensor& b, const Tensor& out) const = 0;
};

/// Returns the gradients of the weights, in the order of the op, and sets that of the input if it
/// is wanted, in the input's shape. `output_mask`: of the weights. `positions`: [M] int64, the
/// positions that `directions` are over, and no gradient comes from others; undefined: all.
std::vector<Tensor> weight_gradients(const Layer& layer,
                                     const std::vector<DirectionGradients>& directions,
                                     const std::vector<bool>& output_mask, bool want_input,
                                     Tensor& grad_input, const Products& products,
                                     const Tensor& positions = {});

/// What the backward op got besides the layer, checked.
struct OutputGradients {
  OutputGradients(const Layer& layer, const OptionalTensor& dy, const OptionalTensor& dh_n,
                  const OptionalTensor& dc_n, const OptionalTensor& output, const Tensor& saved,
                  const std::vector<bool>& output_mask);

  Tensor dy;          ///< [T, B, D*P] or [N, D*P], contiguous; undefined: zeros. The others too
  Tensor dh_n, dc_n;  ///< [D, B, P], [D, B, H]
  Tensor output;      ///< as dy; with a projection
  Tensor saved;       ///< [D, N, A, H]
};

}  // namespace fusedrnn
