// What a GPU does that C++ has no words for, one thin function each: the only home of PTX, of
// launches, and of the differences between nvcc and the emulator of tests/emulator, with which the
// host's compiler makes the same kernels run without a GPU.
//
// A kernel is a struct: its arguments are its members, and operator() is what a thread does, given
// the CTA's shared memory. kThreads is the size of a CTA.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../sequence.h"

namespace fusedrnn::cuda {

/// A grid of CTAs, each with `shared` bytes of shared memory. `resident`: all of them run at the
/// same time, so that they can wait for each other.
struct Grid {
  unsigned x, y = 1, z = 1;
  size_t shared = 0;
  bool resident = false;
};

}  // namespace fusedrnn::cuda

#ifndef __CUDACC__
#include <emulator.h>
#else

#define FUSEDRNN_DEVICE __device__ __forceinline__

namespace fusedrnn::cuda {

// ---- launching ----------------------------------------------------------------------------------

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, 1) run(const __grid_constant__ Kernel kernel) {
  extern __shared__ __align__(16) unsigned char shared[];
  kernel(shared);
}

/// Returns a cudaError_t.
template <class Kernel>
int launch(const Kernel& kernel, const Grid& grid, void* stream) {
  if (grid.shared > 48 * 1024) {
    const cudaError_t status = cudaFuncSetAttribute(
        run<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(grid.shared));
    if (status != cudaSuccess) return status;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid.x, grid.y, grid.z);
  config.blockDim = dim3(Kernel::kThreads);
  config.dynamicSmemBytes = grid.shared;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  config.attrs = &attribute;
  config.numAttrs = grid.resident ? 1 : 0;
  return cudaLaunchKernelEx(&config, run<Kernel>, kernel);
}

// ---- threads that wait for each other -----------------------------------------------------------

/// All threads of the CTA arrive here, and see what the others wrote before.
FUSEDRNN_DEVICE void sync_cta() { __syncthreads(); }
/// The same for the 32 threads of a warp.
FUSEDRNN_DEVICE void sync_warp() { __syncwarp(); }

/// What was written before the matching add_release, by the thread that added or by threads that
/// it has synchronised with, can be read after this.
FUSEDRNN_DEVICE uint32_t load_acquire(const uint32_t* p) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}
FUSEDRNN_DEVICE void add_release(uint32_t* p, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" : : "l"(p), "r"(value) : "memory");
}
/// Inside a loop that waits for a value of another CTA.
FUSEDRNN_DEVICE void pause() {}

// ---- warps --------------------------------------------------------------------------------------

/// The value of the lane whose number differs by `mask`.
FUSEDRNN_DEVICE float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

/// c [16, 8] += a [16, depth] * b [depth, 8], depth 16 for the half types and 8 for TF32, by a
/// warp. With lane = 4 r + q: c[0], c[1] are row r and columns 2q, 2q + 1, c[2], c[3] row r + 8;
/// for the half types a[0], a[1] hold rows r, r + 8 at depths 2q, 2q + 1, a[2], a[3] the same at
/// depths 2q + 8, 2q + 9, and b[0], b[1] column r at those depths; for TF32 one value each, at
/// depths q and q + 4. (PTX ISA, "Matrix Fragments for mma.m16n8k16" and "mma.m16n8k8".)
template <class S>
FUSEDRNN_DEVICE void multiply_add_16x8(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                       uint32_t b1);
#define FUSEDRNN_MMA(S, shape)                                                                  \
  template <>                                                                                   \
  FUSEDRNN_DEVICE void multiply_add_16x8<S>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, \
                                            uint32_t b1) {                                      \
    asm("mma.sync.aligned." shape                                                               \
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                      \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                        \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                        \
  }
FUSEDRNN_MMA(BFloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
FUSEDRNN_MMA(Float16, "m16n8k16.row.col.f32.f16.f16.f32")
FUSEDRNN_MMA(float, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef FUSEDRNN_MMA

// ---- memory -------------------------------------------------------------------------------------

/// Four words, at an address that is a multiple of 16 bytes.
struct alignas(16) Words {
  uint32_t word[4];
};

/// Reads global memory past the SM's own cache, which does not see what other SMs write.
FUSEDRNN_DEVICE Words load_shared_by_ctas(const void* p) {
  Words w;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.word[0]), "=r"(w.word[1]), "=r"(w.word[2]), "=r"(w.word[3])
               : "l"(p)
               : "memory");
  return w;
}

// ---- types --------------------------------------------------------------------------------------

FUSEDRNN_DEVICE float value_of(BFloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
FUSEDRNN_DEVICE float value_of(Float16 x) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
}
FUSEDRNN_DEVICE float value_of(float x) { return x; }
FUSEDRNN_DEVICE double value_of(double x) { return x; }

/// Rounds to nearest, ties to even.
FUSEDRNN_DEVICE void round_to(BFloat16& to, float x) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
}
FUSEDRNN_DEVICE void round_to(Float16& to, float x) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
}
FUSEDRNN_DEVICE void round_to(float& to, float x) { to = x; }
FUSEDRNN_DEVICE void round_to(double& to, double x) { to = x; }

/// To the 10 bits of mantissa that TF32 has, ties away from zero.
FUSEDRNN_DEVICE uint32_t tf32_of(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

}  // namespace fusedrnn::cuda

#endif
