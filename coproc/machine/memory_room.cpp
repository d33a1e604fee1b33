#include "coproc/machine/memory_room.h"

#include <array>
#include <cstdio>
#include <fstream>
#include <limits>

namespace kt::coproc {
namespace {

std::uint64_t memory_available(const std::string& root) {
  std::ifstream file(root + "/proc/meminfo");
  std::string key;
  std::string unit;
  for (std::uint64_t value = 0; file >> key >> value; std::getline(file, unit)) {
    if (key == "MemAvailable:") return value * 1024;
  }
  return std::numeric_limits<std::uint64_t>::max();  // Unknown: no reason to refuse.
}

}  // namespace

MemoryRoom read_memory_room(const CgroupLimits& limits, const std::string& root) {
  const std::uint64_t machine = memory_available(root);
  if (limits.memory_free_bytes && *limits.memory_free_bytes < machine) {
    return {*limits.memory_free_bytes,
            "the control group's limit of " + bytes_text(limits.memory_limit_bytes.value_or(0))};
  }
  return {machine, "MemAvailable of this machine"};
}

Status require_memory(const MemoryRoom& room, std::uint64_t bytes, const std::string& what, const std::string& fix) {
  if (bytes <= room.bytes) return ok_status();
  return Error{ErrorCode::kNoResources, "not enough memory for " + what,
               "it needs " + bytes_text(bytes) + ", and " + bytes_text(room.bytes) + " are free (" + room.source + ")",
               fix};
}

std::string bytes_text(std::uint64_t bytes) {
  const char* unit = "bytes";
  double value = static_cast<double>(bytes);
  if (bytes < 1000) return std::to_string(bytes) + " bytes";
  for (const char* next : {"kB", "MB", "GB", "TB"}) {
    if (value < 1000) break;
    value /= 1000;
    unit = next;
  }
  std::array<char, 48> text{};
  std::snprintf(text.data(), text.size(), "%.1f %s", value, unit);
  return text.data();
}

}  // namespace kt::coproc
