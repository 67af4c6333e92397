// The launches of persistent kernels for problems read from the standard input, a line each:
//
//   lstm float32 tf32 forward|backward inference|training H B T steps algorithm \
//     multiprocessors capability shared
//
// T decides the plan, `steps` is the kernel's. `algorithm` is an algorithm's name or "default";
// `shared` is the KiB that a CTA can have. A line of JSON answers each. The plan, the kernel, its
// grid and its arguments are the library's own. Pointers are made up: nothing runs.
#include <cstdint>
#include <cstdio>
#include <iostream>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "cells.h"
#include "cuda/kernel_table.h"
#include "cuda/launch.cuh"

using namespace fusedrnn;
using namespace fusedrnn::cuda;

namespace {

struct Problem {
  std::string cell, type, precision, pass, mode;
  int64_t H = 0, B = 0, T = 0, steps = 0;
  std::string algorithm;
  int64_t multiprocessors = 0, capability = 0, shared = 0;
};

int cluster_multiprocessors = 0;
std::string recorded;

uintptr_t next_pointer = 0;

/// A pointer to memory of its own, aligned as an allocator's.
template <class V>
V* made_up() {
  next_pointer += uintptr_t{1} << 34;
  return reinterpret_cast<V*>(next_pointer);
}

void set_common(PersistentParams& params, const Problem& p, const LaunchPlan& plan) {
  params.steps = int(p.steps);
  params.rows = int(p.B);
  params.hidden_size = int(p.H);
  params.directions = 1;
  params.tile_rows = int(plan.tile_rows);
}

template <class Element>
int launch_forward(const Problem& p, bool has_cell_state, const LaunchPlan& plan,
                   const PersistentKernels<Element>& kernels) {
  using Accum = Accumulator<Element>;
  PersistentForwardParams<Element> params;
  set_common(params, p, plan);
  params.h0_stride = params.c0_stride = params.y_stride = p.H;
  auto& tensors = params.direction[0];
  tensors.weight_hh = made_up<Element>();
  tensors.bias_ih = made_up<Element>();
  tensors.bias_hh = made_up<Element>();
  tensors.x_product = made_up<Accum>();
  tensors.y = made_up<Element>();
  tensors.h_n = made_up<Element>();
  if (has_cell_state) tensors.c_n = made_up<Element>();
  if (p.mode == "training") tensors.saved = made_up<Accum>();
  if (plan.algorithm == Algorithm::persistent_grid) tensors.exchange = made_up<uint32_t>();
  return kernels.forward(params, plan, nullptr);
}

template <class Element>
int launch_backward(const Problem& p, bool has_cell_state, const LaunchPlan& plan,
                    const PersistentKernels<Element>& kernels) {
  using Accum = Accumulator<Element>;
  PersistentBackwardParams<Element> params;
  set_common(params, p, plan);
  params.h0_stride = params.c0_stride = params.dy_stride = p.H;
  auto& tensors = params.direction[0];
  tensors.weight_hh = made_up<Element>();
  tensors.saved = made_up<Accum>();
  tensors.dy = made_up<Element>();
  tensors.dgates = made_up<Element>();
  tensors.h_previous = made_up<Element>();
  tensors.dh0 = made_up<Element>();
  if (has_cell_state) tensors.dc0 = made_up<Element>();
  if (plan.algorithm == Algorithm::persistent_grid) tensors.exchange = made_up<uint32_t>();
  return kernels.backward(params, plan, nullptr);
}

std::optional<Algorithm> algorithm_of(const std::string& name) {
  if (name == "default") return std::nullopt;
  for (const auto algorithm : {Algorithm::stepwise, Algorithm::persistent_cta,
                               Algorithm::persistent_cluster, Algorithm::persistent_grid}) {
    if (name == name_of(algorithm)) return algorithm;
  }
  throw std::runtime_error("no algorithm is named " + name);
}

template <class Element>
std::string answer(const Problem& p, int cell, bool has_cell_state) {
  const bool is_forward = p.pass == "forward";
  PlanProblem problem;
  scalar::Cells::visit(cell, [&](auto of) {
    problem.gates = of.kGates;
    problem.preacts = of.kPreacts;
    problem.saved = of.kSaved;
    problem.is_bounded = of.kIsBounded;
  });
  problem.saves = is_forward && p.mode == "training";
  problem.capability = p.capability;
  problem.shared_limit = 1024 * p.shared;
  problem.steps = p.T;
  problem.rows = p.B;
  problem.hidden_size = p.H;
  problem.directions = 1;
  problem.precision = p.precision == "tf32" ? Precision::tf32 : Precision::ieee;
  problem.multiprocessors = p.multiprocessors;
  problem.requested = algorithm_of(p.algorithm);
  const auto& kernels = persistent_kernels<Element>(cell);
  const LaunchPlan plan = is_forward ? plan_forward<Element>(problem, &kernels)
                                     : plan_backward<Element>(problem, &kernels);
  recorded.clear();
  next_pointer = 0;
  int status = 0;
  if (plan.algorithm != Algorithm::stepwise) {
    status = is_forward ? launch_forward<Element>(p, has_cell_state, plan, kernels)
                        : launch_backward<Element>(p, has_cell_state, plan, kernels);
  }
  if (status) throw std::runtime_error("the launch fails: " + std::to_string(status));
  return "\"algorithm\": \"" + std::string(name_of(plan.algorithm)) + "\", \"launches\": [" +
         recorded + "]";
}

struct Names {
  int index = -1;
  bool has_cell_state = false;
};

template <class... Cell>
Names find_cell(const std::string& name, scalar::CellList<Cell...>) {
  Names found;
  int index = 0;
  ((name == Cell::kName ? void(found = {index, Cell::kHasCellState}) : void(), ++index), ...);
  if (found.index < 0) throw std::runtime_error("no cell is named " + name);
  return found;
}

std::string answer(const Problem& p) {
  if (p.pass != "forward" && p.pass != "backward") throw std::runtime_error("no pass " + p.pass);
  cluster_multiprocessors = p.capability >= 90 ? int(p.multiprocessors) : 0;
  const Names cell = find_cell(p.cell, scalar::Cells());
  if (p.type == "float32") return answer<float>(p, cell.index, cell.has_cell_state);
  if (p.type == "bfloat16") return answer<BFloat16>(p, cell.index, cell.has_cell_state);
  if (p.type == "float16") return answer<Float16>(p, cell.index, cell.has_cell_state);
  throw std::runtime_error("no type is named " + p.type);
}

}  // namespace

