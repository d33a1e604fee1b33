// Which CPUs the compute workers run on.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "coproc/machine/numa.h"

namespace kt::coproc {

// What this process may use of the machine.
struct Machine {
  std::vector<std::vector<int>> cores;  // Physical cores with a CPU in the affinity mask; those CPUs, ascending.
  std::vector<int> core_nodes;          // The NUMA node of each core.
  std::optional<double> cpu_quota;      // The control group's, in CPUs.

  int num_cpus() const;
  bool has_cpu(int cpu) const;
};

Machine inspect_machine(std::optional<double> cpu_quota);

// The CPUs by physical core. root: "" for this machine; a test passes a directory with sys/ below it.
std::vector<std::vector<int>> group_by_core(const std::vector<int>& cpus, const std::string& root = "");

struct WorkerPlan {
  std::uint32_t num_workers() const;
  std::vector<std::vector<int>> pools;  // Of each pool, one per worker: the CPU to pin it to, or -1.
  std::vector<int> nodes;               // The NUMA node of each pool's memory; -1: any.
  std::string summary;                  // "compute workers: 2 of 2 cores (affinity 2, cgroup quota none)"
  std::string warning;                  // "" or why this number of workers is a bad idea.
};

// threads 0: one per physical core within the quota, minus 2 above 8 cores: the training processes and the system need
// some too; with declared pools, one per CPU named. Workers are pinned unless a quota below the number of cores limits
// them (all groups so limited would pin to the same first cores) or there are more of them than CPUs; then they are one
// pool. kUsage for declared CPUs outside the affinity mask, and for declared pools with `threads`.
Result<WorkerPlan> plan_workers(const Machine& machine, std::uint32_t threads, const NumaChoice& numa = {});

}  // namespace kt::coproc
