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
  using Carried = typename Traits::Carried;
  using Activations = typename Traits::Gemm::Activations;
  using Direction = typename PersistentForwardParams<Element>::Direction;
  static constexpr int kPairs = Traits::kPairs, kGates = Cell::kGates;
  PersistentForwardParams<Element> params;

  /// Indices of the values that a thread carries.
  static constexpr int kState = 0, kH = 1, kLength = 2;

  /// weight_hh as the GEMM's A.
  struct Weight {
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

  FUSEDRNN_DEVICE void operator()(unsigned char* memory) const {
    const auto& tensors = params.direction[blockIdx.z];
    Exchange e(params, tensors.exchange, memory);
    e.kernel_name = kernel_name<Cell, Traits, false>();
    const StepPrefetch<Traits, kGates, float> prefetch(e, params.hidden_size, tensors.x_product,
                                                       int64_t(kGates) * params.hidden_size);
    for (int i = 0; params.prefetches && i < kPrefetchSteps; ++i) {
      for (int chunk = 0; chunk < e.chunks(); ++chunk) {
        prefetch(e.token(i) + chunk * Traits::kChunkRows);
      }
    }
    Carried carried(e.carried_memory());
    typename Traits::Gemm gemm;
    e.load(gemm, Weight(tensors.weight_hh, params.hidden_size));
    const Biases biases = load_biases(e, tensors);
    start(e, carried, tensors);
    e.commit(gemm, 0, e.chunks() - 1);

    const int H = kept(params.hidden_size), y_stride = int(params.y_stride), chunks = e.chunks();
    const bool saves = tensors.saved;
    const Pair first = e.pair(0, 0);
    const auto place = [&](auto* p, int64_t stride) {
      return TokenPlace(p, first.tile_row * stride + e.first_unit + first.unit, stride);
    };
    const auto x_place = place(tensors.x_product, kGates * H);
    const auto y_place = place(tensors.y, params.y_stride);
    const auto saved_place = place(tensors.saved, Cell::kSaved * H);
    // x of the next chunk is asked for before this chunk's wait.
    float x[kPairs][kGates] = {};
    bool is_active[kPairs];
    const auto load = [&](int t, int chunk, int token) {
      const float* const from = x_place.at(token + chunk * Traits::kChunkRows);
      unroll<kPairs>([&](auto n) {
        // The time of no step is as far as `steps`, or negative.
        is_active[n] = unsigned(t) < unsigned(length(carried, chunk, n));
        if (!is_active[n]) return;
        unroll<kGates>([&](auto g) {
          x[n][g] = advance(from, H, Traits::pair_row(n) * kGates + g)[Traits::pair_unit(n)];
        });
      });
    };

    int t = e.time(0), token = e.token(0), next_token = e.token(1);
    const int next_time = kept(e.direction ? -1 : 1), tokens = kept(next_time * params.rows);
    int token_ahead = e.token(kPrefetchSteps);
    load(t, 0, token);
    for (int i = 0; i < params.steps; ++i) {
#pragma unroll 1
      for (int chunk = 0; chunk < chunks; ++chunk) {
        float preact[kPairs][Cell::kPreacts];
        bool now_active[kPairs];
        unroll<kPairs>([&](auto n) {
          constexpr int unit = Traits::pair_unit(n) / 8;
          now_active[n] = is_active[n];
          unroll<Cell::kPreacts>([&](auto k) { preact[n][k] = biases.of_unit[unit][k]; });
          unroll<kGates>([&](auto g) {
            constexpr int input = Cell::input_preact[g];
            preact[n][input] += x[n][g];
          });
        });
        const int now = token + chunk * Traits::kChunkRows;
        if (chunk + 1 < chunks) {
          load(t, chunk + 1, token);
        } else {
          load(t += next_time, 0, next_token);
          token = next_token;
          next_token = params.step_offset ? e.token(i + 2) : token + tokens;
        }
        e.wait(i, chunk);
        float sums[kPairs][kGates];
        unroll<kPairs>([&](auto n) {
          unroll<kGates>([&](auto g) {
            constexpr int hidden = Cell::hidden_preact[g];
            sums[n][g] = preact[n][hidden];
          });
        });
        e.multiply(gemm, i, chunk, sums);
        float h[kPairs][1], saved[kPairs][Cell::kSaved];
        unroll<kPairs>([&](auto n) {
          unroll<kGates>([&](auto g) {
            constexpr int hidden = Cell::hidden_preact[g];
            preact[n][hidden] = sums[n][g];
          });
          float& carried_state = carried.at(chunk, n, kState);
          float& carried_h = carried.at(chunk, n, kH);
          float state = carried_state;
          const float out = Cell::template forward<Activations>(preact[n], state, saved[n]);
          carried_state = now_active[n] ? state : carried_state;
          h[n][0] = carried_h = now_active[n] ? out : carried_h;
        });
        e.store(i + 1, chunk, h);
        e.commit(gemm, i + 1, chunk);
        // Other CTAs wait for the commit, not for these stores.
        Element* const y = y_place.at(now);
        float* const to = saved_place.at(now);
        const auto store = [&](auto n, float h_of_step, const auto& saved_value) {
          round_to(advance(y, y_stride, Traits::pair_row(n))[Traits::pair_unit(n)], h_of_step);
          if (!saves) return;
          unroll<Cell::kSaved>([&](auto a) {
            advance(to, H, Traits::pair_row(n) * Cell::kSaved + a)[Traits::pair_unit(n)] =
                saved_value(a);
          });
        };
        unroll<kPairs>([&](auto n) {
          if (now_active[n]) store(n, h[n][0], [&](auto a) { return saved[n][a]; });
        });
        if (params.lengths) {  // padding
          unroll<kPairs>([&](auto n) {
            if (!now_active[n] && e.exists(e.pair(chunk, n))) {
              store(n, 0, [](auto) { return 0.f; });
            }
          });
        }
        if (params.prefetches) prefetch(token_ahead + chunk * Traits::kChunkRows);
      }
      token_ahead = params.step_offset ? e.token(i + 1 + kPrefetchSteps) : token_ahead + tokens;
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
      constexpr int of_pair = Traits::pair_unit(n) / 8;
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
          if (params.lengths) check_length(params.lengths[row], params.steps);
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
        if (tensors.c_n) round_to(tensors.c_n[at], carried.at(chunk, i, kState));
      });
    }
  }
};

}  // namespace fusedrnn::cuda
