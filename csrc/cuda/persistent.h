// The persistent algorithms: one kernel runs all steps.
#pragma once

#include "kernel_table.h"
#include "tensors.h"

namespace fusedrnn::cuda {

/// The kernels for a layer's cell; null for a type without persistent kernels.
template <class Element>
const PersistentKernels<Element>* persistent_kernels_for(const Layer& layer) {
  if constexpr (std::is_same_v<Element, double>) {
    return nullptr;
  } else {
    return &persistent_kernels<Element>(layer.cell.index);
  }
}

/// Fills `out`, whose tensors are allocated. False, with nothing launched, if the plan is stepwise
/// or its CTAs find no room.
template <class Element>
bool run_forward_persistent(const Layer& layer, const LaunchPlan& plan,
                            const LaunchContext& context, LayerOutput& out);
template <class Element>
bool run_backward_persistent(const Layer& layer, const OutputGradients& gradients,
                             const LaunchPlan& plan, const LaunchContext& context,
                             StepGradients& out);

}  // namespace fusedrnn::cuda
