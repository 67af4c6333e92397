// SIMD vectors of FUSEDRNN_VECTOR_BYTES on the compiler's own vector types: memory and shuffles.
// Included with the instruction set already selected (kernel.h), never on its own.
#pragma once

#include "../activations.h"
#include "../sequence.h"
#include "standard.h"

// Vectors are passed between inlined functions only, where no calling convention matters.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace fusedrnn::FUSEDRNN_TARGET {

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
inline constexpr int kLanes = FUSEDRNN_VECTOR_BYTES / int(sizeof(T));

template <class T>
FUSEDRNN_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <class T>
FUSEDRNN_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

#if defined(__x86_64__) && FUSEDRNN_VECTOR_BYTES == 64
FUSEDRNN_INLINE Vec<float> load_first(const float* p, int64_t n) {
  return bit_cast<Vec<float>>(_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p));
}
FUSEDRNN_INLINE Vec<double> load_first(const double* p, int64_t n) {
  return bit_cast<Vec<double>>(_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p));
}
FUSEDRNN_INLINE void store_first(float* p, Vec<float> v, int64_t n) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), bit_cast<__m512>(v));
}
FUSEDRNN_INLINE void store_first(double* p, Vec<double> v, int64_t n) {
  _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), bit_cast<__m512d>(v));
}
#elif defined(__x86_64__) && FUSEDRNN_VECTOR_BYTES == 32
/// All ones in the first n lanes.
template <class T>
FUSEDRNN_INLINE __m256i first_lanes(int64_t n) {
  using Bits = typename Value<Vec<T>>::bits;
  using Bit = std::remove_reference_t<decltype(std::declval<Bits&>()[0])>;
  Bits lane;
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = Bit(i);
  return bit_cast<__m256i>(lane < Bit(n));
}
FUSEDRNN_INLINE Vec<float> load_first(const float* p, int64_t n) {
  return bit_cast<Vec<float>>(_mm256_maskload_ps(p, first_lanes<float>(n)));
}
FUSEDRNN_INLINE Vec<double> load_first(const double* p, int64_t n) {
  return bit_cast<Vec<double>>(_mm256_maskload_pd(p, first_lanes<double>(n)));
}
FUSEDRNN_INLINE void store_first(float* p, Vec<float> v, int64_t n) {
  _mm256_maskstore_ps(p, first_lanes<float>(n), bit_cast<__m256>(v));
}
FUSEDRNN_INLINE void store_first(double* p, Vec<double> v, int64_t n) {
  _mm256_maskstore_pd(p, first_lanes<double>(n), bit_cast<__m256d>(v));
}
#else
template <class T>
FUSEDRNN_INLINE Vec<T> load_first(const T* p, int64_t n) {
  T all[kLanes<T>] = {};
  for (int64_t i = 0; i < n; ++i) all[i] = p[i];
  return load(all);
}
template <class T>
FUSEDRNN_INLINE void store_first(T* p, Vec<T> v, int64_t n) {
  T all[kLanes<T>];
  store(all, v);
  for (int64_t i = 0; i < n; ++i) p[i] = all[i];
}
#endif

/// The first n of a vector's lanes, n up to all of them; the others read as zero.
template <class T>
FUSEDRNN_INLINE Vec<T> load(const T* p, int64_t n) {
  return n >= kLanes<T> ? load(p) : load_first(p, n);
}
template <class T>
FUSEDRNN_INLINE void store(T* p, Vec<T> v, int64_t n) {
  n >= kLanes<T> ? store(p, v) : store_first(p, v, n);
}

// ---- operands of products -----------------------------------------------------------------------
//
// A product's operands come in lanes as wide as those of its sums: one float32 or float64, or a
// pair of bfloat16 that follow one another in the depth of the product. Vectors of them are carried
// as Vec<T> of the sums' type.

template <class S>
inline constexpr int kPerLane = sizeof(Accumulator<S>) / sizeof(S);

/// Lanes that `size` elements fill.
template <class S>
FUSEDRNN_INLINE int64_t lanes_of(int64_t size) {
  return (size + kPerLane<S> - 1) / kPerLane<S>;
}

