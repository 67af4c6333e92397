// A forward step with its GEMMs in one kernel, for a few rows. The weights are read once, which
// bounds the time.
#include "kernel_table.h"
#include "rows.cuh"

namespace fusedrnn::cuda {
namespace {

constexpr int kLanes = 32;

/// Sums [R, S] values over a warp's lanes, in a fixed order. Afterwards lane i has row
/// i / (kLanes / R)'s sums as its first S values. R is N / S.
template <int S, int N, int kMask = kLanes / 2, class Accum, int kSize>
FUSEDRNN_DEVICE void sum_over_lanes(Accum (&sums)[kSize], int lane) {
  if constexpr (kMask > 0) {
    if constexpr (N > S) {  // half of the lanes take the upper half of the rows
      const bool upper = lane & kMask;
      unroll<N / 2>([&](auto i) {
        const Accum own = upper ? sums[i + N / 2] : sums[i];
        const Accum other = upper ? sums[i] : sums[i + N / 2];
        sums[i] = own + shuffle_xor(other, kMask);
      });
      sum_over_lanes<S, N / 2, kMask / 2>(sums, lane);
    } else {
      unroll<S>([&](auto i) { sums[i] += shuffle_xor(sums[i], kMask); });
      sum_over_lanes<S, N, kMask / 2>(sums, lane);
    }
  }
}

/// A warp has a hidden unit in R rows. Its lanes share K.
template <class Cell, class Element, int R>
struct FusedStepKernel {
  static constexpr int kThreads = 128, kUnits = kThreads / kLanes;
  static constexpr int S = Cell::kPreacts, G = Cell::kGates;
  /// Accesses of 16 bytes.
  static constexpr int kWide = 16 / sizeof(Element);
  using Accum = Accumulator<Element>;
  FusedStepParams<Element> p;
  bool x_is_wide, h_is_wide;  ///< whether the GEMM's operands allow wide accesses

  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    const int lane = threadIdx.x % kLanes;
    const int64_t u = int64_t(blockIdx.x) * kUnits + threadIdx.x / kLanes;
    if (u >= p.hidden_size) return;
    // The inputs of the row that this lane's sums will belong to.
    constexpr int lanes_per_row = kLanes / R;
    const int64_t first_row = int64_t(blockIdx.y) * R, row = first_row + lane / lanes_per_row;
    const bool exists = row < p.all_rows;
    ForwardUnits<Cell, Element, 1> units(p, exists ? row : p.all_rows - 1, u);

    Accum sums[R * S] = {};
    if (p.x) {
      const Operands x{p.weight_ih, p.x, p.x_stride, p.input_size};
      x_is_wide ? multiply<kWide, true>(sums, x, first_row, u)
                : multiply<1, true>(sums, x, first_row, u);
    }
    if (p.h_before) {
      const Operands h{p.weight_hh, p.h_before, p.h_before_stride, p.hidden_size};
      h_is_wide ? multiply<kWide, false>(sums, h, first_row, u)
                : multiply<1, false>(sums, h, first_row, u);
    }
    sum_over_lanes<S, R * S>(sums, lane);
    if (!exists || lane % lanes_per_row != 0) return;
    unroll<S>([&](auto k) { units.preacts[k].value[0] += sums[k]; });
    units.finish();
  }

 private:
  struct Operands {
    const Element* weight;  ///< [G*H, K]
    const Element* rows;    ///< [rows, K], stride apart
    int64_t stride, K;
  };

  /// Adds the lane's part of the unit's products with all rows, V elements of K at a time.
  template <int V, bool kInput>
  FUSEDRNN_DEVICE void multiply(Accum (&sums)[R * S], const Operands& of, int64_t first_row,
                                int64_t u) const {
    const Element* rows[R];
    for (int r = 0; r < R; ++r) {  // rows without a token repeat the last that has one
      const int64_t row = first_row + r;
      rows[r] = of.rows + (row < p.rows ? row : p.rows - 1) * of.stride;
    }
    const Element* const weight = of.weight + u * of.K;
    const int64_t gate_stride = p.hidden_size * of.K;
    [[maybe_unused]] constexpr int unrolled = R == 1 ? 4 : R == 4 ? 2 : 1;
#pragma unroll unrolled
    for (int64_t k = threadIdx.x % kLanes * V; k < of.K; k += kLanes * V) {
      Vector<Element, V> weights[G];
      unroll<G>([&](auto g) { weights[g] = load<V>(weight + g * gate_stride + k); });
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const Vector<Element, V> operand = load<V>(rows[r] + k);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const Accum value = value_of(operand.value[v]);
          unroll<G>([&](auto g) {
            constexpr int preact = kInput ? Cell::input_preact[g] : Cell::hidden_preact[g];
            sums[r * S + preact] += value_of(weights[g].value[v]) * value;
          });
        }
      }
    }
  }
};

template <class Cell, class Element, int R>
int launch_fused(const FusedStepParams<Element>& p, void* stream) {
  using Kernel = FusedStepKernel<Cell, Element, R>;
  constexpr int V = Kernel::kWide;
  Kernel kernel;
  kernel.p = p;
  kernel.x_is_wide = fits<V, Element>({p.x, p.weight_ih}, {p.x_stride, p.input_size});
  kernel.h_is_wide =
      fits<V, Element>({p.h_before, p.weight_hh}, {p.h_before_stride, p.hidden_size});
  const Grid grid{unsigned(scalar::divide_up(p.hidden_size, Kernel::kUnits)),
                  unsigned(scalar::divide_up(p.all_rows, R))};
  return launch(kernel, grid, stream);
}

template <class Cell, class Element>
int fused_step_of(const FusedStepParams<Element>& p, void* stream) {
  if (p.all_rows == 1) return launch_fused<Cell, Element, 1>(p, stream);
  if (p.all_rows <= 4) return launch_fused<Cell, Element, 4>(p, stream);
  return launch_fused<Cell, Element, 8>(p, stream);
}

template <class Element, class... Cell>
FusedStep<Element> fused_step_in(int cell, scalar::CellList<Cell...>) {
  static constexpr FusedStep<Element> table[] = {&fused_step_of<Cell, Element>...};
  return table[cell];
}

}  // namespace

template <class Element>
FusedStep<Element> fused_step(int cell) {
  return fused_step_in<Element>(cell, scalar::Cells());
}

template FusedStep<float> fused_step(int);
template FusedStep<double> fused_step(int);
template FusedStep<BFloat16> fused_step(int);
template FusedStep<Float16> fused_step(int);

}  // namespace fusedrnn::cuda
