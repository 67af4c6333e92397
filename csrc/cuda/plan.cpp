#include "plan.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../target.h"
#include "cost.h"
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

/// gridDim.y is at most as large.
constexpr int64_t kMaxGroups = 65535;

/// Whether the kernels' 32-bit counters of steps, rows and tokens suffice.
bool can_count(const PlanProblem& p) {
  return p.rows > 0 && p.rows <= INT32_MAX / 8 && p.rows * p.steps <= INT32_MAX &&
         p.steps * divide_up(p.hidden_size, 16) <= INT32_MAX;
}

/// Finds the cheapest of the plans that this device can run. Of two that cost the same the simpler
/// one is taken: it comes first.
template <class Element>
class Planner {
 public:
  using Kernels = PersistentKernels<Element>;

  Planner(const PlanProblem& problem, Pass pass, const Kernels* kernels)
      : p_(problem),
        kernels_(kernels),
        clusters_of_(!kernels                ? nullptr
                     : pass == Pass::forward ? kernels->forward_clusters
                                             : kernels->backward_clusters),
        shared_of_(!kernels                ? nullptr
                   : pass == Pass::forward ? kernels->forward_shared
                                           : kernels->backward_shared),
        model_(problem, pass, sizeof(Element)) {
    base_.precision = p_.precision;
    base_.half_operands = pass == Pass::forward && p_.is_bounded && sizeof(Element) == 4 &&
                          p_.precision == Precision::tf32;
  }

  LaunchPlan best() {
    if (!p_.requested) consider({});
    if (kernels_ && !p_.has_projection && can_count(p_)) {
      if (allows(Algorithm::persistent_cta)) consider_cta();
      if (allows(Algorithm::persistent_grid)) consider_grids();
      if (allows(Algorithm::persistent_cluster)) consider_clusters();
    }
    best_.prefetches = model_.prefetches(best_);
    return best_;
  }

 private:
  bool allows(Algorithm algorithm) const { return !p_.requested || *p_.requested == algorithm; }

  void consider(const LaunchPlan& plan, int64_t active_clusters = 0) {
    const double us = model_.of(plan, active_clusters).us;
    if (us < best_us_) best_us_ = us, best_ = plan;
  }

  KernelShape shape_of(const LaunchPlan& plan) const {
    return kernel_shape(plan.algorithm, plan.half_registers,
                        plan.half_operands ? 2 : sizeof(Element), plan.few_rows);
  }

  /// A kernel of an algorithm, with as many CTAs a group as the units need; none where they don't
  /// fit its registers.
  std::optional<LaunchPlan> kernel(Algorithm algorithm, bool half_registers, bool few_rows) const {
    LaunchPlan plan = base_;
    plan.algorithm = algorithm;
    plan.half_registers = half_registers;
    plan.few_rows = few_rows;
    const KernelShape shape = shape_of(plan);
    if (p_.hidden_size > shape.max_units) return std::nullopt;
    plan.max_units = shape.max_units;
    plan.ctas = divide_up(p_.hidden_size, shape.cta_units);
    return plan;
  }

  /// Divides the rows. Gives false where the device can't run the plan, or there is no such kernel.
  bool divide(LaunchPlan& plan, int64_t tile_rows) const {
    plan.tile_rows = tile_rows;
    plan.groups = divide_up(p_.rows, tile_rows);
    const int64_t bytes = shared_of_(plan);
    return plan.groups <= kMaxGroups && bytes >= 0 && bytes <= p_.shared_limit;
  }

  /// One CTA for each tile: any number of tiles, no exchange between CTAs.
  /// Example: H = 100, B = 64 in bfloat16, 132 multiprocessors. A row takes a CTA of its own: 64
  /// CTAs by the kernel for few rows. B = 600 takes tiles of 5 rows, as 120 CTAs.
  void consider_cta() {
    for (const bool half : {true, false}) {
      for (const bool few : {true, false}) {
        std::optional<LaunchPlan> plan = kernel(Algorithm::persistent_cta, half, few);
        if (!plan) continue;
        const int64_t most = std::min<int64_t>(p_.rows, shape_of(*plan).max_rows);
        for (int64_t rows = 1; rows <= most; ++rows) {
          if (divide(*plan, rows)) consider(*plan);
        }
      }
    }
  }

  /// Groups of CTAs with 16 units each. All CTAs of the launch must be resident, one on each
  /// multiprocessor. As many groups run as find room: a tile of fewer rows costs less.
  /// Example: H = 512, B = 100, one direction, 132 multiprocessors. A group is 32 CTAs. 4 groups
  /// fit, and each gets 25 rows, rounded up to a tile of 32.
  void consider_grids() {
    for (const bool half : {true, false}) {
      for (const bool few : {false, true}) {
        std::optional<LaunchPlan> plan = kernel(Algorithm::persistent_grid, half, few);
        if (!plan) continue;
        const int64_t groups = p_.multiprocessors / (p_.directions * plan->ctas);
        if (groups == 0) continue;
        const KernelShape shape = shape_of(*plan);
        const int64_t rows = round_up(divide_up(p_.rows, groups), int64_t(shape.chunk_rows));
        if (rows <= shape.max_rows && divide(*plan, rows)) consider(*plan);
      }
    }
  }

  /// Clusters of CTAs with 32 units each. The device tells how many run at the same time, for the
  /// most shared memory that a tile may need. Zero: it refuses them. The first question loads the
  /// kernel, so none is asked for a plan that loses even with room for all its clusters.
  /// Example: H = 256 is 8 CTAs. If 16 clusters are active, B = 70 takes 9 tiles of 8 rows in one
  /// wave, B = 256 takes 16 tiles of 16.
  void consider_clusters() {
    if (p_.capability < 90) return;
    for (const bool half : {true, false}) {
      std::optional<LaunchPlan> plan = kernel(Algorithm::persistent_cluster, half, false);
      if (!plan) continue;
      // PTX defines st.async only in clusters of two CTAs or more.
      plan->ctas = std::max<int64_t>(2, plan->ctas);
      const KernelShape shape = shape_of(*plan);
      int64_t most = shape.max_rows;
      while (most > 0 && !divide(*plan, most)) most -= shape.chunk_rows;
      const LaunchPlan largest = *plan;
      std::optional<int64_t> active;
      most = std::min(most, round_up(p_.rows, int64_t(shape.chunk_rows)));
      for (int64_t rows = shape.chunk_rows; rows <= most; rows += shape.chunk_rows) {
        if (!divide(*plan, rows)) continue;
        if (model_.of(*plan, plan->groups * p_.directions).us >= best_us_) continue;
        if (!active) active = clusters_of_(largest);
        if (*active > 0) consider(*plan, *active);
      }
    }
  }

  const PlanProblem& p_;
  const Kernels* const kernels_;
  int (*const clusters_of_)(const LaunchPlan&);
  int (*const shared_of_)(const LaunchPlan&);
  const CostModel model_;
  LaunchPlan base_, best_;
  double best_us_ = std::numeric_limits<double>::infinity();
};

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

template <class Element>
LaunchPlan plan(const PlanProblem& p, Pass pass, const PersistentKernels<Element>* kernels) {
  if (p.requested == Algorithm::stepwise || p.rows == 0) return {};
  const LaunchPlan plan = Planner<Element>(p, pass, kernels).best();
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
  return plan(problem, Pass::forward, kernels);
}
template <class Element>
LaunchPlan plan_backward(const PlanProblem& problem, const PersistentKernels<Element>* kernels) {
  return plan(problem, Pass::backward, kernels);
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
