// Prints a GPU's peaks as JSON: rates, the latencies of instructions, and the time of a step that
// only exchanges h, within a CTA, a cluster or a grid. benchmarks/gpu_roofline.py compiles this
// file for the current GPU:
//
//   nvcc -O3 -std=c++17 --expt-relaxed-constexpr -arch=native -Icsrc benchmarks/peaks.cu
//
// No probe can wait endlessly: every poll of memory has a deadline. A probe that passes it is null.
#include <cooperative_groups.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "activations.h"
#include "cuda/mma.cuh"

using namespace fusedrnn;
using namespace fusedrnn::cuda;

namespace {

constexpr int kSchedulers = 4;  // per multiprocessor, from sm_80 to sm_120

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(status));
  std::exit(1);
}
void check(int status) { check(cudaError_t(status)); }

int attribute(cudaDeviceAttr which) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, 0));
  return value;
}

/// Memory on the device, zero at first.
template <class T>
class Memory {
 public:
  explicit Memory(size_t size) : size_(size) {
    check(cudaMalloc(&data_, size * sizeof(T)));
    zero();
  }
  ~Memory() { cudaFree(data_); }
  Memory(const Memory&) = delete;
  void zero() const { check(cudaMemsetAsync(data_, 0, size_ * sizeof(T))); }
  void fill(const std::vector<T>& values) const {
    check(cudaMemcpy(data_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  T* data() const { return data_; }

 private:
  size_t size_;
  T* data_ = nullptr;
};

// ---- time ---------------------------------------------------------------------------------------

/// Set by a kernel that has passed its deadline.
__device__ unsigned expired;

bool take_expired() {
  unsigned found = 0;
  const unsigned none = 0;
  check(cudaMemcpyFromSymbol(&found, expired, sizeof(found)));
  if (found) check(cudaMemcpyToSymbol(expired, &none, sizeof(none)));
  return found;
}

/// Bounds the sum of a thread's waits. A thread that has waited in vain never waits again, so its
/// kernel ends.
class Deadline {
 public:
  FUSEDRNN_DEVICE Deadline() { start_ = clock64(); }
  /// Calls `ready` until it is true or the deadline has passed.
  template <class Ready>
  FUSEDRNN_DEVICE void wait(const Ready& ready) {
    unsigned polls = 0;
    while (!has_passed_ && !ready()) {
      if (++polls % 32 == 0 && clock64() - start_ > kCycles) {
        has_passed_ = true;
        expired = 1;
      }
    }
  }
  FUSEDRNN_DEVICE bool has_passed() const { return has_passed_; }

 private:
  // Half a second. The longest kernel needs a fifth.
  static constexpr long long kCycles = 1ll << 30;
  long long start_;
  bool has_passed_ = false;
};

/// Milliseconds for the work that `run` enqueues; the minimum of a few tries. NaN if a kernel has
/// passed its deadline.
template <class Run>
double milliseconds(Run run) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  float least = 1e30f;
  for (int i = 0; i < 6; ++i) {
    check(cudaEventRecord(begin));
    run();
    check(cudaEventRecord(end));
    check(cudaEventSynchronize(end));
    float found = 0;
    check(cudaEventElapsedTime(&found, begin, end));
    if (i > 0) least = std::min(least, found);
    if (take_expired()) {
      least = NAN;
      break;
    }
  }
  check(cudaEventDestroy(begin));
  check(cudaEventDestroy(end));
  return least;
}

/// Nanoseconds per step, without a launch's cost.
template <class Run>
double nanoseconds(Run run) {
  constexpr int kFew = 500, kMany = 4500;
  const double few = milliseconds([&] { run(kFew); });
  if (std::isnan(few)) return few;
  return 1e6 * (milliseconds([&] { run(kMany); }) - few) / (kMany - kFew);
}

// ---- rates --------------------------------------------------------------------------------------

constexpr int kRounds = 2000;

/// Distinct values from 2^-8 to 2 in any type, because zeros would draw less power.
FUSEDRNN_DEVICE uint32_t operand(uint32_t i) {
  const uint32_t hash = (1 + threadIdx.x + 256 * i) * 2654435761u;
  return 0x3c003c00u | (hash >> 8 & 0x00ff00ffu);
}

/// Fragments for mma in independent chains.
template <class Element, int kChains>
struct MmaChains {
  uint32_t a[kChains][4], b;
  float c[kChains][4];

  FUSEDRNN_DEVICE void begin() {
    uint32_t count = 0;
    for (auto& fragment : a)
      for (uint32_t& value : fragment) value = operand(++count);
    b = operand(0);
    for (auto& fragment : c)
      for (float& value : fragment) value = 0;
  }
  /// An mma in each chain.
  FUSEDRNN_DEVICE void step() {
    scalar::unroll<kChains>([&](auto i) { mma<Element>(c[i], a[i], b, b); });
  }
};

/// Tensor core mma in every warp, with as many accumulators as the kernels use.
///
/// kCtas 2 and kChains 8 are the GPU's peak. kCtas 1 and kChains 4 are what a persistent kernel can
/// reach: its one CTA on a multiprocessor has 8 warps.
template <class Element, int kCtas_, int kChains>
struct TensorRate {
  static constexpr int kThreads = 256, kCtas = kCtas_;
  static constexpr double kFlops = 2.0 * 16 * 8 * (sizeof(Element) == 2 ? 16 : 8) * kChains / 32;
  float* out;

  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    MmaChains<Element, kChains> chains;
    chains.begin();
#pragma unroll 8
    for (int round = 0; round < kRounds; ++round) chains.step();
    float sum = 0;
    for (auto& fragment : chains.c)
      for (float value : fragment) sum += value;
    out[blockIdx.x * kThreads + threadIdx.x] = sum;
  }
};

template <class Value>
struct PlainRate {
  static constexpr int kThreads = 256, kCtas = 2, kChains = 16;
  static constexpr double kFlops = 2.0 * kChains;
  float* out;

  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    Value c[kChains] = {};
    const Value a = Value(threadIdx.x) * Value(1e-3), b = Value(blockIdx.x);
#pragma unroll 8
    for (int round = 0; round < kRounds; ++round)
      scalar::unroll<kChains>([&](auto i) { c[i] = c[i] * a + b; });
    Value sum = 0;
    for (Value value : c) sum += value;
    out[blockIdx.x * kThreads + threadIdx.x] = float(sum);
  }
};

