// Every function of csrc/cuda/launch.cuh and ptx.cuh by itself: a line each, exit 1 if one is
// wrong.
//
//   nvcc -std=c++17 --expt-relaxed-constexpr -arch=native -Icsrc tests/kernels/primitives.cu
//   g++ -std=c++17 -Icsrc -Itests/emulator -x c++ tests/*/{primitives.cu,emulator.cpp}
//
// The second tests the emulator: its functions must do the same as the GPU's.
#include "cuda/ptx.cuh"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

using namespace fusedrnn;
using namespace fusedrnn::cuda;

namespace {

// ---- device memory ------------------------------------------------------------------------------

#ifdef __CUDACC__
void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::printf("FAILED %s\n", cudaGetErrorString(status));
  std::exit(1);
}
int multiprocessors() {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0));
  return count;
}
const char* why(int status) { return cudaGetErrorString(cudaError_t(status)); }

/// Elements on the device with initial values.
template <class T>
class Memory {
 public:
  explicit Memory(const std::vector<T>& values) : size_(values.size()) {
    check(cudaMalloc(&data_, size_ * sizeof(T)));
    check(cudaMemcpy(data_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  explicit Memory(size_t size) : Memory(std::vector<T>(size)) {}
  ~Memory() { cudaFree(data_); }
  Memory(const Memory&) = delete;
  T* data() const { return data_; }
  std::vector<T> values() const {
    std::vector<T> values(size_);
    check(cudaMemcpy(values.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  size_t size_;
  T* data_ = nullptr;
};
#else
int multiprocessors() { return emulator::settings().multiprocessors; }
const char* why(int) { return emulator::last_error(); }

template <class T>
class Memory {
 public:
  explicit Memory(const std::vector<T>& values) : values_(values) {}
  explicit Memory(size_t size) : values_(size) {}
  T* data() { return values_.data(); }
  std::vector<T> values() const { return values_; }

 private:
  std::vector<T> values_;
};
#endif

bool failed = false;

/// Launches the kernel; false if that fails.
template <class Kernel>
bool ran(const char* name, const Kernel& kernel, const Grid& grid) {
  int status = launch(kernel, grid, nullptr);
#ifdef __CUDACC__
  if (!status) status = cudaDeviceSynchronize();
#endif
  if (!status) return true;
  std::printf("FAILED %s: %s\n", name, why(status));
  failed = true;
  return false;
}
void report(const char* name, size_t wrong, size_t of, const char* first = "") {
  std::printf("%s %s: %zu of %zu wrong %s\n", wrong ? "FAILED" : "ok    ", name, wrong, of, first);
  failed |= wrong > 0;
}

// ---- launching ----------------------------------------------------------------------------------

/// Each thread writes its position in the grid, with an argument of almost 4 KB.
struct Places {
  static constexpr int kThreads = 96;
  uint32_t* out;
  uint32_t table[1000];

  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    const uint32_t cta = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    out[cta * kThreads + threadIdx.x] =
        table[cta] + 1000 * blockIdx.x + 100 * blockIdx.y + 10 * blockIdx.z + 100000 * threadIdx.x;
  }
};

void test_launch() {
  const unsigned X = 5, Y = 4, Z = 3;
  Memory<uint32_t> out(X * Y * Z * Places::kThreads);
  Places kernel{out.data(), {}};
  for (uint32_t i = 0; i < 1000; ++i) kernel.table[i] = i * i * 100000;
  if (!ran("launch", kernel, {X, Y, Z})) return;
  size_t wrong = 0, i = 0;
  const auto found = out.values();
  for (unsigned z = 0; z < Z; ++z) {
    for (unsigned y = 0; y < Y; ++y) {
      for (unsigned x = 0; x < X; ++x) {
        const uint32_t cta = (z * Y + y) * X + x;
        for (uint32_t t = 0; t < Places::kThreads; ++t) {
          wrong +=
              found[i++] != uint32_t(cta * cta * 100000 + 1000 * x + 100 * y + 10 * z + 100000 * t);
        }
      }
    }
  }
  report("launch", wrong, i);
  // A launch without room is an error, which is not sticky.
  const size_t accepted = (launch(kernel, {1, 1, 1, 8 << 20}, nullptr) == 0) +
                          (launch(kernel, {100000, 1, 1, 0, true}, nullptr) == 0);
#ifdef __CUDACC__
  cudaGetLastError();
#endif
  report("launch, errors", accepted, 2);
}

/// Each thread writes words of shared memory and reads another thread's, from end to end.
struct SharedMemory {
  static constexpr int kThreads = 256;
  uint32_t* out;
  int words;

  FUSEDRNN_DEVICE void operator()(unsigned char* memory) const {
    uint32_t* const shared = reinterpret_cast<uint32_t*>(memory);
    for (int i = threadIdx.x; i < words; i += kThreads) shared[i] = 7 * i + 1000003 * blockIdx.x;
    sync_cta();
    for (int i = threadIdx.x; i < words; i += kThreads) {
      out[blockIdx.x * words + i] = shared[words - 1 - i];
    }
  }
};

void test_shared_memory() {
  for (const int bytes : {1024, 48 * 1024, 96 * 1024}) {  // more than 48 KB needs an attribute
    const int words = bytes / 4, ctas = 3;
    Memory<uint32_t> out(size_t(ctas) * words);
    if (!ran("shared memory", SharedMemory{out.data(), words}, {ctas, 1, 1, size_t(bytes)})) {
      return;
    }
    const auto found = out.values();
    size_t wrong = 0;
    for (int c = 0; c < ctas; ++c) {
      for (int i = 0; i < words; ++i) {
        wrong += found[size_t(c) * words + i] != uint32_t(7 * (words - 1 - i) + 1000003 * c);
      }
    }
    char name[40];
    std::snprintf(name, sizeof(name), "shared memory, %d KB", bytes / 1024);
    report(name, wrong, found.size());
  }
}

// ---- synchronisation ----------------------------------------------------------------------------

/// In each round a thread reads a value written by another thread in its warp or CTA.
template <bool kWarp>
struct Turns {
  static constexpr int kThreads = 256;
  static constexpr int kRounds = 50;
  uint32_t* wrong;

  FUSEDRNN_DEVICE static void sync() {
    if constexpr (kWarp) {
      sync_warp();
    } else {
      sync_cta();
    }
  }
  FUSEDRNN_DEVICE void operator()(unsigned char* memory) const {
    volatile uint32_t* const shared = reinterpret_cast<volatile uint32_t*>(memory);
    const int size = kWarp ? 32 : kThreads, first = threadIdx.x / size * size;
    uint32_t count = 0;
    for (uint32_t round = 0; round < kRounds; ++round) {
      shared[threadIdx.x] = round * 1000 + threadIdx.x;
      sync();
      const int other = first + (threadIdx.x - first + 5 * round + 1) % size;
      count += shared[other] != round * 1000 + other;
      sync();
    }
    wrong[blockIdx.x * kThreads + threadIdx.x] = count;
  }
};

template <bool kWarp>
void test_turns(const char* name) {
  const unsigned ctas = 3;
  Memory<uint32_t> wrong(ctas * Turns<kWarp>::kThreads);
  if (!ran(name, Turns<kWarp>{wrong.data()}, {ctas, 1, 1, 4 * Turns<kWarp>::kThreads})) return;
  size_t sum = 0;
  for (const uint32_t w : wrong.values()) sum += w;
  report(name, sum, wrong.values().size() * Turns<kWarp>::kRounds);
}

/// CTAs that are all resident exchange 16 bytes a thread in each round, as exchange_grid.cuh does.
struct Handshake {
  static constexpr int kThreads = 64;
  Words* exchange;  ///< [2, CTAs, kThreads]
  uint32_t* arrivals;
  uint32_t* wrong;
  uint32_t rounds;

  FUSEDRNN_DEVICE static uint32_t value(uint32_t round, uint32_t cta, uint32_t thread, int i) {
    return round * 2654435761u + cta * 4096 + thread * 8 + i;
  }
  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    const uint32_t ctas = gridDim.x, thread = threadIdx.x;
    uint32_t count = 0;
    for (uint32_t round = 0; round < rounds; ++round) {
      Words* const buffer = exchange + round % 2 * ctas * kThreads;
      Words own;
      for (int i = 0; i < 4; ++i) own.word[i] = value(round, blockIdx.x, thread, i);
      buffer[blockIdx.x * kThreads + thread] = own;
      sync_cta();
      if (thread == 0) {
        add_release(arrivals, 1);
        poll([&] { return load_acquire(arrivals) >= (round + 1) * ctas; },
             Waiter{"Handshake", 0, int(rounds)});
      }
      sync_cta();
      for (uint32_t k = 1; k <= 3; ++k) {  // neighbours, the other end, and itself
        const uint32_t from = (blockIdx.x + (k == 3 ? ctas : k * (ctas / 2) + 1)) % ctas;
        const uint32_t other = (thread + 7 * k) % kThreads;
        const Words w = load_cg(buffer + from * kThreads + other);
        for (int i = 0; i < 4; ++i) count += w.word[i] != value(round, from, other, i);
      }
    }
    wrong[blockIdx.x * kThreads + thread] = count;
  }
};

void test_handshake() {
  const unsigned ctas = unsigned(multiprocessors()), rounds = 300;
  Memory<Words> exchange(size_t(2) * ctas * Handshake::kThreads);
  Memory<uint32_t> arrivals(1), wrong(ctas * Handshake::kThreads);
  const char* const name = "load_acquire, add_release, poll, load_cg";
  const Handshake kernel{exchange.data(), arrivals.data(), wrong.data(), rounds};
  if (!ran(name, kernel, {ctas, 1, 1, 0, true})) return;
  size_t sum = arrivals.values()[0] != ctas * rounds;
  for (const uint32_t w : wrong.values()) sum += w;
  report(name, sum, wrong.values().size() * rounds * 12);
}

/// Each pair of warps trades values in rounds, without the others: pair p at barrier p + 1.
struct PairTurns {
  static constexpr int kThreads = 256, kPairThreads = 64, kRounds = 50;
  uint32_t* wrong;

  FUSEDRNN_DEVICE void operator()(unsigned char* memory) const {
    volatile uint32_t* const shared = reinterpret_cast<volatile uint32_t*>(memory);
    const int pair = threadIdx.x / kPairThreads, first = pair * kPairThreads;
    uint32_t count = 0;
    // A pair of more rounds goes on when others have left.
    for (uint32_t round = 0; round < uint32_t(kRounds + 10 * pair); ++round) {
      shared[threadIdx.x] = round * 1000 + threadIdx.x;
      sync_threads(pair + 1, kPairThreads);
      const int other = first + (threadIdx.x - first + 5 * round + 33) % kPairThreads;
      count += shared[other] != round * 1000 + other;
      sync_threads(pair + 1, kPairThreads);
    }
    wrong[blockIdx.x * kThreads + threadIdx.x] = count;
  }
};

void test_sync_threads() {
  const unsigned ctas = 3;
  Memory<uint32_t> wrong(ctas * PairTurns::kThreads);
  if (!ran("sync_threads", PairTurns{wrong.data()}, {ctas, 1, 1, 4 * PairTurns::kThreads})) return;
  size_t sum = 0;
  for (const uint32_t w : wrong.values()) sum += w;
  report("sync_threads", sum, wrong.values().size() * PairTurns::kRounds);
}

// ---- relaxed words ------------------------------------------------------------------------------

constexpr uint32_t kClear = 0xffffffffu;

enum class Flaw {
  none,
  no_clear,         ///< a word of an earlier round is still there
  short_ring,       ///< slots are used again before a fence has ordered their clears
  no_fence,         ///< a clear arrives after the next word, which is lost
  first_word_only,  ///< the other words of the 16 bytes may arrive later
};

/// CTAs exchange 16 bytes a thread in each round. The words are their own flags: a slot is clear
/// until they arrive. Its own CTA or the next clears it after everyone has read it.
template <Flaw kFlaw, bool kNextClears>
struct Ring {
  static constexpr int kThreads = 64;
  static constexpr uint32_t kFenceEvery = 4, kSlots = kFlaw == Flaw::short_ring ? 4 : 8;
  Words* slots;  ///< [kSlots, CTAs, kThreads], clear
  uint32_t* wrong;
  uint32_t rounds;

  static FUSEDRNN_DEVICE uint32_t value(uint32_t round, uint32_t cta, uint32_t thread, int i) {
    return (round * 2654435761u + cta * 4096 + thread * 8 + uint32_t(i)) & 0x7fffffffu;
  }
  FUSEDRNN_DEVICE Words* at(uint32_t round, uint32_t cta, uint32_t thread) const {
    return slots + (round % kSlots * gridDim.x + cta) * kThreads + thread;
  }
  static FUSEDRNN_DEVICE bool has_arrived(const Words& w) {
    if (kFlaw == Flaw::first_word_only) return w.word[0] != kClear;
    return w.word[0] != kClear && w.word[1] != kClear && w.word[2] != kClear && w.word[3] != kClear;
  }
  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    const uint32_t ctas = gridDim.x, thread = threadIdx.x;
    uint32_t count = 0;
    for (uint32_t round = 0; round < rounds; ++round) {
      Words own;
      for (int i = 0; i < 4; ++i) own.word[i] = value(round, blockIdx.x, thread, i);
      store_relaxed(own, at(round, blockIdx.x, thread));
      for (uint32_t cta = 0; cta < ctas; ++cta) {
        const uint32_t other = (thread + 7 * cta) % kThreads;
        Words w;
        poll(
            [&] {
              w = load_relaxed(static_cast<const void*>(at(round, cta, other)));
              return has_arrived(w);
            },
            Waiter{"Ring", kThreads, int(ctas)});
        for (int i = 0; i < 4; ++i) count += w.word[i] != value(round, cta, other, i);
      }
      sync_cta();  // all CTAs have read the words of the round before
      if (round > 0 && kFlaw != Flaw::no_clear) {
        store_relaxed({{kClear, kClear, kClear, kClear}},
                      at(round - 1, (blockIdx.x + kNextClears) % ctas, thread));
      }
      if (round % kFenceEvery == 0 && kFlaw != Flaw::no_fence) fence_device();
    }
    wrong[blockIdx.x * kThreads + thread] = count;
  }
};

/// How a launch of the ring ends.
struct RingResult {
  bool ran;
  size_t wrong, of;
};
template <Flaw kFlaw, bool kNextClears>
RingResult run_ring(unsigned ctas, uint32_t rounds) {
  using Kernel = Ring<kFlaw, kNextClears>;
  const Words clear = {{kClear, kClear, kClear, kClear}};
  Memory<Words> slots(std::vector<Words>(size_t(Kernel::kSlots) * ctas * Kernel::kThreads, clear));
  Memory<uint32_t> wrong(ctas * Kernel::kThreads);
  int status = launch(Kernel{slots.data(), wrong.data(), rounds}, {ctas, 1, 1, 0, true}, nullptr);
#ifdef __CUDACC__
  if (!status) status = cudaDeviceSynchronize();
#endif
  size_t sum = 0;
  if (!status) {
    for (const uint32_t w : wrong.values()) sum += w;
  }
  return {status == 0, sum, size_t(ctas) * Kernel::kThreads * rounds * ctas * 4};
}

template <bool kNextClears>
void test_ring(const char* name) {
  const unsigned ctas = unsigned(std::min(multiprocessors(), 8));
  size_t wrong = 0, of = 0;
  for (int i = 0; i < 12; ++i) {
    const RingResult result = run_ring<Flaw::none, kNextClears>(ctas, i ? 20 : 50);
    wrong += result.ran ? result.wrong : result.of;
    of += result.of;
  }
  report(name, wrong, of);
}

#ifndef __CUDACC__
/// The emulator must show each flaw: by wrong words, or by a wait that does not end.
template <Flaw kFlaw, bool kNextClears>
void test_flaw(const char* name, bool ends) {
  const char* const error =
      "fusedrnn: Ring, hidden size 64, batch 4: a CTA waited 10 s for another CTA";
  const int launches = 200;
  int shown = 0;
  for (int i = 1; i <= launches && !shown; ++i) {
    const RingResult result = run_ring<kFlaw, kNextClears>(4, 20);
    const bool is = ends ? result.ran && result.wrong : !result.ran && std::strstr(why(0), error);
    if (is) shown = i;
  }
  char text[60];
  std::snprintf(text, sizeof(text), "(seen in launch %d)", shown);
  report(name, !shown, 1, text);
}
void test_flaws() {
  test_flaw<Flaw::no_clear, false>("a ring without clears", true);
  test_flaw<Flaw::short_ring, false>("a short ring, words of an earlier round", true);
  test_flaw<Flaw::no_fence, false>("a ring without fences, words of an earlier round", true);
  test_flaw<Flaw::short_ring, true>("a short ring, words lost to a late clear", false);
  test_flaw<Flaw::no_fence, true>("a ring without fences, words lost to a late clear", false);
  test_flaw<Flaw::first_word_only, false>("a ring that looks at one word of four", true);
}
#endif

#ifndef __CUDACC__
// ---- errors that only the emulator reports ------------------------------------------------------

/// A kernel of 96 threads whose threads do as Thread says.
template <class Thread>
struct Wrong {
  static constexpr int kThreads = 96;
  Thread thread;
  FUSEDRNN_DEVICE void operator()(unsigned char* memory) const { thread(int(threadIdx.x), memory); }
};
/// Whether the launch ends with an error that contains the text.
template <class Thread>
void test_error(const char* text, const Grid& grid, const Thread& thread) {
  const int status = launch(Wrong<Thread>{thread}, grid, nullptr);
  const bool is = status && std::strstr(why(status), text);
  report(text, !is, 1, is ? "" : status ? why(status) : "no error");
}
template <class Thread>
struct WrongInCluster : Wrong<Thread>, UsesClusters {};

void test_errors() {
  const Grid one{1};
  test_error("barrier 0 is none of 1 to 15", one, [](int, void*) { sync_threads(0, 96); });
  test_error("barrier 16 is none of 1 to 15", one, [](int, void*) { sync_threads(16, 96); });
  test_error("a barrier for 48 threads: no whole warps", one,
             [](int, void*) { sync_threads(1, 48); });
  test_error("a barrier for 128 threads: no whole warps", one,
             [](int, void*) { sync_threads(1, 128); });
  test_error("threads where others wait for", one,
             [](int t, void*) { sync_threads(1, t < 32 ? 64 : 96); });
  test_error("a part of a warp arrives at a barrier", one, [](int t, void*) {
    if (t % 32 < 16 || t >= 64) sync_threads(1, 64);
  });
  test_error("a thread left the kernel while others wait for it", one, [](int t, void*) {
    if (t < 64) sync_threads(1, 96);
  });
  test_error("deadlock; 32 threads of CTA (0, 0, 0) in sync_threads", one, [](int t, void*) {
    if (t < 32) sync_threads(1, 64);
    if (t >= 32) sync_threads(2, 96);
  });
  uint32_t never = 0;
  const auto endless = [&](int t, void*) {
    if (t == 5) poll([&] { return load_relaxed(&never) != 0; }, Waiter{"a layer", 12, 34});
    sync_cta();
  };
  const Grid two{2, 1, 1, 0, true};
  test_error("fusedrnn: a layer, hidden size 12, batch 34: a CTA waited 10 s for another CTA", two,
             endless);
  test_error("1 threads of CTA (1, 0, 0) in poll", two, endless);
  test_error("95 threads of CTA (1, 0, 0) in sync_cta", two, endless);
  test_error("fusedrnn: a cluster, hidden size 1, batch 2: a CTA waited 10 s for another CTA",
             {2, 1, 1, 16, false, 2}, [](int t, unsigned char* memory) {
               auto* const barrier = reinterpret_cast<TransactionBarrier*>(memory);
               if (t == 0) barrier->init(), barrier->arrive_and_expect_tx(16);
               sync_cluster();
               if (t == 0 && blockIdx.x == 0) st_async({}, memory, barrier, 1);
               barrier->wait(0, Waiter{"a cluster", 1, 2});
             });
}
#endif

// ---- clusters -----------------------------------------------------------------------------------

/// In each round a thread reads a value written by another CTA in the cluster.
struct ClusterTurns : UsesClusters {
  static constexpr int kThreads = 64, kRounds = 20;
  uint32_t* values;  ///< [CTAs, kThreads]
  uint32_t* wrong;
  unsigned size;

  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    const uint32_t own = blockIdx.x * kThreads + threadIdx.x, first = blockIdx.x / size * size;
    uint32_t count = 0;
    for (uint32_t round = 0; round < kRounds; ++round) {
      values[own] = round * 100000 + own;
      sync_cluster();
      const uint32_t cta = first + (blockIdx.x - first + round + 1) % size;
      const uint32_t other = cta * kThreads + (threadIdx.x + 5 * round) % kThreads;
      count += values[other] != round * 100000 + other;
      sync_cluster();
    }
    wrong[own] = count;
  }
};

/// Every thread sends 16 bytes and 8 to every CTA of the cluster, itself too, in each round.
struct AllToAll : UsesClusters {
  static constexpr int kThreads = 64;
  uint32_t* wrong;
  unsigned size;
  int rounds;

  static FUSEDRNN_DEVICE uint32_t value(int round, unsigned cta, unsigned thread, int i) {
    return uint32_t(round) * 2654435761u + cta * 4096 + thread * 8 + uint32_t(i);
  }
  static size_t shared_bytes(unsigned size) {
    return 2 * size * kThreads * (sizeof(Words) + 2 * sizeof(float)) +
           2 * sizeof(TransactionBarrier);
  }
  FUSEDRNN_DEVICE void operator()(unsigned char* memory) const {
    const int buffer = int(size) * kThreads;
    Words* const words = reinterpret_cast<Words*>(memory);              // [2, size, kThreads]
    float* const pairs = reinterpret_cast<float*>(words + 2 * buffer);  // [2, size, kThreads, 2]
    auto* const barriers = reinterpret_cast<TransactionBarrier*>(pairs + 4 * buffer);
    const uint32_t bytes = uint32_t(buffer) * (sizeof(Words) + 2 * sizeof(float));
    if (threadIdx.x == 0) {
      for (int i = 0; i < 2; ++i) barriers[i].init();
      barriers[0].arrive_and_expect_tx(bytes);
    }
    sync_cluster();
    const unsigned rank = blockIdx.x % size, thread = threadIdx.x;
    uint32_t count = 0;
    for (int round = 0; round < rounds; ++round) {
      const int at = round % 2 * buffer + int(rank * kThreads + thread);
      TransactionBarrier* const barrier = barriers + round % 2;
      // For the next round; some of its bytes may have arrived before.
      if (thread == 0 && round + 1 < rounds) barriers[(round + 1) % 2].arrive_and_expect_tx(bytes);
      Words own;
      for (int i = 0; i < 4; ++i) own.word[i] = value(round, rank, thread, i);
      const float a = float(round + 1000 * int(thread)), b = float(rank) + 0.5f;
      for (unsigned cta = 0; cta < size; ++cta) {
        st_async(own, words + at, barrier, cta);
        if (round % 3) {
          st_async(a, b, pairs + 2 * at, barrier, cta);
        } else {
          const Remote<float> to(pairs + at, cta);
          st_async(a, b, to + at, Remote<TransactionBarrier>(barriers, cta) + round % 2);
        }
      }
      barrier->wait(uint32_t(round / 2 % 2), Waiter{"AllToAll", 0, rounds});
      for (unsigned cta = 0; cta < size; ++cta) {
        const unsigned other = (thread + 7 * cta + unsigned(round)) % kThreads;
        const int from = round % 2 * buffer + int(cta * kThreads + other);
        for (int i = 0; i < 4; ++i) count += words[from].word[i] != value(round, cta, other, i);
        count += pairs[2 * from] != float(round + 1000 * int(other));
        count += pairs[2 * from + 1] != float(cta) + 0.5f;
      }
    }
    wrong[blockIdx.x * kThreads + thread] = count;
  }
};

void test_clusters() {
  size_t sizes = 0;
  for (const unsigned size : {2, 3, 4, 8, 16}) {
    const unsigned clusters = 3;
    const Grid turns{clusters * size, 1, 1, 0, false, size};
    const Grid all{clusters * size, 1, 1, AllToAll::shared_bytes(size), false, size};
    if (!active_clusters<ClusterTurns>(turns) || !active_clusters<AllToAll>(all)) continue;
    ++sizes;
    char name[80];
    std::snprintf(name, sizeof(name), "sync_cluster, %u CTAs", size);
    const size_t threads = clusters * size * AllToAll::kThreads;
    Memory<uint32_t> values(threads), wrong(threads);
    if (!ran(name, ClusterTurns{{}, values.data(), wrong.data(), size}, turns)) return;
    size_t sum = 0;
    for (const uint32_t w : wrong.values()) sum += w;
    report(name, sum, threads * ClusterTurns::kRounds);
    std::snprintf(name, sizeof(name), "TransactionBarrier, st_async, %u CTAs", size);
    const int rounds = 100;
    if (!ran(name, AllToAll{{}, wrong.data(), size, rounds}, all)) return;
    sum = 0;
    for (const uint32_t w : wrong.values()) sum += w;
    report(name, sum, threads * rounds * size * 6);
  }
  const bool too_many =
      active_clusters<AllToAll>({64, 1, 1, AllToAll::shared_bytes(32), false, 32});
  report("active_clusters", too_many, sizes);
}

// ---- warps --------------------------------------------------------------------------------------

template <class T>
struct Shuffle {
  static constexpr int kThreads = 64;
  T* out;  ///< [31, kThreads]

  /// An integer is a word that no float holds.
  static constexpr T value(int thread, int mask) {
    return std::is_integral_v<T> ? T(0xff000000u + 100u * mask + thread)
                                 : T(1.25) * thread + T(100) * mask;
  }
  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    for (int mask = 1; mask < 32; ++mask) {
      const T own = value(threadIdx.x, mask);
      out[(mask - 1) * kThreads + threadIdx.x] = shuffle_xor(own, mask);
    }
  }
};

/// Each lane reads another's value, by a pattern that is no exclusive or.
struct ShuffleFrom {
  static constexpr int kThreads = 64;
  uint32_t* out;  ///< [32, kThreads]

  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    for (int k = 0; k < 32; ++k) {
      out[k * kThreads + threadIdx.x] =
          shuffle(1000 * k + threadIdx.x, int(threadIdx.x % 32 * 5 + k) % 32);
    }
  }
};

