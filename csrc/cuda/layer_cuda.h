// The ops on CUDA, for register.cpp.
#pragma once

#include "../ops.h"

namespace fusedrnn::cuda {

LstmOp lstm;
LstmBackwardOp lstm_backward;
GruOp gru;
GruBackwardOp gru_backward;

}  // namespace fusedrnn::cuda
