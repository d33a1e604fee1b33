#include "coproc/experts/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "coproc/machine/memory_room.h"
#include "coproc/machine/numa.h"

namespace kt::coproc {
namespace {

constexpr std::uint64_t kHugePageBytes = 2097152;

}  // namespace

Result<Memory> Memory::map(std::uint64_t bytes, const std::string& purpose, const std::string& fix, int node) {
  KT_TRY_STATUS(require_memory(read_memory_room(read_cgroup_limits()), bytes, purpose, fix));
  const bool huge = bytes >= kHugePageBytes;
  Memory memory;
  memory.mapped_bytes_ = std::max<std::uint64_t>(bytes + (huge ? kHugePageBytes : 0), 1);
  void* mapping = ::mmap(nullptr, memory.mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) {
    const int saved = errno;
    memory.mapped_bytes_ = 0;
    return Error{ErrorCode::kNoResources, "cannot reserve memory for " + purpose,
                 "mmap of " + bytes_text(bytes) + " failed: " + std::strerror(saved), fix};
  }
  memory.mapping_ = mapping;
  memory.data_ = static_cast<std::byte*>(mapping);
  if (huge) {
    std::size_t space = memory.mapped_bytes_;
    memory.data_ = static_cast<std::byte*>(std::align(kHugePageBytes, bytes, mapping, space));
    // Advice only: without huge pages everything works, with more TLB misses.
    static_cast<void>(::madvise(memory.data_, bytes, MADV_HUGEPAGE));
  }
  bind_memory(memory.data_, bytes, node);
  return memory;
}

Memory::~Memory() {
  if (mapping_ != nullptr) ::munmap(mapping_, mapped_bytes_);
}

}  // namespace kt::coproc
