// AVX-512 with BF16: kernels for bfloat16 operands only. For other types AVX-512's kernels run.
#if defined(__x86_64__)
#include "target_region.h"

#define FUSEDRNN_TARGET avx512bf16
#define FUSEDRNN_VECTOR_BYTES 64
#define FUSEDRNN_BFLOAT16
FUSEDRNN_TARGET_REGION("avx512bf16," FUSEDRNN_AVX512)
#include "cell_kernels.h"

namespace fusedrnn::cpu {
extern const KernelsOf<float, BFloat16> avx512bf16_kernels =
    avx512bf16::kernels_of<BFloat16, BFloat16>(avx512bf16::Cells());
}
FUSEDRNN_END_TARGET_REGION
#endif
