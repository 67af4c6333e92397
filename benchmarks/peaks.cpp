// Measures a core's peak multiply-add and read rates. benchmarks/roofline.py compiles this file for
// the current machine and calls it from all torch threads at once.
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
// Independent chains: more than latency times units (4 cycles * 2 units = 8), and few enough for 16
// registers.
constexpr int kChains = 12;
constexpr int kSteps = 1000;

// Calls run() for about `seconds`; gives the calls per second.
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

// Hides x from the optimizer: the compiler must compute x and may not assume its value.
template <class Value>
void keep(Value& x) {
  asm volatile("" : "+m"(x) : : "memory");
}

template <class Element>
double multiply_adds(double seconds) {
  typedef Element Vector __attribute__((vector_size(kWidth)));
  Vector accumulators[kChains] = {};
  Vector a = accumulators[0] + Element(0.5), b = accumulators[0] + Element(1);
  keep(a);
  keep(b);
  const double runs = rate(seconds, [&] {
    for (int step = 0; step < kSteps; ++step)
      for (Vector& accumulator : accumulators) accumulator = accumulator * a + b;
    keep(accumulators);
  });
  return runs * kSteps * kChains * 2 * (kWidth / sizeof(Element));
}

}  // namespace

extern "C" {

// Floating point operations per second; 0 if the instruction is missing.
double peak_float32(double seconds) { return multiply_adds<float>(seconds); }
double peak_float64(double seconds) { return multiply_adds<double>(seconds); }

double peak_bfloat16(double seconds) {
#ifdef __AVX512BF16__
  __m512 accumulators[kChains] = {};
  __m512i ones = _mm512_set1_epi16(0x3f80);
  keep(ones);
  const auto a = (__m512bh)ones;
  const double runs = rate(seconds, [&] {
    for (int step = 0; step < kSteps; ++step)
      for (__m512& accumulator : accumulators) accumulator = _mm512_dpbf16_ps(accumulator, a, a);
    keep(accumulators);
  });
  return runs * kSteps * kChains * 2 * 32;
#else
  (void)seconds;
  return 0;
#endif
}

// Bytes per second when reading the same bytes repeatedly; `bytes` is a multiple of 512.
double peak_read(double seconds, const void* memory, std::size_t bytes) {
  typedef std::uint64_t Vector __attribute__((vector_size(kWidth), aligned(1)));
  constexpr std::size_t kUnroll = 8;
  const std::size_t blocks = bytes / sizeof(Vector) / kUnroll;
  const auto* data = static_cast<const Vector*>(memory);
  // Reads small sets many times between two clock readings.
  const std::size_t passes = 1 + (std::size_t(1) << 20) / bytes;
  const double runs = rate(seconds, [&] {
    Vector accumulators[kUnroll] = {};
    for (std::size_t pass = 0; pass < passes; ++pass) {
      for (std::size_t i = 0; i < blocks; ++i)
        for (std::size_t j = 0; j < kUnroll; ++j) accumulators[j] += data[i * kUnroll + j];
      asm volatile("" : : : "memory");
    }
    Vector total = accumulators[0];
    for (std::size_t j = 1; j < kUnroll; ++j) total += accumulators[j];
    keep(total);
  });
  return runs * double(passes * blocks * kUnroll * sizeof(Vector));
}
}
