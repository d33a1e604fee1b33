// How much memory this process may still take.
#pragma once
#include <cstdint>
#include <string>

#include "coproc/machine/cgroup.h"
#include "shm/base/result.h"

namespace kt::coproc {

struct MemoryRoom {
  std::uint64_t bytes = 0;
  std::string source;  // "MemAvailable of this machine", "the control group's limit of 8.0 GB"
};

// The lesser of what the machine and what the control group have left. root: see read_cgroup_limits.
MemoryRoom read_memory_room(const CgroupLimits& limits, const std::string& root = "");

// kNoResources with numbers unless `bytes` fit.
Status require_memory(const MemoryRoom& room, std::uint64_t bytes, const std::string& what,
                      const std::string& fix = "free memory, raise the limit, or serve a smaller checkpoint");

// "57.1 GB", "12.0 MB", "640 bytes": decimal units.
std::string bytes_text(std::uint64_t bytes);

}  // namespace kt::coproc
