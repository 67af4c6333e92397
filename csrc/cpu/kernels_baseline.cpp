// The platform's baseline instructions: SSE2 on x86-64, NEON on arm64.
#include "target_region.h"

#define FUSEDRNN_TARGET baseline
#define FUSEDRNN_VECTOR_BYTES 16
#include "cell_kernels.h"

namespace fusedrnn::cpu {
extern const KernelTable baseline_kernels = baseline::kernel_table("baseline");
}