void test_shuffle_from() {
  Memory<uint32_t> out(32 * ShuffleFrom::kThreads);
  if (!ran("shuffle", ShuffleFrom{out.data()}, {1})) return;
  const auto found = out.values();
  size_t wrong = 0;
  for (int k = 0; k < 32; ++k) {
    for (int t = 0; t < ShuffleFrom::kThreads; ++t) {
      const int from = t / 32 * 32 + (t % 32 * 5 + k) % 32;
      wrong += found[k * ShuffleFrom::kThreads + t] != uint32_t(1000 * k + from);
    }
  }
  report("shuffle", wrong, found.size());
}

template <class T>
void test_shuffle(const char* name) {
  Memory<T> out(31 * Shuffle<T>::kThreads);
  if (!ran(name, Shuffle<T>{out.data()}, {1})) return;
  const auto found = out.values();
  size_t wrong = 0;
  for (int mask = 1; mask < 32; ++mask) {
    for (int t = 0; t < Shuffle<T>::kThreads; ++t) {
      wrong += found[(mask - 1) * Shuffle<T>::kThreads + t] != Shuffle<T>::value(t ^ mask, mask);
    }
  }
  report(name, wrong, found.size());
}

// ---- memory -------------------------------------------------------------------------------------

/// Every third thread loads and stores. The others' addresses do not exist.
struct Conditions {
  static constexpr int kThreads = 96;
  const float* in;
  const BFloat16* halves;
  const Words* words;
  float* out;
  BFloat16* halves_out;
  Words* words_out;

  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    const int i = int(threadIdx.x);
    const bool holds = i % 3 == 0;
    const int64_t at = holds ? i : int64_t{1} << 45;
    float x;
    BFloat16 half;
    if (holds) prefetch_l2(in + at);
    load_if(holds, x, in + at);
    load_if(holds, half, halves + at);
    store_if(holds, out + at, x);
    store_if(holds, halves_out + at, half);
    words_out[i] = load_words_if(holds, words + at);
  }
};

