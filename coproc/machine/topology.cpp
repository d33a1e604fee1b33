#include "coproc/machine/topology.h"

#include <sched.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <fstream>
#include <map>
#include <utility>

namespace kt::coproc {
namespace {

constexpr std::size_t kCpusMax = 8192;
constexpr std::uint32_t kCoresAllBusyMax = 8;  // Up to here every core computes.
constexpr std::uint32_t kCoresLeftFree = 2;    // Above it, this many are left to others.

std::vector<int> affinity_cpus() {
  std::vector<int> cpus;
  cpu_set_t* const mask = CPU_ALLOC(kCpusMax);
  const std::size_t bytes = CPU_ALLOC_SIZE(kCpusMax);
  if (mask != nullptr && ::sched_getaffinity(0, bytes, mask) == 0) {
    for (std::size_t cpu = 0; cpu < kCpusMax; ++cpu) {
      if (CPU_ISSET_S(cpu, bytes, mask)) cpus.push_back(static_cast<int>(cpu));
    }
  }
  if (mask != nullptr) CPU_FREE(mask);
  if (cpus.empty()) cpus.push_back(0);
  return cpus;
}

std::optional<int> read_id(const std::string& path) {
  std::ifstream file(path);
  int id = 0;
  if (file >> id) return id;
  return std::nullopt;
}

std::string quota_text(const std::optional<double>& quota) {
  if (!quota) return "none";
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "%.4g CPUs", *quota);
  return text.data();
}

// Pinning order: one CPU of every core first, then the cores' second CPUs, …; of the cores, one of every NUMA node in
// turn, so that a few workers fewer than cores are missing everywhere. (CPU, node).
std::vector<std::pair<int, int>> pinning_order(const Machine& machine) {
  std::map<int, std::vector<std::size_t>> cores_of_node;
  std::size_t deepest = 0;
  std::size_t most = 0;
  for (std::size_t core = 0; core < machine.cores.size(); ++core) {
    std::vector<std::size_t>& cores = cores_of_node[machine.core_nodes[core]];
    cores.push_back(core);
    most = std::max(most, cores.size());
    deepest = std::max(deepest, machine.cores[core].size());
  }
  std::vector<std::pair<int, int>> order;
  for (std::size_t depth = 0; depth < deepest; ++depth) {
    for (std::size_t n = 0; n < most; ++n) {
      for (const auto& [node, cores] : cores_of_node) {
        if (n >= cores.size() || depth >= machine.cores[cores[n]].size()) continue;
        order.emplace_back(machine.cores[cores[n]][depth], node);
      }
    }
  }
  return order;
}

std::uint32_t usable_cores(const Machine& machine) {
  const auto num_cores = static_cast<std::uint32_t>(machine.cores.size());
  if (!machine.cpu_quota || *machine.cpu_quota >= num_cores) return num_cores;
  return std::max(1u, static_cast<std::uint32_t>(*machine.cpu_quota));
}

// `count` workers on the CPUs that come first, in pools by NUMA node or in one.
void fill_pools(const Machine& machine, std::uint32_t count, bool by_node, WorkerPlan& plan) {
  std::map<int, std::vector<int>> pools;
  const std::vector<std::pair<int, int>> order = pinning_order(machine);
  for (std::uint32_t worker = 0; worker < count; ++worker) {
    const auto [cpu, node] = order[worker];
    pools[by_node ? node : -1].push_back(cpu);
  }
  for (auto& [node, cpus] : pools) {
    std::sort(cpus.begin(), cpus.end());
    plan.nodes.push_back(pools.size() > 1 ? node : -1);
    plan.pools.push_back(std::move(cpus));
  }
}

Status fill_declared_pools(const Machine& machine, const NumaChoice& numa, WorkerPlan& plan) {
  for (const std::vector<int>& cpus : numa.pools) {
    for (const int cpu : cpus) {
      if (machine.has_cpu(cpu)) continue;
      return Error{ErrorCode::kUsage, "cannot put a worker on CPU " + std::to_string(cpu),
                   "this process may run on " + std::to_string(machine.num_cpus()) + " CPUs, and it is not one of them",
                   "name CPUs that nproc counts and taskset -cp $$ shows"};
    }
  }
  plan.pools = numa.pools;
  for (const std::vector<int>& cpus : numa.pools) plan.nodes.push_back(node_of_cpu(cpus[0]));
  return ok_status();
}

}  // namespace

