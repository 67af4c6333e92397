// The PTX that the kernels use, a thin function for each instruction: PTX's only home. The host's
// compiler gets their twins from tests/emulator instead.
#pragma once

#include "launch.cuh"

#ifdef __CUDACC__

#include <cstdio>

namespace fusedrnn::cuda {

// ---- synchronisation ----------------------------------------------------------------------------

/// Waits for all threads of the CTA; their earlier writes are visible afterwards.
FUSEDRNN_DEVICE void sync_cta() { __syncthreads(); }
/// The same for a warp's 32 threads.
FUSEDRNN_DEVICE void sync_warp() { __syncwarp(); }

/// Waits for `threads` threads of the CTA, whole warps, at the barrier with this number, 1 to 15.
/// Their earlier writes are visible afterwards.
FUSEDRNN_DEVICE void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" : : "r"(barrier), "r"(threads) : "memory");
}

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
/// Orders this thread's relaxed stores, and writes that it has synchronised with, before all of its
/// later writes.
FUSEDRNN_DEVICE void fence_device() { asm volatile("fence.acq_rel.gpu;" : : : "memory"); }

/// Nanoseconds of a clock that all SMs share. It goes on while the kernel is stopped.
FUSEDRNN_DEVICE uint64_t nanoseconds() {
  uint64_t time;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
  return time;
}

/// Ends the kernel. An assertion, not a trap: torch raises "device-side assert triggered" for it,
/// and the driver prints its text to stderr. A trap gives "unspecified launch failure" alone.
[[noreturn]] inline __device__ __noinline__ void fail_wait(const char* name, int hidden_size,
                                                           int rows) {
  // Text that printf has buffered is printed before the assertion's. Only one thread prints.
  static __device__ unsigned failures;
  if (atomicAdd(&failures, 1) == 0) {
    printf(FUSEDRNN_WAIT_ERROR "\n", name, hidden_size, rows);
#ifdef __CUDA_ARCH__  // nvcc declares it for the device alone
    __assert_fail("a CTA waited 10 s for another CTA", name, 0, "fusedrnn");
#endif
  }
  for (;;) __nanosleep(1000000);  // the assertion ends this thread too
}

/// Polls is_done() until it is true, the only way to wait for another CTA's writes. The first try
/// is all that a wait for data that is there costs.
template <class IsDone>
FUSEDRNN_DEVICE void poll(const IsDone& is_done, const Waiter& waiter) {
  if (is_done()) return;
  WaitTime time;
  while (!is_done()) {
    if (time.looks() && time.is_over(nanoseconds())) {
      fail_wait(waiter.name, waiter.hidden_size, waiter.rows);
    }
  }
}

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
  FUSEDRNN_DEVICE void wait(uint32_t phase, const Waiter& waiter) {
#if __CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 8)
    // An acquire that covers global memory too would invalidate the L1 cache.
#define FUSEDRNN_ORDER "relaxed"
#define FUSEDRNN_FENCE "fence.acquire.sync_restrict::shared::cluster.cluster;"
#else
#define FUSEDRNN_ORDER "acquire"
#define FUSEDRNN_FENCE ""
#endif
    poll(
        [&] {
          uint32_t done;
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
          return done != 0;
        },
        waiter);
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

/// Loads four 8x8 matrices of 16-bit elements from shared memory, transposed, by a warp. Lane
/// 8 i + j gives the address of matrix i's row j, 16 bytes. With lane = 4 r + q, to[i] gets matrix
/// i's column r: row 2q in the low half, row 2q + 1 in the high.
FUSEDRNN_DEVICE void load_matrix_trans(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
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

// ---- registers ----------------------------------------------------------------------------------

/// The same value, computed here and once: not behind a wait that follows, and not again in each
/// step of a loop that uses it in a branch.
template <class T>
FUSEDRNN_DEVICE T kept(T value) {
  static_assert(sizeof(T) == 4 && std::is_arithmetic_v<T>);
  if constexpr (std::is_integral_v<T>) {
    asm volatile("" : "+r"(value));
  } else {
    asm volatile("" : "+f"(value));
  }
  return value;
}
/// For a pointer to global memory.
template <class T>
FUSEDRNN_DEVICE T* kept(T* p) {
  size_t address = __cvta_generic_to_global(p);
  asm volatile("" : "+l"(address));
  return static_cast<T*>(__cvta_global_to_generic(address));
}

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

/// A place in the shared memory of a CTA of the cluster, which may be this CTA.
template <class T>
struct Remote {
  uint32_t address;
  Remote() = default;
  /// `p`'s place in CTA number `cta`.
  FUSEDRNN_DEVICE Remote(T* p, unsigned cta) {
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(p)), "r"(cta));
  }
  FUSEDRNN_DEVICE Remote operator+(int n) const {
    Remote sum;
    sum.address = address + uint32_t(n) * uint32_t(sizeof(T));
    return sum;
  }
};
/// Stores 16 bytes at `to`. The receiver's barrier counts the bytes. Does not wait.
template <class T>
FUSEDRNN_DEVICE void st_async(const Words& w, Remote<T> to, Remote<TransactionBarrier> barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%2, %3, %4, %5}, [%1];"
      :
      : "r"(to.address), "r"(barrier.address), "r"(w.word[0]), "r"(w.word[1]), "r"(w.word[2]),
        "r"(w.word[3])
      : "memory");
}
/// The same for 8 bytes.
FUSEDRNN_DEVICE void st_async(float a, float b, Remote<float> to,
                              Remote<TransactionBarrier> barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];"
               :
               : "r"(to.address), "f"(a), "f"(b), "r"(barrier.address)
               : "memory");
}

