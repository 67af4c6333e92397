// What csrc/cuda/launch.cuh includes without nvcc, for launches.cpp: a launch is recorded and does
// not run. The functions of ptx.cuh are the emulator's, which are declared and never called.
#pragma once

#include <cxxabi.h>

#include <cstdlib>
#include <string>
#include <typeinfo>

// The emulator's own templates get other names.
#define launch emulated_launch
#define active_clusters emulated_active_clusters
#include "../../../tests/emulator/emulator.h"
#undef launch
#undef active_clusters

namespace fusedrnn::recorder {

/// Records the launch of a kernel whose arguments are `bytes` long.
void record(const std::string& kernel, const cuda::Grid& grid, int threads, const void* arguments,
            size_t bytes);
/// The device's clusters of this size that run at the same time.
int clusters_of(const cuda::Grid& grid);

}  // namespace fusedrnn::recorder

namespace fusedrnn::cuda {

template <class Kernel>
int launch(const Kernel& kernel, const Grid& grid, void*) {
  int status = 0;
  char* const name = abi::__cxa_demangle(typeid(Kernel).name(), nullptr, nullptr, &status);
  recorder::record(name, grid, Kernel::kThreads, &kernel, sizeof(kernel));
  std::free(name);
  return 0;
}

template <class Kernel>
int active_clusters(const Grid& grid) {
  return recorder::clusters_of(grid);
}

}  // namespace fusedrnn::cuda
