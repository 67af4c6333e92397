// Compiles the functions between FUSEDRNN_TARGET_REGION and FUSEDRNN_END_TARGET_REGION for an
// instruction set.
//
// The standard headers stand here, before the region. Inside it, the compiler would use the
// instruction set for their inline functions too.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define FUSEDRNN_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define FUSEDRNN_TARGET_REGION(features) \
  FUSEDRNN_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define FUSEDRNN_END_TARGET_REGION _Pragma("clang attribute pop")
#else
// The region runs to the file's end, where GCC instantiates templates.
#define FUSEDRNN_TARGET_REGION(features) FUSEDRNN_PRAGMA(GCC target(features))
#define FUSEDRNN_END_TARGET_REGION
#endif

/// GCC prefers 256-bit vectors unless told otherwise; Clang has no such feature.
#if defined(__clang__)
#define FUSEDRNN_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
#else
#define FUSEDRNN_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512"
#endif