namespace fusedrnn::recorder {

void record(const std::string& kernel, const Grid& grid, int threads, const void* arguments,
            size_t bytes) {
  std::ostringstream out;
  out << (recorded.empty() ? "" : ", ") << "{\"kernel\": \"" << kernel
      << "\", \"threads\": " << threads << ", \"grid\": [" << grid.x << ", " << grid.y << ", "
      << grid.z << "], \"cluster\": " << grid.cluster << ", \"shared\": " << grid.shared
      << ", \"params\": \"";
  const auto* const byte = static_cast<const unsigned char*>(arguments);
  for (size_t i = 0; i < bytes; ++i) {
    char digits[3];
    std::snprintf(digits, sizeof(digits), "%02x", byte[i]);
    out << digits;
  }
  out << "\"}";
  recorded += out.str();
}

int clusters_of(const Grid& grid) {
  return grid.cluster < 2 || grid.cluster > 16 ? 0 : cluster_multiprocessors / int(grid.cluster);
}

}  // namespace fusedrnn::recorder

// What the emulator's header declares and its templates use.
Index3 threadIdx, blockIdx, gridDim;
namespace fusedrnn::emulator {
const Settings& settings() {
  static const Settings s;
  return s;
}
size_t add_kernel(const char*) { return 0; }
}  // namespace fusedrnn::emulator

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    Problem p;
    words >> p.cell >> p.type >> p.precision >> p.pass >> p.mode >> p.H >> p.B >> p.T >> p.steps >>
        p.algorithm >> p.multiprocessors >> p.capability >> p.shared;
    try {
      if (!words) throw std::runtime_error("a problem has 13 words, not: " + line);
      const std::string found = answer(p);
      std::cout << "{" << found << "}\n";
    } catch (const std::exception& error) {
      std::cout << "{\"error\": \"" << error.what() << "\"}\n";
    }
  }
}
