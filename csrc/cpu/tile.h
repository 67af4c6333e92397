// The register tile: rows by one vector (or four) of columns, summed over k without leaving the
// registers; the packing of weights for it; products of matrices made of it.
//
// All sums over k run in one fixed order, so that a call gives the same bits every time.
#pragma once

#include "../cells.h"
#include "../sequence.h"
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
inline constexpr int kUnpackedRows = kRows < 4 ? kRows : 4;  // of a tile of unpacked weights
inline constexpr int kPreacts =
    4;  ///< of every cell; also the vectors in a block of product panels

/// Chains of additions that hide their latency; those of bfloat16 take longer.
template <class S>
inline constexpr int kChains = kPerLane<S> > 1 ? 16 : 8;

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
  static constexpr int at(int g) { return Cell::input_preact[g]; }
};
template <class Cell>
struct HiddenColumns {
  static constexpr int count = Cell::kGates;
  static constexpr int at(int g) { return Cell::hidden_preact[g]; }
};
template <int C>
struct Columns {
  static constexpr int count = C;
  static constexpr int at(int c) { return c; }
};

template <class T, int R>
using Tile = Vec<T>[R][kPreacts];

/// sum[r][at(c)] += a(r, k) * panel[k][c] for the lanes k in [0, size), panel's rows `stride`
/// apart.
template <class To, class S, int R, class A, class T = Accumulator<S>>
FUSEDRNN_INLINE void accumulate(Tile<T, R>& sum, A&& a, int64_t size, const T* panel,
                                int64_t stride = To::count * kLanes<T>) {
  constexpr int C = To::count;
  const auto step = [&](Tile<T, R>& into, int64_t k) __attribute__((always_inline)) {
    Vec<T> w[C];
    unroll<C>([&](auto c) __attribute__((always_inline)) {
      w[c] = load(panel + k * stride + c * kLanes<T>);
    });
    unroll<R>([&](auto r) __attribute__((always_inline)) {
      const Vec<T> value = broadcast_operand(a(r, k));
      unroll<C>([&](auto c) __attribute__((always_inline)) {
        multiply_add<S>(into[r][To::at(decltype(c)::value)], value, w[c]);
      });
    });
  };
  int64_t k = 0;
  // A few chains of additions can't hide their latency.
  constexpr int kCopies = kChains<S> / (R * kPreacts);
  if constexpr (kCopies > 1) {
    Tile<T, R> copy[kCopies - 1] = {};
    for (; k + kCopies <= size; k += kCopies) {
      step(sum, k);
      unroll<kCopies - 1>([&](auto i) __attribute__((always_inline)) { step(copy[i], k + i + 1); });
    }
    unroll<kCopies - 1>([&](auto i) __attribute__((always_inline)) {
      unroll<R>([&](auto r) __attribute__((always_inline)) {
        unroll<kPreacts>([&](auto c)
                             __attribute__((always_inline)) { sum[r][c] += copy[i][r][c]; });
      });
    });
  }
  for (; k < size; ++k) step(sum, k);
}

template <class To, class S, int R, class T = Accumulator<S>>
FUSEDRNN_INLINE void accumulate_rows(Tile<T, R>& sum, const S* const (&a)[R], int64_t size,
                                     const T* panel, int64_t stride = To::count * kLanes<T>) {
  accumulate<To, S, R>(
      sum, [&](auto r, int64_t k) __attribute__((always_inline)) { return a[r] + k * kPerLane<S>; },
      size, panel, stride);
}

/// into[r][u] += the products, lane by lane, of row u of w [units, size] with a[r]; their lanes are
/// still to be summed. Reads w along its rows, unpacked, four rows at a time: more streams than
/// that, whole pages apart, get in each other's way in the caches.
template <class S, int R, class T = Accumulator<S>>
FUSEDRNN_INLINE void multiply_lanes(Vec<T>* const (&into)[R], const S* w, int64_t units,
                                    int64_t size, const S* const (&a)[R]) {
  constexpr int L = kLanes<T>, kStreams = L < 4 ? L : 4, kWidth = L * kPerLane<S>;
  constexpr int kUnrolled = R == 1 ? 4 : R == 2 ? 2 : 1;  // enough chains of additions
  for (int first = 0; first < L && first < units; first += kStreams) {
    const S* row[kStreams];
    unroll<kStreams>([&](auto i) __attribute__((always_inline)) {
      row[i] = w + (first + i < units ? first + i : units - 1) * size;
    });
    Vec<T> sum[kUnrolled][R][kStreams] = {};
    const auto step = [&](auto u, int64_t k, auto load_k) __attribute__((always_inline)) {
      Vec<T> value[R];
      unroll<R>([&](auto r) __attribute__((always_inline)) { value[r] = load_k(a[r] + k); });
      unroll<kStreams>([&](auto i) __attribute__((always_inline)) {
        const Vec<T> weight = load_k(row[i] + k);
        unroll<R>([&](auto r) __attribute__((always_inline)) {
          multiply_add<S>(sum[u][r][i], weight, value[r]);
        });
      });
    };
    const auto load_all = [](const S* p)
                              __attribute__((always_inline)) { return load_operands(p); };
    int64_t k = 0;
    for (; k + kUnrolled * kWidth <= size; k += kUnrolled * kWidth) {
      unroll<kUnrolled>([&](auto u)
                            __attribute__((always_inline)) { step(u, k + u * kWidth, load_all); });
    }
    for (; k + kWidth <= size; k += kWidth) step(std::integral_constant<int, 0>{}, k, load_all);
    if (k < size) {
      step(std::integral_constant<int, 0>{}, k,
           [n = size - k](const S* p)
               __attribute__((always_inline)) { return load_operands(p, n); });
    }
    unroll<R>([&](auto r) __attribute__((always_inline)) {
      unroll<kStreams>([&](auto i) __attribute__((always_inline)) {
        Vec<T> total = sum[0][r][i];
        unroll<kUnrolled - 1>([&](auto u)
                                  __attribute__((always_inline)) { total += sum[u + 1][r][i]; });
        into[r][first + i] += total;
      });
    });
  }
}

