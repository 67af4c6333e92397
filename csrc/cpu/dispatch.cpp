#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace fusedrnn::cpu {

extern const KernelTable baseline_kernels;
#if defined(__x86_64__)
extern const KernelTable avx2_kernels, avx512_kernels;
#endif

static const KernelTable& choose() {
#if defined(__x86_64__)
  const char* limit = std::getenv("FUSEDRNN_CPU_ISA");
  const auto allowed = [limit](const char* name) {
    return !limit || std::strcmp(limit, name) == 0 || std::strcmp(limit, "avx512") == 0;
  };
  __builtin_cpu_init();
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return avx512_kernels;
  }
  if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return avx2_kernels;
  }
#endif
  return baseline_kernels;
}

const KernelTable& kernels() {
  static const KernelTable& chosen = choose();
  return chosen;
}

}  // namespace fusedrnn::cpu
