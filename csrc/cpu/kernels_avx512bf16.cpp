// AVX-512 with BF16: the products of bfloat16; everything else is AVX-512's.
#if defined(__x86_64__)
#include "standard.h"

#if defined(__clang__)
#pragma clang attribute push(                                                          \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,prefer-vector-width=512")
#endif
#define FUSEDRNN_TARGET avx512bf16
#define FUSEDRNN_VECTOR_BYTES 64
#define FUSEDRNN_BFLOAT16
#include "kernel.h"

namespace fusedrnn::cpu {
extern const KernelsOf<float, BFloat16> avx512bf16_kernels =
    avx512bf16::kernels_of<BFloat16>(avx512bf16::Cells());
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
