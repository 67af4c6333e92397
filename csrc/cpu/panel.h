// The layout of a unit block's panel: its bias, scales and weights, in bytes.
//
// A block has L units, a cell G gates and S pre-activations. A panel is
//   bias       [S][L]     accumulators
//   scales     [2][G][L]  float32, weight_ih's and weight_hh's; int8 weights only
//   sums       [2][G][L]  int32, of each unit's weights; int8, four in a lane
//   weight_ih  [K][G][L]  panel lanes, K = rows(I)
//   weight_hh  [K][G][L]  panel lanes, K = rows(P)
// A panel lane holds `per_lane` neighbours along K of one unit. Operands of four to a lane are
// unsigned: the input's integers plus 128, the states' plus 32768. A product is then too large by
// 128 or 32768 times the sum of its weights.
#pragma once

#include <cstdint>

#include "../target.h"

namespace fusedrnn::FUSEDRNN_TARGET {

struct PanelLayout {
  int64_t units, gates, preacts;  ///< L, G, S
  int64_t lane_bytes, per_lane;   ///< of a panel lane
  int64_t accumulator_bytes;      ///< of a bias
  bool has_scales;

  FUSEDRNN_INLINE constexpr int64_t rows(int64_t K) const { return divide_up(K, per_lane); }
  FUSEDRNN_INLINE constexpr int64_t row_bytes() const { return gates * units * lane_bytes; }
  FUSEDRNN_INLINE constexpr int64_t scales_offset() const {
    return preacts * units * accumulator_bytes;
  }
  /// Of the sums, where there are any.
  FUSEDRNN_INLINE constexpr int64_t sums_offset() const {
    return scales_offset() + (has_scales ? 2 * gates * units * int64_t(sizeof(float)) : 0);
  }
  FUSEDRNN_INLINE constexpr bool has_sums() const { return per_lane == 4; }
  /// Of weight_ih.
  FUSEDRNN_INLINE constexpr int64_t weights_offset() const {
    return sums_offset() + (has_sums() ? 2 * gates * units * int64_t(sizeof(int32_t)) : 0);
  }
  FUSEDRNN_INLINE constexpr int64_t size(int64_t I, int64_t P) const {
    return weights_offset() + (rows(I) + rows(P)) * row_bytes();
  }
};

}  // namespace fusedrnn::FUSEDRNN_TARGET