/// Products of one row of the batch with the gates' rows of unpacked weights, lane by lane.
template <class T, int R>
using Lanes = Vec<T>[R][kPreacts][kLanes<T>];

template <class To, class S, int R, class T = Accumulator<S>>
FUSEDRNN_INLINE void accumulate_unpacked(Lanes<T, R>& lanes, const S* const (&a)[R], int64_t size,
                                         const S* w, int64_t hidden_size, int64_t unit,
                                         int64_t units) {
  for (int g = 0; g < To::count; ++g) {
    Vec<T>* into[R];
    unroll<R>([&](auto r) __attribute__((always_inline)) { into[r] = lanes[r][To::at(g)]; });
    multiply_lanes<S, R>(into, w + (g * hidden_size + unit) * size, units, size, a);
  }
}

template <class T, int R>
FUSEDRNN_INLINE void add_lanes(Tile<T, R>& sum, Lanes<T, R>& lanes) {
  Vec<T> total[R][kPreacts];
#pragma GCC unroll 1
  for (int i = 0; i < R * kPreacts; ++i) (&total[0][0])[i] = sum_lanes<T>((&lanes[0][0])[i]);
  // By constant indices: a tile that is indexed otherwise anywhere does not stay in registers.
  unroll<R>([&](auto r) __attribute__((always_inline)) {
    unroll<kPreacts>([&](auto c) __attribute__((always_inline)) { sum[r][c] += total[r][c]; });
  });
}

// ---- packing ----------------------------------------------------------------------------------

/// Lane k of row v of w goes to out[k * step + v], for the lanes of `size` elements and all lanes v
/// of a vector, zero from `units` on. Rows are `stride` elements apart.
template <class S, class T = Accumulator<S>>
FUSEDRNN_INLINE void pack_rows(const S* w, int64_t units, int64_t stride, int64_t size, T* out,
                               int64_t step) {
  constexpr int L = kLanes<T>, kWidth = L * kPerLane<S>;
  for (int64_t k = 0; k < size; k += kWidth) {
    const int64_t n = size - k;
    Vec<T> square[L];
    for (int v = 0; v < L; ++v) {
      square[v] = v < units ? load_operands(w + v * stride + k, n) : Vec<T>{};
    }
    transpose<T>(square);
    T* to = out + k / kPerLane<S> * step;
    for (int64_t i = 0; i < L && i < lanes_of<S>(n); ++i) store(to + i * step, square[i]);
  }
}

template <class Cell, class S>
int64_t forward_panel_size(int64_t input_size, int64_t output_size) {
  return (kPreacts + (lanes_of<S>(input_size) + lanes_of<S>(output_size)) * Cell::kGates) *
         kLanes<Accumulator<S>>;
}

template <class Cell, class S, class T = Accumulator<S>>
FUSEDRNN_INLINE void bias_of(const Weights<S>& w, int64_t hidden_size, int64_t unit, int64_t units,
                             Vec<T> (&bias)[kPreacts]) {
  unroll<kPreacts>([&](auto c) __attribute__((always_inline)) { bias[c] = Vec<T>{}; });
  unroll<Cell::kGates>([&](auto g) __attribute__((always_inline)) {
    const int64_t at = g * hidden_size + unit;
    if (w.bias_ih) bias[Cell::input_preact[g]] += load_values(w.bias_ih + at, units);
    if (w.bias_hh) bias[Cell::hidden_preact[g]] += load_values(w.bias_hh + at, units);
  });
}

template <class Cell, class S, class T = Accumulator<S>>
void pack_forward(const Weights<S>& weights, int64_t input_size, int64_t hidden_size,
                  int64_t output_size, int64_t block, T* panel) {
  constexpr int L = kLanes<T>, G = Cell::kGates;
  const int64_t unit = block * L, units = hidden_size - unit < L ? hidden_size - unit : L;
  Vec<T> bias[kPreacts];
  bias_of<Cell>(weights, hidden_size, unit, units, bias);
  for (int c = 0; c < kPreacts; ++c) store(panel + c * L, bias[c]);
  panel += kPreacts * L;
  for (int g = 0; g < G; ++g) {
    const int64_t row = g * hidden_size + unit;
    if (weights.ih) {
      pack_rows(weights.ih + row * input_size, units, input_size, input_size, panel + g * L, G * L);
    }
    pack_rows(weights.hh + row * output_size, units, output_size, output_size,
              panel + (weights.ih ? lanes_of<S>(input_size) : 0) * G * L + g * L, G * L);
  }
}

