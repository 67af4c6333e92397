// Which algorithm a layer runs by, and how its launch is shaped: the only heuristic. No torch here.
//
// A *persistent* kernel runs all steps in one launch and keeps weight_hh in registers. The stepwise
// algorithm is a GEMM and a kernel for each step, for any size and type.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

namespace fusedrnn::cuda {

enum class Algorithm {
  stepwise,
  persistent_cta,      ///< each CTA has all hidden units
  persistent_cluster,  ///< a cluster's CTAs share them, through distributed shared memory
  persistent_grid,     ///< CTAs that are all resident share them, through global memory
};
/// "stepwise", "persistent_cta", ...
const char* name_of(Algorithm algorithm);

/// For GEMMs with float32 operands; the half types have their own.
enum class Precision { ieee, tf32 };

/// How a persistent kernel is launched. The defaults are a stepwise plan.
struct LaunchPlan {
  Algorithm algorithm = Algorithm::stepwise;
  Precision precision = Precision::ieee;
  bool half_registers = false;  ///< half the registers hold all weights, so a step is shorter
  int64_t ctas = 0;             ///< per group
  int64_t groups = 0;           ///< per direction
  int64_t tile_rows = 0;        ///< batch rows per group
  int64_t max_units = 0;        ///< hidden units that the kernel has room for
};

/// All that a plan depends on.
struct PlanProblem {
  int64_t steps = 0, rows = 0, hidden_size = 0, directions = 0;
  bool has_projection = false;
  Precision precision = Precision::ieee;
  int64_t multiprocessors = 0;
  std::optional<Algorithm> requested = {};  ///< by name: it runs or is an error
};

/// FUSEDRNN_CUDA_REGIME=step, alone, cluster or grid requests an algorithm, for tests; empty: none.
/// Throws std::runtime_error on another value.
std::optional<Algorithm> requested_algorithm();

template <class Element>
struct PersistentKernels;  // kernel_table.h

/// `kernels`: for the layer's cell; null if there are none. Throws std::runtime_error if the
/// requested algorithm can't run.
template <class Element>
LaunchPlan plan_forward(const PlanProblem& problem, const PersistentKernels<Element>* kernels);
template <class Element>
LaunchPlan plan_backward(const PlanProblem& problem, const PersistentKernels<Element>* kernels);

/// Whether a stepwise forward step is one kernel, with its GEMMs. Each 8 rows read the weights
/// again, mostly from L2, and multiply on FMA units. Example: H = I = 1024 in bfloat16 are 16 MB of
/// weights, 5 us at 3.3 TB/s. The multiply-adds of 8 rows take 2.3 us on 132 multiprocessors, of 16
/// rows 4.6 us; a GEMM or a kernel more takes 2 us at least. No GPU measurement backs the number
/// yet.
constexpr bool plan_fused_step(int64_t rows, bool has_projection) {
  return rows <= 16 && !has_projection;
}

/// Called before a persistent plan that found no room falls back to stepwise. Throws
/// std::runtime_error if the plan's algorithm was requested by name.
template <class Element>
void check_fallback(const LaunchPlan& plan, const PlanProblem& problem);

// ---- kernel shapes ------------------------------------------------------------------------------

/// A persistent kernel's compile-time sizes. A CTA has `unit_blocks` blocks of 16 hidden units. For
/// each block it has `k_splits` warps that share K. A warp's part is `warp_units` units.
struct KernelShape {
  int unit_blocks, k_splits, warp_units;
  int chunk_rows;  ///< batch rows per GEMM
  constexpr int cta_units() const { return 16 * unit_blocks; }
  constexpr int max_units() const { return k_splits * warp_units; }
};

/// A thread's weights fill 128 registers, or 64 with `half_registers`.
///
/// Example: an LSTM's 128 bfloat16 units in one CTA have 4 * 128 * 128 weights, 128 KB. Its 256
/// threads hold 128 registers of 4 bytes each.
constexpr KernelShape kernel_shape(Algorithm algorithm, bool half_registers,
                                   int64_t element_bytes) {
  const int warp_units = element_bytes == 2 ? 128 : 64;
  if (algorithm == Algorithm::persistent_cta) return {warp_units / 16, 1, warp_units, 8};
  const int units = half_registers ? warp_units / 2 : warp_units;
  // Each CTA of a cluster owns 32 hidden units. K is split over four warps, so a warp holds as many
  // weights as in the single-CTA kernel. With few rows a GEMM, more clusters find room, and each is
  // done sooner.
  return algorithm == Algorithm::persistent_grid ? KernelShape{1, 8, units, 16}
                                                 : KernelShape{2, 4, units, 8};
}

}  // namespace fusedrnn::cuda
