// How a thread waits for another thread's part.
#pragma once

#include <algorithm>
#include <chrono>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fusedrnn::cpu {

using Clock = std::chrono::steady_clock;

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

/// How long a caller spins. The wait for a worker that lost its core ends with that core's time
/// slice, 3 or 4 ms. An earlier sleep or a yield leaves this core idle, and the scheduler moves the
/// worker there. Then both share a core, and the following calls take as long as alone. Beside a
/// busy loop, sleeps after 0.2 ms doubled the median of B8 T50 H128.
constexpr Clock::duration kCallerSpin = std::chrono::milliseconds(5);
/// How long a worker spins. The caller may be waiting for this core.
constexpr Clock::duration kWorkerSpin = std::chrono::microseconds(100);

/// A shorter wait is part of sharing work.
constexpr Clock::duration kLongWait = std::chrono::microseconds(100);

/// One wait: it spins at first, then it sleeps.
class Waiter {
 public:
  explicit Waiter(Clock::duration spin) : spin_(spin) {}
  void turn() {
    ++turns_;
    if (waited_ < spin_ && turns_ % kTurns != 0) return pause();
    const auto now = Clock::now();
    if (turns_ == kTurns) begin_ = now;
    waited_ = now - begin_;
    if (waited_ >= spin_) std::this_thread::sleep_for(std::clamp(waited_ / 4, kShortest, kLongest));
  }
  int turns() const { return turns_; }
  /// The time of all turns but some of the first and the last.
  Clock::duration waited() const { return waited_; }

 private:
  static constexpr int kTurns = 64;  // about a microsecond
  static constexpr Clock::duration kShortest = std::chrono::microseconds(50),
                                   kLongest = std::chrono::microseconds(500);
  const Clock::duration spin_;
  int turns_ = 0;
  Clock::time_point begin_;
  Clock::duration waited_{0};
};

}  // namespace fusedrnn::cpu
