#include "coproc/machine/cgroup.h"

#include <algorithm>
#include <fstream>
#include <sstream>
#include <vector>

namespace kt::coproc {
namespace {

// One hierarchy of control groups: where it is mounted, and the group we are in below that.
struct Hierarchy {
  std::string mount_point;
  std::string group;  // "" or "/a/b"
};

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
  return parts;
}

bool has_word(const std::string& list, const std::string& word) {
  const std::vector<std::string> words = split(list, ',');
  return std::find(words.begin(), words.end(), word) != words.end();
}

// Our group's path in the hierarchy: the line "N:controllers:/path" of /proc/self/cgroup; version 2: "0::/path".
std::optional<std::string> own_group(const std::string& root, const std::string& controller) {
  std::ifstream file(root + "/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const std::size_t first = line.find(':');
    const std::size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const bool matches = controller.empty() ? controllers.empty() : has_word(controllers, controller);
    if (matches) return line.substr(second + 1);
  }
  return std::nullopt;
}

// The mount of a version 1 controller, or with "" of version 2, from /proc/self/mountinfo:
//   36 31 0:33 <root> <mount point> <options> … - cgroup cgroup rw,memory
std::optional<Hierarchy> find_hierarchy(const std::string& root, const std::string& controller) {
  const std::optional<std::string> group = own_group(root, controller);
  if (!group) return std::nullopt;
  std::ifstream file(root + "/proc/self/mountinfo");
  for (std::string line; std::getline(file, line);) {
    const std::size_t dash = line.find(" - ");
    if (dash == std::string::npos) continue;
    const std::vector<std::string> left = split(line.substr(0, dash), ' ');
    const std::vector<std::string> right = split(line.substr(dash + 3), ' ');
    if (left.size() < 5 || right.size() < 3) continue;
    const bool matches =
        controller.empty() ? right[0] == "cgroup2" : right[0] == "cgroup" && has_word(right[2], controller);
    if (!matches) continue;
    // In a container without a namespace of its own, the mount shows a part of the tree: `left[3]` and below.
    const std::string& shown = left[3];
    std::string below = *group;
    if (shown != "/" && below.rfind(shown, 0) == 0) below.erase(0, shown.size());
    if (below == "/" || below.rfind("/..", 0) == 0) below.clear();
    return Hierarchy{root + left[4], below};
  }
  return std::nullopt;
}

std::optional<std::uint64_t> read_number(const std::string& path) {
  std::ifstream file(path);
  std::uint64_t number = 0;
  if (file >> number) return number;  // "max" is not a number: no limit.
  return std::nullopt;
}

// The sum of the given keys of a memory.stat file.
std::uint64_t read_stat(const std::string& path, std::initializer_list<const char*> keys) {
  std::ifstream file(path);
  std::uint64_t sum = 0;
  std::string key;
  for (std::uint64_t value = 0; file >> key >> value;) {
    if (std::find(keys.begin(), keys.end(), key) != keys.end()) sum += value;
  }
  return sum;
}

void limit_cpus(CgroupLimits& limits, double quota, double period) {
  if (quota <= 0 || period <= 0) return;
  limits.cpus = std::min(limits.cpus.value_or(quota / period), quota / period);
}

void limit_memory(CgroupLimits& limits, std::uint64_t limit, std::uint64_t used, std::uint64_t reclaimable) {
  // Version 1 writes "no limit" as a number near 2^63.
  if (limit >= std::uint64_t{1} << 60) return;
  const std::uint64_t kept = used - std::min(used, reclaimable);
  const std::uint64_t room = limit - std::min(limit, kept);
  if (limits.memory_free_bytes && *limits.memory_free_bytes <= room) return;
  limits.memory_limit_bytes = limit;
  limits.memory_free_bytes = room;
}

void read_v2(const std::string& directory, CgroupLimits& limits) {
  double quota = 0;
  double period = 0;
  std::ifstream cpu(directory + "/cpu.max");  // "200000 100000" or "max 100000"
  if (cpu >> quota >> period) limit_cpus(limits, quota, period);
  if (const auto limit = read_number(directory + "/memory.max")) {
    limit_memory(limits, *limit, read_number(directory + "/memory.current").value_or(0),
                 read_stat(directory + "/memory.stat", {"active_file", "inactive_file"}));
  }
}

void read_v1_cpu(const std::string& directory, CgroupLimits& limits) {
  double quota = 0;  // -1: none.
  double period = 0;
  std::ifstream(directory + "/cpu.cfs_quota_us") >> quota;
  std::ifstream(directory + "/cpu.cfs_period_us") >> period;
  limit_cpus(limits, quota, period);
}

void read_v1_memory(const std::string& directory, CgroupLimits& limits) {
  if (const auto limit = read_number(directory + "/memory.limit_in_bytes")) {
    limit_memory(limits, *limit, read_number(directory + "/memory.usage_in_bytes").value_or(0),
                 read_stat(directory + "/memory.stat", {"total_active_file", "total_inactive_file"}));
  }
}

// A limit of any group above ours holds for us too.
template <class Read>
void for_each_group(const std::optional<Hierarchy>& hierarchy, const Read& read) {
  if (!hierarchy) return;
  std::string group = hierarchy->group;
  for (;;) {
    read(hierarchy->mount_point + group);
    if (group.empty()) return;
    group.erase(group.rfind('/') == std::string::npos ? 0 : group.rfind('/'));
  }
}

}  // namespace

CgroupLimits read_cgroup_limits(const std::string& root) {
  CgroupLimits limits;
  for_each_group(find_hierarchy(root, ""), [&](const std::string& group) { read_v2(group, limits); });
  for_each_group(find_hierarchy(root, "cpu"), [&](const std::string& group) { read_v1_cpu(group, limits); });
  for_each_group(find_hierarchy(root, "memory"), [&](const std::string& group) { read_v1_memory(group, limits); });
  return limits;
}

}  // namespace kt::coproc