void test_conditions() {
  constexpr int n = Conditions::kThreads;
  std::vector<float> numbers;
  std::vector<BFloat16> halves;
  std::vector<Words> words;
  for (uint32_t i = 0; i < n; ++i) {
    numbers.push_back(float(i) + 0.25f);
    halves.push_back({uint16_t(1000 + i)});
    words.push_back({{i + 1, i + 2, i + 3, i + 4}});
  }
  Memory<float> in(numbers), out(n);
  Memory<BFloat16> halves_in(halves), halves_out(n);
  Memory<Words> words_in(words), words_out(n);
  const Conditions kernel{in.data(),  halves_in.data(),  words_in.data(),
                          out.data(), halves_out.data(), words_out.data()};
  if (!ran("load_if", kernel, {1})) return;
  const auto found = out.values();
  const auto found_halves = halves_out.values();
  const auto found_words = words_out.values();
  size_t wrong = 0;
  for (size_t i = 0; i < n; ++i) {
    const bool holds = i % 3 == 0;
    wrong += found[i] != (holds ? numbers[i] : 0);
    wrong += found_halves[i].bits != (holds ? halves[i].bits : 0);
    for (int k = 0; k < 4; ++k) wrong += found_words[i].word[k] != (holds ? words[i].word[k] : 0);
  }
  report("prefetch_l2, load_if, store_if, load_words_if", wrong, 6 * n);
}