/// TFLOP/s of the whole GPU.
template <class Kernel>
double tflops(float* out) {
  const unsigned ctas = Kernel::kCtas * unsigned(attribute(cudaDevAttrMultiProcessorCount));
  const double ms = milliseconds([&] { check(launch(Kernel{out}, Grid{ctas}, nullptr)); });
  return Kernel::kFlops * Kernel::kThreads * ctas * kRounds / ms * 1e-9;
}

/// 16 bytes at gpu scope: four words, each of them whole, in no order (PTX ISA, "Vector Data-types"
/// in the memory consistency model). Unlike a weak load it can't leave its loop.
FUSEDRNN_DEVICE Words load_relaxed(const Words* p) {
  Words w;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.word[0]), "=r"(w.word[1]), "=r"(w.word[2]), "=r"(w.word[3])
               : "l"(p)
               : "memory");
  return w;
}
FUSEDRNN_DEVICE void store_relaxed(Words* p, uint32_t value) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %1, %1, %1};"
               :
               : "l"(p), "r"(value)
               : "memory");
}

/// Each CTA reads its own 32 KB repeatedly, past the L1 cache.
struct L2Read {
  static constexpr int kThreads = 256, kCtas = 4, kLoads = 8, kTimes = 50;
  static constexpr int kWords = kThreads * kLoads;  // per CTA
  const Words* data;                                // [CTAs, kWords]
  uint32_t* out;

  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    const Words* const own = data + size_t(blockIdx.x) * kWords + threadIdx.x;
    uint32_t sum = 0;
#pragma unroll 2
    for (int time = 0; time < kTimes; ++time) {
      Words words[kLoads];
      scalar::unroll<kLoads>([&](auto i) { words[i] = load_relaxed(own + i * kThreads); });
      for (const Words& w : words) sum += w.word[0] ^ w.word[1] ^ w.word[2] ^ w.word[3];
    }
    if (sum == 1) out[0] = sum;  // never, but the compiler can't know: the data is zero
  }
};

/// TB/s read from the L2 cache by the whole GPU.
double l2_read() {
  const unsigned ctas = L2Read::kCtas * unsigned(attribute(cudaDevAttrMultiProcessorCount));
  const Memory<Words> data(size_t(ctas) * L2Read::kWords);
  const Memory<uint32_t> out(1);
  const double ms =
      milliseconds([&] { check(launch(L2Read{data.data(), out.data()}, Grid{ctas}, nullptr)); });
  return double(ctas) * L2Read::kWords * sizeof(Words) * L2Read::kTimes / ms * 1e-9;
}

// ---- latencies and issue rates of instructions --------------------------------------------------
//
// A probe has kThreads threads. begin() prepares a thread, step() runs kOps instructions, result()
// needs them all. In a latency probe each instruction waits for the one before it. In an issue
// probe two warps a scheduler have four independent chains each.

constexpr int kIssueThreads = 8 * kWarp, kIssueChains = 4;

/// Counts the cycles of many steps. The loop can't leave its place between the clock's two reads: a
/// barrier is on either side, and `out` needs its result.
template <class Probe>
struct Timed : Probe {
  long long* cycles;
  uint32_t* out;  // [kThreads]
  int rounds;