template <class S, class T = Accumulator<S>>
void pack_product(const S* matrix, int64_t row_stride, int64_t column_stride, int64_t depth,
                  int64_t columns, int64_t block, T* panels) {
  constexpr int L = kLanes<T>;
  const int64_t width = kPreacts * L, first = block * width;
  T* panel = panels + lanes_of<S>(depth) * first;
  const int64_t left = padded<T>(columns - first), step = left < width ? left : width;
  for (int64_t c = 0; c < step; c += L) {
    const int64_t n = columns - first - c < L ? columns - first - c : L;
    const S* from = matrix + (first + c) * column_stride;
    if (kPerLane<S> > 1 || column_stride != 1) {
      pack_rows(from, n, column_stride, depth, panel + c, step);
    } else {
      for (int64_t k = 0; k < depth; ++k) {
        store(panel + k * step + c, load_operands(from + k * row_stride, n));
      }
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
  static constexpr int at(int g) { return Cell::hidden_preact[g]; }
};

/// out(j)[columns] = a(j) * matrix, or += with add, for the rows j of [0, rows) and the columns of
/// the panel blocks [block_begin, block_end). The depth of the product is that of the segments, of
/// `length` elements each, the s-th at a(j) + at(s) * length. The matrix is packed in panels, or,
/// with a matrix_stride, as it is: row-major, its columns whole vectors.
template <class Segments, class S, class T = Accumulator<S>>
__attribute__((noinline)) void product(int64_t rows, int64_t length, int64_t columns,
                                       int64_t block_begin, int64_t block_end, const T* panels,
                                       int64_t matrix_stride, Rows<const S> a, Rows<T> out,
                                       bool add) {
  static_assert(Segments::count == 1 || kPerLane<S> == 1);
  constexpr int L = kLanes<T>;
  const int64_t lanes = lanes_of<S>(length), depth = Segments::count * lanes;
  for (int64_t block = block_begin; block < block_end; ++block) {
    const int64_t first = block * kPreacts * L, left = columns - first;
    const T* panel = panels + (matrix_stride ? first : depth * first);
    unroll<kPreacts>([&](auto i) __attribute__((always_inline)) {
      constexpr int C = decltype(i)::value + 1;
      if ((left + L - 1) / L != C && !(C == kPreacts && left > C * L)) return;
      const int64_t stride = matrix_stride ? matrix_stride : C * L;
      for_tiles(rows, [&](auto R, int64_t j) __attribute__((always_inline)) {
        Tile<T, R> sum = {};
        for (int s = 0; s < Segments::count; ++s) {
          const S* row[R];
          unroll<R>([&](auto r) __attribute__((always_inline)) {
            row[r] = a(j + r) + Segments::at(s) * length;
          });
          accumulate_rows<Columns<C>, S, R>(sum, row, lanes, panel + s * lanes * stride, stride);
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

template <class S, class T = Accumulator<S>>
void multiply(int64_t rows, int64_t depth, int64_t columns, const T* panels, int64_t matrix_stride,
              const S* a, int64_t a_stride, T* out, int64_t out_stride, bool add) {
  constexpr int64_t width = kPreacts * kLanes<T>;
  product<Columns<1>, S>(rows, depth, columns, 0, (columns + width - 1) / width, panels,
                         matrix_stride, {a, a_stride}, {out, out_stride}, add);
}

/// out[row, column] = sum over n of a[n, row] * b[n, column], n in blocks whose sums are added in
/// order: b's block stays in the first cache for all rows, a's in the second for all columns.
template <class T>
void multiply_transposed(int64_t depth, int64_t rows, int64_t columns, const T* a, int64_t a_stride,
                         const T* b, int64_t b_stride, T* out, int64_t out_stride) {
  constexpr int L = kLanes<T>;
  constexpr int64_t kDepth = 512 / int64_t(sizeof(T)), width = kPreacts * L;
  alignas(64) T panel[kDepth * width];
  for (int64_t n = 0; n < depth || n == 0; n += kDepth) {
    const int64_t size = depth - n < kDepth ? depth - n : kDepth;
    for (int64_t first = 0; first < columns; first += width) {
      const int64_t left = columns - first;
      unroll<kPreacts>([&](auto i) __attribute__((always_inline)) {
        constexpr int C = decltype(i)::value + 1;
        if ((left + L - 1) / L != C && !(C == kPreacts && left > C * L)) return;
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
                  __attribute__((always_inline)) { return from + k * a_stride + r; },
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

}  // namespace fusedrnn::FUSEDRNN_TARGET
