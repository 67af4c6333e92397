// A cell's kernels: the time loop's steps, forward and backward, for any cell, type and vector
// width.
//
// Forward: a tile has up to kTileRows batch rows and one vector of units. It accumulates the units'
// pre-activations over input and hidden state in registers. There it applies the cell, and stores
// h, the state and the values saved for the backward pass. A cell of one pre-activation takes
// kBlocksPerTile vectors. Weights come from panels. A call too short to pay for prepacking reads
// them in place.
//
// Backward: GEMM tiles take a step's pre-activation gradients to the step before.
//
// An including file defines FUSEDRNN_TARGET and FUSEDRNN_VECTOR_BYTES, and opens a target region
// (target_region.h).
#pragma once

#include "kernel_table.h"
#include "tile_gemm.h"

namespace fusedrnn::FUSEDRNN_TARGET {

/// Unit blocks per tile: 1 for the 4 pre-activations of an LSTM or GRU, 4 for one. Each broadcast
/// input then feeds 4 accumulators.
template <class Cell>
inline constexpr int kBlocksPerTile = kTileColumns / Cell::kPreacts;

/// The step before (after) step t in the run's order, or -1.
template <class Accum>
FUSEDRNN_INLINE int64_t step_before(const Sequence<Accum>& s, int64_t t) {
  return s.reverse ? (t + 1 < s.steps ? t + 1 : -1) : t - 1;
}
template <class Accum>
FUSEDRNN_INLINE int64_t step_after(const Sequence<Accum>& s, int64_t t) {
  return s.reverse ? t - 1 : (t + 1 < s.steps ? t + 1 : -1);
}

/// Copies n elements, or zeros without a source, and clears the padding up to `size`.
template <class Accum>
FUSEDRNN_INLINE void copy_row(Accum* to, const Accum* from, int64_t n, int64_t size) {
  if (from) {
    __builtin_memcpy(to, from, size_t(n) * sizeof(Accum));
  } else {
    __builtin_memset(to, 0, size_t(n) * sizeof(Accum));
  }
  if (size > n) __builtin_memset(to + n, 0, size_t(size - n) * sizeof(Accum));
}

template <class Accum>
FUSEDRNN_INLINE const Accum* row_of(const Accum* base, int64_t row, int64_t stride) {
  return base ? base + row * stride : nullptr;
}

/// Row `row` of the initial value of the cell's `state` (cells.h).
template <class Cell, class Run>
FUSEDRNN_INLINE auto initial_state(const Run& s, int64_t row) {
  return Cell::kHasCellState ? row_of(s.c0, row, s.c0_stride) : row_of(s.h0, row, s.h0_stride);
}

// ---- forward ------------------------------------------------------------------------------------

/// Row states between a forward run's steps, in its workspace.
template <class Element, class Accum = Accumulator<Element>>
struct ForwardState {
  explicit ForwardState(const Forward<Accum, Element>& s)
      : h_size(padded<Accum>(s.output_size)),
        state_size(padded<Accum>(s.hidden_size)),
        h{reinterpret_cast<Element*>(s.workspace),
          reinterpret_cast<Element*>(s.workspace + s.rows * h_size)},
        state(s.workspace + 2 * s.rows * h_size),
        raw(s.projection_panels ? state + s.rows * state_size : nullptr) {}

