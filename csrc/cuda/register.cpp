// The CUDA key. Apart from ops_cuda.cpp, so that the tests can register its ops for the emulator.
#include <torch/library.h>

#include "ops_cuda.h"

TORCH_LIBRARY_IMPL(fusedrnn, CUDA, m) { fusedrnn::cuda::register_cuda_ops(m); }
TORCH_LIBRARY_IMPL(fusedrnn, CompositeExplicitAutograd, m) {
  m.impl("_cuda_algorithm", &fusedrnn::cuda::last_algorithm);
}
