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

/// A kernel's traits, sized by its shape. Gemm<kTiles, kK> is TensorCoreGemm or FmaGemm.
template <Algorithm kAlgorithm, class Cell, bool kBackward, class Element, bool kHalfRegisters,
          template <int, int> class Gemm>
constexpr auto traits_of() {
  constexpr KernelShape shape = kernel_shape(kAlgorithm, kHalfRegisters, sizeof(Element));
  // An all-gather's sizes.
  constexpr int tiles = kBackward ? 1 : Cell::kGates;
  constexpr int k = shape.warp_units * (kBackward ? Cell::kGates : 1);
  if constexpr (kAlgorithm == Algorithm::persistent_cta) {
    return Type<CtaTraits<Gemm<tiles, k>, shape.unit_blocks, shape.chunk_rows>>{};
  } else if constexpr (kAlgorithm == Algorithm::persistent_grid) {
    return Type<GridTraits<Gemm<tiles, k>, shape.k_splits, shape.chunk_rows>>{};
  } else if constexpr (!kBackward) {
    return Type<ClusterAllGatherTraits<Gemm<tiles, k>, shape.k_splits, shape.chunk_rows>>{};
  } else {
    constexpr int warp_tiles = shape.max_units() / (8 * 16);  // 8 warps have all units
    using ScatterGemm = Gemm<warp_tiles, Cell::kGates * kWarp>;
    return Type<ClusterReduceScatterTraits<ScatterGemm, shape.chunk_rows>>{};
  }
}

template <class Element>
struct TensorCore {
  template <int kTiles, int kK>
  using Gemm = TensorCoreGemm<Element, kTiles, kK>;
};

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
#define FUSEDRNN_TRAITS(algorithm, half_registers, gemm) \
  traits_of<Algorithm::algorithm, Cell, kBackward, Element, half_registers, gemm>()
  if constexpr (sizeof(Element) == 4) {
    if (plan.precision == Precision::ieee) {
      switch (plan.algorithm) {
        case Algorithm::persistent_cta:
          return call(FUSEDRNN_TRAITS(persistent_cta, false, FmaGemm));
        case Algorithm::persistent_grid:
          return plan.half_registers ? call(FUSEDRNN_TRAITS(persistent_grid, true, FmaGemm))
                                     : call(FUSEDRNN_TRAITS(persistent_grid, false, FmaGemm));
        default:
          return -1;  // clusters are for tensor cores
      }
    }
  }
  using Tensor = TensorCore<Element>;
  switch (plan.algorithm) {
    case Algorithm::persistent_cta:
      return call(FUSEDRNN_TRAITS(persistent_cta, false, Tensor::template Gemm));
    case Algorithm::persistent_grid:
      return plan.half_registers
                 ? call(FUSEDRNN_TRAITS(persistent_grid, true, Tensor::template Gemm))
                 : call(FUSEDRNN_TRAITS(persistent_grid, false, Tensor::template Gemm));
    case Algorithm::persistent_cluster:
      return plan.half_registers
                 ? call(FUSEDRNN_TRAITS(persistent_cluster, true, Tensor::template Gemm))
                 : call(FUSEDRNN_TRAITS(persistent_cluster, false, Tensor::template Gemm));
    default:
      return -1;
  }
#undef FUSEDRNN_TRAITS
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