  int64_t h_size, state_size;  ///< padded row lengths
  Element* h[2];  ///< [rows, h_size] outputs; step i reads h[i % 2] and writes the other
  Accum* state;   ///< [rows, state_size]
  Accum* raw;     ///< [rows, state_size] output before the projection; null without one
};

template <class Accum>
int64_t forward_workspace(const Sequence<Accum>& s) {
  return s.rows * 2 * (padded<Accum>(s.output_size) + padded<Accum>(s.hidden_size));
}

/// Calls tile(B, block) for blocks [begin, end): B = kBlocksPerTile at once while as many are left,
/// then one by one. The reverse order visits the same tiles.
template <class Cell, class F>
FUSEDRNN_INLINE void for_block_tiles(bool has_panels, bool reverse, int64_t begin, int64_t end,
                                     F&& tile) {
  constexpr int B = kBlocksPerTile<Cell>;
  const int64_t full = B > 1 && has_panels ? (end - begin) / B : 0;
  const int64_t count = full + (end - begin - full * B);
  for (int64_t n = 0; n < count; ++n) {
    const int64_t place = reverse ? count - 1 - n : n;
    if (B > 1 && place < full) {
      tile(std::integral_constant<int, B>{}, begin + place * B);
    } else {
      tile(std::integral_constant<int, 1>{}, begin + full * (B - 1) + place);
    }
  }
}

/// The input's row of operands, `offset` values behind the first.
template <class Element, class Accum = Accumulator<Element>>
FUSEDRNN_INLINE const InputOf<Element>* input_row(const Forward<Accum, Element>& s,
                                                  int64_t offset) {
  return static_cast<const InputOf<Element>*>(s.x) + offset;
}

/// tile += a times the weights of B panels, `rows` panel rows of them from `weights` on. int8
/// weights have `scales` in each panel, and the weights' sums `sums_offset` elements behind them.
/// a_scale[r] is row r's scale.
template <class Map, int R, int B, class Element, class Weight, class Accum = Accumulator<Element>>
FUSEDRNN_INLINE void accumulate_panels(Tile<Accum, R, B * Map::columns>& tile,
                                       const Element* const (&a)[R], int64_t rows,
                                       const PanelLane<Element, Weight>* weights,
                                       int64_t panel_size, const Accum* scales, int64_t sums_offset,
                                       const Accum (&a_scale)[R]) {
  constexpr int L = kLanes<Accum>;
  const int64_t panel_lanes =
      panel_size * int64_t(sizeof(Accum) / sizeof(PanelLane<Element, Weight>));
  if constexpr (!std::is_same_v<Weight, Int8>) {
    accumulate_rows<Map, Element, R, B, Weight>(tile, a, rows, weights, Map::count * L,
                                                panel_lanes);
  } else {
    constexpr int P = kSumsPerRow<Element>;
    const Element* part[P * R];
    unroll<P * R>([&](auto i) FUSEDRNN_LAMBDA { part[i] = a[i % R] + i / R * 2; });
    Tile<Sum<Element>, P * R, B * Map::columns> sums = {};
    accumulate_rows<Map, Element, P * R, B, Weight>(sums, part, rows, weights, Map::count * L,
                                                    panel_lanes);
    unroll<B * Map::count>([&](auto c) FUSEDRNN_LAMBDA {
      constexpr int block = c / Map::count, gate = c % Map::count;
      constexpr int column = block * Map::columns + Map::at(gate);
      const Accum* const from = scales + block * panel_size + gate * L;
      const Vec<Accum> scale = load(from);
      unroll<R>([&](auto r) FUSEDRNN_LAMBDA {
        Vec<int32_t> sum = sums[r][column];
        if constexpr (kPerLane<Element> == 4) {
          // Upper bytes count 256. Each operand is 128 or 32768 too large.
          Vec<uint32_t> all = bit_cast<Vec<uint32_t>>(sum);
          if constexpr (P == 2) all += bit_cast<Vec<uint32_t>>(sums[R + r][column]) << 8;
          const Vec<uint32_t> weights_sum = bit_cast<Vec<uint32_t>>(load(from + sums_offset));
          sum = bit_cast<Vec<int32_t>>(all - (weights_sum << (P == 2 ? 15 : 7)));
        }
        tile[r][column] += __builtin_convertvector(sum, Vec<Accum>) * (scale * a_scale[r]);
      });
    });
  }
}

/// Pre-activations of B blocks from `block` on, for R rows from `first` on. Without panels the run
/// reads its weights in place; B is then 1.
template <class Cell, int R, int B, class Element, class Weight, class Accum = Accumulator<Element>>
FUSEDRNN_INLINE void accumulate_preacts(const Forward<Accum, Element>& s,
                                        const ForwardState<Element>& m, int64_t i, int64_t t,
                                        int64_t block, int64_t first,
                                        Tile<Accum, R, B * Cell::kPreacts>& tile) {
  constexpr int L = kLanes<Accum>, G = Cell::kGates, S = Cell::kPreacts;
  constexpr bool kInPlace = B == 1 && R <= kInPlaceRows && std::is_same_v<Element, Weight>;
  constexpr PanelLayout layout = kPanel<Cell, Element, Weight>;
  const int64_t H = s.hidden_size, unit = block * L, units = smaller(H - unit, L);
  const bool has_panels = !kInPlace || s.panels;
  const Element* h[R];
  unroll<R>([&](auto r) FUSEDRNN_LAMBDA { h[r] = m.h[i % 2] + (first + r) * m.h_size; });

  const int64_t packed_input = s.x_product && !s.panels_have_input ? 0 : s.input_size;
  const int64_t panel_size = layout.size(packed_input, s.output_size) / int64_t(sizeof(Accum));
  const Accum* panel = nullptr;
  Vec<Accum> bias[B][S];
  if (has_panels) {
    panel = s.panels + block * panel_size;
    unroll<B * S>([&](auto c) FUSEDRNN_LAMBDA {
      bias[c / S][c % S] = load(panel + c / S * panel_size + c % S * L);
    });
  } else if constexpr (kInPlace) {
    load_bias<Cell>(s.weights, H, unit, units, bias[0]);
  }
  unroll<R>([&](auto r) FUSEDRNN_LAMBDA {
    unroll<B * S>([&](auto c) FUSEDRNN_LAMBDA { tile[r][c] = bias[c / S][c % S]; });
  });
  const InputOf<Element>* x[R] = {};
  if (s.x_product) {
    unroll<R>([&](auto r) FUSEDRNN_LAMBDA {
      const Accum* at =
          s.x_product + (s.step_offset[t] + s.row[first + r]) * s.x_product_stride + unit;
      unroll<B * G>([&](auto c) FUSEDRNN_LAMBDA {
        constexpr int b = c / G, g = c % G;
        tile[r][b * S + Cell::input_preact[g]] = load(at + b * L + g * H, H - unit - b * L);
      });
    });
  } else {
    unroll<R>([&](auto r) FUSEDRNN_LAMBDA {
      x[r] = input_row(s, s.x_offset[t] + s.row[first + r] * s.x_row_stride);
    });
  }
  if (has_panels) {
    const Accum* scales = panel + layout.scales_offset() / int64_t(sizeof(Accum));
    const auto* weights = reinterpret_cast<const PanelLane<Element, Weight>*>(
        panel + layout.weights_offset() / int64_t(sizeof(Accum)));
    const int64_t input_rows = layout.rows(packed_input);
    Accum scale[R] = {};
    if (!s.x_product) {
      if constexpr (std::is_same_v<Weight, Int8>) {
        unroll<R>([&](auto r) FUSEDRNN_LAMBDA {
          scale[r] = s.x_scale[s.step_offset[t] + s.row[first + r]];
        });
      }
      accumulate_panels<InputPreacts<Cell>, R, B, InputOf<Element>, Weight>(
          tile, x, input_rows, weights, panel_size, scales, 2 * G * L, scale);
    }
    if constexpr (std::is_same_v<Weight, Int8>) {
      unroll<R>([&](auto r) FUSEDRNN_LAMBDA { scale[r] = s.h_scale[s.row[first + r]]; });
    }
    accumulate_panels<HiddenPreacts<Cell>, R, B, Element, Weight>(
        tile, h, layout.rows(s.output_size), weights + input_rows * G * L, panel_size,
        scales + G * L, 2 * G * L, scale);
  } else if constexpr (kInPlace) {
    Lanes<Accum, R, S> lanes = {};
    if (!s.x_product) {
      accumulate_in_place<InputPreacts<Cell>, Element, R>(lanes, x, s.input_size, s.weights.ih, H,
                                                          unit, units);
    }
    accumulate_in_place<HiddenPreacts<Cell>, Element, R>(lanes, h, s.output_size, s.weights.hh, H,
                                                         unit, units);
    add_lanes<Accum, R, S>(tile, lanes);
  }
}

/// Stores one vector of row j's h as an operand.
template <class Element, class Accum = Accumulator<Element>>
FUSEDRNN_INLINE void store_operand(const Forward<Accum, Element>& s, int64_t j, Element* to,
                                   Vec<Accum> h) {
  if constexpr (std::is_same_v<Element, Int16>) {
    store_integers(to, rounded(h * (1 / s.h_scale[s.row[j]])));
  } else {
    store_values(to, h, kLanes<Accum>);
  }
}

/// The biases and the input's part of the pre-activations of blocks [block_begin, block_end), for
/// rows [begin, end) of x: out [N, G*H], rows out_stride apart. From the panels. A step that goes
/// on from there has the same sums as one that begins with the input.
template <class Cell, class Element, class Weight, class Accum = Accumulator<Element>>
void forward_input(const Forward<Accum, Element>& s, int64_t block_begin, int64_t block_end,
                   int64_t begin, int64_t end, Accum* out, int64_t out_stride) {
  constexpr int L = kLanes<Accum>, G = Cell::kGates;
  constexpr PanelLayout layout = kPanel<Cell, Element, Weight>;
  const int64_t H = s.hidden_size;
  const int64_t panel_size = layout.size(s.input_size, s.output_size) / int64_t(sizeof(Accum));
  for_block_tiles<Cell>(
      true, false, block_begin, block_end, [&](auto B, int64_t block) FUSEDRNN_LAMBDA {
        const Accum* panel = s.panels + block * panel_size;
        const auto* weights = reinterpret_cast<const PanelLane<Element, Weight>*>(
            panel + layout.weights_offset() / int64_t(sizeof(Accum)));
        const int64_t unit = block * L;
        for_tiles<kRowsOf<InputOf<Element>, Weight>>(
            end - begin, [&](auto R, int64_t first) FUSEDRNN_LAMBDA {
              Tile<Accum, R, B * G> tile;
              const InputOf<Element>* x[R];
              Accum scale[R] = {};
              unroll<R>([&](auto r) FUSEDRNN_LAMBDA {
                x[r] = input_row(s, (begin + first + r) * s.x_row_stride);
                if constexpr (std::is_same_v<Weight, Int8>) scale[r] = s.x_scale[begin + first + r];
                unroll<B * G>([&](auto c) FUSEDRNN_LAMBDA {
                  tile[r][c] = load(panel + c / G * panel_size + c % G * L);
                });
              });
              accumulate_panels<InOrder<G>, R, B, InputOf<Element>, Weight>(
                  tile, x, layout.rows(s.input_size), weights, panel_size,
                  panel + layout.scales_offset() / int64_t(sizeof(Accum)), 2 * G * L, scale);
              unroll<R>([&](auto r) FUSEDRNN_LAMBDA {
                Accum* to = out + (begin + first + r) * out_stride + unit;
                unroll<B * G>([&](auto c) FUSEDRNN_LAMBDA {
                  store(to + c / G * L + c % G * H, tile[r][c], H - unit - c / G * L);
                });
              });
            });
      });
}

/// Quantises a row of the input, in whole vectors: returns its scale, NaN if a value is not finite.
inline float quantise_row(const float* row, int64_t n, int32_t largest, void* out) {
  constexpr int L = kLanes<float>;
  Vec<float> most = {};
  for (int64_t k = 0; k < n; k += L) {
    Vec<float> size = load(row + k, n - k);
    size = size < 0.0f ? -size : size;
    most = size > most || size != size ? size : most;  // NaN stays
  }
  float max = 0;
  for (int i = 0; i < L; ++i) max = most[i] > max || most[i] != most[i] ? most[i] : max;
  if (!(max <= 3.4028234e38f)) max = __builtin_nanf("");
  // Smaller values than these do not change a pre-activation.
  const float scale = max < 1e-30f ? 0 : max / float(largest);
  const float inverse = scale == 0 ? 0 : float(largest) / max;
  for (int64_t k = 0; k < n; k += L) {
    const Vec<int32_t> values = rounded(load(row + k, n - k) * inverse);
    store_integers(static_cast<InputOf<Int16>*>(out) + k, values);
  }
  return scale;
}

/// Step i, at time t, of B blocks from `block` on, for R rows from `first` on.
template <class Cell, int R, int B, class Element, class Weight, class Accum = Accumulator<Element>>
FUSEDRNN_INLINE void forward_tile(const Forward<Accum, Element>& s, const ForwardState<Element>& m,
                                  int64_t i, int64_t t, int64_t block, int64_t first) {
  constexpr int L = kLanes<Accum>, S = Cell::kPreacts;
  const int64_t H = s.hidden_size;
  Tile<Accum, R, B * S> tile;
  accumulate_preacts<Cell, R, B, Element, Weight>(s, m, i, t, block, first, tile);

  // In memory, so the cell is compiled once, not once a row.
  Vec<Accum> preacts[R][B][S];
  unroll<R>([&](auto r) FUSEDRNN_LAMBDA {
    unroll<B * S>([&](auto c) FUSEDRNN_LAMBDA { preacts[r][c / S][c % S] = tile[r][c]; });
  });
#pragma GCC unroll 1
  for (int part = 0; part < R * B; ++part) {
    const int r = part / B, b = part % B;
    const int64_t j = first + r, token = s.step_offset[t] + s.row[j];
    const int64_t unit = (block + b) * L, units = smaller(H - unit, L);
    Accum* state_at = m.state + j * m.state_size + unit;
    Vec<Accum> state = load(state_at), saved[Cell::kSaved];
    const Vec<Accum> out = Cell::forward(preacts[r][b], state, saved);
    store(state_at, state);
    if (m.raw) {
      store(m.raw + j * m.state_size + unit, out);
    } else {
      store_operand(s, j, m.h[(i + 1) % 2] + j * m.h_size + unit, out);
      store_values(s.y + token * s.y_stride + unit, out, units);
    }
    if (s.saved) {
      Accum* to = s.saved + token * Cell::kSaved * H + unit;
      unroll<Cell::kSaved>([&](auto a) FUSEDRNN_LAMBDA { store(to + a * H, saved[a], units); });
    }
  }
}

/// Writes the final states of rows [begin, end), for these blocks' units. Their h_n is step t's
/// output, or their initial state if t is -1.
template <class Cell, class Element, class Accum = Accumulator<Element>>
FUSEDRNN_INLINE void finish_rows(const Forward<Accum, Element>& s, const ForwardState<Element>& m,
                                 int64_t t, int64_t begin, int64_t end, int64_t block_begin,
                                 int64_t block_end) {
  constexpr int L = kLanes<Accum>;
  const int64_t H = s.hidden_size, P = s.output_size, unit = block_begin * L;
  const int64_t units = smaller(block_end * L, H) - unit;
  const int64_t out = m.raw ? 0 : unit, outs = m.raw ? P : units;
  for (int64_t j = begin; j < end; ++j) {
    Accum* to = s.h_n + s.row[j] * P + out;
    if (t < 0) {
      const Accum* h0 = row_of(s.h0, s.row[j], s.h0_stride);
      copy_row(to, h0 ? h0 + out : nullptr, outs, 0);
    } else {
      const auto* y = s.y + (s.step_offset[t] + s.row[j]) * s.y_stride + out;
      for (int64_t u = 0; u < outs; u += L) store(to + u, load_values(y + u, outs - u), outs - u);
    }
    if constexpr (Cell::kHasCellState) {
      copy_row(s.c_n + s.row[j] * H + unit, m.state + j * m.state_size + unit, units, units);
    }
  }
}

template <class Cell, class Element, class Accum = Accumulator<Element>>
void forward_begin(const Forward<Accum, Element>& s) {
  const ForwardState<Element> m(s);
  for (int64_t j = 0; j < s.rows; ++j) {
    const Accum* h0 = row_of(s.h0, s.row[j], s.h0_stride);
    for (int64_t u = 0; u < m.h_size; u += kLanes<Accum>) {
      const int64_t left = s.output_size - u;
      const Vec<Accum> h = h0 ? load(h0 + u, left) : Vec<Accum>{};
      store_operand(s, j, m.h[0] + j * m.h_size + u, h);
      store_operand(s, j, m.h[1] + j * m.h_size + u, h);
    }
    copy_row(m.state + j * m.state_size, initial_state<Cell>(s, s.row[j]), s.hidden_size,
             m.state_size);
  }
  // Rows of length zero.
  finish_rows<Cell, Element>(s, m, -1, s.active[0], s.rows, 0, blocks_of<Accum>(s.hidden_size));
}

/// The run's i-th step for the units in blocks [block_begin, block_end). A projection needs all
/// blocks at once. Steps run in order; blocks of one step may run at the same time.
template <class Cell, class Element, class Weight, class Accum = Accumulator<Element>>
void forward_step(const Forward<Accum, Element>& s, int64_t i, int64_t block_begin,
                  int64_t block_end) {
  const ForwardState<Element> m(s);
  const int64_t P = s.output_size, t = s.reverse ? s.steps - 1 - i : i, rows = s.active[t];
  // To and fro: the cache still holds the weights read last in the previous step.
  for_block_tiles<Cell>(
      s.panels, i % 2, block_begin, block_end, [&](auto B, int64_t block) FUSEDRNN_LAMBDA {
        for_tiles<kRowsOf<Element, Weight>>(rows, [&](auto R, int64_t first) FUSEDRNN_LAMBDA {
          forward_tile<Cell, R, B, Element, Weight>(s, m, i, t, block, first);
        });
      });
  // Other types would have to round the projection's operands first.
  if constexpr (std::is_same_v<Element, Accum>) {
    if (m.raw) {
      Element* h = m.h[(i + 1) % 2];
      gemm<Accum>(rows, s.hidden_size, P, s.projection_panels, 0, m.raw, m.state_size, h, m.h_size,
                  false);
      for (int64_t j = 0; j < rows; ++j) {
        copy_row(s.y + (s.step_offset[t] + s.row[j]) * s.y_stride, h + j * m.h_size, P, P);
      }
    }
  }
  const int64_t next = step_after(s, t);
  finish_rows<Cell, Element>(s, m, t, next < 0 ? 0 : s.active[next], rows, block_begin, block_end);
}

// ---- backward -----------------------------------------------------------------------------------

/// Row gradients between a backward run's steps, in its workspace.
template <class Accum>
struct BackwardState {
  explicit BackwardState(const Backward<Accum>& s)
      : dh_size(padded<Accum>(s.output_size)),
        state_size(padded<Accum>(s.hidden_size)),
        dh(s.workspace),
        dstate(dh + s.rows * dh_size),
        dh_raw(dstate + s.rows * state_size) {}

