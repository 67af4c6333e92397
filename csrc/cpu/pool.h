// The library's own pool of threads. A call does not wait for a thread of this pool, only for the
// parts of the work that the thread has begun. No torch here.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <utility>

namespace fusedrnn::cpu {

/// The work of one call, in parts that threads claim.
///
/// A worker may still be in `run` when the caller has gone: it may have lost its core. So a job
/// owns all that `run` touches outside of a claimed part.
class Job {
 public:
  virtual ~Job() = default;
  /// Claims parts and works on them. Worker 0 is the caller. Others come late, or never.
  virtual void run(int64_t worker) noexcept = 0;
  /// Returns once all parts are done. Called by the caller after its `run`.
  virtual void wait() noexcept = 0;
  /// Throws the first exception of a part. Called by the caller after `wait`.
  void rethrow() {
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 protected:
  /// Whether a part has thrown, or the caller has given up.
  bool failed() const { return failed_.load(std::memory_order_relaxed); }
  void fail() { failed_.store(true, std::memory_order_relaxed); }
  /// Calls part(), unless the job has failed.
  template <class F>
  void guard(const F& part) noexcept {
    if (failed()) return;
    try {
      part();
    } catch (...) {
      if (!failed_.exchange(true)) error_ = std::current_exception();
    }
  }

 private:
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
};

/// One pool per process. Its threads start on demand, spin for a moment after a job, then sleep. A
/// child of fork begins with an empty pool.
class Pool {
 public:
  /// Calls job->run(worker) for up to `workers` workers. The others than 0 are threads of the pool
  /// that begin before the caller is done. Several callers may run jobs at once. A job within a job
  /// runs on its caller alone.
  static void run(int64_t workers, const std::shared_ptr<Job>& job);
  /// Whether a thread of the pool spins, so that a job need not wake one.
  static bool is_awake();
  /// Whether this thread is in a job.
  static bool in_job();
  /// Whether this process is a child of fork, without exec.
  static bool in_forked_child();
};

}  // namespace fusedrnn::cpu
