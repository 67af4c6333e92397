// Every cell's maths, forward and backward, once, for scalars and SIMD vectors alike.
//
// A cell is constants and functions for one hidden unit. A step's GEMMs sum into kPreacts
// pre-activations a unit. Row block g of weight_ih contributes to pre-activation input_preact[g],
// row block g of weight_hh to hidden_preact[g]; a GRU keeps the hidden part of its candidate apart.
// The backward pass gets kSaved values a unit. output() recomputes h from them, because the caller
// may have changed the output in place. `state` is c for a cell with a cell state, else h. Act has
// sigmoid and tanh.
//
// Candidate says what happens to the candidate's tanh, g of an LSTM and n of a GRU: value() of it,
// and slope(), the derivative of value() by the pre-activation as a function of the value.
//
// A backward step has two parts. prepare() computes kPrepared values from what the forward pass
// saved. backward() needs the output's gradient too. A kernel that waits for this gradient calls
// prepare() before the wait.
//
// To add a cell: a struct here, its name in Cells, its step in _cells.py. docs/new_cell.md.
#pragma once

#include "activations.h"

namespace fusedrnn::FUSEDRNN_TARGET {

/// The candidate as it is.
struct WholeCandidate {
  template <class V>
  FUSEDRNN_INLINE V value(V tanh) const {
    return tanh;
  }
  template <class V>
  FUSEDRNN_INLINE V slope(V value) const {
    return typename Value<V>::scalar(1) - value * value;
  }
};

/// The candidate times a factor, 0 where recurrent dropout zeroes it.
template <class V>
struct ScaledCandidate {
  V factor;
  FUSEDRNN_INLINE V value(V tanh) const { return tanh * factor; }
  FUSEDRNN_INLINE V slope(V value) const {
    return factor == V{} ? V{} : factor - value * value / factor;
  }
};

/// Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000, as in torch.nn.LSTM.
/// Gates i f g o; saved: i f g o c.
struct Lstm {
  static constexpr char kName[] = "lstm";
  static constexpr int kGates = 4, kPreacts = 4, kSaved = 5, kPrepared = 6;
  static constexpr int input_preact[kGates] = {0, 1, 2, 3};
  static constexpr int hidden_preact[kGates] = {0, 1, 2, 3};
  static constexpr bool kHasCellState = true, kHasProjection = true, kHasCandidate = true;
  static constexpr bool kIsBounded = true;   ///< |h| is at most 1 if it is at first
  static constexpr int kSavedState = 4;      ///< the state's index in `saved`
  static constexpr int kPreparedOutput = 5;  ///< in `prepared`: dc's derivative to dh

  template <class Act = ExactActivations, class V, class Candidate = WholeCandidate>
  static FUSEDRNN_INLINE V forward(const V* preact, V& c, V* saved, Candidate candidate = {}) {
    saved[0] = Act::sigmoid(preact[0]);
    saved[1] = Act::sigmoid(preact[1]);
    saved[2] = candidate.value(Act::tanh(preact[2]));
    saved[3] = Act::sigmoid(preact[3]);
    saved[4] = c = saved[1] * c + saved[0] * saved[2];
    return output<Act>(saved);
  }

  template <class Act = ExactActivations, class V>
  static FUSEDRNN_INLINE V output(const V* saved) {
    return saved[3] * Act::tanh(saved[4]);
  }

  /// Derivatives of the gates' pre-activations: the first three to dc, the fourth to dh. Then f,
  /// and dc's derivative to dh.
  template <class Act = ExactActivations, class V, class Candidate = WholeCandidate>
  static FUSEDRNN_INLINE void prepare(const V* saved, V c_previous, V* prepared,
                                      Candidate candidate = {}) {
    using Scalar = typename Value<V>::scalar;
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V tanh_c = Act::tanh(saved[4]);
    prepared[0] = g * i * (Scalar(1) - i);
    prepared[1] = c_previous * f * (Scalar(1) - f);
    prepared[2] = i * candidate.slope(g);
    prepared[3] = tanh_c * o * (Scalar(1) - o);
    prepared[4] = f;
    prepared[5] = o * (Scalar(1) - tanh_c * tanh_c);
  }

