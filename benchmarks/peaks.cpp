// The peaks of one core: rate of multiply-adds, and of reads. benchmarks/limits.py compiles this
// for the machine it runs on, and calls it on as many threads at once as torch has.
#include <chrono>
#include <cstddef>
#include <cstdint>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 64;
#elif defined(__AVX__)
constexpr int kWidth = 32;
#else
constexpr int kWidth = 16;
#endif
// Chains that do not wait for each other: more than latency times units (4 cycles, 2 units), and
// few enough for 16 registers.
constexpr int kChains = 12;
constexpr int kSteps = 1000;

// Calls run() for about this many seconds; gives how often a second.
template <class F>
double rate(double seconds, F run) {
  using clock = std::chrono::steady_clock;
  const auto start = clock::now();
  double spent = 0;
  long count = 0;
  while (spent < seconds) {
    run();
    ++count;
    spent = std::chrono::duration<double>(clock::now() - start).count();
  }
  return count / spent;
}

// Keeps the compiler from leaving out what leads to x, and from knowing x.
template <class T>
void keep(T& x) {
  asm volatile("" : "+m"(x) : : "memory");
}

template <class T>
double multiply_adds(double seconds) {
  typedef T Vector __attribute__((vector_size(kWidth)));
  Vector sums[kChains] = {};
  Vector a = sums[0] + T(0.5), b = sums[0] + T(1);
  keep(a);
  keep(b);
  const double runs = rate(seconds, [&] {
    for (int step = 0; step < kSteps; ++step)
      for (Vector& sum : sums) sum = sum * a + b;
    keep(sums);
  });
  return runs * kSteps * kChains * 2 * (kWidth / sizeof(T));
}

}  // namespace

extern "C" {

// Floating point operations a second; 0 where the instruction is missing.
double peak_float32(double seconds) { return multiply_adds<float>(seconds); }
double peak_float64(double seconds) { return multiply_adds<double>(seconds); }

double peak_bfloat16(double seconds) {
#ifdef __AVX512BF16__
  __m512 sums[kChains] = {};
  __m512i ones = _mm512_set1_epi16(0x3f80);
  keep(ones);
  const auto a = (__m512bh)ones;
  const double runs = rate(seconds, [&] {
    for (int step = 0; step < kSteps; ++step)
      for (__m512& sum : sums) sum = _mm512_dpbf16_ps(sum, a, a);
    keep(sums);
  });
  return runs * kSteps * kChains * 2 * 32;
#else
  (void)seconds;
  return 0;
#endif
}

// Bytes a second of reading the same bytes again and again; their number is a multiple of 512.
double peak_read(double seconds, const void* memory, std::size_t bytes) {
  typedef std::uint64_t Vector __attribute__((vector_size(kWidth), aligned(1)));
  constexpr std::size_t kUnroll = 8;
  const std::size_t blocks = bytes / sizeof(Vector) / kUnroll;
  const auto* data = static_cast<const Vector*>(memory);
  // Small sets many times between two looks at the clock.
  const std::size_t passes = 1 + (std::size_t(1) << 20) / bytes;
  const double runs = rate(seconds, [&] {
    Vector sums[kUnroll] = {};
    for (std::size_t pass = 0; pass < passes; ++pass) {
      for (std::size_t i = 0; i < blocks; ++i)
        for (std::size_t j = 0; j < kUnroll; ++j) sums[j] += data[i * kUnroll + j];
      asm volatile("" : : : "memory");
    }
    Vector total = sums[0];
    for (std::size_t j = 1; j < kUnroll; ++j) total += sums[j];
    keep(total);
  });
  return runs * double(passes * blocks * kUnroll * sizeof(Vector));
}
}
