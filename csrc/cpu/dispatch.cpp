// Chooses the kernel table at run time.
#include <cstdlib>
#include <cstring>
#include <iterator>

#include "kernel_table.h"

namespace fusedrnn::cpu {

extern const KernelTable baseline_kernels;
#if defined(__x86_64__)
extern const KernelTable avx2_kernels, avx512_kernels;
extern const KernelsOf<float, BFloat16> avx512bf16_kernels;
extern const KernelsOf<float, Int16> avx512vnni_kernels;
#endif

namespace {

struct InstructionSet {
  const char* name;
  bool (*is_supported)();
  const KernelTable* table;
  const KernelsOf<float, BFloat16>* bf16;
  const KernelsOf<float, Int16>* frozen_int8;  ///< null: the table's
};

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
bool has_avx512bf16() { return has_avx512vnni() && __builtin_cpu_supports("avx512bf16"); }
#endif

/// Best last.
const InstructionSet instruction_sets[] = {
    {"baseline", [] { return true; }, &baseline_kernels, nullptr, nullptr},
#if defined(__x86_64__)
    {"avx2", has_avx2, &avx2_kernels, nullptr, nullptr},
    {"avx512", has_avx512, &avx512_kernels, nullptr, nullptr},
    {"avx512vnni", has_avx512vnni, &avx512_kernels, nullptr, &avx512vnni_kernels},
    {"avx512bf16", has_avx512bf16, &avx512_kernels, &avx512bf16_kernels, &avx512vnni_kernels},
#endif
};

/// The machine's best instruction set, up to the one named by FUSEDRNN_CPU_ISA. An unknown name
/// sets no limit: _ops.py warns about it.
KernelTable choose() {
  const char* limit = std::getenv("FUSEDRNN_CPU_ISA");
  int best = int(std::size(instruction_sets)) - 1;
  for (int i = 0; limit && i < best; ++i) {
    if (std::strcmp(limit, instruction_sets[i].name) == 0) best = i;
  }
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  while (!instruction_sets[best].is_supported()) --best;
  KernelTable table = *instruction_sets[best].table;
  table.isa = instruction_sets[best].name;
  table.bf16 = instruction_sets[best].bf16;
  if (instruction_sets[best].frozen_int8) table.frozen_int8 = *instruction_sets[best].frozen_int8;
  return table;
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable chosen = choose();
  return chosen;
}

}  // namespace fusedrnn::cpu
