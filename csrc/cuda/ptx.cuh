// The PTX that the kernels use, a thin function for each instruction: PTX's only home. The host's
// compiler gets their twins from tests/emulator instead.
#pragma once

#include "launch.cuh"

#ifdef __CUDACC__

namespace fusedrnn::cuda {

// ---- synchronisation ----------------------------------------------------------------------------

/// Waits for all threads of the CTA; their earlier writes are visible afterwards.
FUSEDRNN_DEVICE void sync_cta() { __syncthreads(); }
/// The same for a warp's 32 threads.
FUSEDRNN_DEVICE void sync_warp() { __syncwarp(); }

/// Acquires all writes before the matching add_release, by its thread or by threads that it had
/// synchronised with.
FUSEDRNN_DEVICE uint32_t load_acquire(const uint32_t* p) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}
FUSEDRNN_DEVICE void add_release(uint32_t* p, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" : : "l"(p), "r"(value) : "memory");
}
/// For loops that poll for another CTA.
FUSEDRNN_DEVICE void pause() {}

// ---- clusters -----------------------------------------------------------------------------------

/// Waits for all threads of the cluster; their earlier writes are visible afterwards.
FUSEDRNN_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;" : : : "memory");
  asm volatile("barrier.cluster.wait.acquire;" : : : "memory");
}

FUSEDRNN_DEVICE uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

/// An mbarrier in this CTA's shared memory that counts bytes sent by the cluster's CTAs (PTX ISA,
/// "mbarrier"). A phase completes when one thread has announced its bytes and all have arrived.
struct alignas(8) TransactionBarrier {
  uint64_t state;

  /// By one thread; others may use the barrier after a sync_cluster().
  FUSEDRNN_DEVICE void init() {
    asm volatile(
        "mbarrier.init.shared::cta.b64 [%0], 1;\n\t"
        "fence.mbarrier_init.release.cluster;"
        :
        : "r"(shared_address(this))
        : "memory");
  }
  /// By one thread, once in a phase. Bytes may arrive before this announces them.
  FUSEDRNN_DEVICE void arrive_and_expect_tx(uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;"
                 :
                 : "r"(shared_address(this)), "r"(bytes)
                 : "memory");
  }
  /// Waits for the phase of this parity to complete; only the current or the previous phase.
  /// Afterwards the received bytes are visible, and shared memory that the senders had read may be
  /// overwritten.
  FUSEDRNN_DEVICE void wait(uint32_t phase) {
#if __CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 8)
    // An acquire that covers global memory too would invalidate the L1 cache.
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
          : "r"(shared_address(this)), "r"(phase)
          : "memory");
    } while (!done);
    asm volatile(FUSEDRNN_FENCE : : : "memory");
#undef FUSEDRNN_ORDER
#undef FUSEDRNN_FENCE
  }
};

// ---- warps --------------------------------------------------------------------------------------

/// Lane `from`'s value.
FUSEDRNN_DEVICE uint32_t shuffle(uint32_t value, int from) {
  return __shfl_sync(0xffffffffu, value, from);
}
/// The value of the lane whose number differs by `mask`.
template <class T>
FUSEDRNN_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

/// c [16, 8] += a [16, K] * b [K, 8] by a warp, K = 16, for a half type. (PTX ISA, "Matrix
/// Fragments for mma.m16n8k16".) With lane = 4 r + q:
///   c[0], c[1]  row r, columns 2q and 2q + 1; c[2], c[3] the same in row r + 8
///   a[0], a[1]  rows r and r + 8 at k = 2q and 2q + 1; a[2], a[3] at k = 2q + 8 and 2q + 9
///   b0, b1      column r at a[0]'s k and a[2]'s
template <class Element>
FUSEDRNN_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
#define FUSEDRNN_MMA(shape)                                                                        \
  asm("mma.sync.aligned." shape " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                             \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
template <>
FUSEDRNN_DEVICE void mma_m16n8k16<BFloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1) {
  FUSEDRNN_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
}
template <>
FUSEDRNN_DEVICE void mma_m16n8k16<Float16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                           uint32_t b1) {
  FUSEDRNN_MMA("m16n8k16.row.col.f32.f16.f16.f32");
}
/// The same for K = 8 in TF32. a and b hold one value each, at k = q and q + 4.
FUSEDRNN_DEVICE void mma_m16n8k8(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  FUSEDRNN_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
}
#undef FUSEDRNN_MMA

// ---- memory -------------------------------------------------------------------------------------

/// 16 bytes that one access loads or stores.
struct alignas(16) Words {
  uint32_t word[4];
};

/// Stores 16 or 8 bytes at `to`'s place in the shared memory of CTA number `cta` of the cluster.
/// `cta` may be this CTA. The receiver's copy of `barrier` counts the bytes. Does not wait.
FUSEDRNN_DEVICE void st_async(const Words& w, void* to, TransactionBarrier* barrier, unsigned cta) {
  asm volatile(
      "{\n\t"
      ".reg .b32 to, mbar;\n\t"
      "mapa.shared::cluster.u32 to, %0, %2;\n\t"
      "mapa.shared::cluster.u32 mbar, %1, %2;\n\t"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [to], {%3, %4, %5, %6}, "
      "[mbar];\n\t"
      "}"
      :
      : "r"(shared_address(to)), "r"(shared_address(barrier)), "r"(cta), "r"(w.word[0]),
        "r"(w.word[1]), "r"(w.word[2]), "r"(w.word[3])
      : "memory");
}
FUSEDRNN_DEVICE void st_async(float a, float b, float* to, TransactionBarrier* barrier,
                              unsigned cta) {
  asm volatile(
      "{\n\t"
      ".reg .b32 to, mbar;\n\t"
      "mapa.shared::cluster.u32 to, %0, %2;\n\t"
      "mapa.shared::cluster.u32 mbar, %1, %2;\n\t"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [to], {%3, %4}, [mbar];\n\t"
      "}"
      :
      : "r"(shared_address(to)), "r"(shared_address(barrier)), "r"(cta), "f"(a), "f"(b)
      : "memory");
}

/// Loads from global memory through L2 alone: the SM's L1 does not see other SMs' writes.
FUSEDRNN_DEVICE Words load_cg(const void* p) {
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

/// To TF32's 10 mantissa bits, ties away from zero.
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

// ---- errors -------------------------------------------------------------------------------------

/// Ends all the device's work with a message on stderr if the condition is false, as assert() does.
/// A call that waits for the device then throws.
FUSEDRNN_DEVICE void device_assert(bool condition, const char* message) {
#ifdef __CUDA_ARCH__  // with NDEBUG the host's headers do not declare the function
  if (!condition) __assert_fail(message, __FILE__, __LINE__, __func__);
#endif
}

}  // namespace fusedrnn::cuda

#endif
