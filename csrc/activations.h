// sigmoid and tanh, once, for float, double and their SIMD vectors.
#pragma once

#include "target.h"

#ifdef __CUDACC__
namespace fusedrnn::cuda {
__device__ __forceinline__ float reciprocal(float x);  // ptx.cuh
}
#endif

namespace fusedrnn::FUSEDRNN_TARGET {

/// The scalar type V is made from, and unsigned integers with its bits.
template <class V>
struct Value {
  using scalar = std::remove_cv_t<std::remove_reference_t<decltype(std::declval<V&>()[0])>>;
  typedef std::conditional_t<sizeof(scalar) == 4, uint32_t, uint64_t> bits
      __attribute__((vector_size(sizeof(V))));
};
template <>
struct Value<float> {
  using scalar = float;
  using bits = uint32_t;
};
template <>
struct Value<double> {
  using scalar = double;
  using bits = uint64_t;
};

template <class V>
FUSEDRNN_INLINE V broadcast(typename Value<V>::scalar x) {
  if constexpr (std::is_arithmetic_v<V>) {
    return x;
  } else {
    return x - V{};  // x - 0 is x for every x, so this is a plain broadcast
  }
}

/// Limits x to [-bound, bound]; NaN stays NaN.
template <class V>
FUSEDRNN_INLINE V clamp(V x, typename Value<V>::scalar bound) {
  const V high = broadcast<V>(bound), low = broadcast<V>(-bound);
  x = x > high ? high : x;
  return x < low ? low : x;
}

// ln 2 is split in two, which makes n * ln2_high exact for every n in range.
template <class Scalar>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr int degree = 7, mantissa = 23, bias = 127;
  static constexpr float limit = 87.0f, tanh_limit = 20.0f;
};
template <>
struct ExpConstants<double> {
  static constexpr double round = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double ln2_high = 6.93147180369123816490e-01,
                          ln2_low = 1.90821492927058770002e-10;
  static constexpr int degree = 13, mantissa = 52, bias = 1023;
  static constexpr double limit = 708.0, tanh_limit = 40.0;
};

/// exp(x) = scale * (1 + fraction), fraction = expm1 of the remainder in [-ln2/2, ln2/2].
template <class V>
struct Exp {
  V scale, fraction;
};

template <class V>
FUSEDRNN_INLINE Exp<V> split_exp(V x) {
  using Scalar = typename Value<V>::scalar;
  using Bits = typename Value<V>::bits;
  using BitScalar = typename Value<Scalar>::bits;
  using K = ExpConstants<Scalar>;
  const Scalar round = K::round;
  const V rounded = x * Scalar(1.44269504088896340736) + round;
  const V n = rounded - round;
  const V r = (x - n * K::ln2_high) - n * K::ln2_low;
  // Taylor series: on this small remainder its error is below half a unit in the last place.
  Scalar inverse_factorial[K::degree + 1] = {1};
  for (int k = 1; k <= K::degree; ++k) inverse_factorial[k] = inverse_factorial[k - 1] / Scalar(k);
  V p = broadcast<V>(inverse_factorial[K::degree]);
  for (int k = K::degree - 1; k >= 2; --k) p = p * r + inverse_factorial[k];
  const BitScalar offset = BitScalar(K::bias) - bit_cast<BitScalar>(round);
  const Bits exponent = (bit_cast<Bits>(rounded) + offset) << K::mantissa;
  return {bit_cast<V>(exponent), p * (r * r) + r};
}

/// a / b for b from 1 to 2^126. On a GPU this avoids a general division's branches.
template <class V>
FUSEDRNN_INLINE V quotient(V a, V b) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<V, float>) {
    const float r = cuda::reciprocal(b), q = a * r;
    return fmaf(fmaf(-b, q, a), r, q);  // correctly rounded but for a last bit
  }
#endif
  return a / b;
}

/// 1 / (1 + exp(-x)); relative error within 2 units in the last place.
template <class V>
FUSEDRNN_INLINE V sigmoid(V x) {
  using Scalar = typename Value<V>::scalar;
  const Exp<V> e = split_exp<V>(clamp<V>(-x, ExpConstants<Scalar>::limit));
  return quotient<V>(broadcast<V>(Scalar(1)), Scalar(1) + (e.scale * e.fraction + e.scale));
}

/// expm1(2x) / (expm1(2x) + 2): accurate near zero, where 1 - 2 / (exp(2x) + 1) is not.
template <class V>
FUSEDRNN_INLINE V tanh(V x) {
  using Scalar = typename Value<V>::scalar;
  const Exp<V> e = split_exp<V>(clamp<V>(x * Scalar(2), ExpConstants<Scalar>::tanh_limit));
  const V expm1 = e.scale * e.fraction + (e.scale - Scalar(1));
  return quotient<V>(expm1, expm1 + Scalar(2));
}

/// tanh within 0.6 units in the last place near +-1, where the derivative 1 - tanh^2 magnifies the
/// error: there 1 - 2 / (exp(2x) + 1), which hides the quotient's rounding. Two selects dearer.
template <class V>
FUSEDRNN_INLINE V saturating_tanh(V x) {
  using Scalar = typename Value<V>::scalar;
  const V size = x < V{} ? -x : x;
  const Exp<V> e = split_exp<V>(clamp<V>(size * Scalar(2), ExpConstants<Scalar>::tanh_limit));
  const V expm1 = e.scale * e.fraction + (e.scale - Scalar(1));
  const V two = broadcast<V>(Scalar(2)), border = broadcast<V>(Scalar(16));
  const V q = quotient<V>(expm1 > border ? two : expm1, expm1 + Scalar(2));
  const V result = expm1 > border ? Scalar(1) - q : q;
  return x < V{} ? -result : result;
}

/// The activations of a cell's maths. CUDA has others for operands of few bits.
struct ExactActivations {
  template <class V>
  static FUSEDRNN_INLINE V sigmoid(V x) {
    return FUSEDRNN_TARGET::sigmoid<V>(x);
  }
  template <class V>
  static FUSEDRNN_INLINE V tanh(V x) {
    return FUSEDRNN_TARGET::tanh<V>(x);
  }
  template <class V>
  static FUSEDRNN_INLINE V saturating_tanh(V x) {
    return FUSEDRNN_TARGET::saturating_tanh<V>(x);
  }
};

}  // namespace fusedrnn::FUSEDRNN_TARGET
