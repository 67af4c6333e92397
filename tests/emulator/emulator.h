// The twins of csrc/cuda/launch.cuh and ptx.cuh for the host's compiler. A CUDA thread is a fiber.
// A scheduler (emulator.cpp) runs a launch's fibers one at a time on the calling thread.
//
// These functions are inlined into the kernels' files. ThreadSanitizer, which knows fibers, then
// sees the kernels' own accesses, but not emulator.cpp's work.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#define FUSEDRNN_DEVICE inline

struct Index3 {
  unsigned x, y, z;
};
extern Index3 threadIdx, blockIdx, gridDim;

namespace fusedrnn::emulator {

/// How a launch's fibers take turns, and on what device.
struct Settings {
  uint64_t seed = 0;        ///< for all launches from now on; each takes another schedule
  int multiprocessors = 8;  ///< as the device reports
  int room = 8;             ///< CTAs that can run together
};
void set(const Settings& settings);
const Settings& settings();

/// The status of a launch whose CTAs can't run together, the same as CUDA's.
constexpr int kNoRoom = 720;

/// The last failed launch's error.
const char* last_error();
/// The program's kernels and how often each was launched.
struct Kernel {
  std::string name;
  uint64_t launches;
};
const std::vector<Kernel>& kernels();
size_t add_kernel(const char* name);  ///< returns its index

/// CTAs and waits of all launches so far.
struct Counts {
  uint64_t launches, ctas, waits;
};
Counts counts();

/// A thread's position in the kernel, for reports.
struct Where {
  const char* what;
  int line;
};

using Thread = void(const void* kernel, unsigned char* shared);
int launch(const cuda::Grid& grid, unsigned threads, const void* kernel, Thread* thread,
           size_t place);
void sync_cluster(Where where);
void sync_cta(Where where);
void sync_threads(int barrier, int threads, Where where);
void sync_warp(Where where);
void pause(Where where);
/// Waits until every lane of the warp has brought `bytes`. Returns the bytes of all 32 lanes, 64
/// bytes apart. Orders nothing else.
const unsigned char* exchange(const void* own, unsigned bytes, Where where);

[[noreturn]] void assertion_failed(const char* message, Where where);

/// Transaction barriers, known by their address. Stores arrive some time later, in any order.
void barrier_init(void* barrier, Where where);
void barrier_arrive_and_expect_tx(void* barrier, uint32_t bytes, Where where);
/// Whether the phase is complete. Blocks until it is, or nothing else can go on.
bool barrier_try_wait(void* barrier, uint32_t phase, Where where);
void st_async(const void* data, unsigned bytes, void* to, void* barrier, unsigned cta, Where where);

/// A clock that stands still until nothing can go on. Then it moves at each look.
uint64_t nanoseconds();
[[noreturn]] void fail_wait(const cuda::Waiter& waiter, Where where);

/// Relaxed words. A word arrives in memory some time later, in any order, even after later words of
/// the same thread. Before, its writer alone sees it, and threads that met the writer at a barrier
/// of the CTA. A fence of such a thread lets it arrive, and so does the kernel's end. An earlier
/// word of such a thread for the same place arrives before it or never.
///
/// Plain loads see memory, not a word that has not arrived.
void store_relaxed(uint32_t word, uint32_t* p, Where where);
/// The word that this thread sees at p; `in_memory`: what it has loaded from there.
uint32_t find_relaxed(const uint32_t* p, uint32_t in_memory);
void fence_device(Where where);
/// `bytes` at p must be aligned and in the CTA's shared memory.
void check_shared(const void* p, unsigned bytes, Where where);

}  // namespace fusedrnn::emulator

