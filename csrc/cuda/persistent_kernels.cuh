// Every cell's persistent kernels for one type: persistent_<type>.cu instantiates the table.
#pragma once

#include "exchange_cluster.cuh"
#include "exchange_cta.cuh"
#include "exchange_grid.cuh"
#include "kernel_table.h"
#include "persistent_backward.cuh"
#include "persistent_forward.cuh"

namespace fusedrnn::cuda {

template <class T>
struct Type {
  using type = T;
};
template <auto kValue>
using Constant = std::integral_constant<decltype(kValue), kValue>;

/// All algorithms, but in tests of one.
constexpr bool is_compiled([[maybe_unused]] Algorithm algorithm) {
#ifdef FUSEDRNN_ONLY
  return algorithm == Algorithm::FUSEDRNN_ONLY;
#else
  return true;
#endif
}

/// A forward kernel's traits by tensor cores: 8 warps.
template <Algorithm kAlgorithm, class Cell, class Operand, class Element, bool kHalfRegisters,
          int kChunkRows, bool kOneChunk>
constexpr auto forward_traits() {
  constexpr KernelShape shape = kernel_shape(kAlgorithm, kHalfRegisters, sizeof(Operand));
  constexpr bool is_cta = kAlgorithm == Algorithm::persistent_cta;
  // In a grid each operand comes to one warp alone: loads through L2 cost more than the trade.
  constexpr int splits = is_cta ? 1 : kAlgorithm == Algorithm::persistent_cluster ? 2 : 8;
  constexpr int groups = 8 / splits, blocks = shape.cta_units / (8 * groups);
  using Gemm = FragmentGemm<Operand, Element, blocks * Cell::kGates, shape.max_units / splits>;
  using Work = FragmentTraits<Gemm, Cell::kGates, blocks, groups, splits, kChunkRows, kOneChunk>;
  if constexpr (is_cta) {
    return Type<CtaTraits<Work>>{};
  } else if constexpr (kAlgorithm == Algorithm::persistent_cluster) {
    return Type<ClusterAllGatherTraits<Work>>{};
  } else {
    return Type<GridTraits<Work, 1>>{};
  }
}

/// A backward kernel's traits by tensor cores: 8 warps.
template <Algorithm kAlgorithm, class Cell, class Element, bool kHalfRegisters, int kChunkRows,
          bool kOneChunk>
constexpr auto backward_traits() {
  constexpr KernelShape shape = kernel_shape(kAlgorithm, kHalfRegisters, sizeof(Element));
  constexpr int gates = Cell::kGates;
  if constexpr (kAlgorithm == Algorithm::persistent_cta) {
    constexpr int blocks = shape.cta_units / (8 * 8);
    using Gemm = TransposedGemm<Element, blocks, shape.max_units * gates>;
    return Type<CtaTraits<FragmentTraits<Gemm, 1, blocks, 8, 1, kChunkRows, true>>>{};
  } else if constexpr (kAlgorithm == Algorithm::persistent_cluster) {
    constexpr int row_groups = shape.max_units / (8 * 8);  // 8 warps have all units
    using Gemm = TransposedGemm<Element, row_groups, gates * kWarp>;
    return Type<ClusterReduceScatterTraits<Gemm, kChunkRows>>{};
  } else {
    constexpr int blocks = shape.cta_units / 8;
    using Gemm = TransposedGemm<Element, blocks, shape.max_units * gates / 8>;
    using Work = FragmentTraits<Gemm, 1, blocks, 1, 8, kChunkRows, kOneChunk>;
    return Type<GridTraits<Work, gates>>{};
  }
}

/// The traits of a kernel by float32 multiply-adds, whose partial sums go through shared memory.
template <Algorithm kAlgorithm, class Cell, bool kBackward, bool kHalfRegisters, int kChunkRows>
constexpr auto fma_traits() {
  constexpr KernelShape shape = kernel_shape(kAlgorithm, kHalfRegisters, sizeof(float));
  constexpr int results = kBackward ? 1 : Cell::kGates;
  constexpr int parts = kBackward ? Cell::kGates : 1;  // of K
  if constexpr (kAlgorithm == Algorithm::persistent_cta) {
    using Gemm = FmaGemm<results, shape.max_units * parts>;
    return Type<CtaTraits<PartialSumTraits<Gemm, shape.cta_units / 16, 1, kChunkRows, true>>>{};
  } else {
    using Gemm = FmaGemm<results, shape.max_units / 8 * parts>;
    return Type<GridTraits<PartialSumTraits<Gemm, 1, 8, kChunkRows, false>, parts>>{};
  }
}

/// Calls f(Type<Traits>) for a plan's kernel by tensor cores; returns -1 where there is none.
template <class Cell, class Operand, class Element, bool kBackward, class F>
int visit_tensor_core_traits(const LaunchPlan& plan, const F& f) {
  const auto call = [&](auto algorithm, auto half_registers, auto rows, auto one_chunk) {
    if constexpr (!is_compiled(algorithm)) {
      return -1;
    } else if constexpr (kBackward) {
      return f(backward_traits<algorithm, Cell, Element, half_registers, rows, one_chunk>());
    } else {
      return f(
          forward_traits<algorithm, Cell, Operand, Element, half_registers, rows, one_chunk>());
    }
  };
  constexpr Constant<8> eight;
  constexpr Constant<16> sixteen;
  const auto of_cta = [&](auto half_registers) {
    constexpr Constant<Algorithm::persistent_cta> cta;
    constexpr int few = kernel_shape(cta, half_registers, sizeof(Operand), true).max_rows;
    return plan.few_rows ? call(cta, half_registers, Constant<few>{}, std::true_type{})
                         : call(cta, half_registers, eight, std::true_type{});
  };
  const auto of_cluster = [&](auto half_registers) {
    constexpr Constant<Algorithm::persistent_cluster> cluster;
    return plan.tile_rows == 8 ? call(cluster, half_registers, eight, std::true_type{})
                               : call(cluster, half_registers, eight, std::false_type{});
  };
  const auto of_grid = [&](auto half_registers) {
    constexpr Constant<Algorithm::persistent_grid> grid;
    if (plan.few_rows) return call(grid, half_registers, eight, std::true_type{});
    return plan.tile_rows == 16 ? call(grid, half_registers, sixteen, std::true_type{})
                                : call(grid, half_registers, sixteen, std::false_type{});
  };
  const auto by_registers = [&](const auto& of) {
    return plan.half_registers ? of(std::true_type{}) : of(std::false_type{});
  };
  switch (plan.algorithm) {
    case Algorithm::persistent_cta:
      // The half types alone have kernels for fewer units.
      if constexpr (sizeof(Operand) == 2) {
        return by_registers(of_cta);
      } else {
        return plan.half_registers ? -1 : of_cta(std::false_type{});
      }
    case Algorithm::persistent_cluster:
      return by_registers(of_cluster);
    case Algorithm::persistent_grid:
      return by_registers(of_grid);
    default:
      return -1;
  }
}

/// The same for kernels by float32 multiply-adds. Clusters are for tensor cores.
template <class Cell, bool kBackward, class F>
int visit_fma_traits(const LaunchPlan& plan, const F& f) {
  const auto call = [&](auto algorithm, auto half_registers, auto rows) {
    if constexpr (is_compiled(algorithm)) {
      return f(fma_traits<algorithm, Cell, kBackward, half_registers, rows>());
    } else {
      return -1;
    }
  };
  constexpr Constant<Algorithm::persistent_cta> cta;
  constexpr Constant<Algorithm::persistent_grid> grid;
  const auto of_grid = [&](auto half_registers) {
    return plan.few_rows ? call(grid, half_registers, Constant<8>{})
                         : call(grid, half_registers, Constant<16>{});
  };
  if (plan.algorithm == cta && !plan.half_registers && !plan.few_rows) {
    return call(cta, std::false_type{}, Constant<8>{});
  }
  if (plan.algorithm != grid) return -1;
  return plan.half_registers ? of_grid(std::true_type{}) : of_grid(std::false_type{});
}

/// Calls f(Type<Kernel>) for a plan's kernel; returns -1 where there is none.
template <class Cell, class Element, bool kBackward, class F>
int visit_kernel(const LaunchPlan& plan, const F& f) {
  const auto call = [&](auto type) {
    using Traits = typename decltype(type)::type;
    if constexpr (kBackward) {
      return f(Type<PersistentBackwardKernel<Cell, Traits>>{});
    } else {
      return f(Type<PersistentForwardKernel<Cell, Traits>>{});
    }
  };
  if constexpr (sizeof(Element) == 4) {
    if (plan.precision == Precision::ieee) return visit_fma_traits<Cell, kBackward>(plan, call);
    if constexpr (Cell::kIsBounded && !kBackward) {
      if (plan.half_operands) {
        return visit_tensor_core_traits<Cell, Float16, Element, kBackward>(plan, call);
      }
    }
  }
  return visit_tensor_core_traits<Cell, Element, Element, kBackward>(plan, call);
}

template <class Kernel>
Grid grid_of(const LaunchPlan& plan, int directions) {
  const typename Kernel::Storage storage(int(plan.tile_rows), int(plan.ctas));
  Grid grid{unsigned(plan.ctas), unsigned(plan.groups), unsigned(directions)};
  grid.shared = size_t(storage.bytes);
  grid.resident = plan.algorithm == Algorithm::persistent_grid;
  grid.cluster = plan.algorithm == Algorithm::persistent_cluster ? unsigned(plan.ctas) : 0;
  return grid;
}

template <class Cell, class Element, bool kBackward, class Params>
int launch_persistent(const Params& params, const LaunchPlan& plan, void* stream) {
  return visit_kernel<Cell, Element, kBackward>(plan, [&](auto type) {
    using Kernel = typename decltype(type)::type;
    Kernel kernel;
    kernel.params = params;
    return launch(kernel, grid_of<Kernel>(plan, params.directions), stream);
  });
}

template <class Cell, class Element, bool kBackward>
int active_clusters_of(const LaunchPlan& plan) {
  const int found = visit_kernel<Cell, Element, kBackward>(plan, [&](auto type) {
    using Kernel = typename decltype(type)::type;
    return active_clusters<Kernel>(grid_of<Kernel>(plan, 1));
  });
  return found > 0 ? found : 0;
}

template <class Cell, class Element, bool kBackward>
int shared_bytes_of(const LaunchPlan& plan) {
  return visit_kernel<Cell, Element, kBackward>(plan, [&](auto type) {
    using Kernel = typename decltype(type)::type;
    return int(grid_of<Kernel>(plan, 1).shared);
  });
}

template <class Element, class... Cell>
const PersistentKernels<Element>& persistent_kernels_of(int cell, scalar::CellList<Cell...>) {
  static constexpr PersistentKernels<Element> table[] = {
      {&launch_persistent<Cell, Element, false, PersistentForwardParams<Element>>,
       &launch_persistent<Cell, Element, true, PersistentBackwardParams<Element>>,
       &active_clusters_of<Cell, Element, false>, &active_clusters_of<Cell, Element, true>,
       &shared_bytes_of<Cell, Element, false>, &shared_bytes_of<Cell, Element, true>}...};
  return table[cell];
}

template <class Element>
const PersistentKernels<Element>& persistent_kernels(int cell) {
  return persistent_kernels_of<Element>(cell, scalar::Cells());
}

}  // namespace fusedrnn::cuda
