// The CPU kernels: the time loop and the vector step, for any cell, value type and vector width.
//
// Forward: a tile of up to kRows batch rows by one vector of units keeps all kPreacts sums of those
// units in registers while it runs over input and hidden state, applies the cell to them there,
// and stores h, state and what the backward pass needs. Weights come from panels
// [units / lanes][bias, input, hidden][gates][lanes], or, when a call reads them too few times to
// pay for packing, row by row as they are.
// Backward: the same tile product takes the gradients of the sums back to the step before.
//
// A file that includes this defines FUSEDRNN_TARGET and FUSEDRNN_VECTOR_BYTES and selects the
// instruction set by a pragma; standard headers come before that, so that none of their
// functions is compiled for it.
#pragma once

#include "kernels.h"
#include "tile.h"

namespace fusedrnn::FUSEDRNN_TARGET {

// ---- forward ----------------------------------------------------------------------------------

/// The step before (after) step t in the order of the run, or -1.
template <class T>
FUSEDRNN_INLINE int64_t step_before(const Sequence<T>& s, int64_t t) {
  return s.reverse ? (t + 1 < s.steps ? t + 1 : -1) : t - 1;
}
template <class T>
FUSEDRNN_INLINE int64_t step_after(const Sequence<T>& s, int64_t t) {
  return s.reverse ? t - 1 : (t + 1 < s.steps ? t + 1 : -1);
}

/// Copies n elements, or zeros when there is no source, and clears the padding behind them.
template <class T>
FUSEDRNN_INLINE void copy_row(T* to, const T* from, int64_t n, int64_t size) {
  if (from) {
    __builtin_memcpy(to, from, size_t(n) * sizeof(T));
  } else {
    __builtin_memset(to, 0, size_t(n) * sizeof(T));
  }
  if (size > n) __builtin_memset(to + n, 0, size_t(size - n) * sizeof(T));
}

template <class T>
FUSEDRNN_INLINE const T* row_of(const T* base, int64_t row, int64_t stride) {
  return base ? base + row * stride : nullptr;
}

/// What a forward run keeps of its rows between steps, in its workspace.
template <class S, class T = Accumulator<S>>
struct ForwardState {
  explicit ForwardState(const Forward<T, S>& s)
      : h_size(padded<T>(s.output_size)),
        state_size(padded<T>(s.hidden_size)),
        h{reinterpret_cast<S*>(s.workspace), reinterpret_cast<S*>(s.workspace + s.rows * h_size)},
        state(s.workspace + 2 * s.rows * h_size),
        raw(s.projection_panels ? state + s.rows * state_size : nullptr) {}

