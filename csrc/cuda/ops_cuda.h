// The ops on CUDA, for register.cpp and for the tests' emulator.
#pragma once

#include "../ops.h"
#include "plan.h"

namespace torch {
class Library;
}

namespace fusedrnn::cuda {

struct Cuda {
  template <class Cell>
  static LayerOutput forward(const ForwardArgs& args);
  template <class Cell>
  static LayerGradients backward(const BackwardArgs& args);
  template <class Cell>
  static VariantOutput forward_variant(const VariantForwardArgs& args);
  template <class Cell>
  static LayerGradients backward_variant(const VariantBackwardArgs& args);
};

/// Registers every cell's kernels, and _random_mask.
void register_cuda_ops(torch::Library& m);

/// The algorithm of this thread's last forward or backward pass; "none" before the first.
std::string last_algorithm();

}  // namespace fusedrnn::cuda
