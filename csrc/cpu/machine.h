// The caches of this machine. No torch here.
#pragma once

#include <cstdint>

namespace fusedrnn::cpu {

/// Bytes of a core's caches, and of the last level that cores share.
struct Caches {
  int64_t l1 = 32 << 10, l2 = 512 << 10, l3 = 8 << 20;  ///< where the system does not tell
};

/// Read once.
const Caches& caches();

}  // namespace fusedrnn::cpu
