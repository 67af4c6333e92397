#include "recurrent.cuh"

namespace fusedrnn::cuda {
FUSEDRNN_RECURRENT_OF(Lstm, BFloat16)
FUSEDRNN_RECURRENT_OF(Gru, BFloat16)
}  // namespace fusedrnn::cuda
