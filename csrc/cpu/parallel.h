// Work on several threads: torch's pool or the library's own, and whether a call may use them.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <ctime>
#include <memory>
#include <string>
#include <utility>

#include "cores.h"
#include "jobs.h"

namespace fusedrnn::cpu {

/// Threads that torch would use: one where torch's headers have no pool.
inline int64_t torch_threads() {
#ifdef INTRA_OP_PARALLEL
  return at::get_num_threads();
#else
  return 1;
#endif
}

/// Threads for a call: no more than cores that this process may use.
inline int64_t threads() {
  const int64_t count = torch_threads();
  return count == 1 ? 1 : std::min(count, cores());
}

/// Whether this thread shares work already.
inline bool in_parallel_region() { return at::in_parallel_region() || Pool::in_job(); }

enum class PoolChoice { torch, own, automatic };

/// FUSEDRNN_CPU_POOL=torch|own asks for one pool. An unknown name asks for none: _ops.py warns.
inline PoolChoice pool_choice() {
  static const PoolChoice chosen = [] {
    const char* const value = std::getenv("FUSEDRNN_CPU_POOL");
    const std::string name = value ? value : "";
    return name == "torch" ? PoolChoice::torch
           : name == "own" ? PoolChoice::own
                           : PoolChoice::automatic;
  }();
  return chosen;
}

/// Thrown where a caller gave up the wait for a held part.
struct GaveUp {};

/// Decides which pool a call uses, if any.
///
/// On a quiet machine the call runs on torch's pool, whose threads are awake after torch's own ops.
/// Joining that pool takes milliseconds if a worker sleeps or has lost its core. So sleepers are
/// not woken for isolated calls. After two long stalls soon after each other, this thread's calls
/// use the library's own pool. They try torch's again after half a second, and after up to 2 s if
/// that stalls again: torch's spinning threads would disturb the own pool's. After three stalls in
/// a row in the own pool, calls run alone for 1 to 64 ms.
class PoolBackoff {
 public:
  /// Marks when an op's call begins and ends.
  class Call {
   public:
    Call() {
      State& s = state();
      s.now = Clock::now();
      if (s.now - s.last_end > kAsleep) s.streak_begin = s.now;
      s.awake = s.now - s.streak_begin > kStreak;
    }
    ~Call() { state().last_end = Clock::now(); }
    Call(const Call&) = delete;
  };

  /// Lets jobs on the own pool give up: `owner` holds all memory that their parts read and write.
  class Owner {
   public:
    explicit Owner(std::shared_ptr<void> owner) { state().owner = std::move(owner); }
    ~Owner() { state().owner = nullptr; }
    Owner(const Owner&) = delete;
  };
  /// Calls of this thread use no pool.
  class Alone {
   public:
    Alone() { state().is_alone = true; }
    ~Alone() { state().is_alone = false; }
    Alone(const Alone&) = delete;
  };
  /// Whether a call would use the own pool, whose jobs may give up.
  static bool may_give_up() {
    return uses_own_pool() && !state().is_alone && threads() > 1 && !in_parallel_region();
  }

  /// Whether this part of a call, of `work` multiplications, may use a pool.
  static bool may_use_pool(int64_t work) {
    const State& s = state();
    if (s.is_alone) return false;
    const bool is_paused = s.pause.count() != 0 && Clock::now() < s.pause_end;
    if (uses_own_pool()) return (work >= kWakes || s.awake || Pool::is_awake()) && !is_paused;
    return work >= kLong || (s.awake && !is_paused);
  }