  FUSEDRNN_DEVICE void operator()(unsigned char* shared) const {
    Probe probe = *this;
    probe.begin(shared);
    sync_cta();
    const long long start = clock64();
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) probe.step();
    sync_cta();
    const long long end = clock64();
    probe.end();
    if (blockIdx.x > 0) return;
    out[threadIdx.x] = probe.result();
    if (threadIdx.x == 0) *cycles = end - start;
  }
};

struct LatencyProbe {
  static constexpr int kThreads = kWarp, kOps = 32;
  FUSEDRNN_DEVICE void end() {}
};

struct FfmaLatency : LatencyProbe {
  float value;
  FUSEDRNN_DEVICE void begin(unsigned char*) { value = float(threadIdx.x); }
  FUSEDRNN_DEVICE void step() {
    scalar::unroll<kOps>([&](auto) { value = fmaf(value, 0.5f, 1.f); });
  }
  FUSEDRNN_DEVICE uint32_t result() const { return scalar::bit_cast<uint32_t>(value); }
};

struct AluLatency : LatencyProbe {
  uint32_t value, a, b;
  FUSEDRNN_DEVICE void begin(unsigned char*) {
    value = threadIdx.x;
    a = operand(1);
    b = operand(2);
  }
  FUSEDRNN_DEVICE void step() {
    scalar::unroll<kOps / 2>([&](auto) { value = min(value ^ a, b); });
  }
  FUSEDRNN_DEVICE uint32_t result() const { return value; }
};

enum class Mufu { ex2, tanh };

template <Mufu kind>
FUSEDRNN_DEVICE float mufu(float x) {
  float y;
  if constexpr (kind == Mufu::ex2) {
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  } else {
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  }
  return y;
}

template <Mufu kind, int kChains = 1, int kThreads_ = kWarp>
struct MufuProbe : LatencyProbe {
  static constexpr int kThreads = kThreads_;
  float value[kChains];
  FUSEDRNN_DEVICE void begin(unsigned char*) {
    for (int i = 0; i < kChains; ++i) value[i] = 1.f + 0.01f * float(threadIdx.x + i);
  }
  FUSEDRNN_DEVICE void step() {
    scalar::unroll<kOps / kChains>(
        [&](auto) { scalar::unroll<kChains>([&](auto i) { value[i] = mufu<kind>(value[i]); }); });
  }
  FUSEDRNN_DEVICE uint32_t result() const {
    uint32_t sum = 0;
    for (float v : value) sum ^= scalar::bit_cast<uint32_t>(v);
    return sum;
  }
};
template <Mufu kind>
using MufuIssue = MufuProbe<kind, kIssueChains, kIssueThreads>;

template <class Element, int kChains = 1, int kThreads_ = kWarp>
struct MmaProbe : LatencyProbe {
  static constexpr int kThreads = kThreads_;
  MmaChains<Element, kChains> chains;
  FUSEDRNN_DEVICE void begin(unsigned char*) { chains.begin(); }
  FUSEDRNN_DEVICE void step() {
    scalar::unroll<kOps / kChains>([&](auto) { chains.step(); });
  }
  FUSEDRNN_DEVICE uint32_t result() const {
    uint32_t sum = 0;
    for (const auto& fragment : chains.c)
      for (float value : fragment) sum ^= scalar::bit_cast<uint32_t>(value);
    return sum;
  }
};
template <class Element>
using MmaIssue = MmaProbe<Element, kIssueChains, kIssueThreads>;

/// Follows offsets in shared memory.
struct LdsLatency : LatencyProbe {
  static constexpr unsigned kEntries = 64;
  uint32_t offset;
  const unsigned char* table;
  FUSEDRNN_DEVICE void begin(unsigned char* shared) {
    table = shared;
    for (unsigned i = threadIdx.x; i < kEntries; i += kThreads) {
      reinterpret_cast<uint32_t*>(shared)[i] = (i + 1) % kEntries * sizeof(uint32_t);
    }
    offset = 0;
  }
  FUSEDRNN_DEVICE void step() {
    scalar::unroll<kOps>(
        [&](auto) { offset = *reinterpret_cast<const uint32_t*>(table + offset); });
  }
  FUSEDRNN_DEVICE uint32_t result() const { return offset; }
};

struct ShflLatency : LatencyProbe {
  uint32_t value;
  FUSEDRNN_DEVICE void begin(unsigned char*) { value = threadIdx.x; }
  FUSEDRNN_DEVICE void step() {
    scalar::unroll<kOps>([&](auto) { value = shuffle(value, int(threadIdx.x + 1) % kWarp); });
  }
  FUSEDRNN_DEVICE uint32_t result() const { return value; }
};

/// A barrier of a CTA with 8 warps.
struct BarLatency : LatencyProbe {
  static constexpr int kThreads = kIssueThreads;
  FUSEDRNN_DEVICE void begin(unsigned char*) {}
  FUSEDRNN_DEVICE void step() {
    scalar::unroll<kOps>([&](auto) { sync_cta(); });
  }
  FUSEDRNN_DEVICE uint32_t result() const { return 0; }
};

