// Prints the CPU quota that the files below a folder tell, in cores, and this process's cores.
#include "../../csrc/cpu/cores.h"

#include <cstdio>

int main(int, char** argv) {
  std::printf("%g %lld\n", fusedrnn::cpu::cgroup_quota(argv[1]),
              static_cast<long long>(fusedrnn::cpu::cores()));
  return 0;
}
