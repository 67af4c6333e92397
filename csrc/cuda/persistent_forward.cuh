// The persistent forward kernel: all steps in one launch, weight_hh in registers.
#pragma once

#include "../cells.h"
#include "exchange.cuh"

namespace fusedrnn::cuda {

template <class Cell, class Traits>
struct PersistentForwardKernel : Traits {
  using Element = typename Traits::Element;
  using Exchange = typename Traits::Exchange;
  using Carried = typename Traits::Carried;
  using Activations = typename Traits::Gemm::Activations;
  using Direction = typename PersistentForwardParams<Element>::Direction;
  static constexpr int kPairs = Traits::kPairs, kGates = Cell::kGates;
  PersistentForwardParams<Element> params;

  /// Indices of the values that a thread carries.
  static constexpr int kState = 0, kH = 1, kLength = 2;

  /// weight_hh as the GEMM's A.
  struct Weight {
    static constexpr bool kTransposed = false;
    const Element* weight_hh;
    int H;
    bool is_aligned;
    FUSEDRNN_DEVICE Weight(const Element* weight_hh, int H)
        : weight_hh(weight_hh),
          H(H),
          is_aligned(H % kPerWords<Element> == 0 &&
                     reinterpret_cast<uintptr_t>(weight_hh) % sizeof(Words) == 0) {}
    FUSEDRNN_DEVICE WeightRow<Element> row(int unit, int gate) const {
      const int64_t at = (int64_t(gate) * H + unit) * H;
      return {unit < H ? weight_hh + at : nullptr, H, is_aligned};
    }
  };

  /// The sums of a unit's biases for each pre-activation.
  struct Biases {
    float of_unit[Traits::kThreadUnits][Cell::kPreacts] = {};
  };

  /// What a chunk of a step needs besides the GEMM, asked for one chunk ahead.
  struct Inputs {
    int t = 0;
    int64_t token = 0;  ///< the tile's first
    bool is_active[kPairs] = {};
    float x[kPairs][kGates];
  };

  FUSEDRNN_DEVICE Inputs load(const Exchange& e, const Carried& carried, int i, int chunk,
                              int64_t token) const {
    const int H = params.hidden_size;
    Inputs in;
    in.t = e.time(i);
    in.token = token;
    const float* const x =
        params.direction[e.direction].x_product + token * (kGates * H) + e.first_unit;
    unroll<kPairs>([&](auto n) {
      in.is_active[n] = i < params.steps && in.t < length(carried, chunk, n);
      const Pair p = e.pair(chunk, n);
      const unsigned at = unsigned(p.tile_row * kGates * H + p.unit);
      if (in.is_active[n]) unroll<kGates>([&](auto g) { in.x[n][g] = (x + g * H)[at]; });
    });
    return in;
  }

  FUSEDRNN_DEVICE void operator()(unsigned char* memory) const {
    const auto& tensors = params.direction[blockIdx.z];
    Exchange e(params, tensors.exchange, memory);
    Carried carried(e.carried_memory());
    e.kernel_name = kernel_name<Cell, Traits, false>();
    typename Traits::Gemm gemm;
    e.load(gemm, Weight(tensors.weight_hh, params.hidden_size));
    const Biases biases = load_biases(e, tensors);
    start(e, carried, tensors);
    e.commit(gemm, 0, e.chunks() - 1);

    int64_t next_token = e.token(1);
    Inputs in = load(e, carried, 0, 0, e.token(0));
    for (int i = 0; i < params.steps; ++i) {
      const int chunks = e.chunks();
#pragma unroll 1
      for (int chunk = 0; chunk < chunks; ++chunk) {
        float preact[kPairs][Cell::kPreacts];
        unroll<kPairs>([&](auto n) {
          constexpr int unit = Traits::template Work<Traits>::unit_of_pair(n);
          unroll<Cell::kPreacts>([&](auto k) { preact[n][k] = biases.of_unit[unit][k]; });
          unroll<kGates>([&](auto g) {
            constexpr int input = Cell::input_preact[g];
            preact[n][input] += in.x[n][g];
          });
        });
        const Inputs now = in;
        if (chunk + 1 < chunks) {
          in = load(e, carried, i, chunk + 1, now.token);
        } else {
          in = load(e, carried, i + 1, 0, next_token);
          next_token = e.token(i + 2);
        }
        e.wait(i, chunk);
        float products[kPairs][kGates];
        e.multiply(gemm, i, chunk, products);
        float h[kPairs][1], saved[kPairs][Cell::kSaved];
        unroll<kPairs>([&](auto n) {
          unroll<kGates>([&](auto g) {
            constexpr int hidden = Cell::hidden_preact[g];
            preact[n][hidden] += products[n][g];
          });
          float state = carried.at(chunk, n, kState);
          const float out = Cell::template forward<Activations>(preact[n], state, saved[n]);
          if (now.is_active[n]) {
            carried.at(chunk, n, kState) = state;
            carried.at(chunk, n, kH) = out;
          }
          h[n][0] = carried.at(chunk, n, kH);
        });
        e.store(i + 1, chunk, h);
        e.commit(gemm, i + 1, chunk);
        // Other CTAs wait for the commit, not for these stores.
        store(e, now, chunk, h, saved);
      }
    }
    finish(e, carried, tensors);
  }