/// For an address in another CTA's memory.
template <class T>
FUSEDRNN_DEVICE Remote<T> kept(Remote<T> to) {
  asm volatile("" : "+r"(to.address));
  return to;
}

/// Loads `to` if the condition holds, without a branch; else `to` is undefined. *p must not change
/// while the kernel runs.
FUSEDRNN_DEVICE void load_if(bool condition, float& to, const float* p) {
  asm("{\n\t"
      ".reg .pred c;\n\t"
      "setp.ne.u32 c, %2, 0;\n\t"
      "@c ld.global.nc.f32 %0, [%1];\n\t"
      "}"
      : "=f"(to)
      : "l"(p), "r"(uint32_t(condition)));
}
template <class Half>
FUSEDRNN_DEVICE std::enable_if_t<sizeof(Half) == 2> load_if(bool condition, Half& to,
                                                            const Half* p) {
  asm("{\n\t"
      ".reg .pred c;\n\t"
      "setp.ne.u32 c, %2, 0;\n\t"
      "@c ld.global.nc.u16 %0, [%1];\n\t"
      "}"
      : "=h"(to.bits)
      : "l"(p), "r"(uint32_t(condition)));
}
/// 16 bytes, or zeros unless the condition holds.
FUSEDRNN_DEVICE Words load_words_if(bool condition, const void* p) {
  Words w;
  asm("{\n\t"
      ".reg .pred c;\n\t"
      "setp.ne.u32 c, %5, 0;\n\t"
      "mov.b32 %0, 0;\n\t"
      "mov.b32 %1, 0;\n\t"
      "mov.b32 %2, 0;\n\t"
      "mov.b32 %3, 0;\n\t"
      "@c ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];\n\t"
      "}"
      : "=&r"(w.word[0]), "=&r"(w.word[1]), "=&r"(w.word[2]), "=&r"(w.word[3])
      : "l"(p), "r"(uint32_t(condition)));
  return w;
}
/// Stores if the condition holds, without a branch, for readers after the kernel.
FUSEDRNN_DEVICE void store_if(bool condition, float* p, float value) {
  asm volatile(
      "{\n\t"
      ".reg .pred c;\n\t"
      "setp.ne.u32 c, %2, 0;\n\t"
      "@c st.global.f32 [%0], %1;\n\t"
      "}"
      :
      : "l"(p), "f"(value), "r"(uint32_t(condition)));
}
template <class Half>
FUSEDRNN_DEVICE std::enable_if_t<sizeof(Half) == 2> store_if(bool condition, Half* p, Half value) {
  asm volatile(
      "{\n\t"
      ".reg .pred c;\n\t"
      "setp.ne.u32 c, %2, 0;\n\t"
      "@c st.global.u16 [%0], %1;\n\t"
      "}"
      :
      : "l"(p), "h"(value.bits), "r"(uint32_t(condition)));
}

/// Brings the 32-byte sector at p to L2.
FUSEDRNN_DEVICE void prefetch_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
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

/// Stores 16 bytes or 4 to global memory for other CTAs that read them by load_relaxed. Each 4-byte
/// word arrives by itself, in any order, until fence_device or add_release orders them.
FUSEDRNN_DEVICE void store_relaxed(const Words& w, void* p) {
  asm volatile("st.relaxed.gpu.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(p), "r"(w.word[0]), "r"(w.word[1]), "r"(w.word[2]), "r"(w.word[3])
               : "memory");
}
FUSEDRNN_DEVICE void store_relaxed(uint32_t word, uint32_t* p) {
  asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" : : "l"(p), "r"(word) : "memory");
}
/// Loads what has arrived, word by word.
FUSEDRNN_DEVICE Words load_relaxed(const void* p) {
  Words w;
  asm volatile("ld.relaxed.gpu.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.word[0]), "=r"(w.word[1]), "=r"(w.word[2]), "=r"(w.word[3])
               : "l"(p)
               : "memory");
  return w;
}
FUSEDRNN_DEVICE uint32_t load_relaxed(const uint32_t* p) {
  uint32_t word;
  asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(word) : "l"(p) : "memory");
  return word;
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

/// Two values rounded to nearest, ties to even; `low` in bits 0 to 15.
template <class Element>
FUSEDRNN_DEVICE uint32_t pack(float low, float high);
template <>
FUSEDRNN_DEVICE uint32_t pack<BFloat16>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
template <>
FUSEDRNN_DEVICE uint32_t pack<Float16>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

/// To TF32's 10 mantissa bits, ties away from zero.
FUSEDRNN_DEVICE uint32_t tf32_of(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

/// The larger of `size` and |x|; a NaN is not larger.
FUSEDRNN_DEVICE float larger_size(float size, float x) { return fmaxf(size, fabsf(x)); }

// ---- approximations -----------------------------------------------------------------------------

/// 2^x within 2 units in the last place. Subnormal arguments and results count as zero.
FUSEDRNN_DEVICE float exp2_approx(float x) {
  float value;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
}
/// tanh(x) with a relative error up to 2^-11.
FUSEDRNN_DEVICE float tanh_approx(float x) {
  float value;
  asm("tanh.approx.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
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
