#include "recurrent.cuh"

namespace fusedrnn::cuda {
FUSEDRNN_RECURRENT_OF(Lstm, Float16)
FUSEDRNN_RECURRENT_OF(Gru, Float16)
}  // namespace fusedrnn::cuda
