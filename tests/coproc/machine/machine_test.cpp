// What the daemon learns from the machine: control groups, cores, memory.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <memory>

#include "coproc/machine/cgroup.h"
#include "coproc/machine/memory_room.h"
#include "coproc/machine/topology.h"
#include "tests/support/temp_dir.h"

namespace kt::coproc {
namespace {

// A machine made of files.
class FakeRoot {
 public:
  void write(const std::string& path, const std::string& text) const {
    const std::filesystem::path file = directory_.path() / path;
    std::filesystem::create_directories(file.parent_path());
    std::ofstream(file) << text;
  }
  std::string path() const { return directory_.path().string(); }

 private:
  testing::TempDir directory_;
};

Machine machine_of(std::size_t num_cores, std::size_t cpus_per_core, std::optional<double> quota = {},
                   std::size_t num_nodes = 1) {
  Machine machine;
  machine.cpu_quota = quota;
  for (std::size_t core = 0; core < num_cores; ++core) {
    machine.cores.emplace_back();
    machine.core_nodes.push_back(num_nodes == 1 ? 0 : static_cast<int>(core * num_nodes / num_cores));
    for (std::size_t i = 0; i < cpus_per_core; ++i) {
      machine.cores.back().push_back(static_cast<int>(core + i * num_cores));
    }
  }
  return machine;
}

TEST(Cgroup, WithoutFilesThereAreNoLimits) {
  const FakeRoot root;
  const CgroupLimits limits = read_cgroup_limits(root.path());
  EXPECT_FALSE(limits.cpus);
  EXPECT_FALSE(limits.memory_limit_bytes);
  EXPECT_FALSE(limits.memory_free_bytes);
}

TEST(Cgroup, Version2TakesTheTightestGroupAboveUs) {
  const FakeRoot root;
  root.write("proc/self/cgroup", "0::/a/b\n");
  root.write("proc/self/mountinfo", "41 31 0:38 / /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw\n");
  root.write("sys/fs/cgroup/a/b/cpu.max", "max 100000\n");
  root.write("sys/fs/cgroup/a/cpu.max", "250000 100000\n");
  root.write("sys/fs/cgroup/a/b/memory.max", "max\n");
  root.write("sys/fs/cgroup/a/memory.max", "1000000\n");
  root.write("sys/fs/cgroup/a/memory.current", "700000\n");
  root.write("sys/fs/cgroup/a/memory.stat", "anon 1\nactive_file 100000\ninactive_file 50000\nslab 9\n");
  const CgroupLimits limits = read_cgroup_limits(root.path());
  EXPECT_DOUBLE_EQ(limits.cpus.value_or(0), 2.5);
  EXPECT_EQ(limits.memory_limit_bytes.value_or(0), 1000000u);
  EXPECT_EQ(limits.memory_free_bytes.value_or(0), 450000u);
}

TEST(Cgroup, Version1InAContainerThatSeesOnlyItsOwnPart) {
  const FakeRoot root;
  root.write("proc/self/cgroup", "4:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n0::/\n");
  root.write("proc/self/mountinfo",
             "30 23 0:29 /docker/x /sys/fs/cgroup/cpu,cpuacct ro - cgroup cgroup rw,cpu,cpuacct\n"
             "31 23 0:30 /docker/x /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n");
  root.write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "150000\n");
  root.write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n");
  root.write("sys/fs/cgroup/memory/memory.limit_in_bytes", "5000\n");
  root.write("sys/fs/cgroup/memory/memory.usage_in_bytes", "6000\n");
  const CgroupLimits limits = read_cgroup_limits(root.path());
  EXPECT_DOUBLE_EQ(limits.cpus.value_or(0), 1.5);
  EXPECT_EQ(limits.memory_free_bytes.value_or(1), 0u);
}

TEST(Cgroup, Version1WritesNoLimitAsNumbers) {
  const FakeRoot root;
  root.write("proc/self/cgroup", "4:memory:/\n1:cpu:/\n");
  root.write("proc/self/mountinfo",
             "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
             "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n");
  root.write("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n");
  root.write("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n");
  root.write("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
  const CgroupLimits limits = read_cgroup_limits(root.path());
  EXPECT_FALSE(limits.cpus);
  EXPECT_FALSE(limits.memory_limit_bytes);
}

TEST(MemoryRoom, IsTheLesserOfMachineAndGroup) {
  const FakeRoot root;
  root.write("proc/meminfo", "MemTotal:       100 kB\nMemFree:  1 kB\nMemAvailable:   50 kB\nHugePages_Total:  0\n");
  EXPECT_EQ(read_memory_room({}, root.path()).bytes, 50u * 1024);
  CgroupLimits limits;
  limits.memory_limit_bytes = 2'000'000'000;
  limits.memory_free_bytes = 40'000;
  const MemoryRoom room = read_memory_room(limits, root.path());
  EXPECT_EQ(room.bytes, 40'000u);
  EXPECT_NE(room.source.find("2.0 GB"), std::string::npos) << room.source;
  EXPECT_TRUE(require_memory(room, 40'000, "this").ok());
  const Status refused = require_memory(room, 41'000, "this");
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.error().code, ErrorCode::kNoResources);
  EXPECT_NE(refused.error().why.find("41.0 kB"), std::string::npos) << refused.error().why;
}

TEST(MemoryRoom, BytesAreWrittenInDecimalUnits) {
  EXPECT_EQ(bytes_text(0), "0 bytes");
  EXPECT_EQ(bytes_text(999), "999 bytes");
  EXPECT_EQ(bytes_text(57'100'000'000), "57.1 GB");
  EXPECT_EQ(bytes_text(1'300'000'000'000), "1.3 TB");
}

TEST(Topology, HyperthreadsOfACoreBelongTogether) {
  const FakeRoot root;
  for (int cpu = 0; cpu < 4; ++cpu) {
    const std::string folder = "sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
    root.write(folder + "physical_package_id", "0\n");
    root.write(folder + "core_id", std::to_string(cpu % 2) + "\n");
  }
  EXPECT_EQ(group_by_core({0, 1, 2, 3}, root.path()), (std::vector<std::vector<int>>{{0, 2}, {1, 3}}));
  EXPECT_EQ(group_by_core({1, 3}, root.path()), (std::vector<std::vector<int>>{{1, 3}}));
  EXPECT_EQ(group_by_core({7, 9}, root.path()), (std::vector<std::vector<int>>{{7}, {9}})) << "without the files";
}

using Pools = std::vector<std::vector<int>>;

WorkerPlan plan_of(const Machine& machine, std::uint32_t threads, const NumaChoice& numa = {}) {
  auto plan = plan_workers(machine, threads, numa);
  EXPECT_TRUE(plan.ok());
  return std::move(plan).value();
}

TEST(Topology, EveryCoreComputesUpToEightAndTwoAreLeftFreeAbove) {
  EXPECT_EQ(plan_of(machine_of(1, 1), 0).num_workers(), 1u);
  EXPECT_EQ(plan_of(machine_of(8, 2), 0).num_workers(), 8u);
  EXPECT_EQ(plan_of(machine_of(56, 2), 0).num_workers(), 54u);
  const WorkerPlan plan = plan_of(machine_of(2, 1), 0);
  EXPECT_EQ(plan.pools, (Pools{{0, 1}}));
  EXPECT_EQ(plan.summary, "compute workers: 2 of 2 cores (affinity 2, cgroup quota none)");
  EXPECT_EQ(plan.warning, "");
}

TEST(Topology, AQuotaLimitsTheWorkersAndLeavesThemUnpinned) {
  const WorkerPlan plan = plan_of(machine_of(64, 2, 2.5), 0);
  EXPECT_EQ(plan.pools, (Pools{{-1, -1}}));
  EXPECT_EQ(plan.summary, "compute workers: 2 of 64 cores (affinity 128, cgroup quota 2.5 CPUs)");
  EXPECT_EQ(plan_of(machine_of(4, 1, 0.5), 0).num_workers(), 1u);
  EXPECT_EQ(plan_of(machine_of(4, 1, 100.0), 0).pools, (Pools{{0, 1, 2, 3}}));
}

TEST(Topology, AskedForThreadsTakeACpuOfEveryCoreFirst) {
  EXPECT_EQ(plan_of(machine_of(3, 2), 2).pools, (Pools{{0, 1}}));
  const WorkerPlan more = plan_of(machine_of(2, 2), 3);
  EXPECT_EQ(more.pools, (Pools{{0, 1, 2}}));
  EXPECT_NE(more.warning.find("more than the 2 cores"), std::string::npos) << more.warning;
  EXPECT_EQ(plan_of(machine_of(2, 2), 5).pools, (Pools{std::vector<int>(5, -1)}));
}

// 12 cores on 2 nodes, two of them left free: one less on each.
TEST(Topology, EveryNumaNodeHasAPoolOfItsOwn) {
  const WorkerPlan plan = plan_of(machine_of(12, 1, {}, 2), 0);
  EXPECT_EQ(plan.pools, (Pools{{0, 1, 2, 3, 4}, {6, 7, 8, 9, 10}}));
  EXPECT_EQ(plan.nodes, (std::vector<int>{0, 1}));
  EXPECT_EQ(plan.summary, "compute workers: 10 of 12 cores in 2 pools (affinity 12, cgroup quota none)");
  NumaChoice off;
  off.mode = NumaChoice::Mode::kOff;
  EXPECT_EQ(plan_of(machine_of(4, 1, {}, 2), 0, off).pools, (Pools{{0, 1, 2, 3}}));
  EXPECT_EQ(plan_of(machine_of(4, 1, {}, 2), 0, off).nodes, (std::vector<int>{-1}));
  EXPECT_EQ(plan_of(machine_of(4, 1, {}, 2), 1).pools, (Pools{{0}}));
  EXPECT_EQ(plan_of(machine_of(4, 1, 2.0, 2), 0).pools, (Pools{{-1, -1}})) << "not pinned, so of no node";
}

TEST(Topology, DeclaredPoolsAreTakenAsTheyAre) {
  const Machine machine = machine_of(4, 2);
  auto numa = parse_numa("0-2,5;3");
  ASSERT_TRUE(numa.ok());
  const WorkerPlan plan = plan_of(machine, 0, numa.value());
  EXPECT_EQ(plan.pools, (Pools{{0, 1, 2, 5}, {3}}));
  EXPECT_EQ(plan.nodes.size(), 2u);
  EXPECT_NE(plan.warning, "") << "five workers, four cores";
  const auto refused = plan_workers(machine_of(2, 1), 0, numa.value());
  ASSERT_FALSE(refused.ok());
  EXPECT_NE(refused.error().what.find("CPU 2"), std::string::npos) << refused.error().what;
  EXPECT_FALSE(plan_workers(machine, 3, numa.value()).ok()) << "two answers to one question";
}

TEST(Numa, ReadsListsOfCpusAndRefusesEverythingElse) {
  EXPECT_EQ(parse_numa("auto").value().mode, NumaChoice::Mode::kAuto);
  EXPECT_EQ(parse_numa("off").value().mode, NumaChoice::Mode::kOff);
  EXPECT_EQ(parse_numa("0").value().pools, (Pools{{0}}));
  EXPECT_EQ(parse_numa("0;1").value().pools, (Pools{{0}, {1}}));
  EXPECT_EQ(parse_numa("4-6,9;0").value().pools, (Pools{{4, 5, 6, 9}, {0}}));
  for (const char* text : {"", "on", ";", "0;", ";0", "0;;1", "3-1", "0,0", "0-3;2", "-1", "1-", "0,", "8192", "0 1",
                           "99999999999999999999", "0-1024"}) {
    const auto parsed = parse_numa(text);
    ASSERT_FALSE(parsed.ok()) << text;
    EXPECT_EQ(parsed.error().code, ErrorCode::kUsage);
    EXPECT_FALSE(parsed.error().why.empty() || parsed.error().fix.empty());
  }
}

TEST(Topology, ThisMachineHasACore) {
  const Machine machine = inspect_machine(std::nullopt);
  EXPECT_GE(machine.cores.size(), 1u);
  EXPECT_GE(machine.num_cpus(), 1);
  EXPECT_EQ(machine.core_nodes.size(), machine.cores.size());
}

}  // namespace
}  // namespace kt::coproc
