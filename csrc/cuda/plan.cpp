#include "plan.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../target.h"
#include "kernel_table.h"

namespace fusedrnn::cuda {
namespace {

using scalar::divide_up;
using scalar::round_up;

constexpr struct {
  Algorithm algorithm;
  const char *name, *regime;  ///< the regime is a value of FUSEDRNN_CUDA_REGIME
} kAlgorithms[] = {
    {Algorithm::stepwise, "stepwise", "step"},
    {Algorithm::persistent_cta, "persistent_cta", "alone"},
    {Algorithm::persistent_cluster, "persistent_cluster", "cluster"},
    {Algorithm::persistent_grid, "persistent_grid", "grid"},
};

/// A persistent kernel first loads all weights, which does not pay for few steps.
/// Example: 4 steps run stepwise, 5 persistently. No GPU measurement backs this number yet.
constexpr int64_t kFewSteps = 4;

/// Shared memory has room for the operands of as many rows on every device.
constexpr int64_t kMaxGridTileRows = 128;

/// Whether the kernels' 32-bit counters of steps, rows and tokens suffice. gridDim.y is at most
/// 65,535 tiles, which have at least 8 rows.
bool can_count(const PlanProblem& p) {
  return p.rows > 0 && p.rows <= 65535 * 8 && p.rows * p.steps <= INT32_MAX &&
         p.steps * divide_up(p.hidden_size, 16) <= INT32_MAX;
}

/// Whether half the registers hold the layer's weights.
/// Example: the grid's kernels have room for 1024 bfloat16 units, or 512 with half the registers.
/// H = 512 takes the latter, whose GEMM has half the K.
bool fits_half_registers(Algorithm algorithm, int64_t hidden_size, int64_t operand_bytes) {
  return hidden_size <= kernel_shape(algorithm, true, operand_bytes).max_units;
}

/// One CTA per tile of 8 rows: any number of tiles, no exchange between CTAs.
/// Example: H = 100, B = 20 in bfloat16 are 3 CTAs; H = 129 does not fit one CTA's registers.
LaunchPlan plan_cta(const PlanProblem& p, const LaunchPlan& stepwise, int64_t operand_bytes) {
  constexpr Algorithm cta = Algorithm::persistent_cta;
  const bool half = operand_bytes == 2 && stepwise.is_forward &&
                    fits_half_registers(cta, p.hidden_size, operand_bytes);
  const KernelShape shape = kernel_shape(cta, half, operand_bytes);
  if (p.hidden_size > shape.max_units) return {};
  LaunchPlan plan = stepwise;
  plan.algorithm = cta;
  plan.ctas = 1;
  plan.half_registers = half;
  plan.tile_rows =
      std::min<int64_t>(shape.chunk_rows, divide_up(p.rows * p.directions, p.multiprocessors));
  plan.groups = divide_up(p.rows, plan.tile_rows);
  plan.max_units = shape.max_units;
  return plan;
}

/// Groups of CTAs with 16 units each. All CTAs of the launch must be resident, one on each
/// multiprocessor. As many groups run as find room. A tile has 8 rows, or a multiple of 16.
/// Example: H = 512, B = 100, one direction, 132 multiprocessors. A group is 32 CTAs. 4 groups fit,
/// and each gets 25 rows, rounded up to a tile of 32. B = 20 is 3 groups with tiles of 8.
LaunchPlan plan_grid(const PlanProblem& p, const LaunchPlan& stepwise, int64_t operand_bytes) {
  constexpr Algorithm grid = Algorithm::persistent_grid;
  const bool half = fits_half_registers(grid, p.hidden_size, operand_bytes);
  const KernelShape shape = kernel_shape(grid, half, operand_bytes);
  if (p.hidden_size > shape.max_units) return {};
  const int64_t ctas = divide_up(p.hidden_size, shape.cta_units);
  const int64_t max_groups =
      std::min(divide_up(p.rows, shape.chunk_rows), p.multiprocessors / (p.directions * ctas));
  if (max_groups == 0) return {};
  const int64_t group_rows = divide_up(p.rows, max_groups);
  const int64_t tile_rows =
      round_up(group_rows, int64_t(shape.chunk_rows) * (group_rows > shape.chunk_rows ? 2 : 1));
  if (tile_rows > kMaxGridTileRows) return {};
  LaunchPlan plan = stepwise;
  plan.algorithm = grid;
  plan.half_registers = half;
  plan.ctas = ctas;
  plan.groups = divide_up(p.rows, tile_rows);
  plan.tile_rows = tile_rows;
  plan.max_units = shape.max_units;
  return plan;
}

/// Clusters of CTAs with 32 units each. Every device with clusters runs 8 CTAs in one, some run 16.
/// A tile has as many rows as fit 227 KB of shared memory. The bytes received in a backward pass
/// grow with the CTAs. Tiles have fewer rows where that lets all clusters that find room work.
/// Example: H = 256 is 8 CTAs and a tile of up to 64 rows. If 16 clusters are active at once,
/// B = 70 in one direction is divided into 9 tiles of 8 rows.
template <class ActiveClusters>
LaunchPlan plan_cluster(const PlanProblem& p, const LaunchPlan& stepwise, int64_t operand_bytes,
                        const ActiveClusters& active_clusters) {
  constexpr Algorithm cluster = Algorithm::persistent_cluster;
  const bool half = fits_half_registers(cluster, p.hidden_size, operand_bytes);
  const KernelShape shape = kernel_shape(cluster, half, operand_bytes);
  if (p.hidden_size > shape.max_units) return {};
  // PTX defines st.async only between different CTAs: at least two.
  const int64_t ctas = std::max<int64_t>(2, divide_up(p.hidden_size, shape.cta_units));
  const int64_t max_rows = ctas > 8 ? 32 : 64;
  LaunchPlan plan = stepwise;
  plan.algorithm = cluster;
  plan.half_registers = half;
  plan.ctas = ctas;
  plan.groups = divide_up(p.rows, max_rows);
  plan.tile_rows = max_rows;
  plan.max_units = shape.max_units;
  const int64_t active = active_clusters(plan);
  if (active == 0) return {};
  const int64_t groups = std::max<int64_t>(1, active / p.directions);
  plan.tile_rows =
      std::min(max_rows, round_up(divide_up(p.rows, groups), int64_t(shape.chunk_rows)));
  plan.groups = divide_up(p.rows, plan.tile_rows);
  return plan;
}

/// The persistent plan for an algorithm, or for the best; stepwise where there is none.
///
/// One CTA is best wherever the weights fit it. Example: H = 64 in float32 runs in one CTA, H = 65
/// in a grid. Clusters run only on request, until a GPU has shown their gain over the grid.
template <class ActiveClusters>
LaunchPlan plan_persistent(const PlanProblem& p, const LaunchPlan& stepwise, int64_t operand_bytes,
                           const ActiveClusters& active_clusters) {
  if (p.has_projection || !can_count(p)) return {};
  if (p.requested == Algorithm::persistent_cta) return plan_cta(p, stepwise, operand_bytes);
  if (p.requested == Algorithm::persistent_grid) return plan_grid(p, stepwise, operand_bytes);
  if (p.requested == Algorithm::persistent_cluster) {
    return plan_cluster(p, stepwise, operand_bytes, active_clusters);
  }
  const LaunchPlan plan = plan_cta(p, stepwise, operand_bytes);
  return plan.algorithm == Algorithm::persistent_cta ? plan : plan_grid(p, stepwise, operand_bytes);
}

template <class Element>
std::string name_of_type(Precision precision) {
  if constexpr (std::is_same_v<Element, double>) return "Double";
  if constexpr (std::is_same_v<Element, BFloat16>) return "BFloat16";
  if constexpr (std::is_same_v<Element, Float16>) return "Half";
  return precision == Precision::tf32 ? "Float (TF32)" : "Float (IEEE)";
}

template <class Element>
[[noreturn]] void refuse(const PlanProblem& p) {
  const char* const regime = kAlgorithms[int(*p.requested)].regime;
  throw std::runtime_error(
      std::string("FUSEDRNN_CUDA_REGIME=") + regime +
      ": this device can't run a layer so that has " + std::to_string(p.hidden_size) +
      " hidden units, " + std::to_string(p.rows) + " rows and " + std::to_string(p.directions) +
      (p.directions == 1 ? " direction" : " directions") + " in " +
      name_of_type<Element>(p.precision) + (p.has_projection ? " with a projection" : ""));
}

template <class Element, class ActiveClusters>
LaunchPlan plan(const PlanProblem& p, const PersistentKernels<Element>* kernels,
                bool may_have_half_operands, const ActiveClusters& active_clusters) {
  if (p.requested == Algorithm::stepwise || p.rows == 0) return {};
  if (!p.requested && p.steps <= kFewSteps) return {};
  LaunchPlan stepwise;
  stepwise.precision = p.precision;
  stepwise.is_forward = may_have_half_operands;
  stepwise.half_operands = may_have_half_operands && p.is_bounded && sizeof(Element) == 4 &&
                           p.precision == Precision::tf32;
  const int64_t operand_bytes = stepwise.half_operands ? 2 : sizeof(Element);
  const LaunchPlan plan =
      kernels ? plan_persistent(p, stepwise, operand_bytes, active_clusters) : LaunchPlan{};
  if (p.requested && plan.algorithm != *p.requested) refuse<Element>(p);
  return plan;
}

}  // namespace

const char* name_of(Algorithm algorithm) { return kAlgorithms[int(algorithm)].name; }

std::optional<Algorithm> requested_algorithm() {
  const char* const value = std::getenv("FUSEDRNN_CUDA_REGIME");
  const std::string_view regime = value ? value : "";
  if (regime.empty()) return std::nullopt;
  for (const auto& known : kAlgorithms) {
    if (regime == known.regime) return known.algorithm;
  }
  throw std::runtime_error("FUSEDRNN_CUDA_REGIME=" + std::string(regime) +
                           " is none of step, alone, cluster and grid");
}

template <class Element>
LaunchPlan plan_forward(const PlanProblem& problem, const PersistentKernels<Element>* kernels) {
  return plan(problem, kernels, true,
              [&](const LaunchPlan& p) { return kernels->forward_clusters(p); });
}
template <class Element>
LaunchPlan plan_backward(const PlanProblem& problem, const PersistentKernels<Element>* kernels) {
  return plan(problem, kernels, false,
              [&](const LaunchPlan& p) { return kernels->backward_clusters(p); });
}

template <class Element>
void check_fallback(const LaunchPlan& plan, const PlanProblem& problem) {
  if (plan.algorithm != Algorithm::stepwise && problem.requested) refuse<Element>(problem);
}

#define FUSEDRNN_PLANS_OF(Element)                                                          \
  template LaunchPlan plan_forward(const PlanProblem&, const PersistentKernels<Element>*);  \
  template LaunchPlan plan_backward(const PlanProblem&, const PersistentKernels<Element>*); \
  template void check_fallback<Element>(const LaunchPlan&, const PlanProblem&);
FUSEDRNN_PLANS_OF(float)
FUSEDRNN_PLANS_OF(double)
FUSEDRNN_PLANS_OF(BFloat16)
FUSEDRNN_PLANS_OF(Float16)

}  // namespace fusedrnn::cuda
