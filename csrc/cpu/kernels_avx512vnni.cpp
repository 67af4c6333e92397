// AVX-512 with VNNI: kernels for int8 weights only.
#if defined(__x86_64__)
#include "target_region.h"

#define FUSEDRNN_TARGET avx512vnni
#define FUSEDRNN_VECTOR_BYTES 64
#define FUSEDRNN_VNNI
FUSEDRNN_TARGET_REGION("avx512vnni," FUSEDRNN_AVX512)
#include "cell_kernels.h"

namespace fusedrnn::cpu {
extern const KernelsOf<float, Int16> avx512vnni_kernels =
    avx512vnni::kernels_of<Int16, Int8>(avx512vnni::Cells());
}
FUSEDRNN_END_TARGET_REGION
#endif
