#include "recurrent.cuh"

namespace fusedrnn::cuda {
FUSEDRNN_RECURRENT_OF(Lstm, float)
FUSEDRNN_RECURRENT_OF(Gru, float)
}  // namespace fusedrnn::cuda
