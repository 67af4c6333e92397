// The CUDA key. Apart from layer_cuda.cpp, so that the tests can register its ops for the emulator.
#include <torch/library.h>

#include "layer_cuda.h"

TORCH_LIBRARY_IMPL(fusedrnn, CUDA, m) { fusedrnn::cuda::register_cuda_ops(m); }
