// AVX2 with FMA.
#if defined(__x86_64__)
#include "standard.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define FUSEDRNN_TARGET avx2
#define FUSEDRNN_VECTOR_BYTES 32
#include "kernel.h"

namespace fusedrnn::cpu {
extern const KernelTable avx2_kernels{"avx2", avx2::kernels_of<float>(avx2::Cells()),
                                      avx2::kernels_of<double>(avx2::Cells()), nullptr};
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
