#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace fusedrnn::cpu {

extern const KernelTable baseline_kernels;
#if defined(__x86_64__)
extern const KernelTable avx2_kernels, avx512_kernels;
extern const KernelsOf<float, BFloat16> avx512bf16_kernels;
#endif

static KernelTable choose() {
#if defined(__x86_64__)
  // Each instruction set contains those before it.
  const char* limit = std::getenv("FUSEDRNN_CPU_ISA");
  int allowed = 3;
  const char* names[] = {"baseline", "avx2", "avx512"};
  for (int i = 0; i < 3; ++i) {
    if (limit && std::strcmp(limit, names[i]) == 0) allowed = i;
  }
  __builtin_cpu_init();
  if (allowed >= 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    KernelTable table = avx512_kernels;
    if (allowed >= 3 && __builtin_cpu_supports("avx512bf16")) {
      table.isa = "avx512bf16";
      table.bf16 = &avx512bf16_kernels;
    }
    return table;
  }
  if (allowed >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return avx2_kernels;
  }
#endif
  return baseline_kernels;
}

const KernelTable& kernels() {
  static const KernelTable chosen = choose();
  return chosen;
}

}  // namespace fusedrnn::cpu
