// SIMD vectors of FUSEDRNN_VECTOR_BYTES on the compiler's own vector types: memory and shuffles.
// Included with the instruction set already selected (kernel.h), never on its own.
#pragma once

#include "../math.h"
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

template <class F, int... i>
FUSEDRNN_INLINE void unroll_sequence(F& f, std::integer_sequence<int, i...>) {
  (f(std::integral_constant<int, i>{}), ...);
}

/// Calls f(integral_constant<int, 0>), ..., f(integral_constant<int, N - 1>).
template <int N, class F>
FUSEDRNN_INLINE void unroll(F&& f) {
  unroll_sequence(f, std::make_integer_sequence<int, N>{});
}

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