/// Follows addresses in the L2 cache; the lines are spread over its slices.
struct L2Latency : LatencyProbe {
  static constexpr size_t kLines = 256, kStride = 528;  // 4224 bytes apart
  uint64_t at;
  FUSEDRNN_DEVICE void begin(unsigned char*) {}
  FUSEDRNN_DEVICE void step() {
    scalar::unroll<kOps>([&](auto) {
      asm volatile("ld.relaxed.gpu.global.u64 %0, [%0];" : "+l"(at) : : "memory");
    });
  }
  FUSEDRNN_DEVICE uint32_t result() const { return uint32_t(at); }

  /// Entry i of the chain at `first` names entry i + 1.
  static std::vector<uint64_t> chain(const uint64_t* first) {
    std::vector<uint64_t> addresses(kLines * kStride);
    for (size_t i = 0; i < kLines; ++i) {
      addresses[i * kStride] = reinterpret_cast<uint64_t>(first + (i + 1) % kLines * kStride);
    }
    return addresses;
  }
};

/// Waits for the thread's earlier stores, as a release does.
FUSEDRNN_DEVICE void fence_gpu() { asm volatile("fence.acq_rel.gpu;" : : : "memory"); }

/// A fence, or a store to global memory and a fence that waits for it: a release's cost before its
/// flag.
template <bool has_store>
struct MembarLatency : LatencyProbe {
  Words* to;  // [kThreads]
  FUSEDRNN_DEVICE void begin(unsigned char*) { to += threadIdx.x; }
  FUSEDRNN_DEVICE void step() {
    scalar::unroll<kOps>([&](auto i) {
      if (has_store) store_relaxed(to, uint32_t(i));
      fence_gpu();
    });
  }
  FUSEDRNN_DEVICE uint32_t result() const { return 0; }
};

/// Follows addresses in the shared memory of the other CTA of a cluster.
struct DsmemLatency : LatencyProbe, UsesClusters {
  static constexpr unsigned kEntries = 64;
  const uint64_t* at;
  static Grid grid() { return {2, 1, 1, kEntries * sizeof(uint64_t), false, 2}; }

  FUSEDRNN_DEVICE void begin(unsigned char* shared) {
#if __CUDA_ARCH__ >= 900
    const cooperative_groups::cluster_group cluster = cooperative_groups::this_cluster();
    auto* const table = reinterpret_cast<uint64_t*>(shared);
    uint64_t* const others = cluster.map_shared_rank(table, cluster.block_rank() ^ 1);
    sync_cluster();  // the other CTA has started
    for (unsigned i = threadIdx.x; i < kEntries; i += kThreads) {
      others[i] = reinterpret_cast<uint64_t>(others + (i + 1) % kEntries);
    }
    at = others;
    sync_cluster();
#endif
  }
  FUSEDRNN_DEVICE void step() {
    scalar::unroll<kOps>([&](auto) { at = reinterpret_cast<const uint64_t*>(*at); });
  }
  FUSEDRNN_DEVICE uint32_t result() const { return uint32_t(reinterpret_cast<uint64_t>(at)); }
  /// A CTA's shared memory must outlive the other's loads.
  FUSEDRNN_DEVICE void end() {
#if __CUDA_ARCH__ >= 900
    sync_cluster();
#endif
  }
};

/// A probe's kernel in a launch.
template <class Probe>
class TimedLaunch {
 public:
  explicit TimedLaunch(const Probe& probe, const Grid& grid = {1}) : grid_(grid) {
    static_cast<Probe&>(kernel_) = probe;
    kernel_.cycles = cycles_.data();
    kernel_.out = out_.data();
  }
  void launch_rounds(int rounds) {
    kernel_.rounds = rounds;
    check(launch(kernel_, grid_, nullptr));
  }
  /// The cycles of a launch; the minimum of a few.
  double cycles(int rounds) {
    long long least = 0;
    for (int i = 0; i < 4; ++i) {
      long long found = 0;
      launch_rounds(rounds);
      check(cudaMemcpy(&found, cycles_.data(), sizeof(found), cudaMemcpyDeviceToHost));
      if (i > 0) least = i == 1 ? found : std::min(least, found);
    }
    return double(least);
  }

 private:
  Timed<Probe> kernel_;
  Grid grid_;
  Memory<long long> cycles_{1};
  Memory<uint32_t> out_{Probe::kThreads};
};

/// Cycles per instruction of a warp. With several warps a scheduler: of the scheduler.
template <class Probe>
double cycles_of(const Probe& probe, const Grid& grid = {1}, int warps_per_scheduler = 1) {
  constexpr int kFew = 100, kMany = 1100;
  TimedLaunch<Probe> timed(probe, grid);
  const double cycles = timed.cycles(kMany) - timed.cycles(kFew);
  return cycles / ((kMany - kFew) * Probe::kOps) / warps_per_scheduler;
}
template <class Probe>
double issue_cycles_of() {
  return cycles_of(Probe{}, {1}, Probe::kThreads / kWarp / kSchedulers);
}

