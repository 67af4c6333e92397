// Which algorithm a layer runs by, and how its launch is shaped: the only heuristic. No torch here.
//
// A *persistent* kernel runs all steps in one launch and keeps weight_hh in registers. The stepwise
// algorithm is a GEMM and a kernel for each step, for any size and type. The plan with the least
// modelled cost (cost.h) is taken among all that the device can run.
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
  bool half_operands = false;   ///< TF32's products from float16 operands (mma.cuh)
  bool few_rows = false;        ///< a kernel for few rows (kernel_shape)
  int64_t ctas = 0;             ///< per group
  int64_t groups = 0;           ///< per direction
  int64_t tile_rows = 0;        ///< batch rows per group, the last one's may be fewer
  int64_t max_units = 0;        ///< hidden units that the kernel has room for
  bool prefetches = false;      ///< whether a step's values come from memory, not L2
};

/// All that a plan depends on, but the kernels. The device's defaults are an H100's.
struct PlanProblem {
  int64_t steps = 0, rows = 0, hidden_size = 0, directions = 0;
  int64_t gates = 4, preacts = 4, saved = 5;  ///< the cell's
  bool saves = false;                         ///< whether the forward pass stores `saved`
  bool has_projection = false;
  bool is_bounded = false;  ///< |h| is at most 1 in all steps
  Precision precision = Precision::ieee;
  int64_t multiprocessors = 0;
  int64_t capability = 90;                  ///< compute capability, 10 * major + minor
  int64_t shared_limit = 227 * 1024;        ///< bytes of shared memory that a CTA can have
  std::optional<Algorithm> requested = {};  ///< by name: it runs or is an error
};

enum class Pass { forward, backward };

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
/// rows 4.6 us; a GEMM or a kernel more takes 2 us at least. On an H200 a step of 16 rows takes 4
/// us up to H512 and 12.5 at H1024; by a GEMM 64 rows take 10 to 12.
constexpr bool plan_fused_step(int64_t rows, bool has_projection) {
  return rows <= 16 && !has_projection;
}

/// Called before a persistent plan that found no room falls back to stepwise. Throws
/// std::runtime_error if the plan's algorithm was requested by name.
template <class Element>
void check_fallback(const LaunchPlan& plan, const PlanProblem& problem);

// ---- kernel shapes ------------------------------------------------------------------------------

/// A persistent kernel's compile-time sizes, which follow from the bytes of an operand.
struct KernelShape {
  int cta_units;   ///< hidden units per CTA
  int max_units;   ///< of the layer
  int chunk_rows;  ///< batch rows per GEMM
  int max_rows;    ///< per tile
};

/// Steps that the grid's exchange has room for.
constexpr int kExchangeSlots = 8;

/// A thread's weights fill 128 registers, or 64 with `half_registers`. The kernels for few rows:
/// one CTA's for tiles of at most 2 rows, or 4 with 64 units; the grid's with GEMMs of 8 rows.
///
/// Example: an LSTM's 128 bfloat16 units in one CTA have 4 * 128 * 128 weights, 128 KB. Its 256
/// threads hold 128 registers of 4 bytes each.
constexpr KernelShape kernel_shape(Algorithm algorithm, bool half_registers, int64_t operand_bytes,
                                   bool few_rows = false) {
  const int units = (operand_bytes == 2 ? 128 : 64) / (half_registers ? 2 : 1);
  if (algorithm == Algorithm::persistent_cta) return {units, units, 8, few_rows ? 256 / units : 8};
  // With few rows a GEMM, more clusters find room, and each is done sooner.
  return algorithm == Algorithm::persistent_grid
             ? KernelShape{16, 8 * units, few_rows ? 8 : 16, few_rows ? 8 : 128}
             : KernelShape{32, 4 * units, 8, 64};
}

}  // namespace fusedrnn::cuda