FUSEDRNN_DEVICE uint32_t word_of(const float* at, int next, BFloat16) {
  BFloat16 low, high;
  round_to(low, at[0]);
  round_to(high, at[next]);
  return low.bits | uint32_t(high.bits) << 16;
}
FUSEDRNN_DEVICE uint32_t word_of(const float* at, int next, Float16) {
  Float16 low, high;
  round_to(low, at[0]);
  round_to(high, at[next]);
  return low.bits | uint32_t(high.bits) << 16;
}
FUSEDRNN_DEVICE uint32_t word_of(const float* at, int, float) { return tf32_of(at[0]); }

/// c += a b for two warps with their own matrices; fragments as in ptx.cuh.
template <class Element>
struct Mma {
  static constexpr int kThreads = 64, kPer = 4 / int(sizeof(Element)), kK = 8 * kPer;
  const float* a;  ///< [2, 16, kK]
  const float* b;  ///< [2, kK, 8]
  float* c;        ///< [2, 16, 8]

  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, q = lane % 4;
    const float* const A = a + warp * 16 * kK;
    const float* const B = b + warp * kK * 8;
    float* const C = c + warp * 16 * 8;
    // The first element's k: 2q and 2q + 8, or q and q + 4.
    const int k[2] = {kPer * q, kPer * q + kK / 2};
    const uint32_t words[4] = {
        word_of(A + r * kK + k[0], 1, Element{}), word_of(A + (r + 8) * kK + k[0], 1, Element{}),
        word_of(A + r * kK + k[1], 1, Element{}), word_of(A + (r + 8) * kK + k[1], 1, Element{})};
    float accum[4];
    for (int i = 0; i < 4; ++i) accum[i] = C[(r + i / 2 * 8) * 8 + 2 * q + i % 2];
    const uint32_t b0 = word_of(B + k[0] * 8 + r, 8, Element{});
    const uint32_t b1 = word_of(B + k[1] * 8 + r, 8, Element{});
    if constexpr (sizeof(Element) == 2) {
      mma_m16n8k16<Element>(accum, words, b0, b1);
    } else {
      mma_m16n8k8(accum, words, b0, b1);
    }
    for (int i = 0; i < 4; ++i) C[(r + i / 2 * 8) * 8 + 2 * q + i % 2] = accum[i];
  }
};

