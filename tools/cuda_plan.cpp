// csrc/cuda/plan.h for Python (cuda_plan.py): plans and their costs, without torch, CUDA or a GPU.
#include <cstring>
#include <exception>
#include <string>

#include "cost.h"
#include "persistent_kernels.cuh"

using namespace fusedrnn;
using namespace fusedrnn::cuda;

extern "C" {

/// cuda_plan.Problem, field by field.
struct Request {
  int64_t cell, element_bytes, is_bfloat16, is_backward, requested;  ///< requested: -1, none
  int64_t steps, rows, hidden_size, directions, saves, has_projection, is_bounded, is_tf32;
  int64_t multiprocessors, capability, shared_limit;
  int64_t active_clusters[17];  ///< by size
};
/// cuda_plan.Plan.
struct Launch {
  int64_t algorithm, half_registers, half_operands, few_rows, ctas, groups, tile_rows, max_units;
};
/// cuda_plan.Cost.
struct Costs {
  double fixed_us, step_us, us;
  int64_t bound;
};
}

namespace {

thread_local const Request* request;
thread_local std::string error;

int active_clusters_of_size(const LaunchPlan& plan) {
  return plan.ctas <= 16 ? int(request->active_clusters[plan.ctas]) : 0;
}

PlanProblem problem_of(const Request& r) {
  PlanProblem p;
  p.steps = r.steps;
  p.rows = r.rows;
  p.hidden_size = r.hidden_size;
  p.directions = r.directions;
  scalar::Cells::visit(int(r.cell), [&](auto cell) {
    p.gates = cell.kGates;
    p.preacts = cell.kPreacts;
    p.saved = cell.kSaved;
    p.is_bounded = r.is_bounded && cell.kIsBounded;
  });
  p.saves = r.saves;
  p.has_projection = r.has_projection;
  p.precision = r.is_tf32 ? Precision::tf32 : Precision::ieee;
  p.multiprocessors = r.multiprocessors;
  p.capability = r.capability;
  p.shared_limit = r.shared_limit;
  if (r.requested >= 0) p.requested = Algorithm(r.requested);
  return p;
}

template <class Cell, class Element>
constexpr PersistentKernels<Element> kernels_of() {
  return {nullptr,
          nullptr,
          active_clusters_of_size,
          active_clusters_of_size,
          shared_bytes_of<Cell, Element, false>,
          shared_bytes_of<Cell, Element, true>};
}

/// Calls f(element, kernels) for the request's type; the kernels are null for double.
template <class F>
void visit_kernels(const Request& r, const F& f) {
  request = &r;
  scalar::Cells::visit(int(r.cell), [&](auto cell) {
    using Cell = decltype(cell);
    const auto with = [&](auto element) {
      const auto kernels = kernels_of<Cell, decltype(element)>();
      f(element, &kernels);
    };
    if (r.element_bytes == 8) {
      f(double{}, static_cast<const PersistentKernels<double>*>(nullptr));
    } else if (r.element_bytes == 4) {
      with(float{});
    } else if (r.is_bfloat16) {
      with(BFloat16{});
    } else {
      with(Float16{});
    }
  });
}

LaunchPlan plan_of(const Request& r, const Launch& l) {
  LaunchPlan plan;
  plan.algorithm = Algorithm(l.algorithm);
  plan.precision = r.is_tf32 ? Precision::tf32 : Precision::ieee;
  plan.half_registers = l.half_registers;
  plan.half_operands = l.half_operands;
  plan.few_rows = l.few_rows;
  plan.ctas = l.ctas;
  plan.groups = l.groups;
  plan.tile_rows = l.tile_rows;
  plan.max_units = l.max_units;
  return plan;
}
Pass pass_of(const Request& r) { return r.is_backward ? Pass::backward : Pass::forward; }

}  // namespace

extern "C" {

/// Gives an error's text, or null.
const char* fusedrnn_plan(const Request* r, Launch* to) {
  error.clear();
  try {
    visit_kernels(*r, [&](auto, auto* kernels) {
      const PlanProblem problem = problem_of(*r);
      const LaunchPlan plan =
          r->is_backward ? plan_backward(problem, kernels) : plan_forward(problem, kernels);
      *to = {int64_t(plan.algorithm), plan.half_registers, plan.half_operands,
             plan.few_rows,           plan.ctas,           plan.groups,
             plan.tile_rows,          plan.max_units};
    });
  } catch (const std::exception& e) {
    error = e.what();
  }
  return error.empty() ? nullptr : error.c_str();
}

void fusedrnn_cost(const Request* r, const Launch* launch, Costs* to) {
  const PlanProblem problem = problem_of(*r);
  const LaunchPlan plan = plan_of(*r, *launch);
  const int64_t active =
      plan.algorithm == Algorithm::persistent_cluster ? r->active_clusters[plan.ctas] : 0;
  const Cost cost = CostModel(problem, pass_of(*r), r->element_bytes).of(plan, active);
  *to = {cost.fixed_us, cost.step_us, cost.us, int64_t(cost.bound)};
}

/// The work that all plans share.
double fusedrnn_shared_us(const Request* r, int64_t input_size) {
  const PlanProblem problem = problem_of(*r);
  return CostModel(problem, pass_of(*r), r->element_bytes).shared_us(input_size);
}

/// A CTA's shared memory; negative: there is no such kernel.
int64_t fusedrnn_shared_bytes(const Request* r, const Launch* launch) {
  int64_t bytes = -1;
  visit_kernels(*r, [&](auto, auto* kernels) {
    if (!kernels) return;
    const LaunchPlan plan = plan_of(*r, *launch);
    bytes = r->is_backward ? kernels->backward_shared(plan) : kernels->forward_shared(plan);
  });
  return bytes;
}
}
