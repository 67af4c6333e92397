// What csrc/cuda/primitives.cuh is on a GPU, for the host's compiler: a CUDA thread is a fiber, and
// a scheduler (emulator.cpp) runs the fibers of a launch one at a time on the calling thread.
//
// The functions here are inlined into the kernels' files, so that ThreadSanitizer, which knows
// fibers, sees the kernels' own accesses; what emulator.cpp does itself it does not see.
#pragma once

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

/// How the fibers of a launch take turns, and on what device.
struct Settings {
  uint64_t seed = 0;        ///< of all launches from now on, each of which takes another schedule
  int multiprocessors = 8;  ///< what the device says that it has
  int room = 8;             ///< the CTAs that can run together
};
void set(const Settings& settings);
const Settings& settings();

/// What a launch returns whose CTAs can't run together, as CUDA does.
constexpr int kNoRoom = 720;

/// What was wrong with the last launch that failed.
const char* last_error();
/// The kernels that this program has, each with the times that it was launched.
struct Kernel {
  std::string name;
  uint64_t launches;
};
const std::vector<Kernel>& kernels();
size_t add_kernel(const char* name);  ///< returns its place among them

/// CTAs and waits of all launches so far.
struct Counts {
  uint64_t launches, ctas, waits;
};
Counts counts();

/// Where in the kernel a thread is, for reports.
struct Where {
  const char* what;
  int line;
};

using Thread = void(const void* kernel, unsigned char* shared);
int launch(const cuda::Grid& grid, unsigned threads, const void* kernel, Thread* thread,
           size_t place);
void sync_cluster(Where where);
void sync_cta(Where where);
void sync_warp(Where where);
void pause(Where where);
/// Waits until all lanes of the warp are here with `bytes` of theirs; returns those of all 32, 64
/// bytes apart. It orders nothing else.
const unsigned char* exchange(const void* own, unsigned bytes, Where where);

/// Mailboxes, known by their address. What is sent comes some time later, in any order.
void open(void* box, Where where);
void expect(void* box, uint32_t bytes, Where where);
void wait_for(void* box, uint32_t phase, Where where);
void send(const void* data, unsigned bytes, void* to, void* box, unsigned cta, Where where);

}  // namespace fusedrnn::emulator

namespace fusedrnn::cuda {

/// Where a kernel is among emulator::kernels(), from before the program begins.
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

/// All of the emulated device's room.
template <class Kernel>
int active_clusters(const Grid& grid) {
  return grid.cluster < 2 || grid.cluster > 16 ? 0 : emulator::settings().room / int(grid.cluster);
}

inline void sync_cta(int line = __builtin_LINE()) { emulator::sync_cta({"sync_cta", line}); }
inline void sync_warp(int line = __builtin_LINE()) { emulator::sync_warp({"sync_warp", line}); }
inline uint32_t load_acquire(const uint32_t* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
inline void add_release(uint32_t* p, uint32_t value) {
  __atomic_fetch_add(p, value, __ATOMIC_RELEASE);
}
inline void pause(int line = __builtin_LINE()) { emulator::pause({"pause", line}); }

inline void sync_cluster(int line = __builtin_LINE()) {
  emulator::sync_cluster({"sync_cluster", line});
}
struct alignas(8) Mailbox {
  uint64_t state;
};
inline void open(Mailbox* box, int line = __builtin_LINE()) {
  box->state = 0;
  emulator::open(box, {"open", line});
}
inline void expect(Mailbox* box, uint32_t bytes, int line = __builtin_LINE()) {
  emulator::expect(box, bytes, {"expect", line});
}
inline void wait_for(Mailbox* box, uint32_t phase, int line = __builtin_LINE()) {
  emulator::wait_for(box, phase, {"wait_for", line});
}
inline void send(float a, float b, float* to, Mailbox* box, unsigned cta,
                 int line = __builtin_LINE()) {
  const float both[2] = {a, b};
  emulator::send(both, sizeof(both), to, box, cta, {"send", line});
}

inline uint32_t shuffle(uint32_t value, int from, int line = __builtin_LINE()) {
  const unsigned char* all = emulator::exchange(&value, sizeof(value), {"shuffle", line});
  std::memcpy(&value, all + 64 * (unsigned(from) % 32), sizeof(value));
  return value;
}
inline float shuffle_xor(float value, int mask, int line = __builtin_LINE()) {
  const unsigned char* all = emulator::exchange(&value, sizeof(value), {"shuffle_xor", line});
  std::memcpy(&value, all + 64 * ((threadIdx.x % 32) ^ unsigned(mask)), sizeof(value));
  return value;
}

struct alignas(16) Words {
  uint32_t word[4];
};
inline Words load_shared_by_ctas(const void* p) { return *static_cast<const Words*>(p); }
inline void send(const Words& w, void* to, Mailbox* box, unsigned cta,
                 int line = __builtin_LINE()) {
  emulator::send(w.word, sizeof(w.word), to, box, cta, {"send", line});
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

inline float reciprocal(float x) { return 1 / x; }

/// The value that a register of a fragment holds at `place` of those in it.
template <class S>
float element(uint32_t word, int place) {
  if constexpr (sizeof(S) == 2) {
    return value_of(S{uint16_t(place ? word >> 16 : word)});
  } else {
    return float_of(word & 0xffffe000u);  // what the tensor cores read of a float
  }
}

template <class S>
void mma_m16n8(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                       int line = __builtin_LINE()) {
  const uint32_t own[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const unsigned char* all = emulator::exchange(own, sizeof(own), {"mma_m16n8", line});
  const auto word = [&](int lane, int i) {
    uint32_t w;
    std::memcpy(&w, all + 64 * lane + 4 * i, sizeof(w));
    return w;
  };
  constexpr int per_word = 4 / int(sizeof(S));
  const int lane = int(threadIdx.x % 32), r = lane / 4, q = lane % 4;
  for (int half = 0; half < 2; ++half) {  // of the depth
    for (int from = 0; from < 4; ++from) {
      for (int place = 0; place < per_word; ++place) {
        const float b[2] = {element<S>(word(4 * (2 * q) + from, 4 + half), place),
                            element<S>(word(4 * (2 * q + 1) + from, 4 + half), place)};
        for (int i = 0; i < 4; ++i) {
          c[i] += element<S>(word(4 * r + from, 2 * half + i / 2), place) * b[i % 2];
        }
      }
    }
  }
}

}  // namespace fusedrnn::cuda
