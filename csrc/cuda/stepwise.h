// The stepwise algorithm: a GEMM and a kernel for each step, for any size and type.
#pragma once

#include "tensors.h"

namespace fusedrnn::cuda {

/// Fills `out`, whose tensors are allocated. `saved` may be empty: not wanted.
template <class Element>
void run_forward_stepwise(const Layer& layer, const LaunchContext& context, LayerOutput& out);

/// Fills `out`, whose tensors are allocated.
template <class Element>
void run_backward_stepwise(const Layer& layer, const OutputGradients& gradients,
                           const LaunchContext& context, StepGradients& out);

}  // namespace fusedrnn::cuda
