// sigmoid and tanh by the GPU's special function unit, as exact as the type of the operands needs.
#pragma once

#include "../activations.h"
#include "ptx.cuh"

namespace fusedrnn::cuda {

/// For operands of ten mantissa bits, float16's and TF32's, whose rounding is a relative 2^-11.
struct ApproximateActivations {
  /// Within 2^-18 of its value, also where it is almost 0.
  static FUSEDRNN_DEVICE float sigmoid(float x) {
    return reciprocal(1 + exp2_approx(x * -1.44269504f));
  }
  /// Within 2^-17 of its value: by the exponential within 2^-21 of 1, which is too much near 0.
  static FUSEDRNN_DEVICE float tanh(float x) {
    const float square = x * x;
    const float small = x + x * square * (-1 / 3.f);
    const float large = 1 - 2 * reciprocal(1 + exp2_approx(x * 2.88539008f));
    return square < 0x1p-8f ? small : large;
  }
  static FUSEDRNN_DEVICE float saturating_tanh(float x) { return tanh(x); }
};

/// For bfloat16, whose rounding is a relative 2^-9. sigmoid by tanh_approx would be within 2^-12 of
/// 1, more than the whole value of a gate that is almost closed.
struct RoughActivations : ApproximateActivations {
  static FUSEDRNN_DEVICE float tanh(float x) { return tanh_approx(x); }
  static FUSEDRNN_DEVICE float saturating_tanh(float x) { return tanh_approx(x); }
};

}  // namespace fusedrnn::cuda