  int64_t h_size, state_size;  ///< padded row lengths
  S* h[2];   ///< [rows, h_size] outputs; step i reads h[i % 2] and writes the other
  T* state;  ///< [rows, state_size]
  T* raw;    ///< [rows, state_size] output before the projection
};

template <class T>
int64_t forward_workspace(const Sequence<T>& s) {
  return s.rows * 2 * (padded<T>(s.output_size) + padded<T>(s.hidden_size));
}

template <class Cell, int R, class S, class T = Accumulator<S>>
FUSEDRNN_INLINE void forward_tile(const Forward<T, S>& s, const ForwardState<S>& m, int64_t i,
                                  int64_t t, int64_t block, int64_t first) {
  constexpr int L = kLanes<T>, G = Cell::kGates;
  const int64_t H = s.hidden_size, unit = block * L, units = H - unit < L ? H - unit : L;
  const S* h[R];
  unroll<R>([&](auto r)
                __attribute__((always_inline)) { h[r] = m.h[i % 2] + (first + r) * m.h_size; });

  Tile<T, R> sum;
  {
    const T* panel = nullptr;
    Vec<T> bias[kPreacts];
    if (s.panels) {
      panel = s.panels +
              block * forward_panel_size<Cell, S>(s.x_product ? 0 : s.input_size, s.output_size);
      unroll<kPreacts>([&](auto c)
                           __attribute__((always_inline)) { bias[c] = load(panel + c * L); });
      panel += kPreacts * L;
    } else {
      bias_of<Cell>(s.weights, H, unit, units, bias);
    }
    unroll<R>([&](auto r) __attribute__((always_inline)) {
      unroll<kPreacts>([&](auto c) __attribute__((always_inline)) { sum[r][c] = bias[c]; });
    });
    const S* x[R] = {};
    if (s.x_product) {
      unroll<R>([&](auto r) __attribute__((always_inline)) {
        const T* at =
            s.x_product + (s.step_offset[t] + s.row[first + r]) * s.x_product_stride + unit;
        unroll<G>([&](auto g) __attribute__((always_inline)) {
          sum[r][Cell::input_preact[g]] += load(at + g * H, units);
        });
      });
    } else {
      unroll<R>([&](auto r) __attribute__((always_inline)) {
        x[r] = s.x + s.x_offset[t] + s.row[first + r] * s.x_row_stride;
      });
    }
    if (panel) {
      if (!s.x_product) {
        const int64_t lanes = lanes_of<S>(s.input_size);
        accumulate_rows<InputColumns<Cell>, S, R>(sum, x, lanes, panel);
        panel += lanes * G * L;
      }
      accumulate_rows<HiddenColumns<Cell>, S, R>(sum, h, lanes_of<S>(s.output_size), panel);
    } else if constexpr (R <= kUnpackedRows) {
      Lanes<T, R> lanes = {};
      if (!s.x_product) {
        accumulate_unpacked<InputColumns<Cell>, S, R>(lanes, x, s.input_size, s.weights.ih, H, unit,
                                                      units);
      }
      accumulate_unpacked<HiddenColumns<Cell>, S, R>(lanes, h, s.output_size, s.weights.hh, H, unit,
                                                     units);
      add_lanes<T, R>(sum, lanes);
    }
  }

  Vec<T> sums[R][kPreacts];  // in memory, so that the cell is compiled once and not once a row
  unroll<R>([&](auto r) __attribute__((always_inline)) {
    unroll<kPreacts>([&](auto c) __attribute__((always_inline)) { sums[r][c] = sum[r][c]; });
  });
#pragma GCC unroll 1
  for (int r = 0; r < R; ++r) {
    const int64_t j = first + r, position = s.step_offset[t] + s.row[j];
    T* state_at = m.state + j * m.state_size + unit;
    Vec<T> state = load(state_at), saved[Cell::kSaved];
    const Vec<T> out = Cell::forward(sums[r], state, saved);
    store(state_at, state);
    if (m.raw) {
      store(m.raw + j * m.state_size + unit, out);
    } else {
      store_values(m.h[(i + 1) % 2] + j * m.h_size + unit, out, L);
      store_values(s.y + position * s.y_stride + unit, out, units);
    }
    if (s.saved) {
      T* to = s.saved + position * Cell::kSaved * H + unit;
      unroll<Cell::kSaved>(
          [&](auto a) __attribute__((always_inline)) { store(to + a * H, saved[a], units); });
    }
  }
}

/// Writes the final states of rows [begin, end), of the units that these blocks own.
template <class Cell, class S, class T = Accumulator<S>>
FUSEDRNN_INLINE void finish_rows(const Forward<T, S>& s, const ForwardState<S>& m, const S* h,
                                 int64_t begin, int64_t end, int64_t block_begin,
                                 int64_t block_end) {
  constexpr int L = kLanes<T>;
  const int64_t H = s.hidden_size, P = s.output_size, unit = block_begin * L;
  const int64_t units = (block_end * L < H ? block_end * L : H) - unit;
  const int64_t out = m.raw ? 0 : unit, outs = m.raw ? P : units;
  for (int64_t j = begin; j < end; ++j) {
    for (int64_t u = 0; u < outs; u += L) {
      store(s.h_n + s.row[j] * P + out + u, load_values(h + j * m.h_size + out + u, outs - u),
            outs - u);
    }
    if constexpr (Cell::kHasCellState) {
      copy_row(s.c_n + s.row[j] * H + unit, m.state + j * m.state_size + unit, units, units);
    }
  }
}

template <class Cell, class S, class T = Accumulator<S>>
void forward_begin(const Forward<T, S>& s) {
  const ForwardState<S> m(s);
  for (int64_t j = 0; j < s.rows; ++j) {
    const T* h0 = row_of(s.h0, s.row[j], s.h0_stride);
    for (int64_t u = 0; u < m.h_size; u += kLanes<T>) {
      const int64_t left = s.output_size - u;
      const Vec<T> h = h0 ? load(h0 + u, left) : Vec<T>{};
      store_values(m.h[0] + j * m.h_size + u, h, kLanes<T>);
      store_values(m.h[1] + j * m.h_size + u, h, kLanes<T>);
    }
    copy_row(m.state + j * m.state_size,
             !Cell::kHasCellState ? h0 : row_of(s.c0, s.row[j], s.c0_stride), s.hidden_size,
             m.state_size);
  }
  // Rows of length zero.
  finish_rows<Cell, S>(s, m, m.h[0], s.active[0], s.rows, 0, blocks_of<T>(s.hidden_size));
}

/// The i-th step of the run for the units of blocks [block_begin, block_end), all of them with a
/// projection. Steps follow one another; the blocks of one step may run at the same time.
template <class Cell, class S, class T = Accumulator<S>>
void forward_step(const Forward<T, S>& s, int64_t i, int64_t block_begin, int64_t block_end) {
  const ForwardState<S> m(s);
  const int64_t P = s.output_size, t = s.reverse ? s.steps - 1 - i : i, rows = s.active[t];
  // To and fro, so that what the step before read last is still in the cache where not all fits.
  for (int64_t n = block_begin; n < block_end; ++n) {
    const int64_t block = i % 2 ? block_begin + block_end - 1 - n : n;
    for_tiles(rows, [&](auto R, int64_t first) __attribute__((always_inline)) {
      forward_tile<Cell, R, S>(s, m, i, t, block, first);
    });
  }
  S* h = m.h[(i + 1) % 2];
  if constexpr (std::is_same_v<S, T>) {  // the projection's operands would need rounding first
    if (m.raw) {
      multiply<T>(rows, s.hidden_size, P, s.projection_panels, 0, m.raw, m.state_size, h, m.h_size,
                  false);
      for (int64_t j = 0; j < rows; ++j) {
        copy_row(s.y + (s.step_offset[t] + s.row[j]) * s.y_stride, h + j * m.h_size, P, P);
      }
    }
  }
  const int64_t next = step_after(s, t);
  finish_rows<Cell, S>(s, m, h, next < 0 ? 0 : s.active[next], rows, block_begin, block_end);
}

// ---- backward ---------------------------------------------------------------------------------

/// What a backward run keeps of its rows between steps, in its workspace.
template <class T>
struct BackwardState {
  explicit BackwardState(const Backward<T>& s)
      : dh_size(padded<T>(s.output_size)),
        state_size(padded<T>(s.hidden_size)),
        dh(s.workspace),
        dstate(dh + s.rows * dh_size),
        dh_raw(dstate + s.rows * state_size) {}