  int64_t dh_size, state_size;  ///< padded row lengths
  Accum* dh;                    ///< [rows, dh_size] output gradients
  Accum* dstate;                ///< [rows, state_size]
  Accum* dh_raw;                ///< [rows, state_size] output gradients before the projection
};

template <class Accum>
int64_t backward_workspace(const Sequence<Accum>& s) {
  return s.rows * (padded<Accum>(s.output_size) + 2 * padded<Accum>(s.hidden_size));
}

template <class Cell, class Accum>
void backward_begin(const Backward<Accum>& s) {
  const BackwardState<Accum> m(s);
  const int64_t H = s.hidden_size, P = s.output_size;
  for (int64_t j = 0; j < s.rows; ++j) {
    copy_row(m.dh + j * m.dh_size, row_of(s.dh_n, s.row[j], P), P, m.dh_size);
    copy_row(m.dstate + j * m.state_size, row_of(s.dc_n, s.row[j], H), H, m.state_size);
    if (s.projection_panels) copy_row<Accum>(m.dh_raw + j * m.state_size, nullptr, 0, m.state_size);
  }
}

/// Computes pre-activation gradients at time t from output gradients, for units [begin, end).
template <class Cell, class Accum>
FUSEDRNN_INLINE void backward_units(const Backward<Accum>& s, const BackwardState<Accum>& m,
                                    int64_t t, int64_t begin, int64_t end, const Accum* dout,
                                    int64_t dout_size) {
  constexpr int L = kLanes<Accum>, S = Cell::kPreacts;
  const int64_t H = s.hidden_size, P = s.output_size;
  // A row starting at t has no step before, although the batch may.
  const int64_t before = step_before(s, t), continued = before < 0 ? 0 : s.active[before];
  for (int64_t j = 0; j < s.active[t]; ++j) {
    const int64_t b = s.row[j], token = s.step_offset[t] + b;
    const int64_t compact = s.compact_offset[t] + s.sorted_index[j];
    const int64_t token_before = j < continued ? s.step_offset[before] + b : -1;
    const Accum* saved_row = s.saved + token * Cell::kSaved * H;
    const Accum* saved_before = s.saved + token_before * Cell::kSaved * H;
    const Accum* h0 = row_of(s.h0, b, s.h0_stride);
    const Accum* state0 = initial_state<Cell>(s, b);
    if (s.projection_panels) {
      copy_row(s.h_previous + compact * P, token_before < 0 ? h0 : s.y + token_before * s.y_stride,
               P, P);
    }
    Accum* dgates = s.dgates + compact * S * H;
    for (int64_t u = begin; u < end; u += L) {
      const int64_t n = H - u;
      const auto load_saved = [&](Vec<Accum>(&saved)[Cell::kSaved],
                                  const Accum* row) FUSEDRNN_LAMBDA {
        unroll<Cell::kSaved>([&](auto a) FUSEDRNN_LAMBDA { saved[a] = load(row + a * H + u, n); });
      };
      Vec<Accum> saved[Cell::kSaved], dgate[S], state = {}, h = {};
      if (token_before >= 0) {
        load_saved(saved, saved_before);
        state = saved[Cell::kSavedState];
        h = Cell::output(saved);
      } else {
        if (state0) state = load(state0 + u, n);
        if (h0 && !s.projection_panels) h = load(h0 + u, n);
      }
      if (!s.projection_panels) store(s.h_previous + compact * P + u, h, n);
      load_saved(saved, saved_row);
      Vec<Accum> d = load(m.dstate + j * m.state_size + u);
      cell_backward<Cell>(saved, state, load(dout + j * dout_size + u), d, dgate);
      store(m.dstate + j * m.state_size + u, d);
      unroll<S>([&](auto c) FUSEDRNN_LAMBDA { store(dgates + c * H + u, dgate[c], n); });
      if (s.projection_panels) store(s.h_raw + compact * H + u, Cell::output(saved), n);
    }
  }
}

/// dh = dgates * weight_hh for panel blocks [block_begin, block_end): takes the pre-activation
/// gradients at time t to the previous step's output.
template <class Cell, class Accum>
FUSEDRNN_INLINE void backward_gemm(const Backward<Accum>& s, const BackwardState<Accum>& m,
                                   int64_t t, int64_t block_begin, int64_t block_end) {
  constexpr int S = Cell::kPreacts;
  const int64_t H = s.hidden_size, P = s.output_size;
  const Rows<const Accum> dgates{s.dgates, S * H, s.sorted_index, s.compact_offset[t]};
  const Rows<Accum> dh{m.dh, m.dh_size};
  // With as many gates as pre-activations, dgates is one K segment.
  using Segments = std::conditional_t<Cell::kGates == S, InOrder<1>, HiddenPreacts<Cell>>;
  const int64_t length = Cell::kGates == S ? S * H : H;
  gemm_blocks<Segments, Accum>(s.active[t], length, P, block_begin, block_end, s.panels,
                               s.matrix_stride, dgates, dh, false);
}

/// Writes the initial states' gradients, for outputs [begin, output_end) and units [begin,
/// unit_end).
template <class Cell, class Accum>
FUSEDRNN_INLINE void finish_backward(const Backward<Accum>& s, const BackwardState<Accum>& m,
                                     int64_t begin, int64_t output_end, int64_t unit_end) {
  for (int64_t j = 0; j < s.rows; ++j) {
    Accum* dh = m.dh + j * m.dh_size;
    Accum* dstate = m.dstate + j * m.state_size;
    if constexpr (!Cell::kHasCellState) {
      for (int64_t u = begin; u < output_end; u += kLanes<Accum>) {
        store(dh + u, load(dh + u) + load(dstate + u));
      }
    } else {
      copy_row(s.dc0 + s.row[j] * s.hidden_size + begin, dstate + begin, unit_end - begin, 0);
    }
    copy_row(s.dh0 + s.row[j] * s.output_size + begin, dh + begin, output_end - begin, 0);
  }
}

/// The i-th step back, for the units in panel blocks [block_begin, block_end). A projection needs
/// all blocks at once. The step takes step i - 1's pre-activation gradients to step i's output,
/// then computes step i's pre-activation gradients. i runs to s.steps; the last step leaves the h0
/// and c0 gradients. Steps run in order; blocks of one step may run at the same time. The caller
/// computes weight gradients as GEMMs over all steps.
template <class Cell, class Accum>
void backward_step(const Backward<Accum>& s, int64_t i, int64_t block_begin, int64_t block_end) {
  constexpr int L = kLanes<Accum>;
  constexpr int64_t width = kPanelVectors * L;
  const BackwardState<Accum> m(s);
  const int64_t H = s.hidden_size, P = s.output_size;
  const auto time = [&](int64_t step) { return s.reverse ? step : s.steps - 1 - step; };
  const int64_t begin = block_begin * width;
  const int64_t output_end = smaller(block_end * width, P),
                unit_end = smaller(block_end * width, H);
  if (i > 0) {
    backward_gemm<Cell>(s, m, time(i - 1), block_begin, smaller(block_end, divide_up(P, width)));
  }
  if (i == s.steps) return finish_backward<Cell>(s, m, begin, output_end, unit_end);

  const int64_t t = time(i), rows = s.active[t];
  if (s.dy) {
    for (int64_t j = 0; j < rows; ++j) {
      const Accum* dy = s.dy + (s.step_offset[t] + s.row[j]) * s.dy_stride;
      Accum* dh = m.dh + j * m.dh_size;
      for (int64_t u = begin; u < output_end; u += L) {
        store(dh + u, load(dh + u) + load(dy + u, P - u));
      }
    }
  }
  if (!s.projection_panels) {
    return backward_units<Cell>(s, m, t, begin, unit_end, m.dh, m.dh_size);
  }
  for (int64_t j = 0; j < rows; ++j) {
    copy_row(s.dr + (s.compact_offset[t] + s.sorted_index[j]) * P, m.dh + j * m.dh_size, P, P);
  }
  gemm<Accum>(rows, P, H, s.projection_panels, 0, m.dh, m.dh_size, m.dh_raw, m.state_size, false);
  backward_units<Cell>(s, m, t, 0, H, m.dh_raw, m.state_size);
}

}  // namespace fusedrnn::FUSEDRNN_TARGET

