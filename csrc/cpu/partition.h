// Splits a layer's work over threads.
#pragma once

#include <c10/util/SmallVector.h>

#include <algorithm>

#include "batch.h"
#include "parallel.h"
#include "plan.h"

namespace fusedrnn::cpu {

/// Splits a layer into runs, each with one direction and some rows. A run's threads share its steps
/// by blocks of units.
class WorkPartition {
 public:
  struct RowGroup {
    int64_t direction;
    Indices row;           ///< in the batch
    Indices sorted_index;  ///< in BatchLayout::order
    Indices active;        ///< [T] the group's active rows
  };
  c10::SmallVector<RowGroup, 4> groups;  ///< one a run
  int64_t members = 1;                   ///< threads per run

  /// Parts begin at multiples of `tile_blocks`. So the tiles, and the bits of their sums, are the
  /// same whether threads share the step or not.
  WorkPartition(const Layer& layer, const BatchLayout& layout, const LayerWork& work,
                bool input_gemm, int64_t blocks, int64_t tile_blocks = 1)
      : blocks_(blocks),
        tile_blocks_(tile_blocks),
        block_tiles_(scalar::divide_up(blocks, tile_blocks)) {
    work_ = layer.B * layer.cell.gates * layer.H * (layer.I + layer.P) * layer.T * layer.D;
    int64_t threads = 1;
    // A single row takes about twice as long a multiplication: it reads a weight for each.
    if (work_ * (layer.B == 1 ? 2 : 1) >= kSharedWork && !in_parallel_region()) {
      threads = std::max<int64_t>(cpu::threads() / layer.D, 1);
    }
    Split split;
    if (threads > 1) split = choose_split(work, input_gemm, threads, caches());
    members = split.members;
    for (int64_t d = 0; d < layer.D; ++d) {
      for (int64_t g = 0; g < split.groups; ++g) add(d, g, split.groups, layout);
    }
  }

  /// Runs every step of every run: step(run, i, block_begin, block_end). With PoolBackoff::Owner
  /// the owner holds this partition and all that step uses.
  template <class F>
  void execute(int64_t steps, const F& step) const {
    if (members == 1 || !PoolBackoff::may_use_pool(work_)) {
      return in_parallel(int64_t(groups.size()), work_, [&](int64_t r) {
        for (int64_t i = 0; i < steps; ++i) step(r, i, 0, blocks_);
      });
    }
    const int64_t runs = int64_t(groups.size());
    const auto part = [this, step](int64_t r, int64_t i, int64_t p) {
      step(r, i, begin_of(p), begin_of(p + 1));
    };
    PoolBackoff::run<TeamsJob<decltype(part)>>(runs * members, runs, members, steps, part);
  }

  /// The member whose part begins with this block.
  int64_t member_of(int64_t block_begin) const {
    return scalar::divide_up(block_begin / tile_blocks_ * members, block_tiles_);
  }

 private:
  /// Adds group `index` of `count`: every count-th row, so each group gets rows of all lengths.
  void add(int64_t direction, int64_t index, int64_t count, const BatchLayout& layout) {
    groups.push_back({direction, {}, {}, {}});
    RowGroup& group = groups.back();
    for (int64_t j = index; j < int64_t(layout.order.size()); j += count) {
      group.row.push_back(layout.order[j]);
      group.sorted_index.push_back(j);
    }
    for (int64_t n : layout.active) {
      group.active.push_back(n > index ? (n - index + count - 1) / count : 0);
    }
  }

  /// A member's first block.
  int64_t begin_of(int64_t member) const {
    return std::min(block_tiles_ * member / members * tile_blocks_, blocks_);
  }

  int64_t blocks_, tile_blocks_, block_tiles_, work_;
};

}  // namespace fusedrnn::cpu
