#include "pool.h"

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

#include "waiter.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include <pthread.h>

namespace fusedrnn::cpu {
namespace {

/// A counter that threads can sleep on. A futex has no lock that a thread without a core could
/// hold.
class Event {
 public:
  uint32_t count() const { return count_.load(); }
  void add() { ++count_; }
  /// Sleeps until `wake`, unless the count has changed from `seen`. May return early.
  void wait(uint32_t seen) {
#if defined(__linux__)
    syscall(SYS_futex, &count_, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
#else
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return count_ != seen; });
#endif
  }
  void wake(int threads) {
#if defined(__linux__)
    syscall(SYS_futex, &count_, FUTEX_WAKE_PRIVATE, threads, nullptr, nullptr, 0);
#else
    const std::lock_guard<std::mutex> lock(mutex_);
    changed_.notify_all();
#endif
  }

 private:
  std::atomic<uint32_t> count_{0};
  static_assert(sizeof(count_) == sizeof(uint32_t));
#if !defined(__linux__)
  std::mutex mutex_;
  std::condition_variable changed_;
#endif
};

/// -1 if unknown.
int current_core() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

/// Moves this thread from the caller's core to another that it may use. The scheduler leaves both
/// on one core while another process keeps the other core busy: two queues of two and one threads
/// are balanced. Beside a busy loop this took a third off B8 T50 H128, a tenth off B64 T60 H256.
void leave_core(int core) {
#if defined(__linux__)
  cpu_set_t all;
  if (core < 0 || core >= CPU_SETSIZE || sched_getaffinity(0, sizeof(all), &all) != 0) return;
  cpu_set_t others = all;
  CPU_CLR(core, &others);
  if (CPU_COUNT(&others) == 0) return;
  if (sched_setaffinity(0, sizeof(others), &others) == 0) sched_setaffinity(0, sizeof(all), &all);
#endif
}

/// Room for one job. Slots are never freed: a late worker may look at any.
class alignas(64) Slot {
 public:
  bool take() {
    return !taken_.load(std::memory_order_relaxed) &&
           !taken_.exchange(true, std::memory_order_acquire);
  }
  /// Offers the job to workers 1, ..., workers - 1.
  void open(uint64_t workers, const std::shared_ptr<Job>& job) {
    job_ = job;
    core_ = current_core();
    state_.store(kClaimed + workers * kLimit, std::memory_order_release);
  }
  /// Runs the job as its next worker; false if there is none to run.
  bool serve() {
    uint64_t state = state_.load(std::memory_order_relaxed);
    do {
      if (claimed(state) >= state / kLimit) return false;
    } while (!state_.compare_exchange_weak(state, state + kClaimed, std::memory_order_acquire,
                                           std::memory_order_relaxed));
    if (current_core() == core_) leave_core(core_);
    job_->run(int64_t(claimed(state)));
    leave();
    return true;
  }
  /// No worker may begin from now on.
  void close() { state_.fetch_and(kLimit - 1, std::memory_order_relaxed); }
  /// The last to leave drops the job. A slot is closed before the caller leaves.
  void leave() {
    const uint64_t state = state_.fetch_add(kLeft, std::memory_order_acq_rel) + kLeft;
    if (claimed(state) != state / kLeft % kField) return;
    job_.reset();
    taken_.store(false, std::memory_order_release);
  }

 private:
  /// Three fields of 16 bits: workers that came, the caller among them; workers that left; and the
  /// limit of workers, zero after `close`.
  static constexpr uint64_t kField = 1 << 16, kClaimed = 1, kLeft = kField,
                            kLimit = kField * kField;
  static uint64_t claimed(uint64_t state) { return state % kField; }

  int core_ = -1;  ///< the caller's
  std::atomic<uint64_t> state_{0};
  std::atomic<bool> taken_{false};
  std::shared_ptr<Job> job_;
};

thread_local bool inside_job = false;
constexpr int64_t kMostWorkers = 1 << 10;

class Threads {
 public:
  Slot* find_slot() {
    for (Slot& slot : slots_) {
      if (slot.take()) return &slot;
    }
    return nullptr;
  }
  /// Starts threads up to `count` in all, as far as the system lets us.
  void grow(int64_t count) {
    int64_t started = started_.load(std::memory_order_relaxed);
    while (started < count) {
      if (!started_.compare_exchange_weak(started, started + 1)) continue;
      try {
        std::thread([this] { serve(); }).detach();
      } catch (const std::system_error&) {
        // No more threads for this process. The call runs with those there are.
        --started_;
        return;
      }
      ++started;
    }
  }
  /// Tells `count` threads of a job.
  void notify(int64_t count) {
    jobs_.add();
    const int64_t wanted = std::min(count - spinning_.load(), sleeping_.load());
    if (wanted > 0) jobs_.wake(int(wanted));
  }
  bool is_awake() const { return spinning_.load(std::memory_order_relaxed) > 0; }

 private:
  [[noreturn]] void serve() {
#if defined(__linux__)
    pthread_setname_np(pthread_self(), "fusedrnn");
#endif
    inside_job = true;
    for (;;) {
      const uint32_t seen = jobs_.count();
      if (serve_any()) continue;
      ++spinning_;
      const bool changed = spin(seen);
      --spinning_;
      if (changed) continue;
      ++sleeping_;
      jobs_.wait(seen);
      --sleeping_;
    }
  }
  bool serve_any() {
    bool served = false;
    for (Slot& slot : slots_) served |= slot.serve();
    return served;
  }
  bool spin(uint32_t seen) const {
    const auto begin = Clock::now();
    do {
      for (int i = 0; i < 32; ++i) {
        if (jobs_.count() != seen) return true;
        pause();
      }
    } while (Clock::now() - begin < kSpin);
    return false;
  }

  /// Calls that follow each other find the threads awake.
  static constexpr Clock::duration kSpin = std::chrono::microseconds(100);

  Slot slots_[32];
  Event jobs_;
  std::atomic<int64_t> started_{0}, spinning_{0}, sleeping_{0};
};

// Never destroyed: its threads run until the process ends.
std::atomic<Threads*> process_threads{nullptr};
std::atomic<bool> forked{false};

void begin_child() {
  process_threads.store(nullptr);
  forked.store(true);
}
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, begin_child);

Threads& threads_of_process() {
  Threads* found = process_threads.load(std::memory_order_acquire);
  if (found) return *found;
  auto made = std::make_unique<Threads>();
  return process_threads.compare_exchange_strong(found, made.get()) ? *made.release() : *found;
}

}  // namespace

void Pool::run(int64_t workers, const std::shared_ptr<Job>& job) {
  Slot* slot = nullptr;
  Threads* threads = nullptr;
  if (workers > 1 && !inside_job) {
    threads = &threads_of_process();
    slot = threads->find_slot();
  }
  if (slot) {
    workers = std::min(workers, kMostWorkers);
    threads->grow(workers - 1);
    slot->open(uint64_t(workers), job);
    threads->notify(workers - 1);
  }
  const bool nested = std::exchange(inside_job, true);
  job->run(0);
  job->wait();
  inside_job = nested;
  if (slot) {
    slot->close();
    slot->leave();
  }
}

bool Pool::is_awake() {
  const Threads* const threads = process_threads.load(std::memory_order_acquire);
  return threads && threads->is_awake();
}

bool Pool::in_job() { return inside_job; }
bool Pool::in_forked_child() { return forked.load(std::memory_order_relaxed); }

}  // namespace fusedrnn::cpu