namespace fusedrnn::cuda {

/// A kernel's index in emulator::kernels(), set before the program begins.
template <class Kernel>
struct Place {
  static const char* name() { return __PRETTY_FUNCTION__; }
  static const size_t value;
};
template <class Kernel>
const size_t Place<Kernel>::value = emulator::add_kernel(name());

template <class Kernel>
int launch(const Kernel& kernel, const Grid& grid, void*) {
  return emulator::launch(
      grid, Kernel::kThreads, &kernel,
      [](const void* k, unsigned char* shared) { (*static_cast<const Kernel*>(k))(shared); },
      Place<Kernel>::value);
}

/// As many as the emulated device has room for.
template <class Kernel>
int active_clusters(const Grid& grid) {
  return grid.cluster < 2 || grid.cluster > 16 ? 0 : emulator::settings().room / int(grid.cluster);
}

inline void sync_cta(int line = __builtin_LINE()) { emulator::sync_cta({"sync_cta", line}); }
inline void sync_threads(int barrier, int threads, int line = __builtin_LINE()) {
  emulator::sync_threads(barrier, threads, {"sync_threads", line});
}
inline void sync_warp(int line = __builtin_LINE()) { emulator::sync_warp({"sync_warp", line}); }
inline uint32_t load_acquire(const uint32_t* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
inline void fence_device(int line = __builtin_LINE()) {
  emulator::fence_device({"fence_device", line});
}
inline void add_release(uint32_t* p, uint32_t value, int line = __builtin_LINE()) {
  emulator::fence_device({"add_release", line});
  __atomic_fetch_add(p, value, __ATOMIC_RELEASE);
}

/// Polls after each `pause()`.
template <class IsDone, class Pause>
void poll_between(const IsDone& is_done, const Pause& pause, const Waiter& waiter,
                  emulator::Where where) {
  WaitTime time;
  while (!is_done()) {
    if (time.looks() && time.is_over(emulator::nanoseconds())) emulator::fail_wait(waiter, where);
    pause();
  }
}
template <class IsDone>
void poll(const IsDone& is_done, const Waiter& waiter, int line = __builtin_LINE()) {
  const emulator::Where where = {"poll", line};
  poll_between(is_done, [&] { emulator::pause(where); }, waiter, where);
}

inline void sync_cluster(int line = __builtin_LINE()) {
  emulator::sync_cluster({"sync_cluster", line});
}
struct alignas(8) TransactionBarrier {
  uint64_t state;

  void init(int line = __builtin_LINE()) {
    state = 0;
    emulator::barrier_init(this, {"init", line});
  }
  void arrive_and_expect_tx(uint32_t bytes, int line = __builtin_LINE()) {
    emulator::barrier_arrive_and_expect_tx(this, bytes, {"arrive_and_expect_tx", line});
  }
  void wait(uint32_t phase, const Waiter& waiter, int line = __builtin_LINE()) {
    const emulator::Where where = {"wait", line};
    poll_between([&] { return emulator::barrier_try_wait(this, phase, where); }, [] {}, waiter,
                 where);
  }
};
inline void st_async(float a, float b, float* to, TransactionBarrier* barrier, unsigned cta,
                     int line = __builtin_LINE()) {
  const float both[2] = {a, b};
  emulator::st_async(both, sizeof(both), to, barrier, cta, {"st_async", line});
}

inline uint32_t shuffle(uint32_t value, int from, int line = __builtin_LINE()) {
  const unsigned char* all = emulator::exchange(&value, sizeof(value), {"shuffle", line});
  std::memcpy(&value, all + 64 * (unsigned(from) % 32), sizeof(value));
  return value;
}
template <class T>
T shuffle_xor_of(T value, int mask, int line) {
  const unsigned char* all = emulator::exchange(&value, sizeof(value), {"shuffle_xor", line});
  std::memcpy(&value, all + 64 * ((threadIdx.x % 32) ^ unsigned(mask)), sizeof(value));
  return value;
}
inline float shuffle_xor(float value, int mask, int line = __builtin_LINE()) {
  return shuffle_xor_of(value, mask, line);
}
inline double shuffle_xor(double value, int mask, int line = __builtin_LINE()) {
  return shuffle_xor_of(value, mask, line);
}
inline uint32_t shuffle_xor(uint32_t value, int mask, int line = __builtin_LINE()) {
  return shuffle_xor_of(value, mask, line);
}

inline void load_matrix_trans(uint32_t (&to)[4], const void* row, int line = __builtin_LINE()) {
  const emulator::Where where = {"load_matrix_trans", line};
  emulator::check_shared(row, 16, where);
  // Each lane reads the row that it names. So ThreadSanitizer sees the access.
  uint16_t own[8];
  for (int i = 0; i < 8; ++i) own[i] = static_cast<const uint16_t*>(row)[i];
  const unsigned char* all = emulator::exchange(own, sizeof(own), where);
  const int lane = int(threadIdx.x % 32), r = lane / 4, q = lane % 4;
  const auto element = [&](int matrix, int row_of_matrix) {
    uint16_t value;
    std::memcpy(&value, all + 64 * (8 * matrix + row_of_matrix) + 2 * r, sizeof(value));
    return uint32_t(value);
  };
  for (int i = 0; i < 4; ++i) to[i] = element(i, 2 * q) | element(i, 2 * q + 1) << 16;
}

template <class T>
T kept(T value) {
  return value;
}
template <class T>
struct Remote {
  T* place;
  unsigned cta;
  Remote() = default;
  Remote(T* p, unsigned cta) : place(p), cta(cta) {}
  Remote operator+(int n) const { return {place + n, cta}; }
};
inline void st_async(float a, float b, Remote<float> to, Remote<TransactionBarrier> barrier,
                     int line = __builtin_LINE()) {
  st_async(a, b, to.place, barrier.place, to.cta, line);
}

/// What a load that does not take place leaves: NaN, so that a use is seen.
inline void spoil(float& x) { x = std::nanf(""); }
template <class Half>
void spoil(Half& x) {
  x.bits = 0x7fff;
}
template <class T>
void load_if(bool condition, T& to, const T* p) {
  if (condition) {
    to = *p;
  } else {
    spoil(to);
  }
}
/// A read, so that an address outside of a buffer fails.
inline void prefetch_l2(const void* p) { (void)*static_cast<const volatile unsigned char*>(p); }
template <class T>
void store_if(bool condition, T* p, T value) {
  if (condition) *p = value;
}

struct alignas(16) Words {
  uint32_t word[4];
};
inline Words load_words_if(bool condition, const void* p) {
  return condition ? *static_cast<const Words*>(p) : Words{};
}
inline void store_relaxed(uint32_t word, uint32_t* p, int line = __builtin_LINE()) {
  __atomic_fetch_or(p, 0u, __ATOMIC_RELAXED);  // ThreadSanitizer sees an atomic store here
  emulator::store_relaxed(word, p, {"store_relaxed", line});
}
inline void store_relaxed(const Words& w, void* p, int line = __builtin_LINE()) {
  for (int i = 0; i < 4; ++i) store_relaxed(w.word[i], static_cast<Words*>(p)->word + i, line);
}
inline uint32_t load_relaxed(const uint32_t* p) {
  return emulator::find_relaxed(p, __atomic_load_n(p, __ATOMIC_RELAXED));
}
inline Words load_relaxed(const void* p) {
  Words w;
  for (int i = 0; i < 4; ++i) w.word[i] = load_relaxed(static_cast<const Words*>(p)->word + i);
  return w;
}
template <class T>
void st_async(const Words& w, Remote<T> to, Remote<TransactionBarrier> barrier,
              int line = __builtin_LINE()) {
  emulator::st_async(w.word, sizeof(w.word), to.place, barrier.place, to.cta, {"st_async", line});
}
inline Words load_cg(const void* p) {
  const Words* const from = static_cast<const Words*>(p);
  Words w = *from;
  for (int i = 0; i < 4; ++i) w.word[i] = emulator::find_relaxed(from->word + i, w.word[i]);
  return w;
}
inline void st_async(const Words& w, void* to, TransactionBarrier* barrier, unsigned cta,
                     int line = __builtin_LINE()) {
  emulator::st_async(w.word, sizeof(w.word), to, barrier, cta, {"st_async", line});
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float value_of(BFloat16 x) { return float_of(uint32_t(x.bits) << 16); }
inline float value_of(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // The exponents' biases differ by 112; the product is exact, for subnormal numbers too.
  return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f));
}
inline float value_of(float x) { return x; }
inline double value_of(double x) { return x; }

inline void round_to(BFloat16& to, float x) {
  const uint32_t bits = bits_of(x);
  to.bits = x != x ? 0x7fff : uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline void round_to(Float16& to, float x) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000u, size = bits_of(x) & 0x7fffffffu;
  uint32_t half;
  if (size > 0x7f800000u) {
    half = 0x7fff;
  } else if (size >= 0x477ff000u) {  // rounds to 65536 or is more
    half = 0x7c00;
  } else if (size < 0x38800000u) {  // subnormal: the sum rounds to a multiple of 2^-24
    half = bits_of(float_of(size) + 0.5f) - 0x3f000000u;
  } else {
    half = (size + 0xfffu + (size >> 13 & 1u) - 0x38000000u) >> 13;
  }
  to.bits = uint16_t(sign | half);
}
inline void round_to(float& to, float x) { to = x; }
inline void round_to(double& to, double x) { to = x; }

inline uint32_t tf32_of(float x) {
  const uint32_t bits = bits_of(x);
  return x - x != 0 ? bits : (bits + 0x1000u) & 0xffffe000u;  // infinity and NaN as they are
}

inline float larger_size(float size, float x) { return std::fmax(size, std::fabs(x)); }

template <class Element>
uint32_t pack(float low, float high) {
  Element bits[2];
  round_to(bits[0], low);
  round_to(bits[1], high);
  return bits[0].bits | uint32_t(bits[1].bits) << 16;
}

// The approximations have errors up to those that the PTX ISA allows. They follow from the
// argument's bits, so that results are repeatable. The results that the PTX ISA lists are exact.

/// From -1 to 1.
inline double error_of(float x) {
  uint32_t hash = bits_of(x) * 0x9e3779b1u;
  hash = (hash ^ hash >> 15) * 0x85ebca77u;
  hash ^= hash >> 13;
  return double(hash & 0xffffffu) / double(0x7fffff) - 1;
}
inline bool is_finite(double x) { return x - x == 0; }
/// Subnormal numbers as zeros of the same sign.
inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }

inline double last_place(double x) { return std::ldexp(1.0, std::ilogb(x) - 23); }

inline float exp2_approx(float x) {
  x = flushed(x);
  const float rounded = std::exp2(x);
  if (x == 0 || !is_finite(x) || !is_finite(rounded) || flushed(rounded) == 0) {
    return flushed(rounded);
  }
  return flushed(float(rounded + double(std::lround(2 * error_of(x))) * last_place(rounded)));
}
inline float tanh_approx(float x) {
  const double exact = std::tanh(double(x)), bound = 0x1p-11;
  if (flushed(x) == 0 || !is_finite(x)) return float(exact);
  const float value = float(exact * (1 + error_of(x) * bound));
  return std::fabs(double(value) - exact) <= bound * std::fabs(exact) ? value : float(exact);
}
inline float reciprocal(float x) {
  x = flushed(x);
  const double exact = 1 / double(x);
  if (x == 0 || !is_finite(x)) return float(exact);
  // Rounding adds as much. Only a result that is subnormal is flushed.
  const float value = float(exact + error_of(x) * last_place(exact) / 2);
  return std::fabs(exact) < 0x1p-126 ? flushed(value) : flushed(value) == 0 ? float(exact) : value;
}

/// The value at `place` among those in a fragment's register.
template <class Element>
float element(uint32_t word, int place) {
  if constexpr (sizeof(Element) == 2) {
    return value_of(Element{uint16_t(place ? word >> 16 : word)});
  } else {
    return float_of(word & 0xffffe000u);  // tensor cores read no more bits
  }
}

