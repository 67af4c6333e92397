// What a launch plan costs: cycles and bytes, for plan.cpp. No torch and no CUDA here.
//
// A CTA's step takes the longest of its chain (the latency from one wait to the next) and of the
// bytes it moves: through distributed shared memory, L2 and memory. CTAs that find no room wait for
// the next wave. The call takes launches + waves * (prologue + steps * step).
//
// All figures are in kCoefficients and kDevices, each with its source:
//   [H200] measured on an H200 at 1.98 GHz: results/nvidia_h200_steps.json in benchmarks/
//   [M] modelled from the kernels' machine code, and scaled by neighbours that were measured
//   [P] published
//   [G] guessed
// A measurement replaces a figure there and nowhere else.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../target.h"
#include "plan.h"

namespace fusedrnn::cuda {

/// A device's rates. Those of one architecture are taken to be the same.
struct DeviceRates {
  int64_t capability;      ///< the least compute capability, 10 * major + minor
  double clock_ghz;        ///< nominal
  double l2_bytes_per_ns;  ///< read by all multiprocessors together
  double memory_bytes_per_ns;
  double l2_bytes;           ///< capacity
  double half_flops_per_ns;  ///< cuBLAS's GEMMs by type, far from the peaks
  double tf32_flops_per_ns;
  double ieee_flops_per_ns;
  double double_flops_per_ns;
};

/// By ascending capability: a device has the rates of the last row that it reaches.
constexpr DeviceRates kDevices[] = {
    // A100: clock, memory and capacity [P]; L2 by microbenchmarks [P]; half of the GEMMs' peaks
    // [G].
    {80, 1.41, 4500, 1550, 40e6, 150e3, 75e3, 15e3, 9e3},
    // H100 SXM and H200: clock and L2 [H200], memory [P] of an H100, GEMMs [G].
    {90, 1.98, 7800, 3350, 50e6, 450e3, 220e3, 45e3, 45e3},
    // B200: as two H100s [G].
    {100, 1.85, 10000, 8000, 126e6, 900e3, 450e3, 60e3, 30e3},
};

/// A step's cycles by pass.
struct StepCycles {
  double inference, training, backward;
};

/// A tile's.
struct TileCycles {
  StepCycles one;   ///< a tile of one GEMM
  StepCycles each;  ///< each GEMM of a tile with several, which has its state in shared memory
};

/// The cycles before the first step: for a CTA's start, and for each register of weights.
struct PrologueCycles {
  double start, per_register;
};

constexpr struct Coefficients {
  // ---- persistent kernels: cycles ----
  //
  // An LSTM's in bfloat16, exchanges of a row included. Other types take up to 7 % more [M].
  //
  // Index: [half_registers][few_rows].
  /// One CTA: few rows [H200], others [M]. Its rows don't matter.
  StepCycles cta[2][2] = {{{1510, 1640, 2030}, {1010, 1130, 1445}},
                          {{870, 910, 1370}, {655, 735, 990}}};
  /// A cluster [H200].
  TileCycles cluster[2] = {{{1540, 1640, 1750}, {1800, 1900, 1900}},
                           {{1380, 1480, 1600}, {1500, 1600, 1650}}};
  /// The grid [H200]. With few rows a tile is one GEMM.
  TileCycles grid[2][2] = {{{{2850, 2900, 4400}, {2700, 2750, 4400}}, {{2200, 2240, 2420}, {}}},
                           {{{2850, 2900, 4400}, {2700, 2750, 4400}}, {{2200, 2240, 2420}, {}}}};
  /// More for each CTA of a group, whose words a CTA polls [H200].
  double grid_per_cta = 17;
  /// The part of a chain that does not shrink with a cell's gates [H200].
  double without_gates = 0.75;
  /// float32 multiply-adds: a row of operands by a register of weights in each thread, forward and
  /// backward, of one CTA and of the grid [H200].
  double fma_per_register[2][2] = {{4.2, 6.6}, {4.8, 13}};
  /// Loads of 16 bytes, in batches of 8 or more [M]. Weights that become float16 take a fifth
  /// longer. Then kernels by multiply-adds [M].
  PrologueCycles prologue = {1000, 32}, fma_prologue = {1500, 15};

  // ---- persistent kernels: bytes ----
  /// Distributed shared memory moves so many bytes in a cycle to each multiprocessor, forward and
  /// backward; nothing else goes on meanwhile [H200].
  double cluster_bytes_per_cycle[2] = {8, 14};
  /// A grid's operands from L2 to one multiprocessor, in a cycle [H200].
  double l2_bytes_per_cycle = 16;
  /// A prologue's weights from L2 to one multiprocessor, in a cycle [P].
  double weight_bytes_per_cycle = 64;
  /// A grid's backward pass exchanges G operands a unit [counted in exchange_grid.cuh]. A
  /// reduce-scatter would exchange a quarter.
  double grid_backward_operands = 1;

  // ---- launches: microseconds ----
  /// A launch that waits for the one before it [G].
  double launch_us = 2.5;
  /// A stepwise step, forward and backward: its host's calls of cuBLAS and of one kernel [H200].
  double stepwise_us[2] = {9.5, 12.5};
  /// The same of a step that is one kernel [H200].
  double fused_step_us = 3.7;
} kCoefficients = {};

/// A call's cost by one plan, without the work that all plans share (shared_us).
struct Cost {
  /// What bounds a step.
  enum Bound { launches, chain, cluster_bytes, l2_bytes, memory_bytes, gemm } bound = launches;
  double fixed_us = 0;  ///< launches and prologues
  double step_us = 0;   ///< all waves
  double us = 0;        ///< all of the call
};

/// The costs of a problem's plans. The problem must outlive it.
class CostModel {
 public:
  CostModel(const PlanProblem& problem, Pass pass, int64_t element_bytes)
      : p_(problem), pass_(pass), element_bytes_(element_bytes), device_(kDevices[0]) {
    for (const DeviceRates& rates : kDevices) {
      if (p_.capability >= rates.capability) device_ = rates;
    }
    const double values = double(p_.rows * p_.directions * p_.hidden_size);
    streamed_ =
        is_backward()
            ? values * double(p_.saved * 4 + element_bytes_ + (p_.preacts + 1) * element_bytes_)
            : values * double(p_.gates * 4 + element_bytes_ + (p_.saves ? p_.saved * 4 : 0));
  }

