// The limits of the control groups this process runs in, versions 1 and 2, in containers and outside.
#pragma once
#include <cstdint>
#include <optional>
#include <string>

namespace kt::coproc {

struct CgroupLimits {
  std::optional<double> cpus;                       // CPU time per time; the least of all groups above us.
  std::optional<std::uint64_t> memory_limit_bytes;  // Of the group with the least room.
  std::optional<std::uint64_t> memory_free_bytes;   // Limit - use + page cache that can be dropped.
};

// root: "" for this machine; a test passes a directory with proc/ and sys/ below it. What cannot be read is no limit.
CgroupLimits read_cgroup_limits(const std::string& root = "");

}  // namespace kt::coproc
