// Work on torch's pool of threads, and whether a call may use the pool.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <chrono>

namespace fusedrnn::cpu {

/// Threads in torch's pool: one where torch's headers have no pool.
inline int64_t threads() {
#ifdef INTRA_OP_PARALLEL
  return at::get_num_threads();
#else
  return 1;
#endif
}

/// Decides whether a short call may use torch's pool. Joining costs milliseconds if a worker sleeps
/// or has lost its core. So sleepers are not woken for isolated calls. After a call that a worker
/// did not join, we back off for 1 to 256 ms.
class PoolBackoff {
  using Clock = std::chrono::steady_clock;

 public:
  /// Marks when an op's call begins and ends.
  class Call {
   public:
    Call() {
      State& s = state();
      const auto now = Clock::now();
      if (now - s.last_end > kAsleep) s.streak_begin = now;
      s.awake = now - s.streak_begin > kStreak;
    }
    ~Call() { state().last_end = Clock::now(); }
    Call(const Call&) = delete;
  };

  /// Whether this part of a call, of `work` multiplications, may use the pool.
  static bool may_use_pool(int64_t work) {
    const State& s = state();
    return work >= kLong || (s.awake && (s.pause.count() == 0 || Clock::now() >= s.pause_end));
  }

  /// Calls task(worker) for each worker on the pool's threads. The caller is worker 0.
  template <class F>
  static void run(int64_t workers, const F& task) {
    std::atomic<int64_t> joined{0};
    bool all_joined = true;
    const auto start = Clock::now();
    auto done = start;
    at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      ++joined;
      for (int64_t worker = begin; worker < end; ++worker) task(worker);
      if (begin == 0) {
        all_joined = joined == workers;
        done = Clock::now();
      }
    });
    const auto waited = Clock::now() - done;
    note(all_joined && (waited < kStall || waited < done - start));
  }

 private:
  /// About a millisecond of multiplications: worth the wait for a worker.
  static constexpr int64_t kLong = 1 << 27;
  static constexpr Clock::duration kStall = std::chrono::microseconds(100);
  static constexpr Clock::duration kPause = std::chrono::milliseconds(1),
                                   kLongestPause = 256 * kPause;
  /// Workers sleep after 5 ms without a call. A 2 ms streak of calls wakes them.
  static constexpr Clock::duration kAsleep = 5 * kPause, kStreak = 2 * kPause;
  struct State {
    Clock::time_point last_end, streak_begin;  ///< call times
    bool awake = false;                        ///< the workers, most likely
    Clock::duration pause{0};
    Clock::time_point pause_end;
  };
  static State& state() {
    static thread_local State s;
    return s;
  }
  static void note(bool helped) {
    State& s = state();
    s.pause = helped ? Clock::duration(0) : std::clamp(2 * s.pause, kPause, kLongestPause);
    if (!helped) s.pause_end = Clock::now() + s.pause;
  }
};

/// Less work than this many multiplications stays on the calling thread.
constexpr int64_t kSharedWork = 1 << 19;

/// Calls task(0), ..., task(count - 1), of `work` multiplications in all. Each thread takes the
/// next task left.
template <class F>
void in_parallel(int64_t count, int64_t work, const F& task) {
  const int64_t workers = std::min(count, threads());
  if (workers <= 1 || !PoolBackoff::may_use_pool(work) || at::in_parallel_region()) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  std::atomic<int64_t> next{0};
  PoolBackoff::run(workers, [&](int64_t) {
    for (int64_t i; (i = next++) < count;) task(i);
  });
}

}  // namespace fusedrnn::cpu
