#include "machine.h"

#include <algorithm>

#if defined(__linux__)
#include <unistd.h>
#endif

namespace fusedrnn::cpu {
namespace {

Caches read_caches() {
  Caches found;
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  const auto read = [](int name, int64_t& bytes) {
    const long size = sysconf(name);
    if (size > 0) bytes = size;
  };
  read(_SC_LEVEL1_DCACHE_SIZE, found.l1);
  read(_SC_LEVEL2_CACHE_SIZE, found.l2);
  read(_SC_LEVEL3_CACHE_SIZE, found.l3);
#endif
  // Some virtual machines report no L2 or L3, others one that is smaller than the level before.
  found.l2 = std::max(found.l2, found.l1);
  found.l3 = std::max(found.l3, found.l2);
  return found;
}

}  // namespace

const Caches& caches() {
  static const Caches found = read_caches();
  return found;
}

}  // namespace fusedrnn::cpu
