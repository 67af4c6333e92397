// The persistent forward kernel: all steps in one launch, weight_hh in registers.
#pragma once

#include "../cells.h"
#include "exchange.cuh"
#include "lengths.cuh"

namespace fusedrnn::cuda {

template <class Cell, class Traits>
struct PersistentForwardKernel : Traits {
  using Element = typename Traits::Element;
  using Exchange = typename Traits::Exchange;
  using Pair = typename Tile<Traits>::Pair;
  PersistentForwardParams<Element> params;

  /// Indices of the values that a CTA carries.
  static constexpr int kState = 0, kH = 1;

  /// weight_hh as the GEMM's A. Rows: 16 units' gates. K: all units.
  struct Weight {
    static constexpr bool kContiguousK = true;
    int first_unit, first_k, first_k_unit;
    const Element* weight_hh;
    int H;
    FUSEDRNN_DEVICE Element at(int row, int k) const {
      const int unit = first_unit + row % 16, column = first_k_unit + first_k + k;
      return unit < H && column < H ? weight_hh[(row / 16 * H + unit) * H + column] : Element{};
    }
  };

  /// A pair's inputs to a step besides the GEMM.
  struct Inputs {
    bool is_active;
    int64_t token;
    float x[Cell::kGates];
  };

  FUSEDRNN_DEVICE Inputs load(const Exchange& e, const Pair& p, int t) const {
    Inputs in;
    in.is_active = p.exists && e.is_active(p.row, t);
    if (!in.is_active) return in;
    const int H = params.hidden_size;
    in.token = e.step_offset(t) + p.row;
    const float* x = params.direction[e.direction].x_product + in.token * Cell::kGates * H + p.unit;
    unroll<Cell::kGates>([&](auto g) { in.x[g] = x[g * H]; });
    return in;
  }

  FUSEDRNN_DEVICE void operator()(unsigned char* memory) const {
    const int H = params.hidden_size;
    const auto& tensors = params.direction[blockIdx.z];
    Exchange e(params, tensors.exchange, memory);

    typename Traits::Gemm gemm;
    e.template load<Weight>(gemm, tensors.weight_hh, H);
    float bias[Cell::kPreacts] = {};
    const int own_unit = e.pair(0, 0).unit;
    if (tensors.bias_ih && own_unit < H) {
      unroll<Cell::kGates>([&](auto g) {
        constexpr int input = Cell::input_preact[g], hidden = Cell::hidden_preact[g];
        bias[input] += value_of(tensors.bias_ih[g * H + own_unit]);
        bias[hidden] += value_of(tensors.bias_hh[g * H + own_unit]);
      });
    }
    start(e, tensors);
    e.commit(gemm, 0, e.chunks() - 1);

    for (int i = 0; i < params.steps; ++i) {
      const int t = e.time(i);
      for (int chunk = 0; chunk < e.chunks(); ++chunk) {
        // Loads are issued before the wait for other CTAs.
        Inputs in[Traits::kPairs];
        unroll<Traits::kPairs>([&](auto n) { in[n] = load(e, e.pair(chunk, n), t); });
        e.wait(gemm, i, chunk);
        Outputs out[Traits::kPairs];
        unroll<Traits::kPairs>([&](auto n) {
          const Pair p = e.pair(chunk, n);
          float h[1] = {0};
          if (in[n].is_active) {
            apply(e, p, in[n], bias, out[n]);
            h[0] = out[n].h;
          } else if (p.exists) {
            h[0] = e.carried(p, kH);
          }
          e.store(i + 1, chunk, p, h);
        });
        e.commit(gemm, i + 1, chunk);
        // Other CTAs wait for the commit, not for these stores.
        unroll<Traits::kPairs>([&](auto n) {
          const Pair p = e.pair(chunk, n);
          if (in[n].is_active) {
            store(e, in[n].token, p.unit, out[n]);
          } else if (p.exists && params.lengths) {  // padding
            store(e, e.step_offset(t) + p.row, p.unit, {});
          }
        });
      }
    }
    finish(e, tensors);
  }

  using Direction = typename PersistentForwardParams<Element>::Direction;

  /// Reads the initial states and stores h0 for the first GEMM.
  FUSEDRNN_DEVICE void start(const Exchange& e, const Direction& tensors) const {
    for (int chunk = 0; chunk < e.chunks(); ++chunk) {
      for (int i = 0; i < Traits::kPairs; ++i) {
        const Pair p = e.pair(chunk, i);
        if (!p.exists) continue;
        if (params.lengths) check_length(params.lengths[p.row], params.steps);
        const float h = value_or_zero(tensors.h0, p.row * params.h0_stride + p.unit);
        e.carried(p, kState) =
            !Cell::kHasCellState ? h : value_or_zero(tensors.c0, p.row * params.c0_stride + p.unit);
        e.carried(p, kH) = h;
      }
      unroll<Traits::kPairs>([&](auto i) {
        const Pair p = e.pair(chunk, i);
        const float h[1] = {p.exists ? e.carried(p, kH) : 0.f};
        e.store(0, chunk, p, h);
      });
    }
  }

  FUSEDRNN_DEVICE void finish(const Exchange& e, const Direction& tensors) const {
    for (int chunk = 0; chunk < e.chunks(); ++chunk) {
      for (int i = 0; i < Traits::kPairs; ++i) {
        const Pair p = e.pair(chunk, i);
        if (!p.exists) continue;
        const int64_t at = p.row * params.hidden_size + p.unit;
        round_to(tensors.h_n[at], e.carried(p, kH));
        if (tensors.c_n) round_to(tensors.c_n[at], e.carried(p, kState));
      }
    }
  }

  struct Outputs {
    float h, saved[Cell::kSaved];
  };

  FUSEDRNN_DEVICE void apply(const Exchange& e, const Pair& p, const Inputs& in,
                             const float (&bias)[Cell::kPreacts], Outputs& out) const {
    float preact[Cell::kPreacts];
    unroll<Cell::kPreacts>([&](auto k) { preact[k] = bias[k]; });
    unroll<Cell::kGates>([&](auto g) {
      constexpr int input = Cell::input_preact[g], hidden = Cell::hidden_preact[g];
      preact[input] += in.x[g];
      preact[hidden] += e.read(p, g);
    });
    e.carried(p, kH) = out.h = Cell::forward(preact, e.carried(p, kState), out.saved);
  }

  FUSEDRNN_DEVICE void store(const Exchange& e, int64_t token, int unit, const Outputs& out) const {
    const auto& tensors = params.direction[e.direction];
    round_to(tensors.y[token * params.y_stride + unit], out.h);
    if (!tensors.saved) return;
    float* const saved = tensors.saved + token * Cell::kSaved * params.hidden_size + unit;
    unroll<Cell::kSaved>([&](auto a) { saved[a * params.hidden_size] = out.saved[a]; });
  }
};

}  // namespace fusedrnn::cuda