/// The multiprocessors' clock in GHz, with one busy warp.
double clock_ghz() {
  constexpr int kFew = 20'000, kMany = 220'000;
  TimedLaunch<FfmaLatency> timed(FfmaLatency{});
  const double cycles = timed.cycles(kMany) - timed.cycles(kFew);
  const double ms = milliseconds([&] { timed.launch_rounds(kMany); }) -
                    milliseconds([&] { timed.launch_rounds(kFew); });
  return 1e-6 * cycles / ms;
}

// ---- exchange of h ------------------------------------------------------------------------------
//
// An all-gather: in a step each CTA sends 64 bytes to 2 KB, its message, and gets every CTA's
// message. One row of 32 bfloat16 units is 64 bytes.

constexpr unsigned kMaxMessage = 2048;
constexpr unsigned kMessages[] = {64, 512, kMaxMessage};
constexpr int kLogWordsBytes = 4;  // sizeof(Words) is 16

/// Words in a message, as a power of two: a division would take longer than the exchange's own
/// work.
unsigned log_words(unsigned message) {
  unsigned log = 0;
  while ((1u << (log + kLogWordsBytes)) < message) ++log;
  return log;
}

/// Between a CTA's threads, through shared memory.
struct InCta {
  static constexpr int kThreads = 128, kMessage = kThreads * sizeof(float);
  float* out;
  int steps;

  FUSEDRNN_DEVICE void operator()(unsigned char* shared) const {
    float* const h = reinterpret_cast<float*>(shared);  // [2, kThreads]
    float value = float(threadIdx.x);
    for (int t = 0; t < steps; ++t) {
      float* const buffer = h + t % 2 * kThreads;
      buffer[threadIdx.x] = value;
      sync_cta();
      value = 0.5f * buffer[(threadIdx.x + 37) % kThreads];
    }
    out[threadIdx.x] = value;
  }
};

// A grid's all-gather has kLoads loads of a thread in flight. A message of 64 bytes needs one or
// two; polling eight would take longer.

/// Between all CTAs of a grid, through L2, with a counter of arrivals as in the persistent grid
/// kernels.
template <int kLoads>
struct InGrid {
  static constexpr int kThreads = 256;
  Words* h;           // [2, CTAs, words]
  uint32_t* arrived;  // 0 before a launch
  uint32_t* out;
  unsigned log_words;
  int steps;

  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    Deadline deadline;
    const unsigned words = 1u << log_words, total = gridDim.x << log_words;
    uint32_t value = threadIdx.x;
    for (int t = 0; t < steps; ++t) {
      Words* const buffer = h + t % 2 * total;
      if (threadIdx.x < words) {
        buffer[blockIdx.x * words + threadIdx.x] = {{value, value, value, value}};
      }
      sync_cta();
      if (threadIdx.x == 0) {
        add_release(arrived, 1);
        const unsigned expected = gridDim.x * unsigned(t + 1);
        deadline.wait([&] { return load_acquire(arrived) >= expected; });
      }
      sync_cta();
      for (unsigned first = threadIdx.x; first < total; first += kLoads * kThreads) {
        Words got[kLoads] = {};
        scalar::unroll<kLoads>([&](auto i) {
          if (first + i * kThreads < total) got[i] = load_cg(buffer + first + i * kThreads);
        });
        for (const Words& w : got) value += w.word[0] ^ w.word[1] ^ w.word[2] ^ w.word[3];
      }
    }
    out[blockIdx.x * kThreads + threadIdx.x] = value;
  }
};

/// The same without a counter or a fence: each word of the data is its own flag, and readers poll
/// the data itself. This is the least that an exchange through L2 takes: a store and a load.
///
/// The lowest bit of a word is the flag. It changes with each pass over the two buffers, so no word
/// need be cleared. A CTA overwrites step t's words at step t + 2, after it has got step t + 1's
/// from every CTA. Each CTA sends those after its barrier, so all its threads have read step t's.
template <int kLoads>
struct InGridFlags {
  static constexpr int kThreads = 256;
  Words* h;  // [2, CTAs, words], 0 before a launch
  uint32_t* out;
  unsigned log_words;
  int steps;

