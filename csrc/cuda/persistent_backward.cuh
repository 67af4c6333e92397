// The persistent backward kernel: all steps, last to first, in one launch.
#pragma once

#include "../cells.h"
#include "exchange.cuh"

namespace fusedrnn::cuda {

template <class Cell, class Traits>
struct PersistentBackwardKernel : Traits {
  using Element = typename Traits::Element;
  using Exchange = typename Traits::Exchange;
  using Carried = typename Traits::Carried;
  using Activations = typename Traits::Gemm::Activations;
  PersistentBackwardParams<Element> params;

  /// Indices of the values that a thread carries. An inactive row's dh waits for its last step.
  static constexpr int kDstate = 0, kDh = 1, kLength = 2;
  static constexpr int kPairs = Traits::kPairs;

  /// A unit's column of weight_hh: a row of the GEMM's A. K: all units' gates, or the CTA's own.
  struct WeightColumn {
    /// Units of a gate that are neighbours in K.
    static constexpr int kRun = Traits::kGateRun ? Traits::kGateRun : Traits::kK / Cell::kGates;
    const Element* weight_hh;
    int H, unit, first_k_unit;
    /// Null: the element is zero.
    FUSEDRNN_DEVICE const Element* place(int k) const {
      const int gate = k / kRun % Cell::kGates;
      const int k_unit = first_k_unit + k / (kRun * Cell::kGates) * kRun + k % kRun;
      return unit < H && k_unit < H ? weight_hh + (gate * H + k_unit) * H + unit : nullptr;
    }
    FUSEDRNN_DEVICE Element at(int k) const {
      const Element* const p = place(k);
      return p ? *p : Element{};
    }
    template <int count>
    FUSEDRNN_DEVICE void load(int k, Element (&to)[count]) const {
      unroll<count>([&](auto i) { to[i] = at(k + i); });
    }
  };
  struct Weight {
    static constexpr bool kTransposed = true;
    const Element* weight_hh;
    int H, first_k_unit;
    FUSEDRNN_DEVICE WeightColumn row(int unit, int) const {
      return {weight_hh, H, unit, first_k_unit};
    }
    /// The elements at k of as many units as fill 16 bytes.
    FUSEDRNN_DEVICE Words load(int k, int unit) const {
      constexpr int n = kPerWords<Element>;
      const bool is_aligned =
          H % n == 0 && reinterpret_cast<uintptr_t>(weight_hh) % sizeof(Words) == 0;
      const WeightColumn first = row(unit, 0);
      if (is_aligned) {
        const Element* const from = first.place(k);
        return from ? *reinterpret_cast<const Words*>(from) : Words{};
      }
      Element values[n];
      unroll<n>([&](auto i) { values[i] = row(unit + i, 0).at(k); });
      return scalar::bit_cast<Words>(values);
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

  FUSEDRNN_DEVICE Inputs load(const Exchange& e, const Pair& p, int length, int i) const {
    const auto& tensors = params.direction[e.direction];
    const int H = params.hidden_size, unit = e.first_unit + p.unit, row = e.first_row + p.tile_row;
    const auto is_active = [&](int step) {
      return step >= 0 && step < params.steps && e.time(step) < length;
    };
    Inputs in;
    in.is_active = is_active(i);
    if (!in.is_active) return in;
    in.token = e.token(i) + p.tile_row;
    const auto load_saved = [&](float (&to)[Cell::kSaved], int64_t token) {
      unroll<Cell::kSaved>(
          [&](auto a) { to[a] = tensors.saved[(token * Cell::kSaved + a) * H + unit]; });
    };
    in.has_previous = is_active(i - 1);
    if (in.has_previous) {
      load_saved(in.previous, e.token(i - 1) + p.tile_row);
      in.state = in.previous[Cell::kSavedState];
    } else {
      in.h0 = value_or_zero(tensors.h0, row * params.h0_stride + unit);
      in.state =
          !Cell::kHasCellState ? in.h0 : value_or_zero(tensors.c0, row * params.c0_stride + unit);
    }
    in.dy = value_or_zero(tensors.dy, in.token * params.dy_stride + unit);
    load_saved(in.saved, in.token);
    return in;
  }

  FUSEDRNN_DEVICE void operator()(unsigned char* memory) const {
    const int H = params.hidden_size;
    const auto& tensors = params.direction[blockIdx.z];
    Exchange e(params, tensors.exchange, memory);
    e.kernel_name = kernel_name<Cell, Traits, true>();

    Carried carried(e.carried_memory());
    typename Traits::Gemm gemm;
    e.load(gemm, Weight{tensors.weight_hh, H, Traits::kOwnUnitsAlone ? e.first_unit : 0});
    for (int chunk = 0; chunk < e.chunks(); ++chunk) {
      unroll<kPairs>([&](auto i) {
        const Pair p = e.pair(chunk, i);
        const int64_t at = (e.first_row + p.tile_row) * int64_t(H) + e.first_unit + p.unit;
        const bool exists = e.exists(p);
        carried.at(chunk, i, kDstate) = exists ? value_or_zero(tensors.dc_n, at) : 0;
        carried.at(chunk, i, kDh) = exists ? value_or_zero(tensors.dh_n, at) : 0;
        carried.at(chunk, i, kLength) = scalar::bit_cast<float>(e.length(p));
      });
    }

    // The n-th step from the end. The last GEMM, at n = steps, gives h0's gradient.
    for (int n = 0; n <= params.steps; ++n) {
      const int i = params.steps - 1 - n;
      for (int chunk = 0; chunk < e.chunks(); ++chunk) {
        Inputs in[kPairs];
        unroll<kPairs>([&](auto m) {
          in[m] =
              load(e, e.pair(chunk, m), scalar::bit_cast<int>(carried.at(chunk, m, kLength)), i);
        });
        if (n > 0) {
          e.wait(n - 1, chunk);
          float product[kPairs][1];
          e.multiply(gemm, n - 1, chunk, product);
          unroll<kPairs>([&](auto m) { carried.at(chunk, m, kDh) += product[m][0]; });
        }
        float dgates[kPairs][Cell::kPreacts] = {}, dhidden[kPairs][Cell::kGates];
        unroll<kPairs>([&](auto m) {
          if (in[m].is_active) {
            float &dh = carried.at(chunk, m, kDh), dh_of_step = dh + in[m].dy;
            dh = 0;
            Cell::template backward<Activations>(in[m].saved, in[m].state, dh_of_step,
                                                 carried.at(chunk, m, kDstate), dgates[m]);
          }
          unroll<Cell::kGates>([&](auto g) {
            constexpr int hidden = Cell::hidden_preact[g];
            dhidden[m][g] = dgates[m][hidden];
          });
        });
        if (i >= 0) e.store(n, chunk, dhidden);
        e.commit(gemm, n, chunk);
        // Other CTAs wait for the commit, not for these stores.
        unroll<kPairs>([&](auto m) {
          if (in[m].is_active) store(e, in[m], e.first_unit + e.pair(chunk, m).unit, dgates[m]);
        });
      }
    }

    for (int chunk = 0; chunk < e.chunks(); ++chunk) {
      unroll<kPairs>([&](auto i) {
        const Pair p = e.pair(chunk, i);
        if (!e.exists(p)) return;
        const int64_t at = (e.first_row + p.tile_row) * int64_t(H) + e.first_unit + p.unit;
        const float dstate = carried.at(chunk, i, kDstate), dh = carried.at(chunk, i, kDh);
        tensors.dh0[at] = !Cell::kHasCellState ? dh + dstate : dh;
        if (tensors.dc0) tensors.dc0[at] = dstate;
      });
    }
  }

  FUSEDRNN_DEVICE void store(const Exchange& e, const Inputs& in, int unit,
                             const float (&dgates)[Cell::kPreacts]) const {
    const auto& tensors = params.direction[e.direction];
    const float h = in.has_previous ? Cell::template output<Activations>(in.previous) : in.h0;
    round_to(tensors.h_previous[in.token * params.hidden_size + unit], h);
    Element* const to = tensors.dgates + in.token * Cell::kPreacts * params.hidden_size + unit;
    unroll<Cell::kPreacts>([&](auto k) { round_to(to[k * params.hidden_size], dgates[k]); });
  }
};

}  // namespace fusedrnn::cuda
