// The cores that this process may use. No torch here.
#pragma once

#include <cstdint>
#include <string>

namespace fusedrnn::cpu {

/// Cores in this thread's affinity mask, at most the CPU quota of the process's cgroups, rounded
/// up. Read again after a second. Without Linux there is no limit.
int64_t cores();

/// The least CPU quota of a process's cgroup and its parents, in cores; 0 without a quota. `root`
/// is put before all paths.
double cgroup_quota(const std::string& root);

}  // namespace fusedrnn::cpu
