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
  /// Not where registers are full: one CTA's 128 units with 8 rows, and its multiply-adds.
  static constexpr bool kPrefetches = Traits::kInFragments ? kPairs <= 2 : !Traits::kOneChunk;
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
    /// 16 bytes of a row of weight_hh, a column of A, from a unit on; zeros past the layer.
    template <bool kAligned>
    FUSEDRNN_DEVICE Words words(int unit, int k) const {
      const KPlace place = Traits::template place_of<Cell::kGates>(k);
      const int k_unit = first_k_unit + place.unit;
      const Element* const p = weight_hh + ((place.gate * H + k_unit) * H + unit);
      if constexpr (kAligned) return load_words_if(k_unit < H && unit < H, p);
      Element values[kPerWords<Element>];
      unroll<kPerWords<Element>>(
          [&](auto i) { values[i] = k_unit < H && unit + i < H ? p[i] : Element{}; });
      return scalar::bit_cast<Words>(values);
    }
  };

  /// What a chunk of a step needs besides the GEMM, asked for one chunk ahead. Values of inactive
  /// pairs are undefined.
  struct Inputs {
    unsigned length[kPairs];
    float saved[kPairs][kSaved];
    float state[kPairs];  ///< before the step
    OutputGradient dy[kPairs];
  };

  /// A chunk of a step whose results are not stored yet.
  struct Results {
    int t = -1, chunk = 0;
    unsigned token = 0;  ///< the chunk's first
    unsigned length[kPairs] = {};
    Rounded<Element, kPreacts> dgates[kPairs];
  };

  /// Where the values of the thread's first pair lie for the direction's first token.
  struct Places {
    const float* saved;
    const OutputGradient* dy;
    Element* dgates;
    Element* h_previous;
  };

  /// From the first pair's place to the n-th pair's i-th value, where a token has `count` times H
  /// values.
  template <class T>
  FUSEDRNN_DEVICE T* value_at(T* first, int n, int count, int i) const {
    return advance(first, Traits::pair_row(n) * count + i, params.hidden_size) +
           Traits::pair_unit(n);
  }

  /// Whether a row is active at time t, which may be one before the first step or behind the last:
  /// -1 is a large number.
  static FUSEDRNN_DEVICE bool is_active(int t, unsigned length) { return unsigned(t) < length; }

  FUSEDRNN_DEVICE void operator()(unsigned char* memory) const {
    const auto& tensors = params.direction[blockIdx.z];
    Exchange e(params, tensors.exchange, memory);
    e.kernel_name = kernel_name<Cell, Traits, true>();
    const StepPrefetch<Traits, kSaved, float, OutputGradient> prefetch(
        e, params.hidden_size, tensors.saved, int64_t(kSaved) * params.hidden_size, tensors.dy,
        params.dy_stride);
    const bool prefetches = kPrefetches && params.prefetches;
    for (int i = 1; prefetches && i <= kPrefetchSteps; ++i) {
      for (int chunk = 0; chunk < e.chunks(); ++chunk) {
        prefetch(e.token(params.steps - i) + chunk * Traits::kChunkRows);
      }
    }
    Carried carried(e.carried_memory());
    typename Traits::Gemm gemm;
    e.load(gemm, Weight(tensors.weight_hh, params.hidden_size,
                        Traits::kOwnUnitsAlone ? e.first_unit : 0));
    start(e, carried, tensors);
    Places places = places_of(e, tensors);
    if constexpr (Traits::kInFragments) places.saved = kept(places.saved);
    places.dgates = kept(places.dgates);
    places.h_previous = kept(places.h_previous);
    const int last = params.steps - 1, back = e.direction ? 1 : -1;
    // The tile's first token in a step, in the step after it, and one and two before it.
    unsigned after = 0, token = unsigned(e.token(last)), before = unsigned(e.token(last - 1));
    unsigned two_before = unsigned(e.token(last - 2));
    int token_ahead = e.token(last - kPrefetchSteps);
    const int tokens_back = kept(e.direction ? params.rows : -params.rows);
    int t = e.time(last);
    Inputs in;
    load(in, e, places, carried, 0, t, back, token, before);
    float state_after[kPairs];  // of the only chunk
    unroll<kPairs>([&](auto m) {
      if constexpr (Traits::kOneChunk) {
        load_if(is_active(t, in.length[m]), state_after[m],
                value_at(advance(places.saved, token, kSaved * params.hidden_size), m, kSaved,
                         Cell::kSavedState));
      }
    });

    start_rows(in, e, places, 0, t, back, token);

    // The n-th step from the end. The last GEMM, at n = steps, gives h0's gradient.
    Results results;
    for (int n = 0; n <= params.steps; ++n) {
      const int chunks = e.chunks();
#pragma unroll 1
      for (int chunk = 0; chunk < chunks; ++chunk) {
        const bool is_last = chunk + 1 == chunks;
        const int next_chunk = is_last ? 0 : chunk + 1, next_t = is_last ? t + back : t;
        const unsigned next_token = is_last ? before : token;
        bool active[kPairs];
        float prepared[kPairs][Cell::kPrepared], dstate[kPairs], dh[kPairs];
        // The part of a step that does not depend on the GEMM.
        const auto prepare = [&] {
          // Other CTAs wait for the commit before, not for these stores.
          store(e, places, results, Traits::kOneChunk ? in.length : results.length);
          float h[kPairs];
          unroll<kPairs>([&](auto m) {
            if constexpr (Traits::kOneChunk) in.saved[m][Cell::kSavedState] = state_after[m];
            active[m] = is_active(t, in.length[m]);
            h[m] = Cell::template output<Activations>(in.saved[m]);
            Cell::template prepare<Activations>(in.saved[m], in.state[m], prepared[m]);
            state_after[m] = in.state[m];
            dstate[m] = carried.at(chunk, m, kDstate);
            dh[m] = carried.at(chunk, m, kDh);
            dh[m] = active[m] && places.dy ? dh[m] + value_of(in.dy[m]) : dh[m];
            results.length[m] = in.length[m];
            // Before the wait for other CTAs, or for the tensor cores.
            // Without tensor cores the weights leave no registers for all of that.
            dstate[m] = kept(dstate[m]);
            dh[m] = kept(dh[m]);
            if constexpr (Traits::kInFragments) {
              unroll<Cell::kPrepared>([&](auto i) { prepared[m][i] = kept(prepared[m][i]); });
            }
          });
          results.t = t;
          results.chunk = chunk;
          results.token = token + chunk * Traits::kChunkRows;
          store_previous(e, places, in.length, h, t, t - back, after, chunk);
          load(in, e, places, carried, next_chunk, next_t, back, next_token,
               is_last ? two_before : before);
        };
        float products[kPairs][1] = {};
        if constexpr (Traits::kHalvesTakeTurns) {
          // A scheduler's two warps begin with different parts: one has the tensor cores while the
          // other has the rest. The first step reads zeros, and k = n + 1 has n - 1's buffer.
          if (threadIdx.x < Traits::kThreads / 2) {
            prepare();
            e.multiply(gemm, n + 1, chunk, products);
          } else {
            e.multiply(gemm, n + 1, chunk, products);
            unroll<kPairs>([&](auto m) { products[m][0] = kept(products[m][0]); });
            prepare();
          }
        } else {
          prepare();
          if (n > 0) {
            e.wait(n - 1, chunk);
            e.multiply(gemm, n - 1, chunk, products);
          }
        }
        unroll<kPairs>([&](auto m) { dh[m] += n > 0 ? products[m][0] : 0; });
        float dgates[kPairs][kPreacts], dhidden[kPairs][Cell::kGates];
        unroll<kPairs>([&](auto m) {
          const float dstate_after = dstate[m];
          Cell::backward(prepared[m], dh[m], dstate[m], dgates[m]);
          carried.at(chunk, m, kDstate) = active[m] ? dstate[m] : dstate_after;
          carried.at(chunk, m, kDh) = active[m] ? 0 : dh[m];
          unroll<kPreacts>([&](auto k) { dgates[m][k] = active[m] ? dgates[m][k] : 0; });
          unroll<Cell::kGates>([&](auto g) {
            constexpr int hidden = Cell::hidden_preact[g];
            dhidden[m][g] = dgates[m][hidden];
          });
        });
        e.store(n, chunk, dhidden);
        e.commit(gemm, n, chunk);
        unroll<kPairs>([&](auto m) { results.dgates[m].set(dgates[m]); });
        start_rows(in, e, places, next_chunk, next_t, back, next_token);
        if (prefetches) prefetch(token_ahead + chunk * Traits::kChunkRows);
      }
      token_ahead =
          params.step_offset ? e.token(last - n - 1 - kPrefetchSteps) : token_ahead + tokens_back;
      t += back;
      after = token;
      token = before;
      before = two_before;
      two_before = unsigned(e.token(last - n - 3));
    }
    finish(e, carried, tensors);
  }

  FUSEDRNN_DEVICE Places places_of(const Exchange& e, const Direction& tensors) const {
    const Pair p = e.pair(0, 0);
    const int64_t H = params.hidden_size, row = p.tile_row, unit = e.first_unit + p.unit;
    return {tensors.saved + row * kSaved * H + unit,
            tensors.dy ? tensors.dy + row * params.dy_stride + unit : nullptr,
            tensors.dgates + row * kPreacts * H + unit, tensors.h_previous + row * H + unit};
  }

  /// token, before: the tile's first at time t and in the step before.
  FUSEDRNN_DEVICE void load(Inputs& in, const Exchange&, const Places& places, Carried& carried,
                            int chunk, int t, int back, unsigned token, unsigned before) const {
    const int H = params.hidden_size, dy_stride = int(params.dy_stride);
    const int row = chunk * Traits::kChunkRows;
    const float* const saved = advance(places.saved, token + row, kSaved * H);
    const float* const saved_before = advance(places.saved, before + row, kSaved * H);
    const OutputGradient* const dy = advance(places.dy, token + row, dy_stride);
    unroll<kPairs>([&](auto n) {
      in.length[n] = scalar::bit_cast<unsigned>(carried.at(chunk, n, kLength));
      const bool active = is_active(t, in.length[n]);
      unroll<kSaved>([&](auto a) {
        if constexpr (a == Cell::kSavedState && Traits::kOneChunk) return;
        load_if(active, in.saved[n][a], value_at(saved, n, kSaved, a));
      });
      load_if(is_active(t + back, in.length[n]), in.state[n],
              value_at(saved_before, n, kSaved, Cell::kSavedState));
      load_if(active && places.dy, in.dy[n],
              advance(dy, Traits::pair_row(n), dy_stride) + Traits::pair_unit(n));
    });
  }

  /// For rows whose first step is at time t: `in` gets the initial state, and h0 is stored as their
  /// previous h.
  FUSEDRNN_DEVICE void start_rows(Inputs& in, const Exchange& e, const Places& places, int chunk,
                                  int t, int back, unsigned token) const {
    const auto starts = [&](int n) {
      return is_active(t, in.length[n]) && !is_active(t + back, in.length[n]);
    };
    bool any = false;
    unroll<kPairs>([&](auto n) { any |= starts(n); });
    if (!any) return;
    const auto& tensors = params.direction[e.direction];
    unroll<kPairs>([&](auto n) {
      if (!starts(n)) return;
      const Pair p = e.pair(chunk, n);
      const int64_t row = e.first_row + p.tile_row, unit = e.first_unit + p.unit;
      const float h0 = value_or_zero(tensors.h0, row * params.h0_stride + unit);
      in.state[n] = h0;
      if constexpr (Cell::kHasCellState) {
        in.state[n] = value_or_zero(tensors.c0, row * params.c0_stride + unit);
      }
      round_to(tensors.h_previous[(int64_t(token) + p.tile_row) * params.hidden_size + unit], h0);
    });
  }

  /// Reads the final states' gradients.
  FUSEDRNN_DEVICE void start(const Exchange& e, Carried& carried, const Direction& tensors) const {
    for (int chunk = 0; chunk < e.chunks(); ++chunk) {
      unroll<kPairs>([&](auto n) {
        const Pair p = e.pair(chunk, n);
        const int64_t row = e.first_row + p.tile_row;
        const int64_t at = row * params.hidden_size + e.first_unit + p.unit;
        float dstate = 0, dh = 0;
        if (e.exists(p)) {
          dstate = value_or_zero(tensors.dc_n, at);
          dh = value_or_zero(tensors.dh_n, at);
        }
        carried.at(chunk, n, kDstate) = dstate;
        carried.at(chunk, n, kDh) = dh;
        carried.at(chunk, n, kLength) = scalar::bit_cast<float>(e.length(p));
      });
    }
  }

  FUSEDRNN_DEVICE void finish(const Exchange& e, Carried& carried, const Direction& tensors) const {
    for (int chunk = 0; chunk < e.chunks(); ++chunk) {
      unroll<kPairs>([&](auto n) {
        const Pair p = e.pair(chunk, n);
        if (!e.exists(p)) return;
        const int64_t row = e.first_row + p.tile_row;
        const int64_t at = row * params.hidden_size + e.first_unit + p.unit;
        const float dstate = carried.at(chunk, n, kDstate), dh = carried.at(chunk, n, kDh);
        round_to(tensors.dh0[at], !Cell::kHasCellState ? dh + dstate : dh);
        if (tensors.dc0) round_to(tensors.dc0[at], dstate);
      });
    }
  }

  /// Whether a pair's token at time t is padding, whose gradients are zeros.
  FUSEDRNN_DEVICE bool is_padding(const Exchange& e, int t, unsigned length, int chunk,
                                  int n) const {
    return !is_active(t, length) && is_active(t, unsigned(params.steps)) &&
           e.exists(e.pair(chunk, n));
  }

  FUSEDRNN_DEVICE void store(const Exchange& e, const Places& places, const Results& results,
                             const unsigned (&length)[kPairs]) const {
    const int H = params.hidden_size;
    Element* const to = advance(places.dgates, results.token, kPreacts * H);
    unroll<kPairs>([&](auto n) {
      const bool active = is_active(results.t, length[n]);
      unroll<kPreacts>(
          [&](auto k) { store_if(active, value_at(to, n, kPreacts, k), results.dgates[n].at(k)); });
    });
    if (!params.lengths) return;
    unroll<kPairs>([&](auto n) {
      if (!is_padding(e, results.t, length[n], results.chunk, n)) return;
      unroll<kPreacts>([&](auto k) { *value_at(to, n, kPreacts, k) = Element{}; });
    });
  }

  /// Stores the output at time t as the previous h of the step after it, the operand of weight_hh's
  /// gradient. token: the tile's first in the step after.
  FUSEDRNN_DEVICE void store_previous(const Exchange& e, const Places& places,
                                      const unsigned (&length)[kPairs], const float (&h)[kPairs],
                                      int t, int t_after, unsigned token, int chunk) const {
    Element* const to =
        advance(places.h_previous, token + chunk * Traits::kChunkRows, params.hidden_size);
    unroll<kPairs>([&](auto n) {
      Element rounded;
      round_to(rounded, h[n]);
      store_if(is_active(t, length[n]) && is_active(t_after, length[n]), value_at(to, n, 1, 0),
               rounded);
    });
    if (!params.lengths) return;
    unroll<kPairs>([&](auto n) {
      if (is_padding(e, t_after, length[n], chunk, n)) *value_at(to, n, 1, 0) = Element{};
    });
  }
};

}  // namespace fusedrnn::cuda
