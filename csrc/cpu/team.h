// Threads that share one run's steps. Each step needs the whole step before.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "waiter.h"

namespace fusedrnn::cpu {

/// Every member calls run. Together they do each (step, part) once, steps in order.
///
/// A member does its own part, then waits for the other parts. A thread may start milliseconds
/// late, or never while the pool serves another call. So after about a microsecond a waiting member
/// takes over a part nobody has begun. A part gives the same result on any thread.
class Team {
 public:
  explicit Team(int64_t parts) : size_(parts), parts_(new Part[size_t(parts)]) {}

  /// A waiting member sleeps after `spin`. It leaves early if give_up(i, waited) is true, in step i
  /// after a wait of this time. Returns the time of its long waits for parts that other threads had
  /// begun.
  template <class GiveUp, class Step>
  Clock::duration run(int64_t member, int64_t steps, Clock::duration spin, GiveUp&& give_up,
                      Step&& step) {
    Clock::duration held{0};
    int patience = kPatience;  // none after an absence, until the member has begun a part
    for (int64_t i = 0; i < steps; ++i) {
      if (give_up(i, Clock::duration(0))) return held;
      work(member, i, step);
      for (int64_t p = 0; p < size_; ++p) {
        Waiter waiter(spin);
        while (parts_[p].done.load(std::memory_order_acquire) <= i) {
          if (parts_[p].begun.load(std::memory_order_relaxed) > i) {
            patience = kPatience;
          } else if (waiter.turns() >= patience && work(p, i, step)) {
            patience = 0;
            continue;
          }
          waiter.turn();
          if (waiter.waited() >= kLongWait && give_up(i, waiter.waited())) {
            return held + waiter.waited();
          }
        }
        if (waiter.waited() >= kLongWait) held += waiter.waited();
      }
    }
    return held;
  }

 private:
  static constexpr int kPatience = 64;  // turns: about a microsecond

  struct alignas(64) Part {
    std::atomic<int64_t> begun{0}, done{0};  // in steps
  };

  template <class Step>
  bool work(int64_t p, int64_t i, Step&& step) {
    int64_t expected = i;
    if (!parts_[p].begun.compare_exchange_strong(expected, i + 1, std::memory_order_acq_rel)) {
      return false;
    }
    step(i, p);
    parts_[p].done.store(i + 1, std::memory_order_release);
    return true;
  }

  int64_t size_;
  std::unique_ptr<Part[]> parts_;
};

}  // namespace fusedrnn::cpu