template <class Element>
void mma_m16n8(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
               emulator::Where where) {
  const uint32_t own[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const unsigned char* all = emulator::exchange(own, sizeof(own), where);
  const auto word = [&](int lane, int i) {
    uint32_t w;
    std::memcpy(&w, all + 64 * lane + 4 * i, sizeof(w));
    return w;
  };
  constexpr int per_word = 4 / int(sizeof(Element));
  const int lane = int(threadIdx.x % 32), r = lane / 4, q = lane % 4;
  for (int half = 0; half < 2; ++half) {  // halves of K
    for (int from = 0; from < 4; ++from) {
      for (int place = 0; place < per_word; ++place) {
        const float b[2] = {element<Element>(word(4 * (2 * q) + from, 4 + half), place),
                            element<Element>(word(4 * (2 * q + 1) + from, 4 + half), place)};
        for (int i = 0; i < 4; ++i) {
          c[i] += element<Element>(word(4 * r + from, 2 * half + i / 2), place) * b[i % 2];
        }
      }
    }
  }
}
template <class Element>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  int line = __builtin_LINE()) {
  mma_m16n8<Element>(c, a, b0, b1, {"mma_m16n8k16", line});
}
inline void mma_m16n8k8(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                        int line = __builtin_LINE()) {
  mma_m16n8<float>(c, a, b0, b1, {"mma_m16n8k8", line});
}

inline void device_assert(bool condition, const char* message, int line = __builtin_LINE()) {
  if (!condition) emulator::assertion_failed(message, {"device_assert", line});
}

}  // namespace fusedrnn::cuda
