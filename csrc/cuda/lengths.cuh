// The check of `lengths` on the device: the host does not know them.
#pragma once

#include "ptx.cuh"

namespace fusedrnn::cuda {

/// By the first kernel of a forward call. No kernel's addresses depend on a length's value.
FUSEDRNN_DEVICE void check_length(int64_t length, int64_t steps) {
  device_assert(length >= 0 && length <= steps, "lengths must be from 0 to the sequence length");
}

}  // namespace fusedrnn::cuda