  /// dh: this step's output gradient. dc: c's gradient, this step's on entry, the previous step's
  /// on return.
  template <class V>
  static FUSEDRNN_INLINE void backward(const V* prepared, V dh, V& dc, V* dgates) {
    dc += dh * prepared[5];
    dgates[0] = dc * prepared[0];
    dgates[1] = dc * prepared[1];
    dgates[2] = dc * prepared[2];
    dgates[3] = dh * prepared[3];
    dc *= prepared[4];
  }
};

/// Cho et al. 2014 in torch.nn.GRU's form, the reset after the product:
/// n = tanh(x_n + r * h_n). Gates r z n; pre-activations r, z, x_n, h_n; saved: r z n h_n h.
struct Gru {
  static constexpr char kName[] = "gru";
  static constexpr int kGates = 3, kPreacts = 4, kSaved = 5, kPrepared = 5;
  static constexpr int input_preact[kGates] = {0, 1, 2};
  static constexpr int hidden_preact[kGates] = {0, 1, 3};
  static constexpr bool kHasCellState = false, kHasProjection = false, kHasCandidate = true;
  static constexpr bool kIsBounded = true;
  static constexpr int kSavedState = 4;

  template <class Act = ExactActivations, class V, class Candidate = WholeCandidate>
  static FUSEDRNN_INLINE V forward(const V* preact, V& h, V* saved, Candidate candidate = {}) {
    using Scalar = typename Value<V>::scalar;
    saved[0] = Act::sigmoid(preact[0]);
    saved[1] = Act::sigmoid(preact[1]);
    saved[2] = candidate.value(Act::tanh(preact[2] + saved[0] * preact[3]));
    saved[3] = preact[3];
    // Not n + z * (h - n), which loses h where |n| is much larger.
    return saved[4] = h = (Scalar(1) - saved[1]) * saved[2] + saved[1] * h;
  }

  template <class Act = ExactActivations, class V>
  static FUSEDRNN_INLINE V output(const V* saved) {
    return saved[4];
  }

  /// The derivatives of x_n and z to dh, of r to x_n. Then r and z.
  template <class Act = ExactActivations, class V, class Candidate = WholeCandidate>
  static FUSEDRNN_INLINE void prepare(const V* saved, V h_previous, V* prepared,
                                      Candidate candidate = {}) {
    using Scalar = typename Value<V>::scalar;
    const V r = saved[0], z = saved[1], n = saved[2], h_n = saved[3];
    prepared[0] = (Scalar(1) - z) * candidate.slope(n);
    prepared[1] = (h_previous - n) * z * (Scalar(1) - z);
    prepared[2] = h_n * r * (Scalar(1) - r);
    prepared[3] = r;
    prepared[4] = z;
  }

  /// dh: this step's output gradient. dh_direct: the part that bypasses the gates, from h to h;
  /// this step's on entry, the previous step's on return.
  template <class V>
  static FUSEDRNN_INLINE void backward(const V* prepared, V dh, V& dh_direct, V* dgates) {
    dh += dh_direct;
    const V dn = dh * prepared[0];
    dgates[0] = dn * prepared[2];
    dgates[1] = dh * prepared[1];
    dgates[2] = dn;
    dgates[3] = dn * prepared[3];
    dh_direct = dh * prepared[4];
  }
};

/// Elman 1990 in torch.nn.RNN's form: h = f(x + W_hh h). One gate, one pre-activation; saved: h.
/// Nonlinearity: f, and its derivative as a function of h.
template <class Nonlinearity>
struct Rnn {
  static constexpr int kGates = 1, kPreacts = 1, kSaved = 1, kPrepared = 1;
  static constexpr int input_preact[kGates] = {0};
  static constexpr int hidden_preact[kGates] = {0};
  static constexpr bool kHasCellState = false, kHasProjection = false, kHasCandidate = false;
  static constexpr bool kIsBounded = Nonlinearity::kIsBounded;
  static constexpr int kSavedState = 0;