#include "variant_kernels.h"

namespace fusedrnn::FUSEDRNN_TARGET {

// ---- the table ----------------------------------------------------------------------------------

template <class Cell, class Element, class Weight, class Accum = Accumulator<Element>>
constexpr cpu::Kernel<Accum, Element> kernel_of() {
  cpu::Kernel<Accum, Element> kernel{};
  kernel.blocks_per_tile = kBlocksPerTile<Cell>;
  kernel.forward_panel_size = forward_panel_size<Cell, Element, Weight>;
  kernel.forward_workspace = forward_workspace<Accum>;
  kernel.backward_workspace = backward_workspace<Accum>;
  kernel.forward_begin = forward_begin<Cell, Element>;
  kernel.forward_step = forward_step<Cell, Element, Weight>;
  kernel.forward_input = forward_input<Cell, Element, Weight>;
  if constexpr (std::is_same_v<Element, Weight>) {
    kernel.prepack_forward = prepack_forward<Cell, Element>;
  }
  if constexpr (std::is_same_v<Element, Weight> && std::is_same_v<Element, Accum>) {
    kernel.backward_begin = backward_begin<Cell, Accum>;
    kernel.backward_step = backward_step<Cell, Accum>;
    kernel.variants = {variant_forward_workspace<Cell, Accum>,
                       variant_backward_workspace<Cell, Accum>,
                       variant_input<Cell, Accum>,
                       variant_forward_begin<Cell, Accum>,
                       variant_forward_step<Cell, Accum>,
                       variant_backward_begin<Cell, Accum>,
                       variant_backward_step<Cell, Accum>};
  }
  return kernel;
}

template <class Element, class Weight, class... Cell, class Accum = Accumulator<Element>>
constexpr cpu::KernelsOf<Accum, Element> kernels_of(CellList<Cell...>) {
  cpu::Common<Accum, Element> common{};
  common.lanes = kLanes<Accum>;
  common.block_columns = kPanelVectors * kLanes<Accum>;
  common.tile_rows = kRowsOf<Element, Weight>;
  common.per_lane = kPerLane<Element>;
  common.in_place_rows = kInPlaceRows;
  if constexpr (std::is_same_v<Element, Int16>) {
    common.x_bytes = sizeof(InputOf<Element>);
    common.largest_x = sizeof(InputOf<Element>) == 1 ? 127 : 32767;
    common.quantise_row = quantise_row;
  } else {
    common.prepack_gemm = prepack_gemm<Element>;
    common.gemm = gemm<Element>;
  }
  if constexpr (std::is_same_v<Element, Accum>) common.gemm_transposed = gemm_transposed<Accum>;
  return {common, {kernel_of<Cell, Element, Weight>()...}};
}

constexpr cpu::KernelTable kernel_table(const char* isa) {
  return {isa,
          random_mask,
          kMaskBlock,
          kernels_of<float, float>(Cells()),
          kernels_of<double, double>(Cells()),
          nullptr,
          kernels_of<float, BFloat16>(Cells()),
          kernels_of<Int16, Int8>(Cells())};
}

}  // namespace fusedrnn::FUSEDRNN_TARGET
