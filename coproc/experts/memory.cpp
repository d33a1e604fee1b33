#include "coproc/experts/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <limits>

namespace kt::coproc {
namespace {

constexpr std::uint64_t kUnknown = std::numeric_limits<std::uint64_t>::max();
constexpr std::uint64_t kHugePageBytes = 2097152;

std::uint64_t memory_available_on_host() {
  std::ifstream file("/proc/meminfo");
  std::string key;
  std::string unit;
  std::uint64_t kib = 0;
  while (file >> key >> kib) {
    if (key == "MemAvailable:") return kib * 1024;
    std::getline(file, unit);
  }
  return kUnknown;
}

// In a container the root of the hierarchy is the container's own group; "max" does not parse as a number.
std::uint64_t memory_limit_of_group() {
  std::uint64_t bytes = 0;
  for (const char* path : {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}) {
    std::ifstream file(path);
    if (file >> bytes) return bytes;
  }
  return kUnknown;
}

std::string gigabytes(std::uint64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2f GB", static_cast<double>(bytes) * 1e-9);
  return text;
}

}  // namespace

std::uint64_t available_memory_bytes() { return std::min(memory_available_on_host(), memory_limit_of_group()); }

Status check_memory(std::uint64_t bytes, const std::string& purpose, const std::string& fix) {
  const std::uint64_t available = available_memory_bytes();
  if (bytes <= available) return ok_status();
  return Error{ErrorCode::kNoResources, "not enough memory for " + purpose,
               "it needs " + gigabytes(bytes) + " (" + std::to_string(bytes) + " bytes), " + gigabytes(available) +
                   " are available",
               fix};
}

Result<Memory> Memory::map(std::uint64_t bytes, const std::string& purpose, const std::string& fix) {
  KT_TRY_STATUS(check_memory(bytes, purpose, fix));
  const bool huge = bytes >= kHugePageBytes;
  Memory memory;
  memory.mapped_bytes_ = std::max<std::uint64_t>(bytes + (huge ? kHugePageBytes : 0), 1);
  void* mapping = ::mmap(nullptr, memory.mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) {
    const int saved = errno;
    memory.mapped_bytes_ = 0;
    return Error{
        ErrorCode::kNoResources, "cannot reserve memory for " + purpose,
        "mmap of " + gigabytes(bytes) + " (" + std::to_string(bytes) + " bytes) failed: " + std::strerror(saved), fix};
  }
  memory.mapping_ = mapping;
  memory.data_ = static_cast<std::byte*>(mapping);
  if (huge) {
    std::size_t space = memory.mapped_bytes_;
    memory.data_ = static_cast<std::byte*>(std::align(kHugePageBytes, bytes, mapping, space));
    // Advice only: without huge pages everything works, with more TLB misses.
    static_cast<void>(::madvise(memory.data_, bytes, MADV_HUGEPAGE));
  }
  return memory;
}

Memory::~Memory() {
  if (mapping_ != nullptr) ::munmap(mapping_, mapped_bytes_);
}

}  // namespace kt::coproc
