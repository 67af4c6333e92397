// AVX2 with FMA.
#if defined(__x86_64__)
#include "target_region.h"

#define FUSEDRNN_TARGET avx2
#define FUSEDRNN_VECTOR_BYTES 32
FUSEDRNN_TARGET_REGION("avx2,fma")
#include "cell_kernels.h"

namespace fusedrnn::cpu {
extern const KernelTable avx2_kernels = avx2::kernel_table("avx2");
}
FUSEDRNN_END_TARGET_REGION
#endif
