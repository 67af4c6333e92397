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

/// A forward kernel's traits by tensor cores: 8 warps.
template <Algorithm kAlgorithm, class Cell, class Operand, class Element, bool kHalfRegisters,
          int kChunkRows>
constexpr auto forward_traits() {
  constexpr KernelShape shape = kernel_shape(kAlgorithm, kHalfRegisters, sizeof(Operand));
  constexpr bool is_cta = kAlgorithm == Algorithm::persistent_cta;
  // In a grid each operand comes to one warp alone: loads through L2 cost more than the trade.
  constexpr int splits = is_cta ? 1 : kAlgorithm == Algorithm::persistent_cluster ? 2 : 8;
  constexpr int groups = 8 / splits, blocks = shape.cta_units / (8 * groups);
  using Gemm = FragmentGemm<Operand, Element, blocks * Cell::kGates, shape.max_units / splits>;
  using Work = FragmentTraits<Gemm, Cell::kGates, blocks, groups, splits, kChunkRows, is_cta>;
  if constexpr (is_cta) {
    return Type<CtaTraits<Work>>{};
  } else if constexpr (kAlgorithm == Algorithm::persistent_cluster) {
    return Type<ClusterAllGatherTraits<Work>>{};
  } else {
    return Type<GridTraits<Work, 1>>{};
  }
}

/// The same for the backward kernel of a grid. K is all units' gates.
template <class Cell, class Element, bool kHalfRegisters, int kChunkRows>
constexpr auto grid_backward_traits() {
  constexpr KernelShape shape =
      kernel_shape(Algorithm::persistent_grid, kHalfRegisters, sizeof(Element));
  constexpr int splits = 8, blocks = shape.cta_units / 8;
  using Gemm = FragmentGemm<Element, Element, blocks, shape.max_units * Cell::kGates / splits>;
  using Work = FragmentTraits<Gemm, 1, blocks, 1, splits, kChunkRows, false>;
  return Type<GridTraits<Work, Cell::kGates>>{};
}

/// The traits of a kernel whose partial sums go through shared memory. Gemm<kTiles, kK> is
/// TensorCoreGemm or FmaGemm.
template <Algorithm kAlgorithm, class Cell, bool kBackward, class Element, bool kHalfRegisters,
          int kChunkRows, template <int, int> class Gemm>
constexpr auto partial_sum_traits() {
  constexpr KernelShape shape = kernel_shape(kAlgorithm, kHalfRegisters, sizeof(Element));
  constexpr int results = kBackward ? 1 : Cell::kGates;
  constexpr int parts = kBackward ? Cell::kGates : 1;  // of K
  if constexpr (kAlgorithm == Algorithm::persistent_cta) {
    using G = Gemm<results, shape.max_units * parts>;
    return Type<CtaTraits<PartialSumTraits<G, shape.cta_units / 16, 1, kChunkRows, true>>>{};
  } else if constexpr (kAlgorithm == Algorithm::persistent_grid) {
    using G = Gemm<results, shape.max_units / 8 * parts>;
    return Type<GridTraits<PartialSumTraits<G, 1, 8, kChunkRows, false>, parts>>{};
  } else {
    constexpr int warp_tiles = shape.max_units / (8 * 16);  // 8 warps have all units
    using ScatterGemm = Gemm<warp_tiles, Cell::kGates * kWarp>;
    return Type<ClusterReduceScatterTraits<ScatterGemm, kChunkRows>>{};
  }
}

template <class Element>
struct TensorCore {
  template <int kTiles, int kK>
  using Gemm = TensorCoreGemm<Element, kTiles, kK>;
};

/// Calls f(Type<Traits>) for a plan's kernel by tensor cores; returns -1 where there is none.
template <class Cell, class Operand, class Element, bool kBackward, class F>
int visit_tensor_core_traits(const LaunchPlan& plan, const F& f) {
  const auto call = [&](auto algorithm, auto half_registers, auto rows) {
    if constexpr (!kBackward) {
      return f(forward_traits<algorithm, Cell, Operand, Element, half_registers, rows>());
    } else if constexpr (algorithm == Algorithm::persistent_grid) {
      return f(grid_backward_traits<Cell, Element, half_registers, rows>());
    } else {
      return f(partial_sum_traits<algorithm, Cell, true, Element, half_registers, rows,
                                  TensorCore<Element>::template Gemm>());
    }
  };
  const auto either = [&](auto algorithm, auto rows) {
    return plan.half_registers ? call(algorithm, std::true_type{}, rows)
                               : call(algorithm, std::false_type{}, rows);
  };
  constexpr Constant<8> eight;
  switch (plan.algorithm) {
    case Algorithm::persistent_cta:
      return call(Constant<Algorithm::persistent_cta>{}, std::false_type{}, eight);
    case Algorithm::persistent_grid: {
      constexpr Constant<Algorithm::persistent_grid> grid;
      return plan.tile_rows == 8 ? either(grid, eight) : either(grid, Constant<16>{});
    }
    case Algorithm::persistent_cluster:
      return either(Constant<Algorithm::persistent_cluster>{}, eight);
    default:
      return -1;
  }
}

/// The same for kernels by float32 multiply-adds. Clusters are for tensor cores.
template <class Cell, bool kBackward, class F>
int visit_fma_traits(const LaunchPlan& plan, const F& f) {
  constexpr Algorithm cta = Algorithm::persistent_cta, grid = Algorithm::persistent_grid;
  if (plan.algorithm == cta) {
    return f(partial_sum_traits<cta, Cell, kBackward, float, false, 8, FmaGemm>());
  }
  if (plan.algorithm != grid) return -1;
  const auto either = [&](auto rows) {
    return plan.half_registers
               ? f(partial_sum_traits<grid, Cell, kBackward, float, true, rows, FmaGemm>())
               : f(partial_sum_traits<grid, Cell, kBackward, float, false, rows, FmaGemm>());
  };
  return plan.tile_rows == 8 ? either(Constant<8>{}) : either(Constant<16>{});
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

template <class Element, class... Cell>
const PersistentKernels<Element>& persistent_kernels_of(int cell, scalar::CellList<Cell...>) {
  static constexpr PersistentKernels<Element> table[] = {
      {&launch_persistent<Cell, Element, false, PersistentForwardParams<Element>>,
       &launch_persistent<Cell, Element, true, PersistentBackwardParams<Element>>,
       &active_clusters_of<Cell, Element, false>, &active_clusters_of<Cell, Element, true>}...};
  return table[cell];
}

template <class Element>
const PersistentKernels<Element>& persistent_kernels(int cell) {
  return persistent_kernels_of<Element>(cell, scalar::Cells());
}

}  // namespace fusedrnn::cuda