/// Integers, all different within a matrix. They and the results are exact in the type.
template <class Element>
void test_mma(const char* name, int first) {
  constexpr int K = Mma<Element>::kK;
  std::mt19937 random(1);
  std::vector<float> a(2 * 16 * K), b(2 * K * 8), c(2 * 16 * 8);
  for (int w = 0; w < 2; ++w) {
    for (int i = 0; i < 16 * K; ++i) a[w * 16 * K + i] = float(i + first) * (random() % 2 ? 1 : -1);
    for (int i = 0; i < K * 8; ++i) b[w * K * 8 + i] = float(i + 1) * (random() % 2 ? 1 : -1);
    for (int i = 0; i < 16 * 8; ++i) c[w * 128 + i] = float(1000 * i + w);
    std::shuffle(a.begin() + w * 16 * K, a.begin() + (w + 1) * 16 * K, random);
    std::shuffle(b.begin() + w * K * 8, b.begin() + (w + 1) * K * 8, random);
  }
  Memory<float> on_a(a), on_b(b), on_c(c);
  if (!ran(name, Mma<Element>{on_a.data(), on_b.data(), on_c.data()}, {1})) return;
  const auto found = on_c.values();
  size_t wrong = 0;
  char first_wrong[100] = "";
  for (int w = 0; w < 2; ++w) {
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 8; ++j) {
        double sum = c[w * 128 + i * 8 + j];
        for (int k = 0; k < K; ++k) {
          sum += double(a[w * 16 * K + i * K + k]) * b[w * K * 8 + k * 8 + j];
        }
        const double got = found[w * 128 + i * 8 + j];
        if (got != sum && !wrong++) {
          std::snprintf(first_wrong, sizeof(first_wrong), "row %d, column %d: %.9g for %.9g", i, j,
                        got, sum);
        }
      }
    }
  }
  report(name, wrong, found.size(), first_wrong);
}

