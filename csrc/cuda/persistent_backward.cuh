// The persistent backward kernel: all steps, last to first, in one launch.
#pragma once

#include "../cells.h"
#include "exchange.cuh"

namespace fusedrnn::cuda {

template <class Cell, class Traits>
struct PersistentBackwardKernel : Traits {
  using Element = typename Traits::Element;
  using Exchange = typename Traits::Exchange;
  using Pair = typename Tile<Traits>::Pair;
  PersistentBackwardParams<Element> params;

  /// Indices of the values that a CTA carries. An inactive row's dh waits for its last step.
  static constexpr int kDstate = 0, kDh = 1;
  static constexpr int kGateK = Traits::kK / Cell::kGates;  ///< K per gate

  /// weight_hh as the GEMM's A. Rows: units. K: all units' gates, or the CTA's own.
  struct Weight {
    static constexpr bool kContiguousK = false;
    int first_unit, first_k, first_k_unit;
    const Element* weight_hh;
    int H;
    FUSEDRNN_DEVICE Element at(int row, int k) const {
      const int unit = first_unit + row, gate = (first_k + k) / kGateK;
      const int k_unit = first_k_unit + (first_k + k) % kGateK;
      return unit < H && k_unit < H ? weight_hh[(gate * H + k_unit) * H + unit] : Element{};
    }
  };

  /// A pair's inputs to a step besides the GEMM.
  struct Inputs {
    bool is_active, has_previous;  ///< previous: the row has a step before this one
    int64_t token;
    float dy, saved[Cell::kSaved];
    float previous[Cell::kSaved];  ///< saved by the previous step
    float h0, state;               ///< h0: without a previous step. state: before this step
  };

  FUSEDRNN_DEVICE Inputs load(const Exchange& e, const Pair& p, int i) const {
    const auto& tensors = params.direction[e.direction];
    const int H = params.hidden_size, t = e.time(i);
    Inputs in;
    in.is_active = p.exists && e.is_active(p.row, t);
    if (!in.is_active) return in;
    in.token = e.step_offset(t) + p.row;
    const auto load_saved = [&](float (&to)[Cell::kSaved], int64_t token) {
      unroll<Cell::kSaved>(
          [&](auto a) { to[a] = tensors.saved[(token * Cell::kSaved + a) * H + p.unit]; });
    };
    const int previous = e.time(i - 1);
    in.has_previous = e.is_active(p.row, previous);
    if (in.has_previous) {
      load_saved(in.previous, e.step_offset(previous) + p.row);
      in.state = in.previous[Cell::kSavedState];
    } else {
      in.h0 = value_or_zero(tensors.h0, p.row * params.h0_stride + p.unit);
      in.state = !Cell::kHasCellState
                     ? in.h0
                     : value_or_zero(tensors.c0, p.row * params.c0_stride + p.unit);
    }
    in.dy = value_or_zero(tensors.dy, in.token * params.dy_stride + p.unit);
    load_saved(in.saved, in.token);
    return in;
  }

  FUSEDRNN_DEVICE void operator()(unsigned char* memory) const {
    const int H = params.hidden_size;
    const auto& tensors = params.direction[blockIdx.z];
    Exchange e(params, tensors.exchange, memory);

    typename Traits::Gemm gemm;
    e.template load<Weight>(gemm, tensors.weight_hh, H);
    for (int chunk = 0; chunk < e.chunks(); ++chunk) {
      for (int i = 0; i < Traits::kPairs; ++i) {
        const Pair p = e.pair(chunk, i);
        if (!p.exists) continue;
        e.carried(p, kDstate) = value_or_zero(tensors.dc_n, p.row * H + p.unit);
        e.carried(p, kDh) = value_or_zero(tensors.dh_n, p.row * H + p.unit);
      }
    }

    // The n-th step from the end. The last GEMM, at n = steps, gives h0's gradient.
    for (int n = 0; n <= params.steps; ++n) {
      const int i = params.steps - 1 - n;
      for (int chunk = 0; chunk < e.chunks(); ++chunk) {
        Inputs in[Traits::kPairs];
        unroll<Traits::kPairs>([&](auto m) { in[m] = load(e, e.pair(chunk, m), i); });
        if (n > 0) e.wait(gemm, n - 1, chunk);
        float dgates[Traits::kPairs][Cell::kPreacts] = {};
        unroll<Traits::kPairs>([&](auto m) {
          const Pair p = e.pair(chunk, m);
          if (n > 0 && p.exists) e.carried(p, kDh) += e.read(p, 0);
          if (in[m].is_active) apply(e, p, in[m], dgates[m]);
          float dhidden[Cell::kGates];
          unroll<Cell::kGates>([&](auto g) {
            constexpr int hidden = Cell::hidden_preact[g];
            dhidden[g] = dgates[m][hidden];
          });
          if (i >= 0) e.store(n, chunk, p, dhidden);
        });
        e.commit(gemm, n, chunk);
        // Other CTAs wait for the commit, not for these stores.
        unroll<Traits::kPairs>([&](auto m) {
          const Pair p = e.pair(chunk, m);
          if (in[m].is_active) {
            store(e, in[m].token, p.unit,
                  in[m].has_previous ? Cell::output(in[m].previous) : in[m].h0, dgates[m]);
          } else if (i >= 0 && p.exists && params.lengths) {  // padding
            store(e, e.step_offset(e.time(i)) + p.row, p.unit, 0, dgates[m]);
          }
        });
      }
    }

    for (int chunk = 0; chunk < e.chunks(); ++chunk) {
      for (int i = 0; i < Traits::kPairs; ++i) {
        const Pair p = e.pair(chunk, i);
        if (!p.exists) continue;
        const float dstate = e.carried(p, kDstate), dh = e.carried(p, kDh);
        round_to(tensors.dh0[p.row * H + p.unit], !Cell::kHasCellState ? dh + dstate : dh);
        if (tensors.dc0) round_to(tensors.dc0[p.row * H + p.unit], dstate);
      }
    }
  }

  FUSEDRNN_DEVICE void apply(const Exchange& e, const Pair& p, const Inputs& in,
                             float (&dgates)[Cell::kPreacts]) const {
    const float dh = e.carried(p, kDh) + in.dy;
    e.carried(p, kDh) = 0;
    Cell::backward(in.saved, in.state, dh, e.carried(p, kDstate), dgates);
  }

  FUSEDRNN_DEVICE void store(const Exchange& e, int64_t token, int unit, float h_previous,
                             const float (&dgates)[Cell::kPreacts]) const {
    const auto& tensors = params.direction[e.direction];
    round_to(tensors.h_previous[token * params.hidden_size + unit], h_previous);
    Element* const to = tensors.dgates + token * Cell::kPreacts * params.hidden_size + unit;
    unroll<Cell::kPreacts>([&](auto k) { round_to(to[k * params.hidden_size], dgates[k]); });
  }
};

}  // namespace fusedrnn::cuda