  FUSEDRNN_DEVICE void operator()(unsigned char*) const {
    Deadline deadline;
    const unsigned words = 1u << log_words, total = gridDim.x << log_words;
    uint32_t value = threadIdx.x;
    for (int t = 0; t < steps; ++t) {
      Words* const buffer = h + t % 2 * total;
      const uint32_t flag = (unsigned(t) / 2 + 1) % 2;
      if (threadIdx.x < words) {
        store_relaxed(buffer + blockIdx.x * words + threadIdx.x, value << 1 | flag);
      }
      for (unsigned first = threadIdx.x; first < total; first += kLoads * kThreads) {
        Words got[kLoads] = {};
        deadline.wait([&] {
          scalar::unroll<kLoads>([&](auto i) {
            const bool exists = first + i * kThreads < total;
            if (exists) got[i] = load_relaxed(buffer + first + i * kThreads);
            if (!exists) got[i] = {{flag, flag, flag, flag}};
          });
          uint32_t ones = ~0u, any = 0;
          for (const Words& w : got) {
            for (uint32_t word : w.word) {
              ones &= word;
              any |= word;
            }
          }
          return ((flag ? ones : ~any) & 1) != 0;
        });
        for (const Words& w : got) value += w.word[0];
      }
      sync_cta();
    }
    out[blockIdx.x * kThreads + threadIdx.x] = value;
  }
};

/// To the next CTA in a cluster, through its shared memory, with the cluster barrier.
constexpr int kInClusterThreads = 128;
__global__ void __launch_bounds__(kInClusterThreads, 1) in_cluster(float* out, int steps) {
#if __CUDA_ARCH__ >= 900
  __shared__ float h[2][kInClusterThreads];
  const cooperative_groups::cluster_group cluster = cooperative_groups::this_cluster();
  const unsigned peer = (cluster.block_rank() + 1) % cluster.num_blocks();
  float value = float(threadIdx.x);
  cluster.sync();
  for (int t = 0; t < steps; ++t) {
    cluster.map_shared_rank(h[t % 2], peer)[threadIdx.x] = value;
    cluster.sync();
    value = 0.5f * h[t % 2][(threadIdx.x + 37) % kInClusterThreads];
  }
  out[blockIdx.x * kInClusterThreads + threadIdx.x] = value;
#endif
}

/// Whether the barrier's phase of this parity is complete. TransactionBarrier::wait has the same
/// instructions, without an end.
FUSEDRNN_DEVICE bool is_complete(TransactionBarrier* barrier, uint32_t phase) {
#if __CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 8)
#define FUSEDRNN_ORDER "relaxed"
#define FUSEDRNN_FENCE "fence.acquire.sync_restrict::shared::cluster.cluster;"
#else
#define FUSEDRNN_ORDER "acquire"
#define FUSEDRNN_FENCE ""
#endif
  uint32_t done;
  asm volatile(
      "{\n\t"
      ".reg .pred done;\n\t"
      "mbarrier.try_wait.parity." FUSEDRNN_ORDER
      ".cluster.shared::cta.b64 done, [%1], %2;\n\t"
      "selp.u32 %0, 1, 0, done;\n\t"
      "}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(phase)
      : "memory");
  if (done) asm volatile(FUSEDRNN_FENCE : : : "memory");
#undef FUSEDRNN_ORDER
#undef FUSEDRNN_FENCE
  return done;
}

/// Between all CTAs of a cluster, by st.async and transaction barriers, as in the persistent
/// cluster kernels.
struct InClusterAsync : UsesClusters {
  static constexpr int kThreads = 256;
  static constexpr unsigned kMaxCtas = 16;
  uint32_t* out;
  unsigned log_words;
  int steps;

  /// The same shared memory for every message, because active_clusters() remembers its answers by
  /// the cluster's size.
  static Grid grid(unsigned ctas) {
    const size_t shared = 2 * kMaxCtas * kMaxMessage + 2 * sizeof(TransactionBarrier);
    return {ctas, 1, 1, shared, false, ctas};
  }
  FUSEDRNN_DEVICE void operator()(unsigned char* shared) const {
    Deadline deadline;
    const unsigned ctas = gridDim.x, words = 1u << log_words, total = ctas << log_words;
    Words* const h = reinterpret_cast<Words*>(shared);  // [2, CTAs, words]
    auto* const barriers =
        reinterpret_cast<TransactionBarrier*>(shared + 2 * kMaxCtas * kMaxMessage);
    const uint32_t bytes = total * sizeof(Words);
    if (threadIdx.x == 0) {
      for (int i = 0; i < 2; ++i) {
        barriers[i].init();
        barriers[i].arrive_and_expect_tx(bytes);
      }
    }
    sync_cluster();
    // Item i is word i % words for CTA i / words. A thread without items takes no part: nothing
    // would keep the others from completing a phase that it still has to see. A thread reads as
    // many words as it sends, so a message tells that its sender has read the step before.
    const int own_steps = threadIdx.x < total ? steps : 0;
    Words own = {{threadIdx.x, threadIdx.x, threadIdx.x, threadIdx.x}};
    const unsigned word = threadIdx.x & (words - 1), from = (blockIdx.x + 1) % ctas;
    for (int t = 0; t < own_steps; ++t) {
      Words* const buffer = h + t % 2 * total;
      TransactionBarrier* const barrier = barriers + t % 2;
      for (unsigned i = threadIdx.x; i < total; i += kThreads) {
        st_async(own, buffer + blockIdx.x * words + word, barrier, i >> log_words);
      }
      deadline.wait([&] { return is_complete(barrier, t / 2 % 2); });
      if (deadline.has_passed()) break;
      if (threadIdx.x == 0 && t + 2 < steps) barrier->arrive_and_expect_tx(bytes);
      own = buffer[from * words + word];
    }
    sync_warp();
    out[blockIdx.x * kThreads + threadIdx.x] = own.word[0];
    sync_cluster();  // after a missed deadline others may still send to this CTA
  }
};