struct LoadMatrix {
  static constexpr int kThreads = 64;
  uint32_t* out;  ///< [kThreads, 4]

  /// Warp w's matrix i has w * 1000 + i * 100 + row * 10 + column at its row and column. Rows lie
  /// apart and in an order of their own.
  FUSEDRNN_DEVICE void operator()(unsigned char* memory) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int place = warp * 32 + (lane * 5 + 3) % 32;
    uint16_t* const row = reinterpret_cast<uint16_t*>(memory) + 24 * place;
    for (int c = 0; c < 8; ++c) {
      row[c] = uint16_t(warp * 1000 + lane / 8 * 100 + lane % 8 * 10 + c);
    }
    sync_warp();
    uint32_t to[4];
    load_matrix_trans(to, row);
    for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = to[i];
  }
};

void test_load_matrix() {
  Memory<uint32_t> out(LoadMatrix::kThreads * 4);
  const size_t bytes = LoadMatrix::kThreads * 24 * sizeof(uint16_t);
  if (!ran("load_matrix_trans", LoadMatrix{out.data()}, {1, 1, 1, bytes})) return;
  const auto found = out.values();
  size_t wrong = 0;
  for (size_t k = 0; k < found.size(); ++k) {
    const size_t warp = k / 128, i = k % 4, lane = k / 4 % 32;
    const size_t low = warp * 1000 + i * 100 + lane % 4 * 2 * 10 + lane / 4;
    wrong += found[k] != (low | (low + 10) << 16);
  }
  report("load_matrix_trans", wrong, found.size());
}

// ---- types --------------------------------------------------------------------------------------

/// A floating-point type: the bits of its mantissa and its range of exponents.
struct Format {
  int mantissa, lowest, highest;
  double most() const { return std::ldexp(2 - std::ldexp(1.0, -mantissa), highest); }
};
constexpr Format kBfloat16 = {7, -126, 127}, kFloat16 = {10, -14, 15}, kTf32 = {10, -126, 127};

/// x rounded to the format, by the definition of rounding.
double rounded(double x, Format f, bool ties_to_even) {
  if (std::isnan(x) || std::isinf(x) || x == 0) return x;
  const int exponent = std::max(std::ilogb(x), f.lowest);
  const double unit = std::ldexp(1.0, exponent - f.mantissa), units = std::fabs(x) / unit;
  const double whole = ties_to_even ? std::nearbyint(units) : std::floor(units + 0.5);
  const double result = std::copysign(whole * unit, x);
  return std::fabs(result) > f.most() ? std::copysign(INFINITY, x) : result;
}
/// The value of 16 bits with such a mantissa.
double decoded(uint32_t bits, Format f) {
  const int exponents = f.highest * 2 + 1;  // the exponent of infinities and NaNs
  const int exponent = int(bits >> f.mantissa) & exponents;
  const double fraction = bits & ((1u << f.mantissa) - 1), sign = bits & 0x8000u ? -1 : 1;
  if (exponent == exponents) return fraction ? NAN : sign * INFINITY;
  const double scaled = std::ldexp(fraction, -f.mantissa) + (exponent > 0);
  return sign * std::ldexp(scaled, std::max(exponent, 1) - 1 + f.lowest);
}
bool same(double a, double b) {
  return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
}
float float_with(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

struct Round {
  static constexpr int kThreads = 128;
  const float* in;
  uint32_t *bfloat16, *float16, *tf32;
  uint32_t *packed_bfloat16, *packed_float16;  ///< each value low, the next one high
  float* larger;                               ///< the larger size of each value and the next one
  int count;

  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    const int i = int(blockIdx.x) * kThreads + int(threadIdx.x);
    if (i >= count) return;
    BFloat16 b;
    Float16 h;
    round_to(b, in[i]);
    round_to(h, in[i]);
    bfloat16[i] = b.bits;
    float16[i] = h.bits;
    tf32[i] = tf32_of(in[i]);
    const float next = in[(i + 1) % count];
    packed_bfloat16[i] = pack<BFloat16>(in[i], next);
    packed_float16[i] = pack<Float16>(in[i], next);
    larger[i] = larger_size(larger_size(0, in[i]), next);
  }
};

