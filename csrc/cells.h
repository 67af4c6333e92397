// The maths of every cell, forward and backward, once, for scalars and SIMD vectors alike.
//
// A cell is constants and functions of one unit. The linear part of a step is summed into
// kSums values a unit; `input_sum[g]` and `hidden_sum[g]` say to which of them the g-th row block
// of weight_ih and weight_hh contributes (GRU keeps the hidden part of its candidate apart).
// kSaved values a unit are kept for the backward pass, from which output() gives the step's h
// again: the backward pass does not need the output, which its owner may have changed in place.
// `state` is what a unit carries from step to step besides h: c for LSTM, h itself for GRU.
//
// To add a cell: a struct here, a schema in ops.cpp, a line in each backend, a test parameter.
#pragma once

#include "activations.h"

namespace fusedrnn::FUSEDRNN_TARGET {

/// Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000, as in torch.nn.LSTM.
/// Gates i f g o; saved: i f g o c.
struct Lstm {
  static constexpr int kGates = 4, kSums = 4, kSaved = 5;
  static constexpr int input_sum[kGates] = {0, 1, 2, 3};
  static constexpr int hidden_sum[kGates] = {0, 1, 2, 3};
  static constexpr bool kStateIsOutput = false;
  static constexpr int kSavedState = 4;  ///< where `saved` holds the state

  template <class V>
  static FUSEDRNN_INLINE V forward(const V* sum, V& c, V* saved) {
    saved[0] = sigmoid(sum[0]);
    saved[1] = sigmoid(sum[1]);
    saved[2] = tanh(sum[2]);
    saved[3] = sigmoid(sum[3]);
    saved[4] = c = saved[1] * c + saved[0] * saved[2];
    return output(saved);
  }

  template <class V>
  static FUSEDRNN_INLINE V output(const V* saved) {
    return saved[3] * tanh(saved[4]);
  }

  /// dh: gradient of this step's output. dc: of c, this step's on entry, the last step's on return.
  template <class V>
  static FUSEDRNN_INLINE void backward(const V* saved, V c_previous, V dh, V& dc, V* dsum) {
    using T = typename Value<V>::scalar;
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V tanh_c = tanh(saved[4]);
    dc += dh * o * (T(1) - tanh_c * tanh_c);
    dsum[0] = dc * g * i * (T(1) - i);
    dsum[1] = dc * c_previous * f * (T(1) - f);
    dsum[2] = dc * i * (T(1) - g * g);
    dsum[3] = dh * tanh_c * o * (T(1) - o);
    dc *= f;
  }
};

/// Cho et al. 2014 in torch.nn.GRU's form, the reset after the product:
/// n = tanh(x_n + r * h_n). Gates r z n; sums r, z, x_n, h_n; saved: r z n h_n h.
struct Gru {
  static constexpr int kGates = 3, kSums = 4, kSaved = 5;
  static constexpr int input_sum[kGates] = {0, 1, 2};
  static constexpr int hidden_sum[kGates] = {0, 1, 3};
  static constexpr bool kStateIsOutput = true;
  static constexpr int kSavedState = 4;

  template <class V>
  static FUSEDRNN_INLINE V forward(const V* sum, V& h, V* saved) {
    using T = typename Value<V>::scalar;
    saved[0] = sigmoid(sum[0]);
    saved[1] = sigmoid(sum[1]);
    saved[2] = tanh(sum[2] + saved[0] * sum[3]);
    saved[3] = sum[3];
    // Not n + z * (h - n): that loses h where |n| is much larger.
    return saved[4] = h = (T(1) - saved[1]) * saved[2] + saved[1] * h;
  }

  template <class V>
  static FUSEDRNN_INLINE V output(const V* saved) {
    return saved[4];
  }

  /// dh: gradient of this step's output but for the part that goes straight from h to h, which
  /// dh_direct carries: this step's on entry, the last step's on return.
  template <class V>
  static FUSEDRNN_INLINE void backward(const V* saved, V h_previous, V dh, V& dh_direct, V* dsum) {
    using T = typename Value<V>::scalar;
    const V r = saved[0], z = saved[1], n = saved[2], h_n = saved[3];
    dh += dh_direct;
    const V dn = dh * (T(1) - z) * (T(1) - n * n);
    dsum[0] = dn * h_n * r * (T(1) - r);
    dsum[1] = dh * (h_previous - n) * z * (T(1) - z);
    dsum[2] = dn;
    dsum[3] = dn * r;
    dh_direct = dh * z;
  }
};

}  // namespace fusedrnn::FUSEDRNN_TARGET