  /// active_clusters: how many of the plan's clusters run at the same time; for clusters alone.
  Cost of(const LaunchPlan& plan, int64_t active_clusters = 0) const {
    return plan.algorithm == Algorithm::stepwise ? of_stepwise()
                                                 : of_persistent(plan, active_clusters);
  }

  /// Whether a plan's kernel asks early for its steps' values. They come from memory where a call
  /// has too many for half of L2: the GEMMs around it have the other half. Asking takes a step 20
  /// to 80 cycles [H200], and up to 30 % of it is gained: a cluster's step at H256, B64 and T500
  /// takes 1.0 us and not 1.37. A value is asked for a chunk ahead anyway, which suffices with many
  /// chunks, and with the long steps of multiply-adds in one CTA.
  bool prefetches(const LaunchPlan& plan) const {
    if (plan.algorithm == Algorithm::stepwise) return false;
    if (plan.algorithm == Algorithm::persistent_cta && uses_fma(plan)) return false;
    const int64_t chunks = scalar::divide_up(plan.tile_rows, int64_t(shape_of(plan).chunk_rows));
    return streamed_ * double(p_.steps) > device_.l2_bytes / 2 && chunks <= (is_backward() ? 2 : 4);
  }

  /// What all plans share: the input's GEMM, or the gradients' GEMMs.
  double shared_us(int64_t input_size) const {
    const double tokens = double(p_.rows * p_.steps), G = double(p_.gates);
    const double H = double(p_.hidden_size), I = double(input_size), D = double(p_.directions);
    // Backward: the gradients of the input, weight_ih, weight_hh and the biases.
    const double flops = 2 * tokens * D * G * H * (is_backward() ? 2 * I + H : I);
    const double gemms = is_backward() ? 4 * D : D;
    return gemms * kCoefficients.launch_us + 1e-3 * flops / flops_per_ns();
  }

