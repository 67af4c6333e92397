#include "cores.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <sstream>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

namespace fusedrnn::cpu {
namespace {

constexpr int64_t kNoLimit = std::numeric_limits<int32_t>::max();

/// Whether a comma-separated list has this entry.
bool has_entry(const std::string& list, const std::string& entry) {
  return ("," + list + ",").find("," + entry + ",") != std::string::npos;
}

/// A mounted hierarchy of cgroups with the CPU's controller.
struct Hierarchy {
  bool is_v2;
  std::string root;   ///< the cgroup at the mount point
  std::string mount;  ///< the mount point
};

/// Reads lines as "31 23 0:28 /root /mount rw shared:1 - cgroup2 cgroup2 rw": proc(5).
std::vector<Hierarchy> read_hierarchies(const std::string& root) {
  std::vector<Hierarchy> found;
  std::ifstream file(root + "/proc/self/mountinfo");
  for (std::string line; std::getline(file, line);) {
    const size_t separator = line.find(" - ");
    if (separator == std::string::npos) continue;
    std::istringstream before(line), after(line.substr(separator + 3));
    std::string skipped, cgroup, mount, type, source, options;
    before >> skipped >> skipped >> skipped >> cgroup >> mount;
    after >> type >> source >> options;
    if (type == "cgroup2" || (type == "cgroup" && has_entry(options, "cpu"))) {
      found.push_back({type == "cgroup2", cgroup, mount});
    }
  }
  return found;
}

/// The process's cgroup in a hierarchy, from lines as "4:cpu,cpuacct:/a/b"; "0::/a/b" for v2.
std::string read_cgroup(const std::string& root, bool is_v2) {
  std::ifstream file(root + "/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (is_v2 ? controllers.empty() : has_entry(controllers, "cpu")) return line.substr(second + 1);
  }
  return "/";
}

/// A cgroup's own quota in cores; 0 without one.
double read_quota(const std::string& folder, bool is_v2) {
  double quota = 0, period = 0;
  if (is_v2) {
    std::ifstream(folder + "/cpu.max") >> quota >> period;  // "max 100000" gives no number
  } else {
    std::ifstream(folder + "/cpu.cfs_quota_us") >> quota;  // -1 without a quota
    std::ifstream(folder + "/cpu.cfs_period_us") >> period;
  }
  return quota > 0 && period > 0 ? quota / period : 0;
}

int64_t count_cores() {
  const char* const requested = std::getenv("FUSEDRNN_CPU_CORES");
  if (requested && std::atoll(requested) > 0) return std::atoll(requested);
  int64_t count = kNoLimit;
#if defined(__linux__)
  // A machine may have more cores than the mask of cpu_set_t.
  for (int most = 1024; most <= 1 << 20; most *= 2) {
    cpu_set_t* const mask = CPU_ALLOC(most);
    const size_t size = CPU_ALLOC_SIZE(most);
    const bool fits = mask && sched_getaffinity(0, size, mask) == 0;
    if (fits) count = CPU_COUNT_S(size, mask);
    CPU_FREE(mask);
    if (fits) break;
  }
  const double quota = cgroup_quota("");
  if (quota > 0) count = std::min(count, int64_t(std::ceil(quota)));
#endif
  return std::max<int64_t>(count, 1);
}

}  // namespace

double cgroup_quota(const std::string& root) {
  double least = 0;
  for (const Hierarchy& h : read_hierarchies(root)) {
    const std::string cgroup = read_cgroup(root, h.is_v2);
    // Below the cgroup at the mount point. A container may see itself as "/" or by its full path.
    const std::string above = h.root == "/" ? "" : h.root;
    const bool is_inside = (cgroup + "/").compare(0, above.size() + 1, above + "/") == 0;
    std::string below = is_inside ? cgroup.substr(above.size()) : "";
    for (;;) {
      const double quota = read_quota(root + h.mount + below, h.is_v2);
      if (quota > 0 && (least == 0 || quota < least)) least = quota;
      const size_t slash = below.rfind('/');
      if (slash == std::string::npos) break;
      below.resize(slash);
    }
  }
  return least;
}

int64_t cores() {
  using Clock = std::chrono::steady_clock;
  static std::atomic<int64_t> count{0}, read_at{0};
  const int64_t now =
      std::chrono::duration_cast<std::chrono::seconds>(Clock::now().time_since_epoch()).count();
  int64_t known = count.load(std::memory_order_relaxed);
  int64_t before = read_at.load(std::memory_order_relaxed);
  // One thread reads again; the others take the count as it was.
  if (known == 0 || (now != before && read_at.compare_exchange_strong(before, now))) {
    known = count_cores();
    count.store(known, std::memory_order_relaxed);
  }
  return known;
}

}  // namespace fusedrnn::cpu
