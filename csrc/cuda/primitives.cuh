// What a GPU does that C++ has no words for, one thin function each: the only home of PTX, of
// launches, and of the differences between nvcc and the emulator of tests/emulator, with which the
// host's compiler makes the same kernels run without a GPU.
//
// A kernel is a struct: its arguments are its members, and operator() is what a thread does, given
// the CTA's shared memory. kThreads is the size of a CTA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../sequence.h"

namespace fusedrnn::cuda {

/// A grid of CTAs, each with `shared` bytes of shared memory. `resident`: all of them run at the
/// same time, so that they can wait for each other. `cluster`: so do as many neighbours along x, 2
/// at least, which can also write into each other's shared memory; 0: none.
struct Grid {
  unsigned x, y = 1, z = 1;
  size_t shared = 0;
  bool resident = false;
  unsigned cluster = 0;
};

/// A base of kernels that run in clusters, which need compute capability 9.0.
struct UsesClusters {};

}  // namespace fusedrnn::cuda

#ifndef __CUDACC__
#include <emulator.h>
#else

#include <atomic>

#define FUSEDRNN_DEVICE __device__ __forceinline__

namespace fusedrnn::cuda {

// ---- launching ----------------------------------------------------------------------------------

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

constexpr int kDevices = 64;  ///< of which something is kept

/// Lets a kernel have all the shared memory that a CTA can, and clusters of any size, on the
/// current device. Once: a limit that followed from each launch would be in force for those of
/// other threads, and for captured ones. How much a launch takes is said with the launch.
template <class Kernel>
cudaError_t lift_limits() {
  static std::atomic<bool> lifted[kDevices];
  int device = 0, most = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess || (device < kDevices && lifted[device].load())) return status;
  status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status == cudaSuccess) {
    status = cudaFuncSetAttribute(run<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  }
  if (status == cudaSuccess && std::is_base_of_v<UsesClusters, Kernel>) {
    status = cudaFuncSetAttribute(run<Kernel>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  if (status == cudaSuccess && device < kDevices) lifted[device].store(true);
  return status;
}

/// A kernel's launch, as CUDA wants to be told.
template <class Kernel>
struct Configuration {
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
    return grid.shared > 48 * 1024 || grid.cluster ? lift_limits<Kernel>() : cudaSuccess;
  }
};

/// Returns a cudaError_t.
template <class Kernel>
int launch(const Kernel& kernel, const Grid& grid, void* stream) {
  Configuration<Kernel> c;
  if (const cudaError_t status = c.set(grid); status != cudaSuccess) return status;
  c.config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&c.config, run<Kernel>, kernel);
}

/// How many clusters of such a grid run at the same time on the current device; 0: none can.
/// Answers are kept by the size of the cluster, for one costs as much as a few launches: `shared`
/// must follow from that.
template <class Kernel>
int active_clusters(const Grid& grid) {
  constexpr int kMost = 16;
  static std::atomic<int> known[kDevices][kMost + 1];  // the answer + 1
  int device = 0;
  if (grid.cluster > kMost || cudaGetDevice(&device) != cudaSuccess) return 0;
  std::atomic<int>* const answer = device < kDevices ? &known[device][grid.cluster] : nullptr;
  if (const int kept = answer ? answer->load() : 0) return kept - 1;
  cudaFuncAttributes attributes;
  Configuration<Kernel> c;
  int count = 0;
  // Code for older devices that was compiled again for this one is without clusters.
  if (cudaFuncGetAttributes(&attributes, run<Kernel>) != cudaSuccess ||
      attributes.ptxVersion < 90 || c.set(grid) != cudaSuccess ||
      cudaOccupancyMaxActiveClusters(&count, run<Kernel>, &c.config) != cudaSuccess) {
    cudaGetLastError();
    count = 0;
  }
  if (answer) answer->store(count + 1);
  return count;
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

// ---- clusters -----------------------------------------------------------------------------------

/// All threads of the cluster arrive here, and see what the others wrote before.
FUSEDRNN_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;" : : : "memory");
  asm volatile("barrier.cluster.wait.acquire;" : : : "memory");
}