struct Approximations {
  static constexpr int kThreads = 128;
  const float* in;
  float *exp2, *tanh, *reciprocals;
  int count;

  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    const int i = int(blockIdx.x) * kThreads + int(threadIdx.x);
    if (i >= count) return;
    exp2[i] = exp2_approx(in[i]);
    tanh[i] = tanh_approx(in[i]);
    reciprocals[i] = reciprocal(in[i]);
  }
};

/// Within the errors of the PTX ISA, and the results that its tables list.
void test_approximations() {
  constexpr float kInfinity = std::numeric_limits<float>::infinity(), kNan = NAN;
  constexpr float kSubnormal = 0x1p-127f;
  struct {
    float x, exp2, tanh, reciprocal;
  } const listed[] = {{0.f, 1, 0.f, kInfinity},
                      {-0.f, 1, -0.f, -kInfinity},
                      {kInfinity, kInfinity, 1, 0.f},
                      {-kInfinity, 0.f, -1, -0.f},
                      {kNan, kNan, kNan, kNan},
                      {kSubnormal, 1, kSubnormal, kInfinity},
                      {-kSubnormal, 1, -kSubnormal, -kInfinity}};
  std::vector<float> numbers;
  for (const auto& l : listed) numbers.push_back(l.x);
  const size_t of_table = numbers.size();
  for (const float x : {1.f, 1 + 0x1p-23f, 2 - 0x1p-22f, 2.f, 3.f, 0x1p126f, -126.f, -126.0001f,
                        -127.f, -149.f, -150.f, -1000.f, 127.99f, 128.f, 1000.f}) {
    numbers.push_back(x);
  }
  std::mt19937 random(1);
  const auto mantissa = [&] { return 1 + float(random() >> 9) * 0x1p-23f; };
  for (int i = 0; i < 100000; ++i) {  // each exponent, and more from 1/8 to 128
    const int exponent = i % 2 ? int(random() % 10) - 3 : int(random() % 252) - 126;
    numbers.push_back(std::ldexp(random() % 2 ? mantissa() : -mantissa(), exponent));
  }
  const unsigned count = unsigned(numbers.size());
  Memory<float> in(numbers), exp2(count), tanh(count), reciprocals(count);
  const Approximations kernel{in.data(), exp2.data(), tanh.data(), reciprocals.data(), int(count)};
  constexpr unsigned kThreads = Approximations::kThreads;
  if (!ran("approximations", kernel, {(count + kThreads - 1) / kThreads})) return;
  const auto e = exp2.values(), t = tanh.values(), r = reciprocals.values();
  size_t wrong_e = 0, wrong_t = 0, wrong_r = 0;
  for (size_t i = 0; i < of_table; ++i) {
    wrong_e += !same(e[i], listed[i].exp2);
    wrong_t += !same(t[i], listed[i].tanh);
    wrong_r += !same(r[i], listed[i].reciprocal);
  }
  double most[3] = {};  // the largest errors; the twins must come near to 1
  const auto is_near = [&](double got, double expected, double bound, double& largest) {
    const double error = std::fabs(got - expected) / bound;
    largest = std::max(largest, error);
    return error <= 1;
  };
  const auto unit = [](double x) { return std::ldexp(1.0, std::ilogb(x) - 23); };
  for (size_t i = of_table; i < count; ++i) {
    const float x = numbers[i], power = std::exp2(x);
    // At the ends of the range results may be flushed or overflow, or not.
    const bool may_end = power < 0x1.00001p-126f || power > 0x1.fffff0p127f;
    const bool ends = power < 1 ? e[i] == 0 : e[i] == kInfinity;
    wrong_e += !(may_end && ends) && !is_near(e[i], power, 2 * unit(power), most[0]);
    wrong_t +=
        !is_near(t[i], std::tanh(double(x)), 0x1p-11 * std::fabs(std::tanh(double(x))), most[1]);
    if (std::fabs(x) > 0x1p126f) continue;  // the result is subnormal
    wrong_r += !is_near(r[i], 1 / double(x), unit(1 / double(x)), most[2]);
  }
  char text[3][60];
  for (int k = 0; k < 3; ++k) {
    std::snprintf(text[k], sizeof(text[k]), "(largest error %.3f of the bound)", most[k]);
#ifndef __CUDACC__
    if (most[k] < 0.9) std::printf("FAILED an exact twin %s\n", text[k]), failed = true;
#endif
  }
  report("exp2_approx", wrong_e, count, text[0]);
  report("tanh_approx", wrong_t, count, text[1]);
  report("reciprocal", wrong_r, count, text[2]);
}

struct Widen {
  static constexpr int kThreads = 256;
  float *bfloat16, *float16;

  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    const uint32_t bits = blockIdx.x * kThreads + threadIdx.x;
    bfloat16[bits] = value_of(BFloat16{uint16_t(bits)});
    float16[bits] = value_of(Float16{uint16_t(bits)});
  }
};