  template <class Act = ExactActivations, class V, class Candidate = WholeCandidate>
  static FUSEDRNN_INLINE V forward(const V* preact, V& h, V* saved, Candidate = {}) {
    return saved[0] = h = Nonlinearity::template value<Act>(preact[0]);
  }

  template <class Act = ExactActivations, class V>
  static FUSEDRNN_INLINE V output(const V* saved) {
    return saved[0];
  }

  template <class Act = ExactActivations, class V, class Candidate = WholeCandidate>
  static FUSEDRNN_INLINE void prepare(const V* saved, V, V* prepared, Candidate = {}) {
    prepared[0] = Nonlinearity::prepare(saved[0]);
  }

  /// dh: this step's output gradient. No part bypasses the gate.
  template <class V>
  static FUSEDRNN_INLINE void backward(const V* prepared, V dh, V&, V* dgates) {
    dgates[0] = Nonlinearity::gradient(prepared[0], dh);
  }
};

struct Tanh {
  static constexpr bool kIsBounded = true;
  template <class Act, class V>
  static FUSEDRNN_INLINE V value(V x) {
    return Act::saturating_tanh(x);
  }
  template <class V>
  static FUSEDRNN_INLINE V prepare(V h) {
    return typename Value<V>::scalar(1) - h * h;
  }
  template <class V>
  static FUSEDRNN_INLINE V gradient(V derivative, V dh) {
    return dh * derivative;
  }
};
/// NaN stays NaN, and its gradient passes, as in torch.relu.
struct Relu {
  static constexpr bool kIsBounded = false;
  template <class, class V>
  static FUSEDRNN_INLINE V value(V x) {
    return x < V{} ? V{} : x;
  }
  template <class V>
  static FUSEDRNN_INLINE V prepare(V h) {
    return h;
  }
  /// A select: where h is 0, a gradient that is infinite or NaN becomes 0 too.
  template <class V>
  static FUSEDRNN_INLINE V gradient(V h, V dh) {
    return h <= V{} ? V{} : dh;
  }
};
struct RnnTanh : Rnn<Tanh> {
  static constexpr char kName[] = "rnn_tanh";
};
struct RnnRelu : Rnn<Relu> {
  static constexpr char kName[] = "rnn_relu";
};

/// A backward step in one call: `dstate` as in the cell's backward().
template <class Cell, class Act = ExactActivations, class V>
FUSEDRNN_INLINE void cell_backward(const V* saved, V state_previous, V dh, V& dstate, V* dgates) {
  V prepared[Cell::kPrepared];
  Cell::template prepare<Act>(saved, state_previous, prepared);
  Cell::backward(prepared, dh, dstate, dgates);
}

/// A list of cells. Code that tells cells apart at run time uses their indices in it.
template <class... Cell>
struct CellList {
  static constexpr int count = sizeof...(Cell);

  /// Calls f(Cell{}) for each cell.
  template <class F>
  static void for_each(F&& f) {
    (f(Cell{}), ...);
  }
  /// Calls f(Cell{}) for the cell with this index.
  template <class F>
  static void visit(int index, F&& f) {
    int i = 0;
    (void)((i++ == index && (f(Cell{}), true)) || ...);
  }
  template <class Of>
  static constexpr int index_of() {
    int index = 0;
    (void)((std::is_same_v<Of, Cell> || (++index, false)) || ...);
    return index;
  }
};

/// The library's cells.
using Cells = CellList<Lstm, Gru, RnnTanh, RnnRelu>;

}  // namespace fusedrnn::FUSEDRNN_TARGET

namespace fusedrnn {
constexpr int kCells = FUSEDRNN_TARGET::Cells::count;
}
