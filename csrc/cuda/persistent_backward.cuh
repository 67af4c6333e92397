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
  using Direction = typename PersistentBackwardParams<Element>::Direction;
  template <class Pointer>
  using Value = std::remove_cv_t<std::remove_pointer_t<Pointer>>;
  using OutputGradient = Value<decltype(Direction::dy)>;
  static constexpr int kPairs = Traits::kPairs, kSaved = Cell::kSaved, kPreacts = Cell::kPreacts;
  PersistentBackwardParams<Element> params;

  /// Indices of the values that a thread carries. An inactive row's dh waits for its last step.
  static constexpr int kDstate = 0, kDh = 1, kLength = 2;

  /// A unit's column of weight_hh: a row of the GEMM's A. K: all units' gates, or the CTA's own.
  struct WeightColumn {
    const Element* weight_hh;
    int H, unit, first_k_unit;
    FUSEDRNN_DEVICE Element at(int k) const {
      const KPlace place = Traits::template place_of<Cell::kGates>(k);
      const int k_unit = first_k_unit + place.unit;
      return unit < H && k_unit < H ? weight_hh[(place.gate * H + k_unit) * H + unit] : Element{};
    }
    template <int count>
    FUSEDRNN_DEVICE void load(int k, Element (&to)[count]) const {
      unroll<count>([&](auto i) { to[i] = at(k + i); });
    }
  };
  struct Weight {
    const Element* weight_hh;
    int H, first_k_unit;
    bool is_aligned;
    FUSEDRNN_DEVICE Weight(const Element* weight_hh, int H, int first_k_unit)
        : weight_hh(weight_hh),
          H(H),
          first_k_unit(first_k_unit),
          is_aligned(H % kPerWords<Element> == 0 &&
                     reinterpret_cast<uintptr_t>(weight_hh) % sizeof(Words) == 0) {}
    FUSEDRNN_DEVICE WeightColumn row(int unit, int) const {
      return {weight_hh, H, unit, first_k_unit};
    }
    /// A row of weight_hh: a column of A.
    FUSEDRNN_DEVICE WeightRow<Element> column(int k) const {
      const KPlace place = Traits::template place_of<Cell::kGates>(k);
      const int k_unit = first_k_unit + place.unit;
      return {k_unit < H ? weight_hh + int64_t(place.gate * H + k_unit) * H : nullptr, H,
              is_aligned};
    }
  };

  /// The tile's first tokens around a step: the step after it, the step, one and two before it.
  struct Tokens {
    int64_t after, now, before, two_before;
  };

  /// What a chunk of a step needs besides the GEMM, asked for one chunk ahead. Inactive pairs keep
  /// other steps' values.
  struct Inputs {
    float saved[kPairs][kSaved] = {};
    float state[kPairs] = {};  ///< before the step
    OutputGradient dy[kPairs] = {};
  };

  /// A chunk of a step whose results are not stored yet.
  struct Results {
    int64_t token = 0;  ///< the tile's first
    int chunk = 0;
    bool is_active[kPairs] = {};
    Element dgates[kPairs][kPreacts];
  };

  /// Whether a pair's row is active at time t, which may be one before the first step or behind the
  /// last: -1 is a large number.
  static FUSEDRNN_DEVICE bool is_active(Carried& carried, int chunk, int n, int t) {
    return unsigned(t) < scalar::bit_cast<unsigned>(carried.at(chunk, n, kLength));
  }

  FUSEDRNN_DEVICE void operator()(unsigned char* memory) const {
    const auto& tensors = params.direction[blockIdx.z];
    Exchange e(params, tensors.exchange, memory);
    Carried carried(e.carried_memory());
    typename Traits::Gemm gemm;
    e.load(gemm, Weight(tensors.weight_hh, params.hidden_size,
                        Traits::kOwnUnitsAlone ? e.first_unit : 0));
    const int last = params.steps - 1;
    Tokens tokens{0, e.token(last), e.token(last - 1), e.token(last - 2)};
    float state_after[kPairs] = {};  // of the only chunk
    start(e, carried, tensors, tokens, state_after);
    Inputs in;
    load(in, e, carried, last, 0, tokens.now, tokens.before);

    // The n-th step from the end. The last GEMM, at n = steps, gives h0's gradient.
    Results results;
    for (int n = 0; n <= params.steps; ++n) {
      const int i = last - n, chunks = e.chunks();
#pragma unroll 1
      for (int chunk = 0; chunk < chunks; ++chunk) {
        // Other CTAs wait for the commit before, not for these stores.
        store(e, results);
        bool active[kPairs];
        float prepared[kPairs][Cell::kPrepared], dh[kPairs];
        unroll<kPairs>([&](auto m) {
          active[m] = is_active(carried, chunk, m, e.time(i));
          if constexpr (Traits::kOneChunk) in.saved[m][Cell::kSavedState] = state_after[m];
          store_previous(e, carried, i + 1, chunk, m, tokens.after, in.saved[m]);
          Cell::template prepare<Activations>(in.saved[m], in.state[m], prepared[m]);
          state_after[m] = in.state[m];
          dh[m] = carried.at(chunk, m, kDh);
          dh[m] = active[m] ? dh[m] + value_of(in.dy[m]) : dh[m];
        });
        if (chunk + 1 < chunks) {
          load(in, e, carried, i, chunk + 1, tokens.now, tokens.before);
        } else {
          load(in, e, carried, i - 1, 0, tokens.before, tokens.two_before);
        }
        add_products(e, gemm, n, chunk, dh);
        float dgates[kPairs][kPreacts], dhidden[kPairs][Cell::kGates];
        unroll<kPairs>([&](auto m) {
          float& carried_dstate = carried.at(chunk, m, kDstate);
          float dstate = carried_dstate;
          Cell::backward(prepared[m], dh[m], dstate, dgates[m]);
          carried_dstate = active[m] ? dstate : carried_dstate;
          carried.at(chunk, m, kDh) = active[m] ? 0 : dh[m];
          unroll<kPreacts>([&](auto k) { dgates[m][k] = active[m] ? dgates[m][k] : 0; });
          unroll<Cell::kGates>([&](auto g) {
            constexpr int hidden = Cell::hidden_preact[g];
            dhidden[m][g] = dgates[m][hidden];
          });
        });
        e.store(n, chunk, dhidden);
        e.commit(gemm, n, chunk);
        results.token = tokens.now;
        results.chunk = chunk;
        unroll<kPairs>([&](auto m) {
          results.is_active[m] = active[m];
          round_all(results.dgates[m], dgates[m]);
        });
      }
      tokens = {tokens.now, tokens.before, tokens.two_before, e.token(i - 3)};
    }
    finish(e, carried, tensors);
  }

  /// Adds the gradients that come through weight_hh from the step after the n-th.
  FUSEDRNN_DEVICE void add_products(Exchange& e, const typename Traits::Gemm& gemm, int n,
                                    int chunk, float (&dh)[kPairs]) const {
    float products[kPairs][1];
    if constexpr (Traits::kOneChunk) {
      // No branch, so that instructions before the GEMM fill its waits. The first step's operands
      // are zeros.
      e.wait(n - 1, chunk);
      e.multiply(gemm, n > 0 ? n - 1 : 1, chunk, products);
      unroll<kPairs>([&](auto m) { dh[m] += n > 0 ? products[m][0] : 0; });
    } else if (n > 0) {
      e.wait(n - 1, chunk);
      e.multiply(gemm, n - 1, chunk, products);
      unroll<kPairs>([&](auto m) { dh[m] += products[m][0]; });
    }
  }

  /// token, before: the tile's first in the i-th step and in the step before it.
  FUSEDRNN_DEVICE void load(Inputs& in, const Exchange& e, Carried& carried, int i, int chunk,
                            int64_t token, int64_t before) const {
    const auto& tensors = params.direction[e.direction];
    const int H = params.hidden_size, dy_stride = int(params.dy_stride);
    const float* const saved = tensors.saved + token * (kSaved * H) + e.first_unit;
    const float* const saved_before =
        tensors.saved + before * (kSaved * H) + Cell::kSavedState * H + e.first_unit;
    const OutputGradient* const dy = tensors.dy + token * params.dy_stride + e.first_unit;
    unroll<kPairs>([&](auto n) {
      const Pair p = e.pair(chunk, n);
      const bool active = is_active(carried, chunk, n, e.time(i));
      const bool active_before = is_active(carried, chunk, n, e.time(i - 1));
      const int at = p.tile_row * (kSaved * H) + p.unit;
      unroll<kSaved>([&](auto a) {
        if constexpr (a == Cell::kSavedState && Traits::kOneChunk) return;
        load_if(active, in.saved[n][a], saved + a * H + at);
      });
      load_if(active_before, in.state[n], saved_before + at);
      if (active && !active_before) in.state[n] = initial_state(e, tensors, p);
      load_if(active && tensors.dy, in.dy[n], dy + (p.tile_row * dy_stride + p.unit));
    });
  }

  /// The state before a row's first step.
  FUSEDRNN_DEVICE float initial_state(const Exchange& e, const Direction& tensors,
                                      const Pair& p) const {
    const int64_t row = e.first_row + p.tile_row, unit = e.first_unit + p.unit;
    return value_of(!Cell::kHasCellState
                        ? value_or_zero(tensors.h0, row * params.h0_stride + unit)
                        : value_or_zero(tensors.c0, row * params.c0_stride + unit));
  }

  /// Reads the final states' gradients, and the state after the last step of the only chunk.
  FUSEDRNN_DEVICE void start(const Exchange& e, Carried& carried, const Direction& tensors,
                             const Tokens& tokens, float (&state_after)[kPairs]) const {
    const int H = params.hidden_size, last = params.steps - 1;
    for (int chunk = 0; chunk < e.chunks(); ++chunk) {
      unroll<kPairs>([&](auto n) {
        const Pair p = e.pair(chunk, n);
        const int64_t at = (e.first_row + p.tile_row) * int64_t(H) + e.first_unit + p.unit;
        float dstate = 0, dh = 0;
        if (e.exists(p)) {
          dstate = value_of(value_or_zero(tensors.dc_n, at));
          dh = value_of(value_or_zero(tensors.dh_n, at));
        }
        carried.at(chunk, n, kDstate) = dstate;
        carried.at(chunk, n, kDh) = dh;
        carried.at(chunk, n, kLength) = scalar::bit_cast<float>(e.length(p));
        if constexpr (Traits::kOneChunk) {
          const int64_t token = tokens.now + p.tile_row;
          const int64_t unit = e.first_unit + p.unit;
          load_if(is_active(carried, chunk, n, e.time(last)), state_after[n],
                  tensors.saved + (token * kSaved + Cell::kSavedState) * H + unit);
        }
      });
    }
  }

  FUSEDRNN_DEVICE void finish(const Exchange& e, Carried& carried, const Direction& tensors) const {
    for (int chunk = 0; chunk < e.chunks(); ++chunk) {
      unroll<kPairs>([&](auto i) {
        const Pair p = e.pair(chunk, i);
        if (!e.exists(p)) return;
        const int64_t at = (e.first_row + p.tile_row) * int64_t(params.hidden_size) + e.first_unit +
                           p.unit;
        const float dstate = carried.at(chunk, i, kDstate), dh = carried.at(chunk, i, kDh);
        round_to(tensors.dh0[at], !Cell::kHasCellState ? dh + dstate : dh);
        if (tensors.dc0) round_to(tensors.dc0[at], dstate);
      });
    }
  }

  FUSEDRNN_DEVICE void store(const Exchange& e, const Results& results) const {
    const int H = params.hidden_size;
    Element* const to = params.direction[e.direction].dgates + results.token * (kPreacts * H) +
                        e.first_unit;
    unroll<kPairs>([&](auto n) {
      const Pair p = e.pair(results.chunk, n);
      const int at = p.tile_row * (kPreacts * H) + p.unit;
      unroll<kPreacts>([&](auto k) {
        store_if(results.is_active[n], to + k * H + at, results.dgates[n][k]);
      });
    });
  }

  /// Stores the i-th step's previous h, the output of the step before it: the operand of
  /// weight_hh's gradient. `saved`: of the step before.
  FUSEDRNN_DEVICE void store_previous(const Exchange& e, Carried& carried, int i, int chunk, int n,
                                      int64_t token, const float (&saved)[kSaved]) const {
    const auto& tensors = params.direction[e.direction];
    const Pair p = e.pair(chunk, n);
    const int H = params.hidden_size;
    const bool active = is_active(carried, chunk, n, e.time(i));
    const bool active_before = is_active(carried, chunk, n, e.time(i - 1));
    float h = Cell::template output<Activations>(saved);
    if (active && !active_before) {
      h = value_of(value_or_zero(
          tensors.h0, (e.first_row + p.tile_row) * params.h0_stride + e.first_unit + p.unit));
    }
    Element rounded;
    round_to(rounded, h);
    store_if(active, tensors.h_previous + token * H + e.first_unit + (p.tile_row * H + p.unit),
             rounded);
  }
};

}  // namespace fusedrnn::cuda
