// A session's shared memory: created and sealed by the daemon, mapped by both ends. Layout: protocol.h.
#pragma once
#include <boost/interprocess/mapped_region.hpp>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "shm/base/result.h"
#include "shm/base/unique_fd.h"
#include "shm/protocol.h"

namespace kt::shm {

// A memfd. Models Boost.Interprocess' MemoryMappable concept, so mapped_region can map it.
class Memfd {
 public:
  // Creates `bytes` of zeroed memory, close-on-exec. huge_pages: MFD_HUGETLB (kNoResources if the pool is empty).
  static Result<Memfd> create(const std::string& name, std::uint64_t bytes, bool huge_pages);
  explicit Memfd(UniqueFd fd) : fd_(std::move(fd)) {}

  // SHRINK | GROW | SEAL: nobody can truncate it under a mapping. read_only adds FUTURE_WRITE: mappings made after
  // this are read-only; the creator's own mapping, made before, stays writable.
  Status seal(bool read_only);
  bool is_sealed() const;  // At least SHRINK | GROW | SEAL. Also false for anything that is not a memfd.
  Result<std::uint64_t> size() const;
  int fd() const { return fd_.get(); }
  boost::interprocess::mapping_handle_t get_mapping_handle() const;

 private:
  UniqueFd fd_;
};

class Segment {
 public:
  // Daemon: arena_bytes is rounded up to 2 MiB. Huge pages where they can be had: MFD_HUGETLB, else MADV_COLLAPSE of
  // the arena, else 4 KiB pages; page_bytes() tells which.
  static Result<Segment> create(std::uint32_t session_id, std::uint64_t arena_bytes);
  // Rank: maps a received descriptor and checks magic, version, size and seals.
  static Result<Segment> attach(UniqueFd fd);

  SegmentHeader& header() const;
  Slot& slot(std::uint32_t index) const;  // index < kNumSlots
  StreamFlag& stream_flag(std::uint32_t index) const;
  std::span<char> message(std::uint32_t index) const;  // kMessageBytes
  std::byte* arena() const;
  std::uint64_t arena_bytes() const { return arena_bytes_; }
  std::uint32_t page_bytes() const { return page_bytes_; }
  int fd() const { return memfd_.fd(); }

 private:
  Segment(Memfd memfd, boost::interprocess::mapped_region region, std::uint64_t arena_bytes, std::uint32_t page_bytes)
      : memfd_(std::move(memfd)), region_(std::move(region)), arena_bytes_(arena_bytes), page_bytes_(page_bytes) {}
  std::byte* at(std::uint64_t offset) const;

  Memfd memfd_;
  boost::interprocess::mapped_region region_;
  std::uint64_t arena_bytes_;
  std::uint32_t page_bytes_;
};

}  // namespace kt::shm
