// AVX-512.
#if defined(__x86_64__)
#include "target_region.h"

#define FUSEDRNN_TARGET avx512
#define FUSEDRNN_VECTOR_BYTES 64
FUSEDRNN_TARGET_REGION(FUSEDRNN_AVX512)
#include "cell_kernels.h"

namespace fusedrnn::cpu {
extern const KernelTable avx512_kernels = avx512::kernel_table("avx512");
}
FUSEDRNN_END_TARGET_REGION
#endif