  static FUSEDRNN_DEVICE int length(const Carried& carried, int chunk, int n) {
    return scalar::bit_cast<int>(const_cast<Carried&>(carried).at(chunk, n, kLength));
  }

  FUSEDRNN_DEVICE Biases load_biases(const Exchange& e, const Direction& tensors) const {
    const int H = params.hidden_size;
    Biases biases;
    unroll<kPairs>([&](auto n) {
      constexpr int of_pair = Traits::template Work<Traits>::unit_of_pair(n);
      const int unit = e.first_unit + e.pair(0, n).unit;
      float (&to)[Cell::kPreacts] = biases.of_unit[of_pair];
      unroll<Cell::kPreacts>([&](auto k) { to[k] = 0; });
      if (!tensors.bias_ih || unit >= H) return;
      unroll<kGates>([&](auto g) {
        constexpr int input = Cell::input_preact[g], hidden = Cell::hidden_preact[g];
        to[input] += value_of(tensors.bias_ih[g * H + unit]);
        to[hidden] += value_of(tensors.bias_hh[g * H + unit]);
      });
    });
    return biases;
  }

  /// Reads the initial states and stores h0 for the first GEMM.
  FUSEDRNN_DEVICE void start(Exchange& e, Carried& carried, const Direction& tensors) const {
    for (int chunk = 0; chunk < e.chunks(); ++chunk) {
      float h[kPairs][1];
      unroll<kPairs>([&](auto i) {
        const Pair p = e.pair(chunk, i);
        const int64_t row = e.first_row + p.tile_row, unit = e.first_unit + p.unit;
        float state = 0;
        h[i][0] = 0;
        if (e.exists(p)) {
          h[i][0] = value_or_zero(tensors.h0, row * params.h0_stride + unit);
          state = !Cell::kHasCellState ? h[i][0]
                                       : value_or_zero(tensors.c0, row * params.c0_stride + unit);
        }
        carried.at(chunk, i, kState) = state;
        carried.at(chunk, i, kH) = h[i][0];
        carried.at(chunk, i, kLength) = scalar::bit_cast<float>(e.length(p));
      });
      e.store(0, chunk, h);
    }
  }

  FUSEDRNN_DEVICE void finish(const Exchange& e, Carried& carried, const Direction& tensors) const {
    for (int chunk = 0; chunk < e.chunks(); ++chunk) {
      unroll<kPairs>([&](auto i) {
        const Pair p = e.pair(chunk, i);
        if (!e.exists(p)) return;
        const int64_t row = e.first_row + p.tile_row;
        const int64_t at = row * params.hidden_size + e.first_unit + p.unit;
        round_to(tensors.h_n[at], carried.at(chunk, i, kH));
        if (tensors.c_n) tensors.c_n[at] = carried.at(chunk, i, kState);
      });
    }
  }

  FUSEDRNN_DEVICE void store(const Exchange& e, const Inputs& now, int chunk,
                             const float (&h)[kPairs][1],
                             const float (&saved)[kPairs][Cell::kSaved]) const {
    const auto& tensors = params.direction[e.direction];
    const int H = params.hidden_size, y_stride = int(params.y_stride);
    Element* const y = tensors.y + now.token * params.y_stride + e.first_unit;
    unroll<kPairs>([&](auto n) {
      const Pair p = e.pair(chunk, n);
      if (now.is_active[n]) round_to(y[unsigned(p.tile_row * y_stride + p.unit)], h[n][0]);
    });
    if (!tensors.saved) return;
    float* const to = tensors.saved + now.token * (Cell::kSaved * H) + e.first_unit;
    unroll<kPairs>([&](auto n) {
      const Pair p = e.pair(chunk, n);
      const unsigned at = unsigned(p.tile_row * Cell::kSaved * H + p.unit);
      if (now.is_active[n]) {
        unroll<Cell::kSaved>([&](auto a) { (to + a * H)[at] = saved[n][a]; });
      }
    });
  }
};

}  // namespace fusedrnn::cuda
