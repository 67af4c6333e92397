// Which rows a call has, and which thread runs which of them.
#pragma once

#include <ATen/Parallel.h>

#include <c10/util/SmallVector.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <vector>

#include "../layer.h"
#include "team.h"

namespace fusedrnn::cpu {

using Indices = c10::SmallVector<int64_t, 8>;

/// Rows of the batch, longest first, and where each step lies.
struct Plan {
  Indices order;        ///< [B]
  Indices active;       ///< [T] rows in each step: a prefix of order
  Indices step_offset;  ///< [T] token of batch row 0

  explicit Plan(const Layer& layer)
      : order(size_t(layer.B)), active(size_t(layer.T), layer.B), step_offset(size_t(layer.T)) {
    for (int64_t t = 0, at = 0; t < layer.T; ++t) {
      step_offset[t] = at;
      if (layer.packed) active[t] = layer.batch_sizes[t];
      at += active[t];
    }
    if (!layer.lengths.defined()) {
      for (int64_t b = 0; b < layer.B; ++b) order[b] = b;
      return;
    }
    // A stable counting sort by length, longest first.
    const int64_t* length = layer.lengths.const_data_ptr<int64_t>();
    std::vector<int64_t> longer(layer.T + 2, 0);  // [l]: rows of length l, then rows longer than l
    for (int64_t b = 0; b < layer.B; ++b) {
      TORCH_CHECK(length[b] >= 0 && length[b] <= layer.T, "fusedrnn::", layer.cell.name,
                  ": lengths must be from 0 to the sequence length ", layer.T, ", got ", length[b]);
      ++longer[length[b]];
    }
    for (int64_t l = layer.T, sum = 0; l >= 0; --l) {
      sum += longer[l];
      longer[l] = sum - longer[l];
      if (l < layer.T) active[l] = longer[l];
    }
    for (int64_t b = 0; b < layer.B; ++b) order[longer[length[b]]++] = b;
  }
};

/// Positions where those that no row reaches are not counted: the rows of a step one after the
/// other, in a plan's order.
struct Packing {
  Indices step_offset;  ///< [T] of the first row
  int64_t count = 0;    ///< of all tokens

  explicit Packing(const Plan& plan) : step_offset(plan.active.size()) {
    for (size_t t = 0; t < step_offset.size(); ++t) {
      step_offset[t] = count;
      count += plan.active[t];
    }
  }
};

/// Threads that in_parallel has: one where torch's pool was not compiled in.
inline int64_t threads() {
#ifdef INTRA_OP_PARALLEL
  return at::get_num_threads();
#else
  return 1;
#endif
}

/// Whether the calling thread's short calls are shared at all. Torch's threads wait for each other
/// at the end of what they share, and that takes milliseconds where one sleeps, where another
/// program holds its processor, or where two of them were put on one. So threads that had time to
/// fall asleep are not woken for a few short calls; and after a call that some thread did not help,
/// calls are done alone for a while: a millisecond, then two, and so on up to a limit.
class Sharing {
  using Clock = std::chrono::steady_clock;

 public:
  /// The time of one call of an op.
  class Call {
   public:
    Call() {
      State& s = state();
      const auto now = Clock::now();
      if (now - s.last > kAsleep) s.first = now;
      s.awake = now - s.first > kStreak;
    }
    ~Call() { state().last = Clock::now(); }
    Call(const Call&) = delete;
  };

  /// Whether to share this part of a call, of that many multiplications.
  static bool is_worth(int64_t work) {
    const State& s = state();
    return work >= kLong || (s.awake && (s.pause.count() == 0 || Clock::now() >= s.until));
  }

  /// Calls task(worker) on each of torch's threads. The caller is worker 0.
  template <class F>
  static void run(int64_t workers, const F& task) {
    std::atomic<int64_t> came{0};
    bool all_came = true;
    const auto start = Clock::now();
    auto done = start;
    at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      ++came;
      for (int64_t worker = begin; worker < end; ++worker) task(worker);
      if (begin == 0) {
        all_came = came == workers;
        done = Clock::now();
      }
    });
    const auto waited = Clock::now() - done;
    note(all_came && (waited < kStall || waited < done - start));
  }

 private:
  static constexpr int64_t kLong = 1 << 27;  // about a millisecond: worth waiting for help
  static constexpr Clock::duration kStall = std::chrono::microseconds(100);
  static constexpr Clock::duration kPause = std::chrono::milliseconds(1),
                                   kLongestPause = 256 * kPause;
  /// Without a call for so long, the other threads sleep; after so long a streak they are woken.
  static constexpr Clock::duration kAsleep = 5 * kPause, kStreak = 2 * kPause;
  struct State {
    Clock::time_point last, first;  ///< end of the last call, begin of the first one since a sleep
    bool awake = false;
    Clock::duration pause{0};
    Clock::time_point until;
  };
  static State& state() {
    static thread_local State s;
    return s;
  }
  static void note(bool helped) {
    State& s = state();
    s.pause = helped ? Clock::duration(0) : std::clamp(2 * s.pause, kPause, kLongestPause);
    if (!helped) s.until = Clock::now() + s.pause;
  }
};

