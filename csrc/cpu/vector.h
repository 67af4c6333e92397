// SIMD vectors of FUSEDRNN_VECTOR_BYTES on the compiler's own vector types: memory and shuffles.
// Only cell_kernels.h includes it, inside a target region (target_region.h).
#pragma once

#include "../activations.h"
#include "../sequence.h"
#include "target_region.h"

// Vectors are passed between inlined functions only, where no calling convention matters.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace fusedrnn::FUSEDRNN_TARGET {

template <class Scalar>
struct VectorOf {
  typedef Scalar type __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));
};
template <class Scalar>
using Vec = typename VectorOf<Scalar>::type;
template <class Scalar>
inline constexpr int kLanes = FUSEDRNN_VECTOR_BYTES / int(sizeof(Scalar));

template <class Scalar>
FUSEDRNN_INLINE Vec<Scalar> load(const Scalar* p) {
  Vec<Scalar> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <class Scalar>
FUSEDRNN_INLINE void store(Scalar* p, Vec<Scalar> v) {
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
template <class Scalar>
FUSEDRNN_INLINE __m256i first_lanes(int64_t n) {
  using Bits = typename Value<Vec<Scalar>>::bits;
  using Bit = std::remove_reference_t<decltype(std::declval<Bits&>()[0])>;
  Bits lane;
  for (int i = 0; i < kLanes<Scalar>; ++i) lane[i] = Bit(i);
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
template <class Scalar>
FUSEDRNN_INLINE Vec<Scalar> load_first(const Scalar* p, int64_t n) {
  Scalar all[kLanes<Scalar>] = {};
  for (int64_t i = 0; i < n; ++i) all[i] = p[i];
  return load(all);
}
template <class Scalar>
FUSEDRNN_INLINE void store_first(Scalar* p, Vec<Scalar> v, int64_t n) {
  Scalar all[kLanes<Scalar>];
  store(all, v);
  for (int64_t i = 0; i < n; ++i) p[i] = all[i];
}
#endif

/// The first n lanes, at most all; the other lanes are zero.
template <class Scalar>
FUSEDRNN_INLINE Vec<Scalar> load(const Scalar* p, int64_t n) {
  return n >= kLanes<Scalar> ? load(p) : load_first(p, n);
}
template <class Scalar>
FUSEDRNN_INLINE void store(Scalar* p, Vec<Scalar> v, int64_t n) {
  n >= kLanes<Scalar> ? store(p, v) : store_first(p, v, n);
}

// ---- GEMM operands ------------------------------------------------------------------------------
//
// An operand lane is as wide as an accumulator: one float32, one float64, or two bfloat16 or int16
// neighbours along K. An operand vector has the type Vec<Accumulator<Element>>.
//
// VNNI multiplies unsigned bytes. Four int16 neighbours, plus 32768, are then two lanes: their
// lower bytes and their upper bytes. The input is quantised to bytes there: four to a lane.

#if defined(FUSEDRNN_VNNI)
inline constexpr bool kSplitsInt16 = true;
#else
inline constexpr bool kSplitsInt16 = false;
#endif

/// The input's operands beside states of type Element.
template <class Element>
using InputOf = std::conditional_t<std::is_same_v<Element, Int16> && kSplitsInt16, UInt8, Element>;

template <class Element>
inline constexpr bool kIsQuantised =
    std::is_same_v<Element, Int16> || std::is_same_v<Element, UInt8>;

/// Elements of a row that one lane of weights meets.
template <class Element>
inline constexpr int kPerLane =
    std::is_same_v<Element, Int16> && kSplitsInt16 ? 4
                                                   : sizeof(Accumulator<Element>) / sizeof(Element);

/// The lanes that `size` elements fill: 13 for 13 float32, 7 for 13 bfloat16.
template <class Element>
FUSEDRNN_INLINE int64_t lanes_of(int64_t size) {
  return divide_up(size, kPerLane<Element>);
}

template <class Element>
FUSEDRNN_INLINE Vec<Accumulator<Element>> load_operands(const Element* p) {
  Vec<Accumulator<Element>> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

/// The first n elements, at most one vector; the other lanes are zero.
template <class Element>
FUSEDRNN_INLINE Vec<Accumulator<Element>> load_operands(const Element* p, int64_t n) {
  if constexpr (kPerLane<Element> == 1) {
    return load(p, n);
  } else {
#if defined(FUSEDRNN_BFLOAT16)
    if (n >= 2 * kLanes<float>) return load_operands(p);
    return bit_cast<Vec<float>>(_mm512_maskz_loadu_epi16(__mmask32((1u << n) - 1), p));
#endif
  }
}

/// The lanes of an operand and of a sum of products: int32 for quantised operands.
template <class Element>
using Sum = std::conditional_t<kIsQuantised<Element>, int32_t, Accumulator<Element>>;

/// Broadcasts the lane at p.
template <class Element>
FUSEDRNN_INLINE Vec<Sum<Element>> broadcast_operand(const Element* p) {
  Sum<Element> lane;
  __builtin_memcpy(&lane, p, sizeof(lane));
  return lane - Vec<Sum<Element>>{};
}

/// sum + a_low * b_low + a_high * b_high for the int16 halves of each lane. With VNNI for its four
/// bytes, which are unsigned in a and signed in b.
FUSEDRNN_INLINE Vec<int32_t> multiply_add_pairs(Vec<int32_t> sum, Vec<int32_t> a, Vec<int32_t> b) {
#if defined(FUSEDRNN_VNNI)
  // GCC copies the sum before and after each _mm512_dpbusd_epi32.
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
#elif defined(__x86_64__) && FUSEDRNN_VECTOR_BYTES == 64
  return sum +
         bit_cast<Vec<int32_t>>(_mm512_madd_epi16(bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#elif defined(__x86_64__) && FUSEDRNN_VECTOR_BYTES == 32
  return sum +
         bit_cast<Vec<int32_t>>(_mm256_madd_epi16(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#elif defined(__x86_64__)
  return sum + bit_cast<Vec<int32_t>>(_mm_madd_epi16(bit_cast<__m128i>(a), bit_cast<__m128i>(b)));
#else
  return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

/// sum += a * b, lane by lane.
template <class Element>
FUSEDRNN_INLINE void multiply_add(Vec<Sum<Element>>& sum, Vec<Sum<Element>> a,
                                  Vec<Sum<Element>> b) {
  if constexpr (kPerLane<Element> == 1) {
    sum += a * b;
  } else if constexpr (kIsQuantised<Element>) {
    sum = multiply_add_pairs(sum, a, b);
  } else {
#if defined(FUSEDRNN_BFLOAT16)
    sum = bit_cast<Vec<float>>(
        _mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(a), bit_cast<__m512bh>(b)));
#endif
  }
}

/// Rounds to nearest even integers, at most 2^22 in size.
FUSEDRNN_INLINE Vec<int32_t> rounded(Vec<float> v) {
  const float magic = ExpConstants<float>::round;
  return bit_cast<Vec<int32_t>>(v + magic) - bit_cast<int32_t>(magic);
}

#if defined(FUSEDRNN_VNNI)
/// Stores a whole vector of bytes, plus 128.
FUSEDRNN_INLINE void store_integers(UInt8* p, Vec<int32_t> v) {
  const __m128i bytes = _mm512_maskz_cvtepi32_epi8(__mmask16(-1), bit_cast<__m512i>(v + 128));
  __builtin_memcpy(p, &bytes, sizeof(bytes));
}
#endif

/// Stores a whole vector of int16 operands.
FUSEDRNN_INLINE void store_integers(Int16* p, Vec<int32_t> v) {
#if defined(FUSEDRNN_VNNI)
  // Of four lanes the lower bytes, then the upper ones: eight bytes of sixteen.
  // The forms with masks: GCC warns about an undefined operand in the others.
  const __m512i order = _mm512_maskz_broadcast_i32x4(
      __mmask16(-1), _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 0, 0, 0, 0, 0, 0, 0, 0));
  const __m512i bytes =
      _mm512_maskz_shuffle_epi8(__mmask64(-1), bit_cast<__m512i>(v + 32768), order);
  const __m512i packed = _mm512_maskz_compress_epi64(__mmask8(0x55), bytes);
  __builtin_memcpy(p, &packed, 32);
#else
  typedef int16_t Half __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES / 2)));
  const Half half = __builtin_convertvector(v, Half);
  __builtin_memcpy(p, &half, sizeof(half));
#endif
}

/// The first n elements, at most one vector, as accumulators.
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
/// Rounds to nearest even.
FUSEDRNN_INLINE void store_values(BFloat16* p, Vec<float> v, int64_t n) {
  const __m256i halves = bit_cast<__m256i>(_mm512_cvtneps_pbh(bit_cast<__m512>(v)));
  _mm256_mask_storeu_epi16(p, first_lanes(n), halves);
}
#endif

// ---- prepacked weights --------------------------------------------------------------------------
//
// A panel lane holds one unit's weights for the operands of one lane, or of a pair of lanes.

/// Frozen bfloat16 weights for float32 operands: a pair of neighbours along K in a lane.
template <class Element, class Weight>
inline constexpr int kLanesPerWeight =
    std::is_same_v<Weight, BFloat16> && std::is_same_v<Element, float> ? 2 : 1;

template <class Element, class Weight>
using PanelLane = std::conditional_t<std::is_same_v<Weight, Int8> && !kSplitsInt16, uint16_t,
                                     Accumulator<Element>>;

/// A vector of weights for operand lane `part` of kLanesPerWeight.
template <class Element, class Weight, int part>
FUSEDRNN_INLINE Vec<Sum<Element>> load_weights(const PanelLane<Element, Weight>* p) {
  if constexpr (kLanesPerWeight<Element, Weight> == 2) {
    const Vec<uint32_t> pairs = bit_cast<Vec<uint32_t>>(load(p));
    return bit_cast<Vec<float>>(part ? pairs & 0xffff0000u : pairs << 16);
  } else if constexpr (std::is_same_v<Weight, Int8>) {
#if defined(FUSEDRNN_VNNI)
    return bit_cast<Vec<int32_t>>(load(p));
#elif defined(__x86_64__) && FUSEDRNN_VECTOR_BYTES == 64
    __m256i bytes;
    __builtin_memcpy(&bytes, p, sizeof(bytes));
    return bit_cast<Vec<int32_t>>(_mm512_cvtepi8_epi16(bytes));
#elif defined(__x86_64__) && FUSEDRNN_VECTOR_BYTES == 32
    __m128i bytes;
    __builtin_memcpy(&bytes, p, sizeof(bytes));
    return bit_cast<Vec<int32_t>>(_mm256_cvtepi8_epi16(bytes));
#else
    typedef int8_t Bytes __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES / 2)));
    typedef int16_t Words __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));
    Bytes bytes;
    __builtin_memcpy(&bytes, p, sizeof(bytes));
    return bit_cast<Vec<int32_t>>(__builtin_convertvector(bytes, Words));
#endif
  } else {
    return load(p);
  }
}

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

