#include "persistent_kernels.cuh"

namespace fusedrnn::cuda {
template const PersistentKernels<Float16>& persistent_kernels(int);
}  // namespace fusedrnn::cuda