/// Values of every exponent of each format, the points halfway between them, their neighbours, and
/// random floats.
std::vector<float> numbers_to_round() {
  std::vector<float> in = {0.f, -0.f, INFINITY, -INFINITY, NAN, 65504.f, 65519.996f, 65520.f};
  in.push_back(std::numeric_limits<float>::max());
  in.push_back(std::numeric_limits<float>::denorm_min());
  in.push_back(std::numeric_limits<float>::min());
  for (const Format f : {kBfloat16, kFloat16, kTf32}) {
    for (int e = f.lowest - f.mantissa - 2; e <= f.highest; ++e) {
      for (const int units : {0, 1, 2, 3, (1 << f.mantissa) - 1}) {
        const int exponent = std::max(e, f.lowest) - f.mantissa;
        const double value = std::ldexp(1.0, e) + std::ldexp(units, exponent);
        const float halfway = float(value + std::ldexp(0.5, exponent));
        for (const float x : {float(value), halfway, std::nextafter(halfway, 0.f),
                              std::nextafter(halfway, INFINITY)}) {
          in.push_back(x);
          in.push_back(-x);
        }
      }
    }
  }
  std::mt19937 random(1);
  for (int i = 0; i < 200000; ++i) in.push_back(float_with(random()));
  for (int i = 0; i < 50000; ++i) in.push_back(float_with(random() & 0x807fffffu));  // subnormal
  for (float& x : in) {
    if (std::isnan(x)) x = NAN;  // quiet: a signalling one may keep its bits
  }
  return in;
}

void test_types() {
  const std::vector<float> numbers = numbers_to_round();
  const size_t count = numbers.size();
  Memory<float> in(numbers);
  Memory<uint32_t> bfloat16(count), float16(count), tf32(count);
  Memory<uint32_t> packed_bfloat16(count), packed_float16(count);
  Memory<float> larger(count);
  const Round kernel{in.data(),
                     bfloat16.data(),
                     float16.data(),
                     tf32.data(),
                     packed_bfloat16.data(),
                     packed_float16.data(),
                     larger.data(),
                     int(count)};
  if (!ran("round_to", kernel, {unsigned((count + Round::kThreads - 1) / Round::kThreads)})) return;
  const auto compare = [&](const char* name, Format f, bool even, const auto& value) {
    size_t wrong = 0;
    char first[100] = "";
    for (size_t i = 0; i < count; ++i) {
      const double expected = rounded(numbers[i], f, even), got = value(i);
      if (!same(got, expected) && !wrong++) {
        std::snprintf(first, sizeof(first), "%.9g gives %.9g for %.9g", numbers[i], got, expected);
      }
    }
    report(name, wrong, count, first);
  };
  const auto b = bfloat16.values(), h = float16.values(), t = tf32.values();
  compare("round_to(BFloat16)", kBfloat16, true,
          [&](size_t i) { return decoded(b[i], kBfloat16); });
  compare("round_to(Float16)", kFloat16, true, [&](size_t i) { return decoded(h[i], kFloat16); });
  const auto pb = packed_bfloat16.values(), ph = packed_float16.values();
  const auto sizes = larger.values();
  size_t wrong_pb = 0, wrong_ph = 0, wrong_size = 0;
  for (size_t i = 0; i < count; ++i) {
    const size_t next = (i + 1) % count;
    const auto is_pair = [&](uint32_t word, Format f) {
      return same(decoded(word & 0xffffu, f), rounded(numbers[i], f, true)) &&
             same(decoded(word >> 16, f), rounded(numbers[next], f, true));
    };
    wrong_pb += !is_pair(pb[i], kBfloat16);
    wrong_ph += !is_pair(ph[i], kFloat16);
    float expected = 0;
    for (const float x : {numbers[i], numbers[next]}) {
      if (std::fabs(x) > expected) expected = std::fabs(x);  // not a NaN
    }
    wrong_size += sizes[i] != expected;
  }
  report("pack<BFloat16>", wrong_pb, count);
  report("pack<Float16>", wrong_ph, count);
  report("larger_size", wrong_size, count);
  // Without the bits that an mma does not read.
  compare("tf32_of", kTf32, false, [&](size_t i) { return float_with(t[i] & 0xffffe000u); });

  Memory<float> from_bfloat16(65536), from_float16(65536);
  const Widen widen{from_bfloat16.data(), from_float16.data()};
  if (!ran("value_of", widen, {65536 / Widen::kThreads})) return;
  const auto wide_b = from_bfloat16.values(), wide_h = from_float16.values();
  size_t wrong_b = 0, wrong_h = 0;
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    wrong_b += !same(wide_b[bits], decoded(bits, kBfloat16));
    wrong_h += !same(wide_h[bits], decoded(bits, kFloat16));
  }
  report("value_of(BFloat16)", wrong_b, 65536);
  report("value_of(Float16)", wrong_h, 65536);
}

// ---- errors -------------------------------------------------------------------------------------

struct Assertion {
  static constexpr int kThreads = 64;
  unsigned limit;

  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    device_assert(threadIdx.x < limit, "a failed assertion, as the test wants");
  }
};

void test_device_assert() {
  if (!ran("device_assert", Assertion{Assertion::kThreads}, {2})) return;
  int status = launch(Assertion{Assertion::kThreads - 1}, {2}, nullptr);
#ifdef __CUDACC__
  if (!status) status = cudaDeviceSynchronize();
  const bool is_right = status == cudaErrorAssert;  // the message is on stderr
#else
  const bool is_right = status && std::strstr(why(status), "a failed assertion, as the test wants");
#endif
  report("device_assert", !is_right, 1);
}

}  // namespace

int main() {
  test_launch();
  test_shared_memory();
  test_turns<false>("sync_cta");
  test_turns<true>("sync_warp");
  test_sync_threads();
  test_handshake();
  test_ring<false>("store_relaxed, load_relaxed, fence_device, own clears");
  test_ring<true>("store_relaxed, load_relaxed, fence_device, another CTA's clears");
#ifndef __CUDACC__
  test_flaws();
  test_errors();
#endif
  test_shuffle<float>("shuffle_xor");
  test_shuffle<double>("shuffle_xor(double)");
  test_shuffle<uint32_t>("shuffle_xor(uint32_t)");
  test_shuffle_from();
  test_load_matrix();
  test_conditions();
  test_mma<BFloat16>("mma_m16n8k16<BFloat16>", 0);
  test_mma<Float16>("mma_m16n8k16<Float16>", 1500);
  test_mma<float>("mma_m16n8k8", 1500);
  test_types();
  test_approximations();
  test_clusters();
  test_device_assert();  // the device is of no use afterwards
  return failed;
}