  /// Runs a job of type `TheJob` on up to `workers` threads. The caller is worker 0.
  template <class TheJob, class... Arguments>
  static void run(int64_t workers, const Arguments&... arguments) {
    const auto start = Clock::now();
    if (uses_own_pool()) {
      const auto job = std::make_shared<TheJob>(arguments...);
      job->set_owner(state().owner);
      Pool::run(workers, job);
      note(job->held(), Clock::now() - start);
      if (job->gave_up()) throw GaveUp();
      return job->rethrow();
    }
    const auto start_of_cpu = cpu_time();
    TheJob job(arguments...);
    std::atomic<int64_t> joined{0};
    bool all_joined = true;
    auto done = start;
    at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      ++joined;
      for (int64_t worker = begin; worker < end; ++worker) job.run(worker);
      if (begin == 0) {
        all_joined = joined == workers;
        done = Clock::now();
      }
    });
    const auto end = Clock::now();
    // A worker that did not join has helped for no time.
    auto waited = all_joined ? end - done + job.held() : end - start;
    // A worker that spins on the caller's core shows only as time that the caller did not run.
    if (end - start >= kPause) waited = std::max(waited, end - start - (cpu_time() - start_of_cpu));
    note(waited, end - start);
    job.rethrow();
  }

 private:
  /// About a millisecond of multiplications: worth the wait for a worker.
  static constexpr int64_t kLong = 1 << 27;
  /// About 50 us of multiplications: worth waking a thread of the own pool.
  static constexpr int64_t kWakes = 1 << 22;
  static constexpr Clock::duration kPause = std::chrono::milliseconds(1),
                                   kLongestPause = 64 * kPause;
  /// Workers of torch's pool sleep after 5 ms without a call. A 2 ms streak of calls wakes them.
  static constexpr Clock::duration kAsleep = 5 * kPause, kStreak = 2 * kPause;
  static constexpr int kStallsInRow = 3;
  /// A thread that lost its core is away for a time slice, 3 or 4 ms.
  /// Two such stalls within this time mean a busy machine.
  static constexpr Clock::duration kLostCore = 2 * kPause, kSoon = 50 * kPause;
  /// How long calls use the own pool after a stall in torch's. Doubles if the next comes soon.
  static constexpr Clock::duration kCalm = 500 * kPause, kLongestCalm = 4 * kCalm;
  struct State {
    Clock::time_point now, last_end, streak_begin;  ///< call times
    bool awake = false;                             ///< torch's workers, most likely
    int stalls = 0;                                 ///< calls in a row
    Clock::duration pause{0}, calm = kCalm;
    Clock::time_point pause_end, own_end, lost_core;
    std::shared_ptr<void> owner;
    bool is_alone = false;
  };
  static State& state() {
    static thread_local State s;
    return s;
  }
  /// torch's pool would start all its threads, also without cores for them. In a child of fork it
  /// may hang.
  static bool uses_own_pool() {
    const PoolChoice choice = pool_choice();
    if (choice != PoolChoice::automatic) return choice == PoolChoice::own;
    const State& s = state();
    return s.now < s.own_end || Pool::in_forked_child() || torch_threads() > cores();
  }
  /// The time that this thread has run, or without such a clock all time.
  static Clock::duration cpu_time() {
#ifdef CLOCK_THREAD_CPUTIME_ID
    timespec time{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return std::chrono::seconds(time.tv_sec) + std::chrono::nanoseconds(time.tv_nsec);
#else
    return Clock::now().time_since_epoch();
#endif
  }
  /// Notes the caller's wait, and the time of the whole. A call stalled if it waited longer than it
  /// worked. A short wait means a thread that slept: then calls pause. A long one means a thread
  /// that lost its core: then calls use the own pool.
  static void note(Clock::duration waited, Clock::duration time) {
    State& s = state();
    if (waited < kLongWait || waited < time - waited) {
      s.stalls = 0;
      s.pause = s.pause > kPause ? s.pause / 2 : Clock::duration(0);
      return;
    }
    const auto now = Clock::now();
    ++s.stalls;
    if (uses_own_pool()) {
      if (s.stalls < kStallsInRow) return;
    } else if (waited >= kLostCore && pool_choice() != PoolChoice::torch) {
      const bool is_first = now - std::exchange(s.lost_core, now) > kSoon;
      if (is_first) return;  // a quiet machine has them too, now and then
      s.calm = now - s.own_end < s.calm ? std::min(2 * s.calm, kLongestCalm) : kCalm;
      s.own_end = now + s.calm;
      return;
    }
    s.pause = std::clamp(2 * s.pause, kPause, kLongestPause);
    s.pause_end = now + s.pause;
  }
};

/// Less work than this many multiplications stays on the calling thread.
constexpr int64_t kSharedWork = 1 << 19;

/// Calls task(0), ..., task(count - 1), of `work` multiplications in all. Each thread takes the
/// next task left.
template <class F>
void in_parallel(int64_t count, int64_t work, const F& task) {
  const int64_t workers = std::min(count, threads());
  if (workers <= 1 || !PoolBackoff::may_use_pool(work) || in_parallel_region()) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  PoolBackoff::run<PartsJob<F>>(workers, count, task);
}

}  // namespace fusedrnn::cpu
