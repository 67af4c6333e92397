// A layer's forward and backward pass on the CPU, and their shared run set-up.
#pragma once

#include <c10/util/SmallVector.h>

#include <algorithm>
#include <optional>

#include "frozen.h"
#include "partition.h"
#include "scratch.h"

namespace fusedrnn::cpu {

/// In forward.cpp, for Element = float, double, BFloat16.
template <class Element>
LayerOutput forward(const Layer& layer, bool save);

/// A variant's, for Element = float, double.
template <class Element>
VariantOutput forward_variant(const Layer& layer, const LayerVariant& variant, bool save);

/// With frozen weights, packed for this machine; without `saved`. An odd number of features of the
/// input is padded by a zero for bfloat16 weights.
LayerOutput forward_frozen(const Layer& layer, const FrozenWeights& weights);

/// In backward.cpp, for Accum = float, double.
template <class Accum>
LayerGradients backward(const Layer& layer, const OutputGradients& g);

/// A variant's. The norms' gradients follow the weights'.
template <class Accum>
LayerGradients backward_variant(const Layer& layer, const OutputGradients& g,
                                const LayerVariant& variant);

/// A partition's runs with their workspaces. Run: Forward or Backward (sequence.h).
template <class Run>
class Runs {
 public:
  using Accum = std::remove_const_t<std::remove_pointer_t<decltype(Run::h0)>>;

  /// Sets each run's sequence and initial states; set(run, group) sets the rest. Then allocates the
  /// workspaces and begins each run.
  template <class Begin, class Set>
  Runs(const Layer& layer, const BatchLayout& layout, const WorkPartition& partition,
       int64_t (*workspace_size)(const Sequence<Accum>&), const Begin& begin, const Set& set)
      : runs_(partition.groups.size()) {
    int64_t size = 0;
    for (size_t r = 0; r < runs_.size(); ++r) {
      const WorkPartition::RowGroup& group = partition.groups[r];
      set_sequence(runs_[r], layer, layout, group);
      set_initial_states(runs_[r], layer, group.direction);
      set(runs_[r], group);
      size = std::max(size, workspace_size(runs_[r]));
    }
    workspace_.emplace(int64_t(runs_.size()), size);
    for (size_t r = 0; r < runs_.size(); ++r) {
      runs_[r].workspace = (*workspace_)[int64_t(r)];
      begin(runs_[r]);
    }
  }
  const Run& operator[](int64_t r) const { return runs_[size_t(r)]; }

 private:
  static void set_sequence(Sequence<Accum>& s, const Layer& layer, const BatchLayout& layout,
                           const WorkPartition::RowGroup& group) {
    s.steps = layer.T;
    s.rows = int64_t(group.row.size());
    s.input_size = layer.I;
    s.hidden_size = layer.H;
    s.output_size = layer.P;
    s.reverse = group.direction == 1;
    s.row = group.row.data();
    s.active = group.active.data();
    s.step_offset = layout.step_offset.data();
  }
  static void set_initial_states(Run& s, const Layer& layer, int64_t d) {
    if (layer.h0.defined()) {
      s.h0 = layer.h0.const_data_ptr<Accum>() + d * layer.h0.stride(0);
      s.h0_stride = layer.h0.stride(1);
    }
    if (layer.c0.defined()) {
      s.c0 = layer.c0.const_data_ptr<Accum>() + d * layer.c0.stride(0);
      s.c0_stride = layer.c0.stride(1);
    }
  }

  c10::SmallVector<Run, 4> runs_;
  std::optional<Scratch<Accum>> workspace_;
};

}  // namespace fusedrnn::cpu