 private:
  bool is_backward() const { return pass_ == Pass::backward; }
  double cycles_per_us() const { return 1e3 * device_.clock_ghz; }
  double flops_per_ns() const {
    if (element_bytes_ == 8) return device_.double_flops_per_ns;
    if (element_bytes_ == 2) return device_.half_flops_per_ns;
    return p_.precision == Precision::tf32 ? device_.tf32_flops_per_ns : device_.ieee_flops_per_ns;
  }
  /// Bytes that the whole device reads or writes once in each step: the input's products, saved
  /// values, outputs. They come from L2 only where a call's fit it.
  double streamed_us() const {
    const bool fits = streamed_ * double(p_.steps) <= device_.l2_bytes;
    return 1e-3 * streamed_ / (fits ? device_.l2_bytes_per_ns : device_.memory_bytes_per_ns);
  }

  Cost of_stepwise() const {
    const double D = double(p_.directions), rows = double(p_.rows), H = double(p_.hidden_size);
    const double G = double(p_.gates);
    // A fused step has the input's weights too, taken to be as many, and no GEMM for the input. It
    // reads all of them for each 8 rows, from L2 but for the first time.
    const bool is_fused = !is_backward() && plan_fused_step(p_.rows, p_.has_projection);
    const double weights = D * G * H * H * double(element_bytes_) * (is_fused ? 2 : 1);
    const double rereads = is_fused ? double(scalar::divide_up(p_.rows, int64_t(8)) - 1) : 0;
    // Each step reads all weights. The GEMM's product is written and read, and so is the state.
    const double products = rows * D * H * (is_backward() ? 1 : G) * 8;
    const double states = rows * D * H * double(12 + 2 * element_bytes_);
    const double weights_us =
        1e-3 * weights /
        (weights <= device_.l2_bytes ? device_.l2_bytes_per_ns : device_.memory_bytes_per_ns);
    const double moved_us = weights_us + 1e-3 * rereads * weights / device_.l2_bytes_per_ns +
                            streamed_us() + 1e-3 * (products + states) / device_.l2_bytes_per_ns;
    const double gemm_us = 2e-3 * rows * D * G * H * H / flops_per_ns();
    const double launches_us =
        D * (is_fused ? kCoefficients.fused_step_us : kCoefficients.stepwise_us[is_backward()]);
    Cost cost;
    cost.step_us = launches_us + std::max(moved_us, gemm_us);
    if (std::max(moved_us, gemm_us) > launches_us) {
      cost.bound = moved_us > gemm_us ? Cost::memory_bytes : Cost::gemm;
    }
    cost.us = double(p_.steps) * cost.step_us;
    return cost;
  }

  Cost of_persistent(const LaunchPlan& plan, int64_t active_clusters) const {
    using scalar::divide_up;
    const Coefficients& k = kCoefficients;
    const bool is_grid = plan.algorithm == Algorithm::persistent_grid;
    const bool is_cluster = plan.algorithm == Algorithm::persistent_cluster;
    const int64_t groups = plan.groups * p_.directions;
    const int64_t waves =
        is_grid ? 1 : divide_up(groups, is_cluster ? active_clusters : p_.multiprocessors);
    Cost cost;
    cost.bound = Cost::chain;
    cost.step_us = chain_cycles(plan) / cycles_per_us();
    const auto bound_by = [&](Cost::Bound bound, double us) {
      if (us > cost.step_us) cost.bound = bound, cost.step_us = us;
    };
    const double operand_bytes = plan.half_operands ? 2 : double(element_bytes_);
    const double rows = double(plan.tile_rows);
    if (is_cluster) {
      // Forward every CTA receives h of all units; backward its 32 units' partial dh of each CTA.
      const double received = double(plan.ctas) * 32 * std::min(rows, double(p_.rows)) *
                              (is_backward() ? 4 : operand_bytes);
      const double received_us =
          received / k.cluster_bytes_per_cycle[is_backward()] / cycles_per_us();
      if (received_us > cost.step_us) cost.bound = Cost::cluster_bytes;
      cost.step_us += received_us;
    }
    if (is_grid) {
      const double row_bytes = double(p_.hidden_size) * operand_bytes *
                               (is_backward() ? double(p_.gates) * k.grid_backward_operands : 1);
      // Each CTA reads its group's rows.
      bound_by(Cost::l2_bytes, rows * row_bytes / k.l2_bytes_per_cycle / cycles_per_us());
    }
    cost.step_us *= double(waves);
    bound_by(Cost::memory_bytes, streamed_us());
    const double launches = is_grid ? 2 : 1;  // the grid's memory is zeroed first
    cost.fixed_us = launches * k.launch_us + double(waves) * prologue_us(plan);
    cost.us = cost.fixed_us + double(p_.steps) * cost.step_us;
    return cost;
  }

