// Single-threaded GEMMs on tiles. gemm.h splits them over threads.
#pragma once

#include "prepack.h"

namespace fusedrnn::FUSEDRNN_TARGET {

/// Matrix rows: row j is at base + (index ? offset + index[j] : j) * stride.
template <class Pointee>
struct Rows {
  Pointee* base;
  int64_t stride;
  const int64_t* index = nullptr;
  int64_t offset = 0;
  Pointee* operator()(int64_t j) const { return base + (index ? offset + index[j] : j) * stride; }
};

/// Calls f(C): `columns` columns fill C vectors, at most kPanelVectors.
template <class Accum, class F>
FUSEDRNN_INLINE void with_vectors(int64_t columns, F&& f) {
  const int64_t vectors = smaller(blocks_of<Accum>(columns), kPanelVectors);
  unroll<kPanelVectors>([&](auto i) FUSEDRNN_LAMBDA {
    constexpr int C = decltype(i)::value + 1;
    if (vectors == C) f(std::integral_constant<int, C>{});
  });
}

/// Stores row r of a tile to out, or adds it with add. `columns` are left in out's row. Only the
/// last vector may be partial.
template <class Accum, int R, int C>
FUSEDRNN_INLINE void store_row(const Tile<Accum, R, C>& tile, int r, Accum* out, int64_t columns,
                               bool add) {
  constexpr int L = kLanes<Accum>;
  unroll<C>([&](auto c) FUSEDRNN_LAMBDA {
    const int64_t n = c + 1 < C ? L : columns - c * L;
    store(out + c * L, add ? load(out + c * L, n) + tile[r][c] : tile[r][c], n);
  });
}

/// out(j)[columns] = a(j) * matrix, or += with add, for rows j in [0, rows) and panel blocks
/// [block_begin, block_end). K has Segments::count segments of `length` elements; segment s begins
/// at a(j) + at(s) * length. The matrix is prepacked, or with a matrix_stride in place: row-major,
/// its columns whole vectors.
template <class Segments, class Element, class Accum = Accumulator<Element>>
__attribute__((noinline)) void gemm_blocks(int64_t rows, int64_t length, int64_t columns,
                                           int64_t block_begin, int64_t block_end,
                                           const Accum* panels, int64_t matrix_stride,
                                           Rows<const Element> a, Rows<Accum> out, bool add) {
  static_assert(Segments::count == 1 || kPerLane<Element> == 1);
  constexpr int L = kLanes<Accum>;
  const int64_t lanes = lanes_of<Element>(length), K = Segments::count * lanes;
  for (int64_t block = block_begin; block < block_end; ++block) {
    const int64_t first = block * kPanelVectors * L, left = columns - first;
    const Accum* panel = panels + (matrix_stride ? first : K * first);
    with_vectors<Accum>(left, [&](auto C) FUSEDRNN_LAMBDA {
      const int64_t stride = matrix_stride ? matrix_stride : C * L;
      for_tiles(rows, [&](auto R, int64_t j) FUSEDRNN_LAMBDA {
        Tile<Accum, R, C> tile = {};
        for (int s = 0; s < Segments::count; ++s) {
          const Element* row[R];
          unroll<R>([&](auto r) FUSEDRNN_LAMBDA { row[r] = a(j + r) + Segments::at(s) * length; });
          accumulate_rows<InOrder<C>, Element, R>(tile, row, lanes, panel + s * lanes * stride,
                                                  stride);
        }
        unroll<R>([&](auto r) FUSEDRNN_LAMBDA {
          store_row<Accum, R, C>(tile, r, out(j + r) + first, left, add);
        });
      });
    });
  }
}

template <class Element, class Accum = Accumulator<Element>>
void gemm(int64_t rows, int64_t K, int64_t columns, const Accum* panels, int64_t matrix_stride,
          const Element* a, int64_t a_stride, Accum* out, int64_t out_stride, bool add) {
  constexpr int64_t width = kPanelVectors * kLanes<Accum>;
  gemm_blocks<InOrder<1>, Element>(rows, K, columns, 0, divide_up(columns, width), panels,
                                   matrix_stride, {a, a_stride}, {out, out_stride}, add);
}

/// out[row, column] = sum over k of a[k, row] * b[k, column]. Blocks of k are added in order. A
/// block of b stays in the first-level cache for all rows. A block of a stays in the second-level
/// cache for all columns.
template <class Accum>
void gemm_transposed(int64_t K, int64_t rows, int64_t columns, const Accum* a, int64_t a_stride,
                     const Accum* b, int64_t b_stride, Accum* out, int64_t out_stride) {
  constexpr int L = kLanes<Accum>;
  constexpr int64_t kBlock = 512 / int64_t(sizeof(Accum)), width = kPanelVectors * L;
  alignas(64) Accum panel[kBlock * width];
  for (int64_t begin = 0; begin < K || begin == 0; begin += kBlock) {
    const int64_t size = smaller(K - begin, kBlock);
    for (int64_t first = 0; first < columns; first += width) {
      const int64_t left = columns - first;
      with_vectors<Accum>(left, [&](auto C) FUSEDRNN_LAMBDA {
        for (int64_t k = 0; k < size; ++k) {
          unroll<C>([&](auto c) FUSEDRNN_LAMBDA {
            const int64_t n = c + 1 < C ? L : left - c * L;
            store(panel + (k * C + c) * L, load(b + (begin + k) * b_stride + first + c * L, n));
          });
        }
        for_tiles(rows, [&](auto R, int64_t row) FUSEDRNN_LAMBDA {
          Tile<Accum, R, C> tile = {};
          const Accum* from = a + begin * a_stride + row;
          accumulate<InOrder<C>, Accum, R, 1>(
              tile, [&](auto r, int64_t k) FUSEDRNN_LAMBDA { return from + k * a_stride + r; },
              size, panel, C * L, 0);
          unroll<R>([&](auto r) FUSEDRNN_LAMBDA {
            store_row<Accum, R, C>(tile, r, out + (row + r) * out_stride + first, left, begin > 0);
          });
        });
      });
    }
  }
}

}  // namespace fusedrnn::FUSEDRNN_TARGET
