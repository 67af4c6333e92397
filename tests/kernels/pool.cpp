// The library's own pool without torch: jobs of several callers, late workers, exceptions, forks.
// Compiled with ThreadSanitizer, which sees a job that is used after its end.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cpu/jobs.h"

using namespace fusedrnn::cpu;

static void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("failed: %s\n", what);
  std::exit(1);
}

template <template <class> class TheJob, class F, class... Arguments>
static void run(int64_t workers, const F& part, Arguments... arguments) {
  const auto job = std::make_shared<TheJob<F>>(arguments..., part);
  Pool::run(workers, job);
  job->rethrow();
}

/// Keeps a thread in its part, as if it had lost its core.
static void lose_core(int64_t microseconds) {
  if (microseconds > 0) std::this_thread::sleep_for(std::chrono::microseconds(microseconds));
}

/// Each part once, whoever does it. `held`: now and then a part takes a long time.
static void run_parts(int64_t workers, int64_t count, bool held) {
  std::vector<int> done(size_t(count), 0);
  run<PartsJob>(
      workers,
      [&](int64_t i) {
        ++done[size_t(i)];
        if (held && i == count / 2) lose_core(300);
      },
      count);
  for (const int n : done) expect(n == 1, "each part is done once");
}

/// Step i of a run reads what all parts of step i - 1 wrote.
static void run_teams(int64_t runs, int64_t members, int64_t steps, bool held) {
  std::vector<int64_t> value(size_t(runs * 2 * members), 0);
  const auto row = [&](int64_t r, int64_t i) { return value.data() + (r * 2 + i % 2) * members; };
  run<TeamsJob>(
      runs * members,
      [&](int64_t r, int64_t i, int64_t part) {
        int64_t sum = 0;
        for (int64_t p = 0; p < members; ++p) sum += row(r, i + 1)[p];
        expect(sum == i * members, "steps are done in order");
        if (held && i == steps / 2 && part == members - 1) lose_core(1000);
        row(r, i)[part] = i + 1;
      },
      runs, members, steps);
  for (int64_t r = 0; r < runs; ++r) {
    for (int64_t p = 0; p < members; ++p)
      expect(row(r, steps - 1)[p] == steps, "all steps are done");
  }
}

static void run_many(int64_t jobs, int64_t seed) {
  for (int64_t i = 0; i < jobs; ++i) {
    const int64_t n = i * 7 + seed;
    const bool held = n % 16 == 0;
    switch (n % 4) {
      case 0:
        run_parts(2 + n % 6, 1 + n % 40, held);
        break;
      case 1:
        run_teams(1, 2 + n % 3, 20, held);
        break;
      case 2:
        run_teams(2, 1 + n % 3, 11, held);
        break;
      case 3:
        run_parts(2, 2, false);
        break;  // over before a worker wakes
    }
    if (n % 50 == 0) lose_core(200);  // workers fall asleep
  }
}

static void in_threads(int64_t count, int64_t jobs) {
  std::vector<std::thread> callers;
  for (int64_t c = 0; c < count; ++c) callers.emplace_back([=] { run_many(jobs, c); });
  for (std::thread& caller : callers) caller.join();
}

static void check_exceptions() {
  for (int64_t bad = 0; bad < 4; ++bad) {
    for (const bool teams : {false, true}) {
      std::string found;
      const auto part = [&](int64_t i) {
        lose_core(100);
        if (i == bad) throw std::runtime_error("part " + std::to_string(i));
      };
      try {
        if (teams) {
          run<TeamsJob>(4, [&](int64_t, int64_t i, int64_t p) { part(i == 1 ? p : 9); }, 1, 4, 3);
        } else {
          run<PartsJob>(4, part, 4);
        }
      } catch (const std::runtime_error& error) {
        found = error.what();
      }
      expect(found == "part " + std::to_string(bad), "an exception reaches the caller");
    }
  }
  run_many(20, 0);
}

/// A caller does not wait for a part that a worker holds. The worker goes on in memory that the job
/// keeps, and the caller frees its own.
static void check_giving_up() {
  struct Memory {
    std::vector<std::atomic<int64_t>> value = std::vector<std::atomic<int64_t>>(2 * 64);
    std::atomic<bool> held{false}, released{false};
  };
  int64_t gave_up = 0;
  std::vector<std::weak_ptr<Memory>> left;
  for (int64_t n = 0; n < 100000 && gave_up < 20; ++n) {
    const auto memory = std::make_shared<Memory>();
    const auto caller = std::this_thread::get_id();
    const auto part = [m = memory.get(), caller](int64_t, int64_t i, int64_t p) {
      if (std::this_thread::get_id() != caller && !m->held.exchange(true)) {
        while (!m->released) lose_core(50);
      }
      m->value[size_t(i % 2 * 64 + p)] = i + 1;
    };
    const auto job = std::make_shared<TeamsJob<decltype(part)>>(1, 2, 30, part);
    job->set_owner(memory);
    Pool::run(2, job);
    job->rethrow();
    gave_up += job->gave_up();
    expect(job->gave_up() == memory->held, "a caller gives up where a worker holds a part");
    expect(job->gave_up() || memory->value[64] == 30, "all steps are done");
    memory->released = true;
    left.push_back(memory);
  }
  expect(gave_up > 0, "a worker held a part");
  for (int i = 0; i < 10000; ++i) {
    bool all_free = true;
    for (const auto& memory : left) all_free &= memory.expired();
    if (all_free) return run_many(20, 0);
    lose_core(1000);
  }
  expect(false, "the last thread in a job frees its memory");
}

static void check_nesting() {
  std::atomic<int64_t> foreign{0};
  run<PartsJob>(
      4,
      [&](int64_t) {
        expect(Pool::in_job(), "a part is in a job");
        const auto outer = std::this_thread::get_id();
        run<PartsJob>(4, [&](int64_t) { foreign += std::this_thread::get_id() != outer; }, 8);
      },
      8);
  expect(foreign == 0, "a job within a job runs on its caller");
  expect(!Pool::in_job(), "the caller has left the job");
}

/// Children of a process whose pool is in use.
static void check_forks() {
  expect(!Pool::in_forked_child(), "the parent is no child");
  std::atomic<bool> stop{false};
  std::thread other([&] {
    while (!stop) run_many(10, 3);
  });
  for (int i = 0; i < 20; ++i) {
    run_many(5, i);
    const pid_t child = fork();
    if (child == 0) {
      alarm(60);
      expect(Pool::in_forked_child(), "a child knows that it is one");
      expect(!Pool::is_awake(), "a child has no threads");
      run_many(50, i);
      in_threads(2, 20);
      _exit(0);
    }
    int status = 1;
    waitpid(child, &status, 0);
    expect(status == 0, "jobs in a child of fork");
  }
  stop = true;
  other.join();
}

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (what == "fork") {
    check_forks();
  } else {
    run_many(2000, 1);  // one caller, a growing pool
    in_threads(4, 2000);
    in_threads(40, 100);  // more callers than the pool has room for jobs
    check_exceptions();
    check_giving_up();
    check_nesting();
  }
  std::printf("passed\n");
  return 0;
}