/// Calls task(0), ..., task(count - 1), of `work` multiplications in all, on torch's threads, each
/// of which takes the next that is left.
template <class F>
void in_parallel(int64_t count, int64_t work, const F& task) {
  const int64_t workers = std::min(count, threads());
  if (workers <= 1 || !Sharing::is_worth(work) || at::in_parallel_region()) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  std::atomic<int64_t> next{0};
  Sharing::run(workers, [&](int64_t) {
    for (int64_t i; (i = next++) < count;) task(i);
  });
}

/// Work of fewer multiplications than this is done at once rather than shared, ...
constexpr int64_t kSharedWork = 1 << 19;
/// ... and so is a step of fewer than this for each thread.
constexpr int64_t kSharedStep = 1 << 15;

/// How a layer is shared out: runs, each a direction and some of its rows, and the threads that
/// share each run's steps by blocks of units.
struct Shares {
  struct Run {
    int64_t direction;
    Indices row, sorted_index, active;  ///< sorted_index: places in Plan::order
  };
  c10::SmallVector<Run, 4> runs;
  int64_t members = 1;  ///< of each run
  int64_t work;         ///< multiplications of a pass over all steps

  Shares(const Layer& layer, const Plan& plan, int64_t tile_rows, int64_t blocks) {
    const int64_t step = layer.B * layer.cell.gates * layer.H * (layer.I + layer.P);
    int64_t threads = 1, rows = 1;
    work = step * layer.T * layer.D;
    // With one row each weight is read for one multiplication: that takes longer.
    if (work * (layer.B == 1 ? 2 : 1) >= kSharedWork && !at::in_parallel_region()) {
      threads = std::max<int64_t>(cpu::threads() / layer.D, 1);
    }
    // Few rows leave a tile's weights too little used: then all threads run all rows, each with
    // its part of the weights. The steps of a projection can't be shared so.
    // One step is as if it had few.
    if ((layer.B < threads * tile_rows || layer.T == 1) && !layer.has_projection &&
        step >= threads * kSharedStep) {
      members = std::min(threads, blocks);
    }
    if (members == 1) rows = std::clamp<int64_t>(threads, 1, std::max<int64_t>(layer.B, 1));
    for (int64_t d = 0; d < layer.D; ++d) {
      for (int64_t part = 0; part < rows; ++part) {
        // Every rows-th row, so that rows of all lengths go to each thread.
        runs.push_back({d, {}, {}, {}});
        Run& run = runs.back();
        for (int64_t j = part; j < layer.B; j += rows) {
          run.row.push_back(plan.order[j]);
          run.sorted_index.push_back(j);
        }
        for (int64_t n : plan.active) {
          run.active.push_back(n > part ? (n - part + rows - 1) / rows : 0);
        }
      }
    }
  }

  /// Runs every step of every run: step(run, i, block_begin, block_end).
  template <class F>
  void execute(int64_t steps, int64_t blocks, const F& step) const {
    if (members == 1 || !Sharing::is_worth(work)) {
      return in_parallel(int64_t(runs.size()), work, [&](int64_t r) {
        for (int64_t i = 0; i < steps; ++i) step(r, i, 0, blocks);
      });
    }
    c10::SmallVector<Team, 2> teams;
    for (size_t r = 0; r < runs.size(); ++r) teams.emplace_back(members);
    Sharing::run(int64_t(runs.size()) * members, [&](int64_t worker) {
      const int64_t r = worker / members;
      teams[size_t(r)].run(worker % members, steps, [&](int64_t i, int64_t part) {
        step(r, i, blocks * part / members, blocks * (part + 1) / members);
      });
    });
  }
};

}  // namespace fusedrnn::cpu