int Machine::num_cpus() const {
  std::size_t count = 0;
  for (const std::vector<int>& core : cores) count += core.size();
  return static_cast<int>(count);
}

std::vector<std::vector<int>> group_by_core(const std::vector<int>& cpus, const std::string& root) {
  std::map<std::pair<int, int>, std::size_t> seen;
  std::vector<std::vector<int>> cores;
  for (const int cpu : cpus) {
    const std::string folder = root + "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
    const auto package = read_id(folder + "physical_package_id");
    const auto core = read_id(folder + "core_id");
    // Without the files (some containers hide them) every CPU counts as a core.
    const auto key = core ? std::pair(package.value_or(0), *core) : std::pair(-1, cpu);
    const auto [entry, is_new] = seen.try_emplace(key, cores.size());
    if (is_new) cores.emplace_back();
    cores[entry->second].push_back(cpu);
  }
  return cores;
}

bool Machine::has_cpu(int cpu) const {
  return std::any_of(cores.begin(), cores.end(), [cpu](const std::vector<int>& core) {
    return std::find(core.begin(), core.end(), cpu) != core.end();
  });
}

std::uint32_t WorkerPlan::num_workers() const {
  std::size_t count = 0;
  for (const std::vector<int>& pool : pools) count += pool.size();
  return static_cast<std::uint32_t>(count);
}

Machine inspect_machine(std::optional<double> cpu_quota) {
  Machine machine;
  machine.cores = group_by_core(affinity_cpus());
  for (const std::vector<int>& core : machine.cores) machine.core_nodes.push_back(node_of_cpu(core[0]));
  machine.cpu_quota = cpu_quota;
  return machine;
}

Result<WorkerPlan> plan_workers(const Machine& machine, std::uint32_t threads, const NumaChoice& numa) {
  const auto num_cores = static_cast<std::uint32_t>(machine.cores.size());
  const auto num_cpus = static_cast<std::uint32_t>(machine.num_cpus());
  const std::uint32_t usable = usable_cores(machine);
  WorkerPlan plan;
  if (numa.mode == NumaChoice::Mode::kDeclared) {
    if (threads > 0) {
      return Error{ErrorCode::kUsage, "cannot use both a number of workers and pools of CPUs",
                   "--numa names the CPUs, one worker each, and --threads asks for " + std::to_string(threads),
                   "leave out --threads, or use --numa auto"};
    }
    KT_TRY_STATUS(fill_declared_pools(machine, numa, plan));
  } else {
    std::uint32_t chosen = threads;
    if (chosen == 0) chosen = usable > kCoresAllBusyMax ? usable - kCoresLeftFree : usable;
    if (usable < num_cores || chosen > num_cpus) {
      plan.pools.emplace_back(chosen, -1);
      plan.nodes.push_back(-1);
    } else {
      fill_pools(machine, chosen, numa.mode == NumaChoice::Mode::kAuto, plan);
    }
  }
  const std::string count = std::to_string(plan.num_workers());
  plan.summary = "compute workers: " + count + " of " + std::to_string(num_cores) +
                 (num_cores == 1 ? " core" : " cores") +
                 (plan.pools.size() > 1 ? " in " + std::to_string(plan.pools.size()) + " pools" : "") + " (affinity " +
                 std::to_string(num_cpus) + ", cgroup quota " + quota_text(machine.cpu_quota) + ")";
  if (plan.num_workers() > usable) {
    plan.warning = count + " compute workers are more than the " + std::to_string(usable) +
                   " cores there are for them: they will wait for each other";
  }
  return plan;
}

}  // namespace kt::coproc
