// The jobs of a layer: parts in any order, and steps shared by teams. No torch here.
#pragma once

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "pool.h"
#include "team.h"
#include "waiter.h"

namespace fusedrnn::cpu {

/// A job that tells how long its caller waited for parts that other threads had begun.
class TimedJob : public Job {
 public:
  Clock::duration held() const { return held_; }
  /// Lets the caller give up. Threads in the job may then go on in memory that the owner holds.
  void set_owner(std::shared_ptr<void> owner) { owner_ = std::move(owner); }
  bool gave_up() const { return gave_up_; }

 protected:
  Clock::duration held_{0};  ///< the caller's long waits
  std::shared_ptr<void> owner_;
  bool gave_up_ = false;
};

/// Parts that can be done in any order. Each thread takes the next one left.
template <class F>
class PartsJob : public TimedJob {
 public:
  PartsJob(int64_t count, const F& part) : count_(count), part_(part) {}
  void run(int64_t) noexcept override {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) {
      guard([&] { part_(i); });
      done_.fetch_add(1, std::memory_order_release);
    }
  }
  void wait() noexcept override {
    Waiter waiter(kCallerSpin);
    while (done_.load(std::memory_order_acquire) < count_) waiter.turn();
    held_ = waiter.waited();
  }

 private:
  const int64_t count_;
  const F part_;
  std::atomic<int64_t> next_{0}, done_{0};
};

/// The steps of some runs, with a team each. It does part(run, i, p) for all parts of all steps.
template <class F>
class TeamsJob : public TimedJob {
 public:
  TeamsJob(int64_t runs, int64_t members, int64_t steps, const F& part)
      : members_(members), steps_(steps), part_(part) {
    for (int64_t r = 0; r < runs; ++r) teams_.emplace_back(members);
  }
  /// A worker goes through all runs, its own first: the others may lack workers.
  void run(int64_t worker) noexcept override {
    const int64_t runs = int64_t(teams_.size());
    for (int64_t k = 0; k < runs; ++k) {
      const int64_t r = (worker / members_ + k) % runs;
      const auto waited = teams_[size_t(r)].run(
          worker % members_, steps_, worker == 0 ? kCallerSpin : kWorkerSpin,
          [&](int64_t i, Clock::duration wait) {
            if (worker == 0 && owner_ && wait >= patience(k * steps_ + i, wait)) {
              gave_up_ = true;
              fail();
            }
            return gave_up_or_failed(worker);
          },
          [&](int64_t i, int64_t p) { guard([&] { part_(r, i, p); }); });
      if (worker == 0) held_ += waited;
      if (gave_up_or_failed(worker)) return;
    }
  }
  void wait() noexcept override {}

 private:
  /// The caller of a job that has thrown still waits for the parts that others have begun.
  bool gave_up_or_failed(int64_t worker) const {
    return worker == 0 ? gave_up_ : owner_ && failed();
  }
  /// How long the caller waits for a held part: a part of the time that the call would take alone,
  /// by the time of its steps so far.
  Clock::duration patience(int64_t steps_done, Clock::duration wait) const {
    const auto each = (Clock::now() - start_ - wait) / (steps_done + 1);
    return std::max(kLongWait, each * (int64_t(teams_.size()) * members_ * steps_) / kPatience);
  }
  static constexpr int kPatience = 4;

  const int64_t members_, steps_;
  const F part_;
  const Clock::time_point start_ = Clock::now();
  std::vector<Team> teams_;
};

}  // namespace fusedrnn::cpu