/// A cluster in which each CTA fills a multiprocessor, as in a persistent layer.
struct Cluster {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute;

  explicit Cluster(unsigned ctas) {
    config.gridDim = dim3(ctas);
    config.blockDim = dim3(kInClusterThreads);
    config.dynamicSmemBytes = size_t(::attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)) - 4096;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = ctas;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
    check(cudaFuncSetAttribute(in_cluster, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    check(cudaFuncSetAttribute(in_cluster, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               int(config.dynamicSmemBytes)));
  }
  Cluster(const Cluster&) = delete;

  /// The number of clusters the GPU can hold at once.
  int active() const {
    int count = 0;
    const cudaError_t status = cudaOccupancyMaxActiveClusters(&count, in_cluster, &config);
    if (status != cudaSuccess) cudaGetLastError();  // the cluster is too large for this GPU
    return status == cudaSuccess ? count : 0;
  }
};

// ---- results ------------------------------------------------------------------------------------

/// Named values, printed as a JSON object. A value that was not measured is null.
class Section {
 public:
  void add(const std::string& name, double value) {
    if (!std::isfinite(value)) std::fprintf(stderr, "%s: passed its deadline\n", name.c_str());
    values_.emplace_back(name, value);
  }
  void print(const char* name, const char* end) const {
    std::printf("\"%s\": {", name);
    const char* comma = "";
    for (const auto& [key, value] : values_) {
      std::printf("%s\"%s\": ", comma, key.c_str());
      if (std::isfinite(value)) {
        std::printf("%.6g", value);
      } else {
        std::printf("null");
      }
      comma = ", ";
    }
    std::printf("}%s\n", end);
  }