  bool uses_fma(const LaunchPlan& plan) const {
    return element_bytes_ == 4 && plan.precision == Precision::ieee;
  }

  KernelShape shape_of(const LaunchPlan& plan) const {
    return kernel_shape(plan.algorithm, plan.half_registers,
                        plan.half_operands ? 2 : element_bytes_, plan.few_rows);
  }

  double chain_cycles(const LaunchPlan& plan) const {
    const Coefficients& k = kCoefficients;
    const bool half = plan.half_registers, few = plan.few_rows;
    const auto of_pass = [&](const StepCycles& c) {
      return is_backward() ? c.backward : p_.saves ? c.training : c.inference;
    };
    const int64_t chunk_rows = shape_of(plan).chunk_rows;
    const int64_t rows = std::min(plan.tile_rows, p_.rows);
    const double chunks = double(scalar::divide_up(rows, chunk_rows));
    const auto of_tile = [&](const TileCycles& c) {
      return plan.tile_rows <= chunk_rows ? of_pass(c.one) : chunks * of_pass(c.each);
    };
    double cycles = plan.algorithm == Algorithm::persistent_cta    ? of_pass(k.cta[half][few])
                    : plan.algorithm == Algorithm::persistent_grid ? of_tile(k.grid[half][few])
                                                                   : of_tile(k.cluster[half]);
    cycles *= k.without_gates + (1 - k.without_gates) * double(p_.gates) / 4;
    if (plan.algorithm == Algorithm::persistent_grid) {
      cycles += chunks * k.grid_per_cta * double(plan.ctas);
    }
    if (uses_fma(plan)) {
      cycles += chunks * double(chunk_rows) * weight_registers(plan) *
                k.fma_per_register[plan.algorithm != Algorithm::persistent_cta][is_backward()];
    }
    return cycles;
  }

  /// Of each of 256 threads.
  double weight_registers(const LaunchPlan& plan) const {
    const KernelShape shape = shape_of(plan);
    const double bytes = plan.half_operands ? 2 : double(element_bytes_);
    return double(shape.cta_units * shape.max_units * p_.gates) * bytes / (256 * 4);
  }

  double prologue_us(const LaunchPlan& plan) const {
    const Coefficients& k = kCoefficients;
    const PrologueCycles c = uses_fma(plan) ? k.fma_prologue : k.prologue;
    const double registers = weight_registers(plan);
    // 256 threads load their weights, which float16 operands take from float32.
    const double bytes = 256 * 4 * registers * (plan.half_operands ? 2 : 1);
    const double l2_share = device_.l2_bytes_per_ns / double(p_.multiprocessors);
    return std::max(
        (c.start + c.per_register * registers) / cycles_per_us(),
        1e-3 * bytes / std::min(l2_share, k.weight_bytes_per_cycle * device_.clock_ghz));
  }

  const PlanProblem& p_;
  const Pass pass_;
  const int64_t element_bytes_;
  DeviceRates device_;
  double streamed_;  ///< bytes a step
};

}  // namespace fusedrnn::cuda
