// What every CPU of the platform has: SSE2 on x86-64, NEON on arm64.
#include "standard.h"

#define FUSEDRNN_TARGET baseline
#define FUSEDRNN_VECTOR_BYTES 16
#include "kernel.h"

namespace fusedrnn::cpu {
extern const KernelTable baseline_kernels{"baseline",
                                          baseline::kernels_of<float>(baseline::Cells()),
                                          baseline::kernels_of<double>(baseline::Cells()), nullptr};
}
