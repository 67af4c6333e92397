// The CUDA key. Apart from layer_cuda.cpp, so that the tests can register its ops for the emulator.
#include <torch/library.h>

#include "layer_cuda.h"

TORCH_LIBRARY_IMPL(fusedrnn, CUDA, m) {
  m.impl("lstm", &fusedrnn::cuda::lstm);
  m.impl("lstm_backward", &fusedrnn::cuda::lstm_backward);
  m.impl("gru", &fusedrnn::cuda::gru);
  m.impl("gru_backward", &fusedrnn::cuda::gru_backward);
}
