// Every cell's kernels as functions, and tables of them by the cell's index in scalar::Cells.
//
// A function launches on `stream`, a cudaStream_t, and returns a cudaError_t. stepwise_kernels.cu,
// fused_step.cu, variant_kernels.cu and persistent_*.cu fill the tables from the cell list.
#pragma once

#include "params.h"
#include "plan.h"

namespace fusedrnn::cuda {

template <class Element>
struct StepKernels {
  int (*forward)(const ForwardStepParams<Element>& params, void* stream);
  int (*backward)(const BackwardStepParams<Element>& params, void* stream);
};
template <class Element>
const StepKernels<Element>& step_kernels(int cell);

/// A forward step with its GEMMs in one kernel.
template <class Element>
using FusedStep = int (*)(const FusedStepParams<Element>& params, void* stream);
template <class Element>
FusedStep<Element> fused_step(int cell);

// These do not depend on the cell.
template <class Element>
int projection_step(const ProjectionStepParams<Element>& params, void* stream);
template <class Element>
int projection_backward_step(const ProjectionBackwardStepParams<Element>& params, void* stream);
template <class Element>
int initial_gradients(const InitialGradientParams<Element>& params, void* stream);
template <class Element>
int mask_padding(const MaskPaddingParams<Element>& params, void* stream);
template <class Element>
int bias_gradients(const BiasGradientParams<Element>& params, void* stream);

template <class Element>
struct VariantKernels {
  int (*forward)(const VariantForwardStepParams<Element>& params, void* stream);
  int (*backward)(const VariantBackwardStepParams<Element>& params, void* stream);
};
template <class Element>
const VariantKernels<Element>& variant_kernels(int cell);

// These do not depend on the cell.
template <class Element>
int variant_input(const VariantInputParams<Element>& params, void* stream);
/// Behind a projection's GEMM, and before it in the backward pass.
template <class Element>
int variant_projection(const VariantOutputParams<Element>& params, void* stream);
template <class Element>
int variant_projection_backward(const VariantGradientParams<Element>& params, void* stream);
/// The launch behind the backward steps.
template <class Element>
int variant_initial_gradients(const VariantBackwardStepParams<Element>& params, void* stream);

int random_mask(const RandomMaskParams& params, void* stream);

/// Writes `count` numbers from host memory to device memory. They travel as a kernel's arguments: a
/// copy could wait for the host, and a captured graph would read host memory that is gone.
int upload(const int64_t* numbers, int64_t count, int64_t* to, void* stream);

template <class Element>
struct PersistentKernels {
  int (*forward)(const PersistentForwardParams<Element>& params, const LaunchPlan& plan,
                 void* stream);
  int (*backward)(const PersistentBackwardParams<Element>& params, const LaunchPlan& plan,
                  void* stream);
  /// How many of a plan's clusters the device runs at the same time; 0: it can't run one.
  int (*forward_clusters)(const LaunchPlan& plan);
  int (*backward_clusters)(const LaunchPlan& plan);
  /// A CTA's bytes of shared memory; negative: there is no such kernel.
  int (*forward_shared)(const LaunchPlan& plan);
  int (*backward_shared)(const LaunchPlan& plan);
};
/// Not for double, which has no persistent kernels.
template <class Element>
const PersistentKernels<Element>& persistent_kernels(int cell);

}  // namespace fusedrnn::cuda
