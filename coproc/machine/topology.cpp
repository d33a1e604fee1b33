#include "coproc/machine/topology.h"

#include <numa.h>
#include <sched.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <fstream>
#include <map>
#include <set>
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

// Pinning order: one CPU of every core first, then the cores' second CPUs, …
std::vector<int> pinning_order(const Machine& machine) {
  std::vector<int> order;
  std::size_t deepest = 0;
  for (const std::vector<int>& core : machine.cores) deepest = std::max(deepest, core.size());
  for (std::size_t depth = 0; depth < deepest; ++depth) {
    for (const std::vector<int>& core : machine.cores) {
      if (depth < core.size()) order.push_back(core[depth]);
    }
  }
  return order;
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

Machine inspect_machine(std::optional<double> cpu_quota) {
  Machine machine;
  const std::vector<int> cpus = affinity_cpus();
  machine.cores = group_by_core(cpus);
  machine.cpu_quota = cpu_quota;
  if (::numa_available() >= 0) {
    std::set<int> nodes;
    for (const int cpu : cpus) nodes.insert(std::max(0, ::numa_node_of_cpu(cpu)));
    machine.numa_nodes = static_cast<std::uint32_t>(nodes.size());
  }
  return machine;
}

WorkerPlan plan_workers(const Machine& machine, std::uint32_t threads) {
  const auto num_cores = static_cast<std::uint32_t>(machine.cores.size());
  const auto num_cpus = static_cast<std::uint32_t>(machine.num_cpus());
  std::uint32_t usable = num_cores;
  const bool quota_binds = machine.cpu_quota && *machine.cpu_quota < num_cores;
  if (quota_binds) usable = std::max(1u, static_cast<std::uint32_t>(*machine.cpu_quota));

  std::uint32_t chosen = threads;
  if (chosen == 0) chosen = usable > kCoresAllBusyMax ? usable - kCoresLeftFree : usable;

  WorkerPlan plan;
  plan.cpus.assign(chosen, -1);
  if (!quota_binds && chosen <= num_cpus) {
    const std::vector<int> order = pinning_order(machine);
    std::copy_n(order.begin(), chosen, plan.cpus.begin());
  }
  plan.summary = "compute workers: " + std::to_string(chosen) + " of " + std::to_string(num_cores) +
                 (num_cores == 1 ? " core" : " cores") + " (affinity " + std::to_string(num_cpus) + ", cgroup quota " +
                 quota_text(machine.cpu_quota) + ")";
  if (chosen > usable) {
    plan.warning = std::to_string(chosen) + " compute workers are more than the " + std::to_string(usable) +
                   " cores there are for them: they will wait for each other";
  }
  return plan;
}

}  // namespace kt::coproc