/// a0 b0 a1 b1 ... from the lower or the higher halves.
template <bool high, class Scalar>
FUSEDRNN_INLINE Vec<Scalar> interleave(Vec<Scalar> a, Vec<Scalar> b) {
  return interleave<high>(a, b, std::make_integer_sequence<int, kLanes<Scalar>>{});
}

/// Transposes the square of lanes in v by log2(lanes) rounds of perfect shuffles.
template <class Scalar>
FUSEDRNN_INLINE void transpose(Vec<Scalar> (&v)[kLanes<Scalar>]) {
  constexpr int n = kLanes<Scalar>;
  for (int round = 1; round < n; round *= 2) {
    Vec<Scalar> next[n];
    unroll<n / 2>([&](auto i) FUSEDRNN_LAMBDA {
      next[2 * i] = interleave<false, Scalar>(v[i], v[i + n / 2]);
      next[2 * i + 1] = interleave<true, Scalar>(v[i], v[i + n / 2]);
    });
    unroll<n>([&](auto i) FUSEDRNN_LAMBDA { v[i] = next[i]; });
  }
}

template <class Scalar, int n>
FUSEDRNN_INLINE void sum_lanes_round(Vec<Scalar>* v) {
  unroll<n>([&](auto i) FUSEDRNN_LAMBDA {
    v[i] = interleave<false, Scalar>(v[i], v[i + n]) + interleave<true, Scalar>(v[i], v[i + n]);
  });
  if constexpr (n > 1) sum_lanes_round<Scalar, n / 2>(v);
}

/// Lane i of the result is the sum of all lanes of v[i].
template <class Scalar>
FUSEDRNN_INLINE Vec<Scalar> sum_lanes(Vec<Scalar> (&v)[kLanes<Scalar>]) {
  sum_lanes_round<Scalar, kLanes<Scalar> / 2>(v);
  return v[0];
}

}  // namespace fusedrnn::FUSEDRNN_TARGET
