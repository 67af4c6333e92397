// Batch rows by length, and their tokens.
#pragma once

#include <c10/util/SmallVector.h>

#include <vector>

#include "../layer.h"

namespace fusedrnn::cpu {

using Indices = c10::SmallVector<int64_t, 8>;

/// Batch rows, longest first, and the place of each step.
struct BatchLayout {
  Indices order;        ///< [B] rows by descending length
  Indices active;       ///< [T] active rows per step: a prefix of order
  Indices step_offset;  ///< [T] batch row 0's token

  explicit BatchLayout(const Layer& layer)
      : order(size_t(layer.B)), active(size_t(layer.T), layer.B), step_offset(size_t(layer.T)) {
    for (int64_t t = 0, at = 0; t < layer.T; ++t) {
      step_offset[t] = at;
      if (layer.packed) active[t] = layer.batch_sizes[t];
      at += active[t];
    }
    if (layer.lengths.defined()) {
      sort_by_length(layer);
    } else {
      for (int64_t b = 0; b < layer.B; ++b) order[b] = b;
    }
  }

 private:
  /// A stable counting sort, longest first.
  void sort_by_length(const Layer& layer) {
    const int64_t* length = layer.lengths.const_data_ptr<int64_t>();
    std::vector<int64_t> longer(layer.T + 2, 0);  // [l]: rows of length l, then rows longer than l
    for (int64_t b = 0; b < layer.B; ++b) {
      TORCH_CHECK(length[b] >= 0 && length[b] <= layer.T, "fusedrnn::", layer.cell.name,
                  ": lengths must be from 0 to the sequence length ", layer.T, ", got ", length[b]);
      ++longer[length[b]];
    }
    for (int64_t l = layer.T, sum = 0; l >= 0; --l) {
      sum += longer[l];
      longer[l] = sum - longer[l];
      if (l < layer.T) active[l] = longer[l];
    }
    for (int64_t b = 0; b < layer.B; ++b) order[longer[length[b]]++] = b;
  }
};

/// Valid tokens without padding: step by step, in the layout's row order.
struct CompactTokens {
  Indices step_offset;  ///< [T] each step's first token
  int64_t count = 0;

  explicit CompactTokens(const BatchLayout& layout) : step_offset(layout.active.size()) {
    for (size_t t = 0; t < step_offset.size(); ++t) {
      step_offset[t] = count;
      count += layout.active[t];
    }
  }
};

}  // namespace fusedrnn::cpu
