// The register tile: rows by column vectors, accumulated over k without leaving the registers.
//
// Every sum over k runs in one fixed order, so a call gives the same bits every time.
#pragma once

#include "../cells.h"
#include "../sequence.h"
#include "vector.h"

namespace fusedrnn::FUSEDRNN_TARGET {

/// Rows per tile. A tile's rows * 4 accumulators, 4 weight vectors and a broadcast must fit the
/// register file: on AVX-512, 6 * 4 + 4 + 1 of 32 registers.
#if defined(FUSEDRNN_TILE_ROWS)  // for the sanitizers, whose build of full tiles takes long
inline constexpr int kTileRows = FUSEDRNN_TILE_ROWS;
#elif FUSEDRNN_VECTOR_BYTES == 64 || defined(__aarch64__)
inline constexpr int kTileRows = 6;
#elif FUSEDRNN_VECTOR_BYTES == 32
inline constexpr int kTileRows = 3;
#else
inline constexpr int kTileRows = 2;
#endif
/// Rows per tile with weights in place.
inline constexpr int kInPlaceRows = kTileRows < 4 ? kTileRows : 4;

/// Sums for each row: of lower and upper bytes where int16 operands are split.
template <class Element>
inline constexpr int kSumsPerRow = std::is_same_v<Element, Int16> && kSplitsInt16 ? 2 : 1;

/// Rows per tile of these weights. Weights that are expanded in registers leave no operand for
/// memory: 2 * 4 + 4 + 1 of AVX2's 16 registers.
template <class Element, class Weight>
inline constexpr int kRowsOf = kLanesPerWeight<Element, Weight> > 1 && FUSEDRNN_VECTOR_BYTES == 32
                                   ? 2
                                   : (kTileRows > 1 ? kTileRows / kSumsPerRow<Element> : 1);

/// Chains of additions that hide an addition's latency; bfloat16's is longer.
template <class Element>
inline constexpr int kChains = std::is_same_v<Element, BFloat16> ? 16 : 8;

template <class Accum>
FUSEDRNN_INLINE int64_t padded(int64_t n) {
  return round_up(n, kLanes<Accum>);
}
/// A block is one vector of units.
template <class Accum>
FUSEDRNN_INLINE int64_t blocks_of(int64_t units) {
  return divide_up(units, kLanes<Accum>);
}
FUSEDRNN_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/// Splits rows into the fewest nearly equal tiles and calls tile(size, first row). On AVX-512, 13
/// rows make tiles of 5, 4 and 4.
template <int kRows = kTileRows, class F>
FUSEDRNN_INLINE void for_tiles(int64_t rows, F&& tile) {
  const int64_t tiles = divide_up(rows, kRows);
  int64_t first = 0;
  for (int64_t left = tiles; left > 0; --left) {
    const int64_t size = divide_up(rows - first, left);
    unroll<kRows>([&](auto i) FUSEDRNN_LAMBDA {
      constexpr int R = decltype(i)::value + 1;
      if (size == R) tile(std::integral_constant<int, R>{}, first);
    });
    first += size;
  }
}

// A map tells to which of `columns` accumulator vectors a panel row's `count` vectors add.

template <class Cell>
struct InputPreacts {
  static constexpr int count = Cell::kGates, columns = Cell::kPreacts;
  static constexpr int at(int gate) { return Cell::input_preact[gate]; }
};
template <class Cell>
struct HiddenPreacts {
  static constexpr int count = Cell::kGates, columns = Cell::kPreacts;
  static constexpr int at(int gate) { return Cell::hidden_preact[gate]; }
};
template <int C>
struct InOrder {
  static constexpr int count = C, columns = C;
  static constexpr int at(int c) { return c; }
};

template <class Accum, int R, int C>
using Tile = Vec<Accum>[R][C];

/// Column vectors of a full tile, and of a GEMM panel block.
inline constexpr int kTileColumns = 4;

/// How many tiles accumulate in turn. A tile of few rows has too few chains of additions: one row
/// of an LSTM's 4 gates has 4 of the 8 chains, so 2 tiles take turns. A narrower tile counts as a
/// full one. So a float32 row has the same sums beside any number of other rows.
template <class Element, int R>
inline constexpr int kTilesInTurn =
    kChains<Element> > R* kTileColumns ? kChains<Element> / (R * kTileColumns) : 1;

/// tile[r][b * Map::columns + Map::at(c)] += a(r, k) * panel[b][k][c] for the panel lanes k in
/// [0, size). a(r, k): the address of the first operand of lane k. A panel's rows are `stride`
/// apart, the B panels `panel_stride`.
template <class Map, class Element, int R, int B, class Weight = Element, class A>
FUSEDRNN_INLINE void accumulate(Tile<Sum<Element>, R, B * Map::columns>& tile, A&& a, int64_t size,
                                const PanelLane<Element, Weight>* panel, int64_t stride,
                                int64_t panel_stride) {
  constexpr int C = B * Map::count, columns = B * Map::columns;
  const auto step = [&](Tile<Sum<Element>, R, columns>& into, int64_t k) FUSEDRNN_LAMBDA {
    unroll<kLanesPerWeight<Element, Weight>>([&](auto part) FUSEDRNN_LAMBDA {
      Vec<Sum<Element>> w[C];
      unroll<C>([&](auto c) FUSEDRNN_LAMBDA {
        constexpr int block = c / Map::count, vector = c % Map::count;
        w[c] = load_weights<Element, Weight, part>(panel + block * panel_stride + k * stride +
                                                   vector * kLanes<Sum<Element>>);
      });
      unroll<R>([&](auto r) FUSEDRNN_LAMBDA {
        const Vec<Sum<Element>> value = broadcast_operand(a(r, k) + part * kPerLane<Element>);
        unroll<C>([&](auto c) FUSEDRNN_LAMBDA {
          constexpr int block = c / Map::count, vector = c % Map::count;
          multiply_add<Element>(into[r][block * Map::columns + Map::at(vector)], value, w[c]);
        });
      });
    });
  };
  int64_t k = 0;
  // Where a tile has two rows at most, three rows make tiles of two and one: with the same sums.
  constexpr int kTiles = kRowsOf<Element, Weight> > 2 ? kTilesInTurn<Element, R> : 1;
  if constexpr (kTiles > 1) {
    Tile<Sum<Element>, R, columns> more[kTiles - 1] = {};
    for (; k + kTiles <= size; k += kTiles) {
      step(tile, k);
      unroll<kTiles - 1>([&](auto i) FUSEDRNN_LAMBDA { step(more[i], k + i + 1); });
    }
    unroll<kTiles - 1>([&](auto i) FUSEDRNN_LAMBDA {
      unroll<R>([&](auto r) FUSEDRNN_LAMBDA {
        unroll<columns>([&](auto c) FUSEDRNN_LAMBDA { tile[r][c] += more[i][r][c]; });
      });
    });
  }
  for (; k < size; ++k) step(tile, k);
}

/// The same for rows of operands from a[r] on.
template <class Map, class Element, int R, int B = 1, class Weight = Element>
FUSEDRNN_INLINE void accumulate_rows(Tile<Sum<Element>, R, B * Map::columns>& tile,
                                     const Element* const (&a)[R], int64_t size,
                                     const PanelLane<Element, Weight>* panel, int64_t stride,
                                     int64_t panel_stride = 0) {
  constexpr int kPerWeight = kPerLane<Element> * kLanesPerWeight<Element, Weight>;
  accumulate<Map, Element, R, B, Weight>(
      tile, [&](auto r, int64_t k) FUSEDRNN_LAMBDA { return a[r] + k * kPerWeight; }, size, panel,
      stride, panel_stride);
}

// ---- weights in place ---------------------------------------------------------------------------

/// into[r][u] += a[r] * row u of w [units, size], lane by lane; the caller adds up the lanes. Reads
/// four rows at a time: more streams, whole pages apart, would get in each other's way in the
/// caches.
template <class Element, int R, class Accum = Accumulator<Element>>
FUSEDRNN_INLINE void multiply_lanes(Vec<Accum>* const (&into)[R], const Element* w, int64_t units,
                                    int64_t size, const Element* const (&a)[R]) {
  constexpr int L = kLanes<Accum>, kStreams = L < 4 ? L : 4, kWidth = L * kPerLane<Element>;
  constexpr int kUnrolled = R == 1 ? 4 : R == 2 ? 2 : 1;  // enough addition chains
  for (int first = 0; first < L && first < units; first += kStreams) {
    const Element* row[kStreams];
    unroll<kStreams>([&](auto i) FUSEDRNN_LAMBDA {
      row[i] = w + (first + i < units ? first + i : units - 1) * size;
    });
    Vec<Accum> sum[kUnrolled][R][kStreams] = {};
    const auto step = [&](auto u, int64_t k, auto load_k) FUSEDRNN_LAMBDA {
      Vec<Accum> value[R];
      unroll<R>([&](auto r) FUSEDRNN_LAMBDA { value[r] = load_k(a[r] + k); });
      unroll<kStreams>([&](auto i) FUSEDRNN_LAMBDA {
        const Vec<Accum> weight = load_k(row[i] + k);
        unroll<R>([&](auto r)
                      FUSEDRNN_LAMBDA { multiply_add<Element>(sum[u][r][i], weight, value[r]); });
      });
    };
    const auto load_all = [](const Element* p) FUSEDRNN_LAMBDA { return load_operands(p); };
    int64_t k = 0;
    for (; k + kUnrolled * kWidth <= size; k += kUnrolled * kWidth) {
      unroll<kUnrolled>([&](auto u) FUSEDRNN_LAMBDA { step(u, k + u * kWidth, load_all); });
    }
    for (; k + kWidth <= size; k += kWidth) step(std::integral_constant<int, 0>{}, k, load_all);
    if (k < size) {
      step(std::integral_constant<int, 0>{}, k,
           [n = size - k](const Element* p) FUSEDRNN_LAMBDA { return load_operands(p, n); });
    }
    unroll<R>([&](auto r) FUSEDRNN_LAMBDA {
      unroll<kStreams>([&](auto i) FUSEDRNN_LAMBDA {
        Vec<Accum> total = sum[0][r][i];
        unroll<kUnrolled - 1>([&](auto u) FUSEDRNN_LAMBDA { total += sum[u + 1][r][i]; });
        into[r][first + i] += total;
      });
    });
  }
}

/// A tile before its lanes are added up: a vector for each row, column and unit.
template <class Accum, int R, int C>
using Lanes = Vec<Accum>[R][C][kLanes<Accum>];

/// Adds a[r] times the weights in place, w [gates * hidden_size, size].
template <class Map, class Element, int R, class Accum = Accumulator<Element>>
FUSEDRNN_INLINE void accumulate_in_place(Lanes<Accum, R, Map::columns>& lanes,
                                         const Element* const (&a)[R], int64_t size,
                                         const Element* w, int64_t hidden_size, int64_t unit,
                                         int64_t units) {
  for (int gate = 0; gate < Map::count; ++gate) {
    Vec<Accum>* into[R];
    unroll<R>([&](auto r) FUSEDRNN_LAMBDA { into[r] = lanes[r][Map::at(gate)]; });
    multiply_lanes<Element, R>(into, w + (gate * hidden_size + unit) * size, units, size, a);
  }
}

template <class Accum, int R, int C>
FUSEDRNN_INLINE void add_lanes(Tile<Accum, R, C>& tile, Lanes<Accum, R, C>& lanes) {
  Vec<Accum> total[R][C];
#pragma GCC unroll 1
  for (int i = 0; i < R * C; ++i) (&total[0][0])[i] = sum_lanes<Accum>((&lanes[0][0])[i]);
  // A tile stays in registers only if every index into it is constant.
  unroll<R>([&](auto r) FUSEDRNN_LAMBDA {
    unroll<C>([&](auto c) FUSEDRNN_LAMBDA { tile[r][c] += total[r][c]; });
  });
}

}  // namespace fusedrnn::FUSEDRNN_TARGET
