// The instruction set that a file is compiled for, and helpers that every target shares.
//
// Convention: everything that a vector kernel calls is a template on the value type V. It lies in
// the namespace FUSEDRNN_TARGET, one namespace per instruction set. So the linker never merges a
// function compiled for AVX-512 into code for an older machine. `scalar` is the namespace without
// vectors.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#ifndef FUSEDRNN_TARGET
#define FUSEDRNN_TARGET scalar
#endif

#ifdef __CUDACC__
#define FUSEDRNN_INLINE __host__ __device__ inline __attribute__((always_inline))
#else
#define FUSEDRNN_INLINE inline __attribute__((always_inline))
#endif
/// For code that a hot function calls seldom, so that it does not grow.
#define FUSEDRNN_NOINLINE __attribute__((noinline))
/// Behind a lambda's parameters: inlined at every optimisation level.
#define FUSEDRNN_LAMBDA __attribute__((always_inline))

namespace fusedrnn::FUSEDRNN_TARGET {

/// a / b rounded up, and a rounded up to a multiple of b.
FUSEDRNN_INLINE constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
FUSEDRNN_INLINE constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

template <class F, int... i>
FUSEDRNN_INLINE void unroll_sequence(F& f, std::integer_sequence<int, i...>) {
  (f(std::integral_constant<int, i>{}), ...);
}

/// Calls f(integral_constant<int, 0>), ..., f(integral_constant<int, N - 1>).
template <int N, class F>
FUSEDRNN_INLINE void unroll(F&& f) {
  unroll_sequence(f, std::make_integer_sequence<int, N>{});
}

template <class To, class From>
FUSEDRNN_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace fusedrnn::FUSEDRNN_TARGET
