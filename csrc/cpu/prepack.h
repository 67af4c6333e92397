// Prepacking: weights and matrices in the order in which tiles read them.
//
// For each lane k along K, a panel holds the column vectors read by a tile at k.
#pragma once

#include "panel.h"
#include "tile.h"

namespace fusedrnn::FUSEDRNN_TARGET {

inline constexpr int kPanelVectors = kTileColumns;

/// Copies lane k of row v of w to out[k * step + v]. k covers the lanes of `size` elements, v all
/// lanes of a vector. Rows from `units` on are zero. Rows of w are `stride` elements apart.
template <class Element, class Accum = Accumulator<Element>>
FUSEDRNN_INLINE void prepack_rows(const Element* w, int64_t units, int64_t stride, int64_t size,
                                  Accum* out, int64_t step) {
  constexpr int L = kLanes<Accum>, kWidth = L * kPerLane<Element>;
  for (int64_t k = 0; k < size; k += kWidth) {
    const int64_t n = size - k;
    Vec<Accum> square[L];
    for (int v = 0; v < L; ++v) {
      square[v] = v < units ? load_operands(w + v * stride + k, n) : Vec<Accum>{};
    }
    transpose<Accum>(square);
    Accum* to = out + k / kPerLane<Element> * step;
    for (int64_t i = 0; i < L && i < lanes_of<Element>(n); ++i) store(to + i * step, square[i]);
  }
}

template <class Cell, class Element, class Weight>
inline constexpr PanelLayout kPanel = {kLanes<Accumulator<Element>>,
                                       Cell::kGates,
                                       Cell::kPreacts,
                                       sizeof(PanelLane<Element, Weight>),
                                       kPerLane<Element> * kLanesPerWeight<Element, Weight>,
                                       sizeof(Accumulator<Element>),
                                       std::is_same_v<Weight, Int8>};

template <class Cell, class Element, class Weight>
int64_t forward_panel_size(int64_t input_size, int64_t output_size) {
  return kPanel<Cell, Element, Weight>.size(input_size, output_size) /
         int64_t(sizeof(Accumulator<Element>));
}

template <class Cell, class Element, class Accum = Accumulator<Element>>
FUSEDRNN_INLINE void load_bias(const Weights<Element>& w, int64_t hidden_size, int64_t unit,
                               int64_t units, Vec<Accum> (&bias)[Cell::kPreacts]) {
  unroll<Cell::kPreacts>([&](auto c) FUSEDRNN_LAMBDA { bias[c] = Vec<Accum>{}; });
  unroll<Cell::kGates>([&](auto g) FUSEDRNN_LAMBDA {
    const int64_t at = g * hidden_size + unit;
    if (w.bias_ih) bias[Cell::input_preact[g]] += load_values(w.bias_ih + at, units);
    if (w.bias_hh) bias[Cell::hidden_preact[g]] += load_values(w.bias_hh + at, units);
  });
}

/// A block's panel: the bias [preacts][lanes], then weight_ih and weight_hh [k][gates][lanes].
template <class Cell, class Element, class Accum = Accumulator<Element>>
void prepack_forward(const Weights<Element>& weights, int64_t input_size, int64_t hidden_size,
                     int64_t output_size, int64_t block, Accum* panel) {
  constexpr int L = kLanes<Accum>, G = Cell::kGates, S = Cell::kPreacts;
  const int64_t unit = block * L, units = smaller(hidden_size - unit, L);
  Vec<Accum> bias[S];
  load_bias<Cell>(weights, hidden_size, unit, units, bias);
  for (int c = 0; c < S; ++c) store(panel + c * L, bias[c]);
  panel += S * L;
  for (int g = 0; g < G; ++g) {
    const int64_t row = g * hidden_size + unit;
    if (weights.ih) {
      prepack_rows(weights.ih + row * input_size, units, input_size, input_size, panel + g * L,
                   G * L);
    }
    prepack_rows(weights.hh + row * output_size, units, output_size, output_size,
                 panel + (weights.ih ? lanes_of<Element>(input_size) : 0) * G * L + g * L, G * L);
  }
}

template <class Element, class Accum = Accumulator<Element>>
void prepack_gemm(const Element* matrix, int64_t row_stride, int64_t column_stride, int64_t K,
                  int64_t columns, int64_t block, Accum* panels) {
  constexpr int L = kLanes<Accum>;
  const int64_t width = kPanelVectors * L, first = block * width;
  Accum* panel = panels + lanes_of<Element>(K) * first;
  const int64_t step = smaller(padded<Accum>(columns - first), width);
  for (int64_t c = 0; c < step; c += L) {
    const int64_t n = smaller(columns - first - c, L);
    const Element* from = matrix + (first + c) * column_stride;
    if (kPerLane<Element> > 1 || column_stride != 1) {
      prepack_rows(from, n, column_stride, K, panel + c, step);
    } else {
      for (int64_t k = 0; k < K; ++k) {
        store(panel + k * step + c, load_operands(from + k * row_stride, n));
      }
    }
  }
}

}  // namespace fusedrnn::FUSEDRNN_TARGET