  int64_t dh_size, state_size;  ///< padded row lengths
  T* dh;                        ///< [rows, dh_size] of the output
  T* dstate;                    ///< [rows, state_size]
  T* dh_raw;                    ///< [rows, state_size] of the output before the projection
};

template <class T>
int64_t backward_workspace(const Sequence<T>& s) {
  return s.rows * (padded<T>(s.output_size) + 2 * padded<T>(s.hidden_size));
}

template <class Cell, class T>
void backward_begin(const Backward<T>& s) {
  const BackwardState<T> m(s);
  const int64_t H = s.hidden_size, P = s.output_size;
  for (int64_t j = 0; j < s.rows; ++j) {
    copy_row(m.dh + j * m.dh_size, row_of(s.dh_n, s.row[j], P), P, m.dh_size);
    copy_row(m.dstate + j * m.state_size, row_of(s.dc_n, s.row[j], H), H, m.state_size);
    if (s.projection_panels) copy_row<T>(m.dh_raw + j * m.state_size, nullptr, 0, m.state_size);
  }
}

/// Gradients of the sums of step t, for the units [begin, end), from those of its output.
template <class Cell, class T>
FUSEDRNN_INLINE void backward_units(const Backward<T>& s, const BackwardState<T>& m, int64_t t,
                                    int64_t begin, int64_t end, const T* dout, int64_t dout_size) {
  constexpr int L = kLanes<T>;
  const int64_t H = s.hidden_size, P = s.output_size;
  // A row that starts at t has no step before, although the batch may.
  const int64_t before = step_before(s, t), continued = before < 0 ? 0 : s.active[before];
  for (int64_t j = 0; j < s.active[t]; ++j) {
    const int64_t b = s.row[j], at = s.step_offset[t] + b,
                  to = s.compact_offset[t] + s.sorted_index[j];
    const int64_t from = j < continued ? s.step_offset[before] + b : -1;
    const T* saved_row = s.saved + at * Cell::kSaved * H;
    const T* saved_before = s.saved + from * Cell::kSaved * H;
    const T* h0 = row_of(s.h0, b, s.h0_stride);
    const T* state0 = !Cell::kHasCellState ? h0 : row_of(s.c0, b, s.c0_stride);
    if (s.projection_panels) {
      copy_row(s.h_previous + to * P, from < 0 ? h0 : s.y + from * s.y_stride, P, P);
    }
    T* dgates = s.dgates + to * kPreacts * H;
    for (int64_t u = begin; u < end; u += L) {
      const int64_t n = H - u;
      const auto load_saved = [&](Vec<T>(&saved)[Cell::kSaved],
                                  const T* row) __attribute__((always_inline)) {
        unroll<Cell::kSaved>(
            [&](auto a) __attribute__((always_inline)) { saved[a] = load(row + a * H + u, n); });
      };
      Vec<T> saved[Cell::kSaved], dgate[kPreacts], state = {}, h = {};
      if (from >= 0) {
        load_saved(saved, saved_before);
        state = saved[Cell::kSavedState];
        h = Cell::output(saved);
      } else {
        if (state0) state = load(state0 + u, n);
        if (h0 && !s.projection_panels) h = load(h0 + u, n);
      }
      if (!s.projection_panels) store(s.h_previous + to * P + u, h, n);
      load_saved(saved, saved_row);
      Vec<T> d = load(m.dstate + j * m.state_size + u);
      Cell::backward(saved, state, load(dout + j * dout_size + u), d, dgate);
      store(m.dstate + j * m.state_size + u, d);
      unroll<kPreacts>(
          [&](auto c) __attribute__((always_inline)) { store(dgates + c * H + u, dgate[c], n); });
      if (s.projection_panels) store(s.h_raw + to * H + u, Cell::output(saved), n);
    }
  }
}

/// The i-th step back, for the units of the product blocks [block_begin, block_end), all of them
/// with a projection: takes the gradients of step i - 1's sums back to the output of step i, then
/// computes those of step i's sums. i runs to s.steps, which leaves the gradients of h0 and c0.
/// Steps follow one another; the blocks of one step may run at the same time. The weights'
/// gradients are products over all steps and belong to the caller.
template <class Cell, class T>
void backward_step(const Backward<T>& s, int64_t i, int64_t block_begin, int64_t block_end) {
  constexpr int L = kLanes<T>;
  const BackwardState<T> m(s);
  const int64_t H = s.hidden_size, P = s.output_size;
  const auto time = [&](int64_t step) { return s.reverse ? step : s.steps - 1 - step; };
  const int64_t begin = block_begin * kPreacts * L;
  const auto end_of = [&](int64_t size) {
    return block_end * kPreacts * L < size ? block_end * kPreacts * L : size;
  };
  const int64_t blocks = (P + kPreacts * L - 1) / (kPreacts * L);
  if (i > 0) {
    const int64_t t = time(i - 1);
    const Rows<const T> dgates{s.dgates, kPreacts * H, s.sorted_index, s.compact_offset[t]};
    const Rows<T> dh{m.dh, m.dh_size};
    const int64_t last = block_end < blocks ? block_end : blocks;
    if constexpr (Cell::kGates ==
                  kPreacts) {  // the sums of the hidden part are all of them, in order
      product<Columns<1>, T>(s.active[t], kPreacts * H, P, block_begin, last, s.panels,
                             s.matrix_stride, dgates, dh, false);
    } else {
      product<HiddenSegments<Cell>, T>(s.active[t], H, P, block_begin, last, s.panels,
                                       s.matrix_stride, dgates, dh, false);
    }
  }
  if (i == s.steps) {
    for (int64_t j = 0; j < s.rows; ++j) {
      T* dh = m.dh + j * m.dh_size;
      T* dstate = m.dstate + j * m.state_size;
      if constexpr (!Cell::kHasCellState) {
        for (int64_t u = begin; u < end_of(P); u += L)
          store(dh + u, load(dh + u) + load(dstate + u));
      } else {
        copy_row(s.dc0 + s.row[j] * H + begin, dstate + begin, end_of(H) - begin, 0);
      }
      copy_row(s.dh0 + s.row[j] * P + begin, dh + begin, end_of(P) - begin, 0);
    }
    return;
  }

  const int64_t t = time(i), rows = s.active[t];
  if (s.dy) {
    for (int64_t j = 0; j < rows; ++j) {
      const T* dy = s.dy + (s.step_offset[t] + s.row[j]) * s.dy_stride;
      T* dh = m.dh + j * m.dh_size;
      for (int64_t u = begin; u < end_of(P); u += L) {
        store(dh + u, load(dh + u) + load(dy + u, P - u));
      }
    }
  }
  if (!s.projection_panels) {
    return backward_units<Cell>(s, m, t, begin, end_of(H), m.dh, m.dh_size);
  }
  for (int64_t j = 0; j < rows; ++j) {
    copy_row(s.dr + (s.compact_offset[t] + s.sorted_index[j]) * P, m.dh + j * m.dh_size, P, P);
  }
  multiply<T>(rows, P, H, s.projection_panels, 0, m.dh, m.dh_size, m.dh_raw, m.state_size, false);
  backward_units<Cell>(s, m, t, 0, H, m.dh_raw, m.state_size);
}

// ---- the table --------------------------------------------------------------------------------

template <class Cell, class S, class T = Accumulator<S>>
constexpr cpu::Kernel<T, S> kernel_of() {
  static_assert(Cell::kPreacts == kPreacts);
  cpu::Kernel<T, S> kernel{forward_panel_size<Cell, S>,
                           forward_workspace<T>,
                           backward_workspace<T>,
                           pack_forward<Cell, S>,
                           forward_begin<Cell, S>,
                           forward_step<Cell, S>,
                           nullptr,
                           nullptr};
  if constexpr (std::is_same_v<S, T>) {
    kernel.backward_begin = backward_begin<Cell, T>;
    kernel.backward_step = backward_step<Cell, T>;
  }
  return kernel;
}

template <class S, class... Cell, class T = Accumulator<S>>
constexpr cpu::KernelsOf<T, S> kernels_of(CellList<Cell...>) {
  cpu::Common<T, S> common{kLanes<T>,       kPreacts * kLanes<T>, kRows,  kUnpackedRows,
                           pack_product<S>, multiply<S>,          nullptr};
  if constexpr (std::is_same_v<S, T>) common.multiply_transposed = multiply_transposed<T>;
  return {common, {kernel_of<Cell, S>()...}};
}

}  // namespace fusedrnn::FUSEDRNN_TARGET
