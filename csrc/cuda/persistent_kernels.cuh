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

/// A forward kernel's traits by tensor cores: 8 warps.
template <Algorithm kAlgorithm, class Cell, class Operand, class Element, bool kHalfRegisters>
constexpr auto forward_traits() {
  constexpr KernelShape shape = kernel_shape(kAlgorithm, kHalfRegisters, sizeof(Operand));
  constexpr bool is_cta = kAlgorithm == Algorithm::persistent_cta;
  constexpr int splits = is_cta ? 1 : kAlgorithm == Algorithm::persistent_cluster ? 2 : 4;
  constexpr int groups = 8 / splits, blocks = shape.cta_units / (8 * groups);
  using Gemm = FragmentGemm<Operand, Element, blocks * Cell::kGates, shape.max_units / splits>;
  using Work = FragmentTraits<Gemm, Cell::kGates, blocks, groups, splits, shape.chunk_rows, is_cta>;
  if constexpr (is_cta) {
    return Type<CtaTraits<Work>>{};
  } else if constexpr (kAlgorithm == Algorithm::persistent_cluster) {
    return Type<ClusterAllGatherTraits<Work>>{};
  } else {
    return Type<GridTraits<Work>>{};
  }
}

/// The traits of a kernel whose partial sums go through shared memory. Gemm<kTiles, kK> is
/// TensorCoreGemm or FmaGemm.
template <Algorithm kAlgorithm, class Cell, bool kBackward, class Element, bool kHalfRegisters,
          template <int, int> class Gemm>
constexpr auto partial_sum_traits() {
  constexpr KernelShape shape = kernel_shape(kAlgorithm, kHalfRegisters, sizeof(Element));
  constexpr int results = kBackward ? 1 : Cell::kGates;
  constexpr int parts = kBackward ? Cell::kGates : 1;  // of K
  if constexpr (kAlgorithm == Algorithm::persistent_cta) {
    using G = Gemm<results, shape.max_units * parts>;
    return Type<CtaTraits<PartialSumTraits<G, shape.cta_units / 16, 1, shape.chunk_rows, true>>>{};
  } else if constexpr (kAlgorithm == Algorithm::persistent_grid) {
    using G = Gemm<results, shape.max_units / 8 * parts>;
    return Type<GridTraits<PartialSumTraits<G, 1, 8, shape.chunk_rows, false>>>{};
  } else {
    constexpr int warp_tiles = shape.max_units / (8 * 16);  // 8 warps have all units
    using ScatterGemm = Gemm<warp_tiles, Cell::kGates * kWarp>;
    return Type<ClusterReduceScatterTraits<ScatterGemm, shape.chunk_rows>>{};
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
  if (plan.few_rows) return -1;
  const auto call = [&](auto algorithm, auto half_registers) {
    if constexpr (kBackward) {
      return f(partial_sum_traits<algorithm, Cell, true, Element, half_registers,
                                  TensorCore<Element>::template Gemm>());
    } else {
      return f(forward_traits<algorithm, Cell, Operand, Element, half_registers>());
    }
  };
  const auto either = [&](auto algorithm) {
    return plan.half_registers ? call(algorithm, std::true_type{})
                               : call(algorithm, std::false_type{});
  };
  switch (plan.algorithm) {
    case Algorithm::persistent_cta:
      return plan.half_registers
                 ? -1
                 : call(std::integral_constant<Algorithm, Algorithm::persistent_cta>{},
                        std::false_type{});
    case Algorithm::persistent_grid:
      return either(std::integral_constant<Algorithm, Algorithm::persistent_grid>{});
    case Algorithm::persistent_cluster:
      return either(std::integral_constant<Algorithm, Algorithm::persistent_cluster>{});
    default:
      return -1;
  }
}

/// The same for kernels by float32 multiply-adds. Clusters are for tensor cores.
template <class Cell, bool kBackward, class F>
int visit_fma_traits(const LaunchPlan& plan, const F& f) {
  constexpr Algorithm cta = Algorithm::persistent_cta, grid = Algorithm::persistent_grid;
  if (plan.few_rows) return -1;
  if (plan.algorithm == cta && !plan.half_registers) {
    return f(partial_sum_traits<cta, Cell, kBackward, float, false, FmaGemm>());
  }
  if (plan.algorithm != grid) return -1;
  return plan.half_registers
             ? f(partial_sum_traits<grid, Cell, kBackward, float, true, FmaGemm>())
             : f(partial_sum_traits<grid, Cell, kBackward, float, false, FmaGemm>());
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
