// Frozen weights: a layer's weights prepacked once, in one tensor of bytes.
//
// The tensor is a header, then for each direction its parts, each padded to 64 bytes:
//   panels        [blocks] of panel.h
//   projection    [H, P] float32 as prepack_gemm has it, with a projection
//   biases        [2][G*H] float32, bias_ih and bias_hh as they were, for unfreeze
#pragma once

#include <string>
#include <vector>

#include "../layer.h"
#include "kernel_table.h"
#include "panel.h"

namespace fusedrnn::cpu {

enum class WeightType : int32_t { float32, bfloat16, int8 };

/// A view of a tensor of frozen weights.
class FrozenWeights {
 public:
  /// Throws if the tensor is not one of freeze()'s. Keeps a reference to it.
  explicit FrozenWeights(const Tensor& packed);

  const CellInfo& cell() const { return cell_info(header_.cell); }
  WeightType type() const { return WeightType(header_.type); }
  /// Units in a panel's block.
  int64_t block_units() const { return header_.block_units; }
  /// Whether the kernels of this table can read the panels.
  bool fits(const KernelTable& table) const;
  const FrozenSizes& sizes() const { return header_.sizes; }

  const float* panels(int64_t d) const { return reinterpret_cast<const float*>(at(d, 0)); }
  /// Null without a projection.
  const float* projection(int64_t d) const {
    return sizes().has_projection ? reinterpret_cast<const float*>(at(d, panels_bytes())) : nullptr;
  }
  /// The weights as an op takes them, in float32.
  std::vector<Tensor> unfreeze() const;

 private:
  struct Header {
    char magic[8];
    int32_t version, cell, type, block_units, int8_per_lane;
    FrozenSizes sizes;
  };
  friend Tensor freeze(const CellInfo& cell, at::TensorList weights, bool bidirectional,
                       WeightType type, const KernelTable& table);
  explicit FrozenWeights(const Header& header) : header_(header) {}

  scalar::PanelLayout layout() const;
  int64_t blocks() const { return scalar::divide_up(sizes().H, block_units()); }
  int64_t panels_bytes() const;
  int64_t projection_bytes() const;
  int64_t direction_bytes() const;
  int64_t bytes() const;
  /// The bytes of direction d's parts from `offset` on.
  unsigned char* at(int64_t d, int64_t offset) const;

  /// Where unit `unit` lies in vector `vector` of a panel's biases, scales or sums, which begin at
  /// `offset`: bytes from the first panel.
  int64_t place(int64_t offset, int64_t vector, int64_t unit) const;
  /// Calls f(byte offset in direction d's parts, row of the matrix, k) for every weight of
  /// weight_ih (matrix 0) or weight_hh (1).
  template <class F>
  void for_each_weight(int matrix, const F& f) const;

  Header header_;
  Tensor packed_;
};

/// Packs weights (ops.cpp) for the kernels of this table.
Tensor freeze(const CellInfo& cell, at::TensorList weights, bool bidirectional, WeightType type,
              const KernelTable& table);

}  // namespace fusedrnn::cpu
