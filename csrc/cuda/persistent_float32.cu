#include "persistent_kernels.cuh"

namespace fusedrnn::cuda {
template const PersistentKernels<float>& persistent_kernels(int);
}  // namespace fusedrnn::cuda
