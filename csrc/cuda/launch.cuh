// How a kernel is launched: by nvcc on a GPU, or by the emulator in tests/emulator. With the
// emulator the host's compiler runs the same kernels without a GPU.
//
// A kernel is a struct: its members are its arguments, and operator() is one thread's work, given
// the CTA's shared memory. A CTA has kThreads threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../sequence.h"
#include "wait.h"

namespace fusedrnn::cuda {

/// A grid whose CTAs have `shared` bytes of shared memory each.
struct Grid {
  unsigned x, y = 1, z = 1;
  size_t shared = 0;
  bool resident = false;  ///< all CTAs run at the same time and can wait for each other
  unsigned cluster = 0;   ///< CTAs in a cluster, at least 2 neighbours along x; 0: no clusters
};

/// A base for kernels that run in clusters, which need compute capability 9.0.
struct UsesClusters {};

}  // namespace fusedrnn::cuda

#ifndef __CUDACC__
#include <emulator.h>
#else

#include <atomic>

#define FUSEDRNN_DEVICE __device__ __forceinline__

namespace fusedrnn::cuda {

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, 1) run(const __grid_constant__ Kernel kernel) {
#if __CUDA_ARCH__ < 900
  if constexpr (std::is_base_of_v<UsesClusters, Kernel>) {
    __trap();
    return;
  }
#endif
  extern __shared__ __align__(16) unsigned char shared[];
  kernel(shared);
}

constexpr int kDevices = 64;  ///< caches below cover as many devices

/// Lets a kernel use all shared memory that a CTA can have, and any cluster size, on the current
/// device. Raised once, to the maximum. The attribute is process-wide: setting it per launch would
/// affect other threads and captured graphs. Each launch names its own amount.
template <class Kernel>
cudaError_t raise_limits() {
  static std::atomic<bool> raised[kDevices];
  int device = 0, most = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess || (device < kDevices && raised[device].load())) return status;
  status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status == cudaSuccess) {
    status = cudaFuncSetAttribute(run<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  }
  if (status == cudaSuccess && std::is_base_of_v<UsesClusters, Kernel>) {
    status = cudaFuncSetAttribute(run<Kernel>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  if (status == cudaSuccess && device < kDevices) raised[device].store(true);
  return status;
}

/// CUDA's launch description.
template <class Kernel>
struct LaunchConfig {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute = {};

  cudaError_t set(const Grid& grid) {
    config.gridDim = dim3(grid.x, grid.y, grid.z);
    config.blockDim = dim3(Kernel::kThreads);
    config.dynamicSmemBytes = grid.shared;
    config.attrs = &attribute;
    config.numAttrs = grid.resident || grid.cluster;
    if (grid.cluster) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = grid.cluster;
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    } else {
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    }
    return grid.shared > 48 * 1024 || grid.cluster ? raise_limits<Kernel>() : cudaSuccess;
  }
};

/// Returns a cudaError_t.
template <class Kernel>
int launch(const Kernel& kernel, const Grid& grid, void* stream) {
  LaunchConfig<Kernel> c;
  if (const cudaError_t status = c.set(grid); status != cudaSuccess) return status;
  c.config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&c.config, run<Kernel>, kernel);
}

/// How many clusters in such a grid run at the same time on the current device; 0: none can.
/// Answers are cached by cluster size, which must determine `shared`: CUDA's answer costs as much
/// as a few launches.
template <class Kernel>
int active_clusters(const Grid& grid) {
  constexpr int kMost = 16;
  static std::atomic<int> known[kDevices][kMost + 1];  // the answer + 1
  int device = 0;
  if (grid.cluster > kMost || cudaGetDevice(&device) != cudaSuccess) return 0;
  std::atomic<int>* const answer = device < kDevices ? &known[device][grid.cluster] : nullptr;
  if (const int cached = answer ? answer->load() : 0) return cached - 1;
  cudaFuncAttributes attributes;
  LaunchConfig<Kernel> c;
  int count = 0;
  // PTX for sm_80 that the driver JIT-compiled for this GPU has no cluster code.
  if (cudaFuncGetAttributes(&attributes, run<Kernel>) != cudaSuccess ||
      c.set(grid) != cudaSuccess ||
      (attributes.ptxVersion >= 90 &&
       cudaOccupancyMaxActiveClusters(&count, run<Kernel>, &c.config) != cudaSuccess)) {
    cudaGetLastError();
    return 0;  // not cached: the error may pass
  }
  if (answer) answer->store(count + 1);
  return count;
}

}  // namespace fusedrnn::cuda

#endif