/// Counts bytes that CTAs of the cluster send into this one's shared memory, where it lies itself
/// (PTX ISA, "mbarrier"). It goes from phase to phase: one ends when a thread of the CTA has said
/// how much to expect, and all of it has come.
struct alignas(8) Mailbox {
  uint64_t state;
};
FUSEDRNN_DEVICE uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}
/// By one thread; others may use it after a sync_cluster().
FUSEDRNN_DEVICE void open(Mailbox* box) {
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], 1;\n\t"
      "fence.mbarrier_init.release.cluster;"
      :
      : "r"(shared_address(box))
      : "memory");
}
/// By one thread, once in a phase; some of the mail may have come before.
FUSEDRNN_DEVICE void expect(Mailbox* box, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;"
               :
               : "r"(shared_address(box)), "r"(bytes)
               : "memory");
}
/// Waits for the end of a phase, 0 for the first and every second, 1 for the others; not for one
/// before the last. What was sent can be read after this, and what the senders had read, of shared
/// memory, written.
FUSEDRNN_DEVICE void wait_for(Mailbox* box, uint32_t phase) {
#if __CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 8)
  // An acquire that is of global memory too empties the first-level cache.
#define FUSEDRNN_ORDER "relaxed"
#define FUSEDRNN_FENCE "fence.acquire.sync_restrict::shared::cluster.cluster;"
#else
#define FUSEDRNN_ORDER "acquire"
#define FUSEDRNN_FENCE ""
#endif
  uint32_t done;
  do {
    asm volatile(
        "{\n\t"
        ".reg .pred done;\n\t"
        "mbarrier.try_wait.parity." FUSEDRNN_ORDER
        ".cluster.shared::cta.b64 done, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, done;\n\t"
        "}"
        : "=r"(done)
        : "r"(shared_address(box)), "r"(phase)
        : "memory");
  } while (!done);
  asm volatile(FUSEDRNN_FENCE : : : "memory");
#undef FUSEDRNN_ORDER
#undef FUSEDRNN_FENCE
}

// ---- warps --------------------------------------------------------------------------------------

/// The value of lane `from`.
FUSEDRNN_DEVICE uint32_t shuffle(uint32_t value, int from) {
  return __shfl_sync(0xffffffffu, value, from);
}
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
FUSEDRNN_DEVICE void mma_m16n8(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                       uint32_t b1);
#define FUSEDRNN_MMA(S, shape)                                                                  \
  template <>                                                                                   \
  FUSEDRNN_DEVICE void mma_m16n8<S>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, \
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

/// Sends 16 or 8 bytes to where `to` is in the shared memory of the cluster's CTA number `cta`,
/// which may be the sender's own, to be counted in its `box`; the sender does not wait.
FUSEDRNN_DEVICE void send(const Words& w, void* to, Mailbox* box, unsigned cta) {
  asm volatile(
      "{\n\t"
      ".reg .b32 to, box;\n\t"
      "mapa.shared::cluster.u32 to, %0, %2;\n\t"
      "mapa.shared::cluster.u32 box, %1, %2;\n\t"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [to], {%3, %4, %5, %6}, "
      "[box];\n\t"
      "}"
      :
      : "r"(shared_address(to)), "r"(shared_address(box)), "r"(cta), "r"(w.word[0]), "r"(w.word[1]),
        "r"(w.word[2]), "r"(w.word[3])
      : "memory");
}
FUSEDRNN_DEVICE void send(float a, float b, float* to, Mailbox* box, unsigned cta) {
  asm volatile(
      "{\n\t"
      ".reg .b32 to, box;\n\t"
      "mapa.shared::cluster.u32 to, %0, %2;\n\t"
      "mapa.shared::cluster.u32 box, %1, %2;\n\t"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [to], {%3, %4}, [box];\n\t"
      "}"
      :
      : "r"(shared_address(to)), "r"(shared_address(box)), "r"(cta), "f"(a), "f"(b)
      : "memory");
}

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

/// 1 / x within a unit in the last place, for x from 1 to 2^126.
FUSEDRNN_DEVICE float reciprocal(float x) {
  float value;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
}

}  // namespace fusedrnn::cuda

#endif