 private:
  std::vector<std::pair<std::string, double>> values_;
};

Section rates() {
  const Memory<float> memory(size_t(attribute(cudaDevAttrMultiProcessorCount)) * 2 * 256);
  float* const out = memory.data();
  for (int i = 0; i < 100; ++i) tflops<TensorRate<BFloat16, 2, 8>>(out);  // ramps up the clocks
  Section found;
  found.add("bfloat16", tflops<TensorRate<BFloat16, 2, 8>>(out));
  found.add("float16", tflops<TensorRate<Float16, 2, 8>>(out));
  found.add("tf32", tflops<TensorRate<float, 2, 8>>(out));
  found.add("ieee", tflops<PlainRate<float>>(out));
  found.add("float64", tflops<PlainRate<double>>(out));
  found.add("bfloat16, 8 warps", tflops<TensorRate<BFloat16, 1, 4>>(out));
  found.add("float16, 8 warps", tflops<TensorRate<Float16, 1, 4>>(out));
  found.add("tf32, 8 warps", tflops<TensorRate<float, 1, 4>>(out));
  return found;
}

Section latencies(bool has_clusters) {
  Section found;
  found.add("ffma", cycles_of(FfmaLatency{}));
  found.add("alu", cycles_of(AluLatency{}));
  found.add("mufu_ex2", cycles_of(MufuProbe<Mufu::ex2>{}));
  found.add("mufu_tanh", cycles_of(MufuProbe<Mufu::tanh>{}));
  found.add("hmma_bfloat16", cycles_of(MmaProbe<BFloat16>{}));
  found.add("hmma_float16", cycles_of(MmaProbe<Float16>{}));
  found.add("hmma_tf32", cycles_of(MmaProbe<float>{}));
  found.add("lds", cycles_of(LdsLatency{}, {1, 1, 1, LdsLatency::kEntries * sizeof(uint32_t)}));
  found.add("shfl", cycles_of(ShflLatency{}));
  found.add("bar_8_warps", cycles_of(BarLatency{}));
  const Memory<uint64_t> lines(L2Latency::kLines * L2Latency::kStride);
  lines.fill(L2Latency::chain(lines.data()));
  found.add("l2_load", cycles_of(L2Latency{{}, reinterpret_cast<uint64_t>(lines.data())}));
  const Memory<Words> to(LatencyProbe::kThreads);
  found.add("membar_gpu", cycles_of(MembarLatency<false>{{}, to.data()}));
  found.add("store_and_membar_gpu", cycles_of(MembarLatency<true>{{}, to.data()}));
  if (has_clusters && active_clusters<Timed<DsmemLatency>>(DsmemLatency::grid())) {
    found.add("dsmem_load", cycles_of(DsmemLatency{}, DsmemLatency::grid()));
  }
  return found;
}

Section issue_rates() {
  Section found;
  found.add("mufu_ex2", issue_cycles_of<MufuIssue<Mufu::ex2>>());
  found.add("mufu_tanh", issue_cycles_of<MufuIssue<Mufu::tanh>>());
  found.add("hmma_bfloat16", issue_cycles_of<MmaIssue<BFloat16>>());
  found.add("hmma_float16", issue_cycles_of<MmaIssue<Float16>>());
  found.add("hmma_tf32", issue_cycles_of<MmaIssue<float>>());
  return found;
}

std::string exchange_name(const char* protocol, unsigned ctas, unsigned message) {
  return std::string(protocol) + " " + std::to_string(ctas) + " " + std::to_string(message);
}

/// Nanoseconds per step of `Exchange<loads>` with enough loads for a thread's part of the message.
template <template <int> class Exchange, class... Args>
double grid_nanoseconds(const Memory<uint32_t>& zeroed, unsigned ctas, unsigned message,
                        Args... args) {
  const unsigned log = log_words(message), threads = Exchange<1>::kThreads, total = ctas << log;
  const auto measure = [&](auto loads) {
    return nanoseconds([&](int steps) {
      zeroed.zero();
      const Exchange<loads> kernel{args..., log, steps};
      check(launch(kernel, Grid{ctas, 1, 1, 0, true}, nullptr));
    });
  };
  if (total <= threads) return measure(std::integral_constant<int, 1>{});
  if (total <= 2 * threads) return measure(std::integral_constant<int, 2>{});
  return measure(std::integral_constant<int, 8>{});
}

void add_grids(Section& found, uint32_t* out) {
  const unsigned multiprocessors = unsigned(attribute(cudaDevAttrMultiProcessorCount));
  std::vector<unsigned> sizes;
  for (unsigned ctas = 2; ctas < multiprocessors; ctas *= 2) sizes.push_back(ctas);
  sizes.push_back(multiprocessors);
  const Memory<uint32_t> memory(2 * size_t(multiprocessors) * kMaxMessage / sizeof(uint32_t));
  const Memory<uint32_t> arrived(1);
  Words* const h = reinterpret_cast<Words*>(memory.data());
  for (unsigned ctas : sizes) {
    for (unsigned message : kMessages) {
      found.add(exchange_name("grid", ctas, message),
                grid_nanoseconds<InGrid>(arrived, ctas, message, h, arrived.data(), out));
      found.add(exchange_name("grid_flags", ctas, message),
                grid_nanoseconds<InGridFlags>(memory, ctas, message, h, out));
    }
  }
}

void add_clusters(Section& found, Section& active_sizes, uint32_t* out) {
  for (unsigned ctas = 2; ctas <= InClusterAsync::kMaxCtas; ctas *= 2) {
    const Cluster cluster(ctas);
    const int active = cluster.active();
    active_sizes.add(std::to_string(ctas), active);
    if (!active) continue;
    found.add(exchange_name("cluster", ctas, kInClusterThreads * sizeof(float)),
              nanoseconds([&](int steps) {
                check(cudaLaunchKernelEx(&cluster.config, in_cluster, reinterpret_cast<float*>(out),
                                         steps));
              }));
    const Grid grid = InClusterAsync::grid(ctas);
    if (!active_clusters<InClusterAsync>(grid)) continue;
    for (unsigned message : kMessages) {
      const unsigned log = log_words(message);
      found.add(exchange_name("st_async", ctas, message), nanoseconds([&](int steps) {
                  check(launch(InClusterAsync{{}, out, log, steps}, grid, nullptr));
                }));
    }
  }
}

}  // namespace

int main() {
  const unsigned multiprocessors = unsigned(attribute(cudaDevAttrMultiProcessorCount));
  const bool has_clusters = attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
  const Section tflops = rates();  // first, because it ramps up the clocks
  Section clock, l2, exchange, active_sizes;
  clock.add("ghz", clock_ghz());
  l2.add("read_tb_per_s", l2_read());
  const Section latency = latencies(has_clusters), issue = issue_rates();
  const Memory<uint32_t> out(size_t(multiprocessors) * 256);
  exchange.add(exchange_name("cta", 1, InCta::kMessage), nanoseconds([&](int steps) {
                 const Grid grid{1, 1, 1, 2 * InCta::kMessage};
                 check(launch(InCta{reinterpret_cast<float*>(out.data()), steps}, grid, nullptr));
               }));
  if (has_clusters) add_clusters(exchange, active_sizes, out.data());
  add_grids(exchange, out.data());
  check(cudaDeviceSynchronize());

  std::printf("{");
  clock.print("clock", ",");
  tflops.print("tflops", ",");
  l2.print("l2", ",");
  latency.print("latency_cycles", ",");
  issue.print("issue_cycles", ",");
  exchange.print("exchange_ns", ",");
  active_sizes.print("active_clusters", "}");
  return 0;
}
