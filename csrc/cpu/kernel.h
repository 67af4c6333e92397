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
#if defined(FUSEDRNN_TILE_ROWS)  // the sanitizers' build, which would take long with full tiles
inline constexpr int kRows = FUSEDRNN_TILE_ROWS;
#elif FUSEDRNN_VECTOR_BYTES == 64 || defined(__aarch64__)
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
template <class T>
FUSEDRNN_INLINE int64_t blocks_of(int64_t units) {
  return padded<T>(units) / kLanes<T>;
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

/// sum[r][at(c)] += a(r, k) * panel[k][c] for k in [0, size).
template <class To, class T, int R, class A>
FUSEDRNN_INLINE void accumulate(Tile<T, R>& sum, A&& a, int64_t size, const T* panel) {
  constexpr int C = To::count;
  const auto step = [&](Tile<T, R>& into, int64_t k) __attribute__((always_inline)) {
    Vec<T> w[C];
    unroll<C>([&](auto c)
                  __attribute__((always_inline)) { w[c] = load(panel + (k * C + c) * kLanes<T>); });
    unroll<R>([&](auto r) __attribute__((always_inline)) {
      const Vec<T> value = broadcast<Vec<T>>(a(r, k));
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

template <class To, class T, int R>
FUSEDRNN_INLINE void accumulate_rows(Tile<T, R>& sum, const T* const (&a)[R], int64_t size,
                                     const T* panel) {
  accumulate<To, T, R>(
      sum, [&](auto r, int64_t k) __attribute__((always_inline)) { return a[r][k]; }, size, panel);
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

/// out[k * step + v] = w[v * stride + k] for k in [0, size) and all lanes v, zero from `units` on.
template <class T>
FUSEDRNN_INLINE void pack_rows(const T* w, int64_t units, int64_t stride, int64_t size, T* out,
                               int64_t step) {
  constexpr int L = kLanes<T>;
  for (int64_t k = 0; k < size; k += L) {
    const int64_t n = size - k < L ? size - k : L;
    Vec<T> square[L];
    for (int v = 0; v < L; ++v) square[v] = v < units ? load(w + v * stride + k, n) : Vec<T>{};
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
      pack_rows(weights.ih + row * input_size, units, input_size, input_size, panel + g * L, G * L);
    }
    pack_rows(weights.hh + row * output_size, units, output_size, output_size,
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
    if (column_stride == 1) {
      for (int64_t k = 0; k < depth; ++k) {
        store(panel + k * step + c, load(from + k * row_stride, n));
      }
    } else {
      pack_rows(from, n, column_stride, depth, panel + c, step);
    }
  }
}

// ---- products ---------------------------------------------------------------------------------

/// Rows of a matrix: row j is at base + (index ? offset + index[j] : j) * stride.
template <class T>
struct Rows {
  T* base;
  int64_t stride;
  const int64_t* index = nullptr;
  int64_t offset = 0;
  T* operator()(int64_t j) const { return base + (index ? offset + index[j] : j) * stride; }
};

/// Which stretches of a row, in units of their length, a product's depth is made of.
template <class Cell>
struct HiddenSegments {
  static constexpr int count = Cell::kGates;
  static constexpr int at(int g) { return Cell::hidden_sum[g]; }
};

/// out(j)[columns] = a(j) * matrix, or += with add, for the rows j of [0, rows) and the columns of
/// the panel blocks [block_begin, block_end). The depth of the product is that of the segments, of
/// `length` elements each, the s-th at a(j) + at(s) * length.
template <class Segments, class T>
__attribute__((noinline)) void product(int64_t rows, int64_t length, int64_t columns,
                                       int64_t block_begin, int64_t block_end, const T* panels,
                                       Rows<const T> a, Rows<T> out, bool add) {
  constexpr int L = kLanes<T>;
  const int64_t depth = Segments::count * length;
  for (int64_t block = block_begin; block < block_end; ++block) {
    const int64_t first = block * kSums * L, left = columns - first;
    const T* panel = panels + depth * first;
    unroll<kSums>([&](auto i) __attribute__((always_inline)) {
      constexpr int C = decltype(i)::value + 1;
      if ((left + L - 1) / L != C && !(C == kSums && left > C * L)) return;
      for_tiles(rows, [&](auto R, int64_t j) __attribute__((always_inline)) {
        Tile<T, R> sum = {};
        for (int s = 0; s < Segments::count; ++s) {
          const T* row[R];
          unroll<R>([&](auto r) __attribute__((always_inline)) {
            row[r] = a(j + r) + Segments::at(s) * length;
          });
          accumulate_rows<Columns<C>, T, R>(sum, row, length, panel + s * length * C * L);
        }
        unroll<R>([&](auto r) __attribute__((always_inline)) {
          T* to = out(j + r) + first;
          unroll<C>([&](auto c) __attribute__((always_inline)) {
            const int64_t n = left - c * L;
            store(to + c * L, add ? load(to + c * L, n) + sum[r][c] : sum[r][c], n);
          });
        });
      });
    });
  }
}

template <class T>
void multiply(int64_t rows, int64_t depth, int64_t columns, const T* panels, const T* a,
              int64_t a_stride, T* out, int64_t out_stride, bool add) {
  constexpr int64_t width = kSums * kLanes<T>;
  product<Columns<1>, T>(rows, depth, columns, 0, (columns + width - 1) / width, panels,
                         {a, a_stride}, {out, out_stride}, add);
}

/// out[row, column] = sum over n of a[n, row] * b[n, column], n in blocks whose sums are added in
/// order: b's block stays in the first cache for all rows, a's in the second for all columns.
template <class T>
void multiply_transposed(int64_t depth, int64_t rows, int64_t columns, const T* a, int64_t a_stride,
                         const T* b, int64_t b_stride, T* out, int64_t out_stride) {
  constexpr int L = kLanes<T>;
  constexpr int64_t kDepth = 512 / int64_t(sizeof(T)), width = kSums * L;
  alignas(64) T panel[kDepth * width];
  for (int64_t n = 0; n < depth || n == 0; n += kDepth) {
    const int64_t size = depth - n < kDepth ? depth - n : kDepth;
    for (int64_t first = 0; first < columns; first += width) {
      const int64_t left = columns - first;
      unroll<kSums>([&](auto i) __attribute__((always_inline)) {
        constexpr int C = decltype(i)::value + 1;
        if ((left + L - 1) / L != C && !(C == kSums && left > C * L)) return;
        for (int64_t k = 0; k < size; ++k) {
          unroll<C>([&](auto c) __attribute__((always_inline)) {
            store(panel + (k * C + c) * L,
                  load(b + (n + k) * b_stride + first + c * L, left - c * L));
          });
        }
        for_tiles(rows, [&](auto R, int64_t row) __attribute__((always_inline)) {
          Tile<T, R> sum = {};
          const T* from = a + n * a_stride + row;
          accumulate<Columns<C>, T, R>(
              sum,
              [&](auto r, int64_t k)
                  __attribute__((always_inline)) { return from[k * a_stride + r]; },
              size, panel);
          unroll<R>([&](auto r) __attribute__((always_inline)) {
            T* to = out + (row + r) * out_stride + first;
            unroll<C>([&](auto c) __attribute__((always_inline)) {
              const int64_t m = left - c * L;
              store(to + c * L, n ? load(to + c * L, m) + sum[r][c] : sum[r][c], m);
            });
          });
        });
      });
    }
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

/// What a forward run keeps of its rows between steps, in its workspace.
template <class T>
struct ForwardState {
  explicit ForwardState(const Forward<T>& s)
      : h_size(padded<T>(s.output_size)),
        state_size(padded<T>(s.hidden_size)),
        h{s.workspace, s.workspace + s.rows * h_size},
        state(h[1] + s.rows * h_size),
        raw(s.projection_panels ? state + s.rows * state_size : nullptr) {}

  int64_t h_size, state_size;  ///< padded row lengths
  T* h[2];   ///< [rows, h_size] outputs; step i reads h[i % 2] and writes the other
  T* state;  ///< [rows, state_size]
  T* raw;    ///< [rows, state_size] output before the projection
};

template <class T>
int64_t forward_workspace(const Sequence<T>& s) {
  return s.rows * 2 * (padded<T>(s.output_size) + padded<T>(s.hidden_size));
}

template <class Cell, int R, class T>
FUSEDRNN_INLINE void forward_tile(const Forward<T>& s, const ForwardState<T>& m, int64_t i,
                                  int64_t t, int64_t block, int64_t first) {
  constexpr int L = kLanes<T>, G = Cell::kGates;
  const int64_t H = s.hidden_size, unit = block * L, units = H - unit < L ? H - unit : L;
  const T* h[R];
  unroll<R>([&](auto r)
                __attribute__((always_inline)) { h[r] = m.h[i % 2] + (first + r) * m.h_size; });

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
        const T* x = s.x_product + (s.position[t] + s.row[first + r]) * s.x_product_stride + unit;
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
        accumulate_rows<InputColumns<Cell>, T, R>(sum, x, s.input_size, panel);
        panel += s.input_size * G * L;
      } else {
        accumulate_unpacked<InputColumns<Cell>, T, R>(sum, x, s.input_size, s.weights.ih, H, unit,
                                                      units);
      }
    }
    if (panel) {
      accumulate_rows<HiddenColumns<Cell>, T, R>(sum, h, s.output_size, panel);
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
      store(m.h[(i + 1) % 2] + j * m.h_size + unit, out);
      store(s.y + position * s.y_stride + unit, out, units);
    }
    if (s.saved) {
      T* to = s.saved + position * Cell::kSaved * H + unit;
      unroll<Cell::kSaved>(
          [&](auto a) __attribute__((always_inline)) { store(to + a * H, saved[a], units); });
    }
  }
}

/// Writes the final states of rows [begin, end), of the units that these blocks own.
template <class Cell, class T>
FUSEDRNN_INLINE void finish_rows(const Forward<T>& s, const ForwardState<T>& m, const T* h,
                                 int64_t begin, int64_t end, int64_t block_begin,
                                 int64_t block_end) {
  constexpr int L = kLanes<T>;
  const int64_t H = s.hidden_size, P = s.output_size, unit = block_begin * L;
  const int64_t units = (block_end * L < H ? block_end * L : H) - unit;
  const int64_t out = m.raw ? 0 : unit, outs = m.raw ? P : units;
  for (int64_t j = begin; j < end; ++j) {
    copy_row(s.h_n + s.row[j] * P + out, h + j * m.h_size + out, outs, outs);
    if constexpr (!Cell::kStateIsOutput) {
      copy_row(s.c_n + s.row[j] * H + unit, m.state + j * m.state_size + unit, units, units);
    }
  }
}

template <class Cell, class T>
void forward_begin(const Forward<T>& s) {
  const ForwardState<T> m(s);
  for (int64_t j = 0; j < s.rows; ++j) {
    const T* h0 = row_of(s.h0, s.row[j], s.h0_stride);
    copy_row(m.h[0] + j * m.h_size, h0, s.output_size, m.h_size);
    copy_row(m.h[1] + j * m.h_size, h0, s.output_size, m.h_size);
    copy_row(m.state + j * m.state_size,
             Cell::kStateIsOutput ? h0 : row_of(s.c0, s.row[j], s.c0_stride), s.hidden_size,
             m.state_size);
  }
  // Rows of length zero.
  finish_rows<Cell>(s, m, m.h[0], s.active[0], s.rows, 0, blocks_of<T>(s.hidden_size));
}

/// The i-th step of the run for the units of blocks [block_begin, block_end), all of them with a
/// projection. Steps follow one another; the blocks of one step may run at the same time.
template <class Cell, class T>
void forward_step(const Forward<T>& s, int64_t i, int64_t block_begin, int64_t block_end) {
  const ForwardState<T> m(s);
  const int64_t P = s.output_size, t = s.reverse ? s.steps - 1 - i : i, rows = s.active[t];
  for (int64_t block = block_begin; block < block_end; ++block) {
    for_tiles(rows, [&](auto R, int64_t first) __attribute__((always_inline)) {
      forward_tile<Cell, R>(s, m, i, t, block, first);
    });
  }
  T* h = m.h[(i + 1) % 2];
  if (m.raw) {
    multiply<T>(rows, s.hidden_size, P, s.projection_panels, m.raw, m.state_size, h, m.h_size,
                false);
    for (int64_t j = 0; j < rows; ++j) {
      copy_row(s.y + (s.position[t] + s.row[j]) * s.y_stride, h + j * m.h_size, P, P);
    }
  }
  const int64_t next = step_after(s, t);
  finish_rows<Cell>(s, m, h, next < 0 ? 0 : s.active[next], rows, block_begin, block_end);
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
        draw(dstate + s.rows * state_size) {}

  int64_t dh_size, state_size;  ///< padded row lengths
  T* dh;                        ///< [rows, dh_size] of the output
  T* dstate;                    ///< [rows, state_size]
  T* draw;                      ///< [rows, state_size] of the output before the projection
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
    const int64_t b = s.row[j], at = s.position[t] + b;
    const int64_t from = j < continued ? s.position[before] + b : -1;
    const T* saved_row = s.saved + at * Cell::kSaved * H;
    const T* saved_before = s.saved + from * Cell::kSaved * H;
    const T* h0 = row_of(s.h0, b, s.h0_stride);
    const T* state0 = Cell::kStateIsOutput ? h0 : row_of(s.c0, b, s.c0_stride);
    if (s.projection_panels) {
      copy_row(s.h_previous + at * P, from < 0 ? h0 : s.y + from * s.y_stride, P, P);
    }
    T* dsums = s.dsums + at * kSums * H;
    for (int64_t u = begin; u < end; u += L) {
      const int64_t n = H - u;
      const auto load_saved = [&](Vec<T>(&saved)[Cell::kSaved],
                                  const T* row) __attribute__((always_inline)) {
        unroll<Cell::kSaved>(
            [&](auto a) __attribute__((always_inline)) { saved[a] = load(row + a * H + u, n); });
      };
      Vec<T> saved[Cell::kSaved], dsum[kSums], state = {}, h = {};
      if (from >= 0) {
        load_saved(saved, saved_before);
        state = saved[Cell::kSavedState];
        h = Cell::output(saved);
      } else {
        if (state0) state = load(state0 + u, n);
        if (h0 && !s.projection_panels) h = load(h0 + u, n);
      }
      if (!s.projection_panels) store(s.h_previous + at * P + u, h, n);
      load_saved(saved, saved_row);
      Vec<T> d = load(m.dstate + j * m.state_size + u);
      Cell::backward(saved, state, load(dout + j * dout_size + u), d, dsum);
      store(m.dstate + j * m.state_size + u, d);
      unroll<kSums>([&](auto c)
                        __attribute__((always_inline)) { store(dsums + c * H + u, dsum[c], n); });
      if (s.projection_panels) store(s.h_raw + at * H + u, Cell::output(saved), n);
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
  const int64_t begin = block_begin * kSums * L;
  const auto end_of = [&](int64_t size) {
    return block_end * kSums * L < size ? block_end * kSums * L : size;
  };
  const int64_t blocks = (P + kSums * L - 1) / (kSums * L);
  if (i > 0) {
    const int64_t t = time(i - 1);
    const Rows<const T> dsums{s.dsums, kSums * H, s.row, s.position[t]};
    const Rows<T> dh{m.dh, m.dh_size};
    const int64_t last = block_end < blocks ? block_end : blocks;
    if constexpr (Cell::kGates == kSums) {  // the sums of the hidden part are all of them, in order
      product<Columns<1>, T>(s.active[t], kSums * H, P, block_begin, last, s.panels, dsums, dh,
                             false);
    } else {
      product<HiddenSegments<Cell>, T>(s.active[t], H, P, block_begin, last, s.panels, dsums, dh,
                                       false);
    }
  }
  if (i == s.steps) {
    for (int64_t j = 0; j < s.rows; ++j) {
      T* dh = m.dh + j * m.dh_size;
      T* dstate = m.dstate + j * m.state_size;
      if constexpr (Cell::kStateIsOutput) {
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
      const T* dy = s.dy + (s.position[t] + s.row[j]) * s.dy_stride;
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
    copy_row(s.dr + (s.position[t] + s.row[j]) * P, m.dh + j * m.dh_size, P, P);
  }
  multiply<T>(rows, P, H, s.projection_panels, m.dh, m.dh_size, m.draw, m.state_size, false);
  backward_units<Cell>(s, m, t, 0, H, m.draw, m.state_size);
}

// ---- the table --------------------------------------------------------------------------------

template <class Cell, class T>
constexpr cpu::Kernel<T> kernel_of() {
  static_assert(Cell::kSums == kSums);
  return {forward_panel_size<Cell, T>, forward_workspace<T>,   backward_workspace<T>,
          pack_forward<Cell, T>,       forward_begin<Cell, T>, forward_step<Cell, T>,
          backward_begin<Cell, T>,     backward_step<Cell, T>};
}

template <class T>
constexpr cpu::KernelsOf<T> kernels_of() {
  return {
      {kLanes<T>, kSums * kLanes<T>, kRows, pack_product<T>, multiply<T>, multiply_transposed<T>},
      kernel_of<Lstm, T>(),
      kernel_of<Gru, T>()};
}

}  // namespace fusedrnn::FUSEDRNN_TARGET