template <class S>
FUSEDRNN_INLINE Vec<Accumulator<S>> load_operands(const S* p) {
  Vec<Accumulator<S>> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

/// The first n elements, n up to a whole vector of them or more; the others read as zero.
template <class S>
FUSEDRNN_INLINE Vec<Accumulator<S>> load_operands(const S* p, int64_t n) {
  if constexpr (kPerLane<S> == 1) {
    return load(p, n);
  } else {
#if defined(FUSEDRNN_BFLOAT16)
    if (n >= 2 * kLanes<float>) return load_operands(p);
    return bit_cast<Vec<float>>(_mm512_maskz_loadu_epi16(__mmask32((1u << n) - 1), p));
#endif
  }
}

/// The lane at p, in all lanes.
template <class S>
FUSEDRNN_INLINE Vec<Accumulator<S>> broadcast_operand(const S* p) {
  Accumulator<S> lane;
  __builtin_memcpy(&lane, p, sizeof(lane));
  return broadcast<Vec<Accumulator<S>>>(lane);
}

/// sum += a * b, lane by lane.
template <class S>
FUSEDRNN_INLINE void multiply_add(Vec<Accumulator<S>>& sum, Vec<Accumulator<S>> a,
                                  Vec<Accumulator<S>> b) {
  if constexpr (kPerLane<S> == 1) {
    sum += a * b;
  } else {
#if defined(FUSEDRNN_BFLOAT16)
    sum = bit_cast<Vec<float>>(
        _mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(a), bit_cast<__m512bh>(b)));
#endif
  }
}

/// The first n elements, or a whole vector of them, as values of the sums' type.
FUSEDRNN_INLINE Vec<float> load_values(const float* p, int64_t n) { return load(p, n); }
FUSEDRNN_INLINE Vec<double> load_values(const double* p, int64_t n) { return load(p, n); }
FUSEDRNN_INLINE void store_values(float* p, Vec<float> v, int64_t n) { store(p, v, n); }
FUSEDRNN_INLINE void store_values(double* p, Vec<double> v, int64_t n) { store(p, v, n); }
#if defined(FUSEDRNN_BFLOAT16)
FUSEDRNN_INLINE __mmask16 first_lanes(int64_t n) {
  return n >= kLanes<float> ? __mmask16(-1) : __mmask16((1u << n) - 1);
}
FUSEDRNN_INLINE Vec<float> load_values(const BFloat16* p, int64_t n) {
  const __mmask16 lanes = first_lanes(n);
  const __m256i halves = _mm256_maskz_loadu_epi16(lanes, p);
  using Bits = Value<Vec<float>>::bits;
  return bit_cast<Vec<float>>(bit_cast<Bits>(_mm512_maskz_cvtepu16_epi32(lanes, halves)) << 16);
}
/// Rounded to the nearest.
FUSEDRNN_INLINE void store_values(BFloat16* p, Vec<float> v, int64_t n) {
  const __m256i halves = bit_cast<__m256i>(_mm512_cvtneps_pbh(bit_cast<__m512>(v)));
  _mm256_mask_storeu_epi16(p, first_lanes(n), halves);
}
#endif

// ---- shuffles -----------------------------------------------------------------------------------

template <bool high, class V, int... i>
FUSEDRNN_INLINE V interleave(V a, V b, std::integer_sequence<int, i...>) {
  constexpr int n = sizeof...(i), from = high ? n / 2 : 0;
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, (from + i / 2 + (i % 2) * n)...);
#else
  return __builtin_shuffle(a, b, typename Value<V>::bits{unsigned(from + i / 2 + (i % 2) * n)...});
#endif
}

/// a0 b0 a1 b1 ... of the lower or of the higher halves.
template <bool high, class T>
FUSEDRNN_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b) {
  return interleave<high>(a, b, std::make_integer_sequence<int, kLanes<T>>{});
}

/// Transposes the square of lanes in v, in log2(lanes) rounds of perfect shuffles.
template <class T>
FUSEDRNN_INLINE void transpose(Vec<T> (&v)[kLanes<T>]) {
  constexpr int n = kLanes<T>;
  for (int round = 1; round < n; round *= 2) {
    Vec<T> next[n];
    unroll<n / 2>([&](auto i) __attribute__((always_inline)) {
      next[2 * i] = interleave<false, T>(v[i], v[i + n / 2]);
      next[2 * i + 1] = interleave<true, T>(v[i], v[i + n / 2]);
    });
    unroll<n>([&](auto i) __attribute__((always_inline)) { v[i] = next[i]; });
  }
}

template <class T, int n>
FUSEDRNN_INLINE void sum_lanes_round(Vec<T>* v) {
  unroll<n>([&](auto i) __attribute__((always_inline)) {
    v[i] = interleave<false, T>(v[i], v[i + n]) + interleave<true, T>(v[i], v[i + n]);
  });
  if constexpr (n > 1) sum_lanes_round<T, n / 2>(v);
}

/// Lane i of the result is the sum of all lanes of v[i].
template <class T>
FUSEDRNN_INLINE Vec<T> sum_lanes(Vec<T> (&v)[kLanes<T>]) {
  sum_lanes_round<T, kLanes<T> / 2>(v);
  return v[0];
}

}  // namespace fusedrnn::FUSEDRNN_TARGET
