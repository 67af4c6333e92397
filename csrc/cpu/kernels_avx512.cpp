// AVX-512.
#if defined(__x86_64__)
#include "standard.h"

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
#define FUSEDRNN_TARGET avx512
#define FUSEDRNN_VECTOR_BYTES 64
#include "kernel.h"

namespace fusedrnn::cpu {
extern const KernelTable avx512_kernels{"avx512", avx512::kernels_of<float>(avx512::Cells()),
                                        avx512::kernels_of<double>(avx512::Cells()), nullptr};
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
