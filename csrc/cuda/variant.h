// Variants of a recurrence (ops.cpp, <cell>_variant): a GEMM and a kernel for each step.
#pragma once

#include "tensors.h"

namespace fusedrnn::cuda {

/// Fills `out`, whose tensors are allocated. `saved` may be empty: not wanted.
template <class Element>
void run_forward_variant(const Layer& layer, const LayerVariant& variant,
                         const LaunchContext& context, VariantOutput& out);

/// Fills `out` and, with layer norms and a cell state, dnorm_c [D, N, H] (append_norm_gradients).
/// Their tensors are allocated.
template <class Element>
void run_backward_variant(const Layer& layer, const LayerVariant& variant,
                          const OutputGradients& gradients, const LaunchContext& context,
                          StepGradients& out, const Tensor& dnorm_c);

}  // namespace fusedrnn::cuda
