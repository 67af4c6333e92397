// The CPU kernels: the time loop and the vector step, for any cell, value type and vector width.
//
// Forward: a tile of up to kRows batch rows by one vector of units keeps all kSums sums of those
// units in registers while it runs over input and hidden state, applies the cell to them there,
// and stores h, state and what the backward pass needs. Weights come from panels
// [units / lanes][bias, input, hidden][gates][lanes], or, when a call reads them too few times to
// pay for packing, row by row as they are.
// Backward: the same tile product takes the gradients of the sums back to the step before.
// All sums over k run in one fixed order, so that a call gives the same bits every time.
//
// A file that includes this defines FUSEDRNN_TARGET and FUSEDRNN_VECTOR_BYTES and selects the
// instruction set by a pragma; standard headers come before that, so that none of their
// functions is compiled for it.
#pragma once

#include "../cells.h"
#include "kernels.h"
#include "vector.h"

namespace fusedrnn::FUSEDRNN_TARGET {

// Rows of a tile: rows * 4 sums, 4 weights and a broadcast must fit the register file.
#if FUSEDRNN_VECTOR_BYTES == 64 || defined(__aarch64__)
inline constexpr int kRows = 6;
#elif FUSEDRNN_VECTOR_BYTES == 32
inline constexpr int kRows = 3;
#else
inline constexpr int kRows = 2;
#endif
inline constexpr int kSums = 4;  ///< of every cell; also the vectors in a block of product panels

FUSEDRNN_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
template <class T>
FUSEDRNN_INLINE int64_t padded(int64_t n) {
  return round_up(n, kLanes<T>);
}

/// Splits rows into the fewest tiles, of nearly equal size, and calls tile(size, first row).
template <class F>
FUSEDRNN_INLINE void for_tiles(int64_t rows, F&& tile) {
  const int64_t tiles = (rows + kRows - 1) / kRows;
  int64_t first = 0;
  for (int64_t left = tiles; left > 0; --left) {
    const int64_t size = (rows - first + left - 1) / left;
    unroll<kRows>([&](auto i) __attribute__((always_inline)) {
      constexpr int R = decltype(i)::value + 1;
      if (size == R) tile(std::integral_constant<int, R>{}, first);
    });
    first += size;
  }
}

// Which sums the vectors of a panel row go to.
template <class Cell>
struct InputColumns {
  static constexpr int count = Cell::kGates;
  static constexpr int at(int g) { return Cell::input_sum[g]; }
};
template <class Cell>
struct HiddenColumns {
  static constexpr int count = Cell::kGates;
  static constexpr int at(int g) { return Cell::hidden_sum[g]; }
};
template <int C>
struct Columns {
  static constexpr int count = C;
  static constexpr int at(int c) { return c; }
};

template <class T, int R>
using Tile = Vec<T>[R][kSums];

/// sum[r][at(c)] += a[r][k] * panel[k][c] for k in [0, size).
template <class To, class T, int R>
FUSEDRNN_INLINE void accumulate(Tile<T, R>& sum, const T* const (&a)[R], int64_t size,
                                const T* panel) {
  constexpr int C = To::count;
  const auto step = [&](Tile<T, R>& into, int64_t k) __attribute__((always_inline)) {
    Vec<T> w[C];
    unroll<C>([&](auto c) __attribute__((always_inline)) {
      w[c] = load(panel + (k * C + c) * kLanes<T>);
    });
    unroll<R>([&](auto r) __attribute__((always_inline)) {
      const Vec<T> value = broadcast<Vec<T>>(a[r][k]);
      unroll<C>([&](auto c) __attribute__((always_inline)) {
        into[r][To::at(decltype(c)::value)] += value * w[c];
      });
    });
  };
  int64_t k = 0;
  if constexpr (R == 1) {  // four chains of additions can't hide their latency; eight do
    Tile<T, R> odd = {};
    for (; k + 2 <= size; k += 2) {
      step(sum, k);
      step(odd, k + 1);
    }
    unroll<kSums>([&](auto c) __attribute__((always_inline)) { sum[0][c] += odd[0][c]; });
  }
  for (; k < size; ++k) step(sum, k);
}

/// Lane u: the product of row u of w [units, size] with a. Reads w along its rows, unpacked.
template <class T>
FUSEDRNN_INLINE Vec<T> dot(const T* w, int64_t units, int64_t size, const T* a) {
  constexpr int L = kLanes<T>;
  Vec<T> sum[L] = {};
  const T* row[L];
  unroll<L>([&](auto i) __attribute__((always_inline)) {
    row[i] = w + (i < units ? int64_t(i) : units - 1) * size;
  });
  int64_t k = 0;
  for (; k + L <= size; k += L) {
    const Vec<T> value = load(a + k);
    unroll<L>([&](auto i) __attribute__((always_inline)) { sum[i] += load(row[i] + k) * value; });
  }
  if (k < size) {
    const Vec<T> value = load_first(a + k, size - k);
    unroll<L>([&](auto i) __attribute__((always_inline)) {
      sum[i] += load_first(row[i] + k, size - k) * value;
    });
  }
  return sum_lanes<T>(sum);
}

template <class To, class T, int R>
FUSEDRNN_INLINE void accumulate_unpacked(Tile<T, R>& sum, const T* const (&a)[R], int64_t size,
                                         const T* w, int64_t hidden_size, int64_t unit,
                                         int64_t units) {
  for (int r = 0; r < R; ++r) {
    unroll<To::count>([&](auto g) __attribute__((always_inline)) {
      sum[r][To::at(decltype(g)::value)] +=
          dot(w + (g * hidden_size + unit) * size, units, size, a[r]);
    });
  }
}

// ---- packing ----------------------------------------------------------------------------------

/// out[k * step + v] = w[v * size + k] for v in [0, lanes), rows from `units` on zero.
template <class T>
FUSEDRNN_INLINE void pack_rows(const T* w, int64_t units, int64_t size, T* out, int64_t step) {
  constexpr int L = kLanes<T>;
  for (int64_t k = 0; k < size; k += L) {
    const int64_t n = size - k < L ? size - k : L;
    Vec<T> square[L];
    for (int v = 0; v < L; ++v) square[v] = v < units ? load(w + v * size + k, n) : Vec<T>{};
    transpose<T>(square);
    for (int64_t i = 0; i < n; ++i) store(out + (k + i) * step, square[i]);
  }
}

template <class Cell, class T>
int64_t forward_panel_size(int64_t input_size, int64_t output_size) {
  return (kSums + (input_size + output_size) * Cell::kGates) * kLanes<T>;
}

template <class Cell, class T>
FUSEDRNN_INLINE void bias_of(const Weights<T>& w, int64_t hidden_size, int64_t unit, int64_t units,
                             Vec<T> (&bias)[kSums]) {
  unroll<kSums>([&](auto c) __attribute__((always_inline)) { bias[c] = Vec<T>{}; });
  unroll<Cell::kGates>([&](auto g) __attribute__((always_inline)) {
    const int64_t at = g * hidden_size + unit;
    if (w.bias_ih) bias[Cell::input_sum[g]] += load(w.bias_ih + at, units);
    if (w.bias_hh) bias[Cell::hidden_sum[g]] += load(w.bias_hh + at, units);
  });
}

template <class Cell, class T>
void pack_forward(const Weights<T>& weights, int64_t input_size, int64_t hidden_size,
                  int64_t output_size, int64_t block, T* panel) {
  constexpr int L = kLanes<T>, G = Cell::kGates;
  const int64_t unit = block * L, units = hidden_size - unit < L ? hidden_size - unit : L;
  Vec<T> bias[kSums];
  bias_of<Cell>(weights, hidden_size, unit, units, bias);
  for (int c = 0; c < kSums; ++c) store(panel + c * L, bias[c]);
  panel += kSums * L;
  for (int g = 0; g < G; ++g) {
    const int64_t row = g * hidden_size + unit;
    if (weights.ih) {
      pack_rows(weights.ih + row * input_size, units, input_size, panel + g * L, G * L);
    }
    pack_rows(weights.hh + row * output_size, units, output_size,
              panel + (weights.ih ? input_size : 0) * G * L + g * L, G * L);
  }
}

template <class T>
void pack_product(const T* matrix, int64_t row_stride, int64_t column_stride, int64_t depth,
                  int64_t columns, int64_t block, T* panels) {
  constexpr int L = kLanes<T>;
  const int64_t width = kSums * L, first = block * width;
  T* panel = panels + depth * first;
  const int64_t left = padded<T>(columns - first), step = left < width ? left : width;
  for (int64_t c = 0; c < step; c += L) {
    const int64_t n = columns - first - c < L ? columns - first - c : L;
    const T* from = matrix + (first + c) * column_stride;
    if (row_stride == 1) {
      pack_rows(from, n, column_stride, panel + c, step);
    } else {
      for (int64_t k = 0; k < depth; ++k) {
        store(panel + k * step + c, load(from + k * row_stride, n));
      }
    }
  }
}

/// out(j)[0, columns) = a(j) * matrix for the rows j of [0, rows), in whole vectors. The depth of
/// the product is that of `segments` stretches of `length` elements, the s-th at a(j) + at(s).
template <class Segments, class T, class A, class Out>
FUSEDRNN_INLINE void product(int64_t rows, int64_t length, int64_t columns, const T* panels, A&& a,
                             Out&& out) {
  constexpr int L = kLanes<T>;
  const int64_t depth = Segments::count * length;
  for (int64_t first = 0; first < columns; first += kSums * L) {
    const int64_t left = (columns - first + L - 1) / L;
    const T* panel = panels + depth * first;
    unroll<kSums>([&](auto i) __attribute__((always_inline)) {
      constexpr int C = decltype(i)::value + 1;
      if (left != C && !(C == kSums && left > C)) return;
      for_tiles(rows, [&](auto R, int64_t j) __attribute__((always_inline)) {
        Tile<T, R> sum = {};
        for (int s = 0; s < Segments::count; ++s) {
          const T* row[R];
          unroll<R>([&](auto r) __attribute__((always_inline)) {
            row[r] = a(j + r) + Segments::at(s) * length;
          });
          accumulate<Columns<C>, T, R>(sum, row, length, panel + s * length * C * L);
        }
        unroll<R>([&](auto r) __attribute__((always_inline)) {
          unroll<C>([&](auto c) __attribute__((always_inline)) {
            store(out(j + r) + first + c * L, sum[r][c]);
          });
        });
      });
    });
  }
}

// ---- forward ----------------------------------------------------------------------------------

/// The step that a row takes before or after step t, or -1.
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

/// What a forward call keeps of its rows between steps.
template <class T>
struct ForwardState {
  int64_t h_size, state_size;  ///< padded row lengths
  T *h, *h_next;               ///< [rows, h_size] output of the last step and of this one
  T* state;                    ///< [rows, state_size]
  T* raw;                      ///< [rows, state_size] output before the projection
};

template <class T>
int64_t forward_workspace(const Sequence<T>& s) {
  return s.rows * 2 * (padded<T>(s.output_size) + padded<T>(s.hidden_size));
}

template <class Cell, int R, class T>
FUSEDRNN_INLINE void forward_tile(const Forward<T>& s, const ForwardState<T>& m, int64_t t,
                                  int64_t block, int64_t first) {
  constexpr int L = kLanes<T>, G = Cell::kGates;
  const int64_t H = s.hidden_size, unit = block * L, units = H - unit < L ? H - unit : L;
  const T* h[R];
  unroll<R>([&](auto r) __attribute__((always_inline)) { h[r] = m.h + (first + r) * m.h_size; });

  Tile<T, R> sum;
  {
    const T* panel = nullptr;
    Vec<T> bias[kSums];
    if (s.panels) {
      panel = s.panels +
              block * forward_panel_size<Cell, T>(s.x_product ? 0 : s.input_size, s.output_size);
      unroll<kSums>([&](auto c) __attribute__((always_inline)) { bias[c] = load(panel + c * L); });
      panel += kSums * L;
    } else {
      bias_of<Cell>(s.weights, H, unit, units, bias);
    }
    unroll<R>([&](auto r) __attribute__((always_inline)) {
      unroll<kSums>([&](auto c) __attribute__((always_inline)) { sum[r][c] = bias[c]; });
    });
    if (s.x_product) {
      unroll<R>([&](auto r) __attribute__((always_inline)) {
        const T* x = s.x_product + (s.position[t] + s.row[first + r]) * G * H + unit;
        unroll<G>([&](auto g) __attribute__((always_inline)) {
          sum[r][Cell::input_sum[g]] += load(x + g * H, units);
        });
      });
    } else {
      const T* x[R];
      unroll<R>([&](auto r) __attribute__((always_inline)) {
        x[r] = s.x + s.x_offset[t] + s.row[first + r] * s.x_row_stride;
      });
      if (panel) {
        accumulate<InputColumns<Cell>, T, R>(sum, x, s.input_size, panel);
        panel += s.input_size * G * L;
      } else {
        accumulate_unpacked<InputColumns<Cell>, T, R>(sum, x, s.input_size, s.weights.ih, H, unit,
                                                      units);
      }
    }
    if (panel) {
      accumulate<HiddenColumns<Cell>, T, R>(sum, h, s.output_size, panel);
    } else {
      accumulate_unpacked<HiddenColumns<Cell>, T, R>(sum, h, s.output_size, s.weights.hh, H, unit,
                                                     units);
    }
  }

  Vec<T> sums[R][kSums];  // in memory, so that the cell is compiled once and not once a row
  unroll<R>([&](auto r) __attribute__((always_inline)) {
    unroll<kSums>([&](auto c) __attribute__((always_inline)) { sums[r][c] = sum[r][c]; });
  });
#pragma GCC unroll 1
  for (int r = 0; r < R; ++r) {
    const int64_t j = first + r, position = s.position[t] + s.row[j];
    T* state_at = m.state + j * m.state_size + unit;
    Vec<T> state = load(state_at), saved[Cell::kSaved];
    const Vec<T> out = Cell::forward(sums[r], state, saved);
    store(state_at, state);
    if (m.raw) {
      store(m.raw + j * m.state_size + unit, out);
    } else {
      store(m.h_next + j * m.h_size + unit, out);
      store(s.y + position * s.y_stride + unit, out, units);
    }
    if (s.saved) {
      T* to = s.saved + position * Cell::kSaved * H + unit;
      unroll<Cell::kSaved>([&](auto a) __attribute__((always_inline)) {
        store(to + a * H, saved[a], units);
      });
    }
  }
}

template <class Cell, class T>
void forward(const Forward<T>& s) {
  constexpr int L = kLanes<T>;
  const int64_t H = s.hidden_size, P = s.output_size;
  ForwardState<T> m;
  m.h_size = padded<T>(P);
  m.state_size = padded<T>(H);
  m.h = s.workspace;
  m.h_next = m.h + s.rows * m.h_size;
  m.state = m.h_next + s.rows * m.h_size;
  m.raw = s.projection_panels ? m.state + s.rows * m.state_size : nullptr;
  const int64_t unit = s.block_begin * L;
  const int64_t units = (s.block_end * L < H ? s.block_end * L : H) - unit;
  const int64_t out = s.projection_panels ? 0 : unit, outs = s.projection_panels ? P : units;

  const auto finish = [&](int64_t begin, int64_t end, const T* h) {
    for (int64_t j = begin; j < end; ++j) {
      copy_row(s.h_n + s.row[j] * P + out, h + j * m.h_size + out, outs, outs);
      if constexpr (!Cell::kStateIsOutput) {
        copy_row(s.c_n + s.row[j] * H + unit, m.state + j * m.state_size + unit, units, units);
      }
    }
  };

  for (int64_t j = 0; j < s.rows; ++j) {
    const T* h0 = row_of(s.h0, s.row[j], s.h0_stride);
    copy_row(m.h + j * m.h_size, h0, P, m.h_size);
    copy_row(m.h_next + j * m.h_size, h0, P, m.h_size);
    copy_row(m.state + j * m.state_size,
             Cell::kStateIsOutput ? h0 : row_of(s.c0, s.row[j], s.c0_stride), H, m.state_size);
  }
  finish(s.steps ? s.active[0] : 0, s.rows, m.h);  // rows of length zero

  for (int64_t i = 0; i < s.steps; ++i) {
    const int64_t t = s.reverse ? s.steps - 1 - i : i, rows = s.active[t];
    for (int64_t block = s.block_begin; block < s.block_end; ++block) {
      for_tiles(rows, [&](auto R, int64_t first) __attribute__((always_inline)) {
        forward_tile<Cell, R>(s, m, t, block, first);
      });
    }
    if (m.raw) {
      product<Columns<1>>(
          rows, H, P, s.projection_panels,
          [&](int64_t j) __attribute__((always_inline)) { return m.raw + j * m.state_size; },
          [&](int64_t j) __attribute__((always_inline)) { return m.h_next + j * m.h_size; });
      for (int64_t j = 0; j < rows; ++j) {
        copy_row(s.y + (s.position[t] + s.row[j]) * s.y_stride, m.h_next + j * m.h_size, P, P);
      }
    }
    const int64_t next = step_after(s, t);
    finish(next < 0 ? 0 : s.active[next], rows, m.h_next);
    std::swap(m.h, m.h_next);
  }
}

// ---- backward ---------------------------------------------------------------------------------

template <class T>
int64_t backward_workspace(const Sequence<T>& s) {
  return s.rows * (padded<T>(s.output_size) + 2 * padded<T>(s.hidden_size));
}

/// Gradients of the sums, the state and h0 from those of the outputs; the weights' are products
/// over all steps and belong to the caller.
template <class Cell, class T>
void backward(const Backward<T>& s) {
  constexpr int L = kLanes<T>;
  const int64_t H = s.hidden_size, P = s.output_size;
  const int64_t dh_size = padded<T>(P), state_size = padded<T>(H);
  T* const dh = s.workspace;                           // [rows, dh_size]
  T* const dstate = dh + s.rows * dh_size;             // [rows, state_size]
  T* const draw = dstate + s.rows * state_size;        // [rows, state_size] projection only
  for (int64_t j = 0; j < s.rows; ++j) {
    copy_row(dh + j * dh_size, row_of(s.dh_n, s.row[j], P), P, dh_size);
    copy_row(dstate + j * state_size, row_of(s.dc_n, s.row[j], H), H, state_size);
  }

  for (int64_t i = 0; i < s.steps; ++i) {
    const int64_t t = s.reverse ? i : s.steps - 1 - i, rows = s.active[t];
    const int64_t before = step_before(s, t), continued = before < 0 ? 0 : s.active[before];
    const auto position = [&](int64_t j) __attribute__((always_inline)) {
      return s.position[t] + s.row[j];
    };

    if (s.dy) {
      for (int64_t j = 0; j < rows; ++j) {
        const T* dy = s.dy + position(j) * s.dy_stride;
        T* to = dh + j * dh_size;
        for (int64_t u = 0; u < P; u += L) store(to + u, load(to + u) + load(dy + u, P - u));
      }
    }
    const T* output_gradient = dh;
    int64_t output_gradient_size = dh_size;
    if (s.projection_panels) {
      for (int64_t j = 0; j < rows; ++j) copy_row(s.dr + position(j) * P, dh + j * dh_size, P, P);
      product<Columns<1>>(
          rows, P, H, s.projection_panels,
          [&](int64_t j) __attribute__((always_inline)) { return dh + j * dh_size; },
          [&](int64_t j) __attribute__((always_inline)) { return draw + j * state_size; });
      output_gradient = draw;
      output_gradient_size = state_size;
    }

    for (int64_t j = 0; j < rows; ++j) {
      const int64_t at = position(j), b = s.row[j];
      // A reverse row that starts at t has no step before although t + 1 exists.
      const int64_t from = j < continued ? s.position[before] + b : -1;
      const T* h_previous =
          from < 0 ? row_of(s.h0, b, s.h0_stride) : s.y + from * s.y_stride;
      const T* previous = h_previous;
      if constexpr (!Cell::kStateIsOutput) {
        previous = from < 0 ? row_of(s.c0, b, s.c0_stride)
                            : s.saved + (from * Cell::kSaved + Cell::kSavedState) * H;
      }
      copy_row(s.h_previous + at * P, h_previous, P, P);
      const T* saved_row = s.saved + at * Cell::kSaved * H;
      const T* dout = output_gradient + j * output_gradient_size;
      T* dstate_row = dstate + j * state_size;
      T* dsums = s.dsums + at * kSums * H;
      for (int64_t u = 0; u < H; u += L) {
        const int64_t n = H - u;
        Vec<T> saved[Cell::kSaved], dsum[kSums];
        unroll<Cell::kSaved>([&](auto a) __attribute__((always_inline)) {
          saved[a] = load(saved_row + a * H + u, n);
        });
        Vec<T> d = load(dstate_row + u);
        Cell::backward(saved, previous ? load(previous + u, n) : Vec<T>{}, load(dout + u), d, dsum);
        store(dstate_row + u, d);
        unroll<kSums>([&](auto c) __attribute__((always_inline)) {
          store(dsums + c * H + u, dsum[c], n);
        });
        if constexpr (!Cell::kStateIsOutput) {
          if (s.h_raw) store(s.h_raw + at * H + u, Cell::output(saved), n);
        }
      }
    }
    product<HiddenColumns<Cell>>(
        rows, H, P, s.panels,
        [&](int64_t j) __attribute__((always_inline)) { return s.dsums + position(j) * kSums * H; },
        [&](int64_t j) __attribute__((always_inline)) { return dh + j * dh_size; });
  }

  for (int64_t j = 0; j < s.rows; ++j) {
    if constexpr (Cell::kStateIsOutput) {
      for (int64_t u = 0; u < P; u += L) {
        T* at = dh + j * dh_size + u;
        store(at, load(at) + load(dstate + j * state_size + u));
      }
    } else {
      copy_row(s.dc0 + s.row[j] * H, dstate + j * state_size, H, H);
    }
    copy_row(s.dh0 + s.row[j] * P, dh + j * dh_size, P, P);
  }
}

// ---- the table --------------------------------------------------------------------------------

template <class Cell, class T>
constexpr cpu::Kernel<T> kernel_of() {
  static_assert(Cell::kSums == kSums);
  return {forward_panel_size<Cell, T>, forward_workspace<T>, backward_workspace<T>,
          pack_forward<Cell, T>,       forward<Cell, T>,     backward<Cell, T>};
}

template <class T>
constexpr cpu::KernelsOf<T> kernels_of() {
  return {{kLanes<T>, kSums * kLanes<T>, pack_product<T>}, kernel_of<Lstm, T>(), kernel_of<Gru, T>()};
}

}  // namespace fusedrnn::FUSEDRNN_TARGET
