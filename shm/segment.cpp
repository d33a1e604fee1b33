#include "shm/segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "shm/base/align.h"

namespace kt::shm {
namespace bip = boost::interprocess;
namespace {

constexpr std::uint32_t kHugePageBytes = 2 * 1024 * 1024;
constexpr std::uint32_t kSmallPageBytes = 4096;
constexpr int kMadvCollapse = 25;            // MADV_COLLAPSE of Linux 6.1; glibc 2.36 does not name it.
constexpr int kMadvPopulateWrite = 23;       // MADV_POPULATE_WRITE of Linux 5.14: fails where a store would be SIGBUS.
constexpr unsigned kMfdHuge2Mb = 21u << 26;  // MFD_HUGE_2MB of linux/memfd.h: log2 of the page size.
constexpr int kSealsRequired = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
constexpr const char* kMemoryFix = "lower --arena or free memory; see `free -m` and the container's memory limit";

// An address with room for `bytes` at a huge-page boundary, so that a huge page can be mapped as one, or null.
// Another thread may take it first; the caller then lives with any address.
void* free_aligned_address(std::uint64_t bytes) {
  const std::uint64_t room = bytes + kHugePageBytes;
  void* const start = ::mmap(nullptr, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) return nullptr;
  ::munmap(start, room);
  const auto address = reinterpret_cast<std::uintptr_t>(start);
  return static_cast<std::byte*>(start) + (round_up(address, kHugePageBytes) - address);
}

Result<bip::mapped_region> map_region(const Memfd& memfd, bip::mode_t mode, std::uint64_t bytes) {
  try {
    return bip::mapped_region(memfd, mode, 0, bytes, free_aligned_address(bytes));
  } catch (const bip::interprocess_exception&) {
    // The address was taken meanwhile, or there is no memory: the second try tells.
  }
  try {
    return bip::mapped_region(memfd, mode, 0, bytes);
  } catch (const bip::interprocess_exception& failure) {
    return Error{ErrorCode::kOs, "mmap of " + std::to_string(bytes) + " bytes of shared memory failed", failure.what(),
                 kMemoryFix};
  }
}

// Collapsing clears and commits the memory at once: 64 MiB in 7 ms where the machine has it at hand, in 100 ms where a
// hypervisor has to find it first (which every first touch pays anyway). Beyond this size a new session would wait
// noticeably, so larger arenas keep 4 KiB pages, which come when they are touched.
constexpr std::uint64_t kCollapseBytesMax = std::uint64_t{256} * 1024 * 1024;

// Makes the arena of huge pages without a reserved pool. All or nothing is reported; the pages it got stay.
bool collapse_arena(void* base, std::uint64_t arena_bytes) {
  std::byte* const arena = static_cast<std::byte*>(base) + kArenaOffset;
  if (arena_bytes > kCollapseBytesMax || reinterpret_cast<std::uintptr_t>(arena) % kHugePageBytes != 0) return false;
  // The kernel collapses only ranges that hold a page: one touch each saves it from refusing (EINVAL).
  for (std::uint64_t offset = 0; offset < arena_bytes; offset += kHugePageBytes) {
    if (::madvise(arena + offset, kSmallPageBytes, kMadvPopulateWrite) != 0) return false;
    if (::madvise(arena + offset, kHugePageBytes, kMadvCollapse) != 0) return false;
  }
  return true;
}

Error bad_segment(std::string why) {
  return Error{ErrorCode::kInvalidArgument, "the descriptor received from the daemon is not a session's segment",
               std::move(why), "run client and daemon of the same kt-coproc release"};
}

}  // namespace

Result<Memfd> Memfd::create(const std::string& name, std::uint64_t bytes, bool huge_pages) {
  const unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING | (huge_pages ? MFD_HUGETLB | kMfdHuge2Mb : 0u);
  const auto failed = [&](const char* call) {
    Error error = os_error(call, name + ", " + std::to_string(bytes) + " bytes", kMemoryFix);
    if (huge_pages) error.code = ErrorCode::kNoResources;
    return error;
  };
  UniqueFd fd(::memfd_create(name.c_str(), flags));
  if (!fd.valid()) return failed("memfd_create");
  if (::ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0) return failed("ftruncate");
  // An empty pool shows only here: without this, the first access would be SIGBUS.
  if (huge_pages && ::fallocate(fd.get(), 0, 0, static_cast<off_t>(bytes)) != 0) return failed("fallocate");
  return Memfd(std::move(fd));
}

Status Memfd::seal(bool read_only) {
  const int seals = kSealsRequired | (read_only ? F_SEAL_FUTURE_WRITE : 0);
  if (::fcntl(fd_.get(), F_ADD_SEALS, seals) != 0) {
    return os_error("fcntl(F_ADD_SEALS)", "memfd", "run Linux 5.1 or newer: it has F_SEAL_FUTURE_WRITE");
  }
  return ok_status();
}

bool Memfd::is_sealed() const {
  const int seals = ::fcntl(fd_.get(), F_GET_SEALS);
  return seals >= 0 && (seals & kSealsRequired) == kSealsRequired;
}

Result<std::uint64_t> Memfd::size() const {
  struct stat status {};
  if (::fstat(fd_.get(), &status) != 0) return os_error("fstat", "memfd", "pass an open descriptor");
  return static_cast<std::uint64_t>(status.st_size);
}

bip::mapping_handle_t Memfd::get_mapping_handle() const {
  return bip::ipcdetail::mapping_handle_from_file_handle(fd_.get());
}

Result<Segment> Segment::create(std::uint32_t session_id, std::uint64_t arena_bytes) {
  if (arena_bytes < kArenaBytesMin || arena_bytes > kArenaBytesMax) {
    return Error{ErrorCode::kInvalidArgument, "an arena of " + std::to_string(arena_bytes) + " bytes was asked for",
                 "it may have " + std::to_string(kArenaBytesMin) + " to " + std::to_string(kArenaBytesMax) + " bytes",
                 "ask for a size in that range"};
  }
  arena_bytes = round_up(arena_bytes, kHugePageBytes);
  const std::uint64_t segment_bytes = kArenaOffset + arena_bytes;
  const std::string name = "kt-coproc-session-" + std::to_string(session_id);

  auto memfd = Memfd::create(name, segment_bytes, /*huge_pages=*/true);
  bool huge_pages = memfd.ok();
  if (!huge_pages) memfd = Memfd::create(name, segment_bytes, /*huge_pages=*/false);
  if (!memfd.ok()) return std::move(memfd).error();
  KT_TRY_STATUS(memfd.value().seal(/*read_only=*/false));
  KT_TRY(auto region, map_region(memfd.value(), bip::read_write, segment_bytes));
  if (!huge_pages) huge_pages = collapse_arena(region.get_address(), arena_bytes);

  const std::uint32_t page_bytes = huge_pages ? kHugePageBytes : kSmallPageBytes;
  Segment segment(std::move(memfd).value(), std::move(region), arena_bytes, page_bytes);
  SegmentHeader& header = segment.header();
  header.magic = kSegmentMagic;
  header.protocol = kProtocolVersion;
  header.session_id = session_id;
  header.segment_bytes = segment_bytes;
  header.arena_bytes = arena_bytes;
  header.page_bytes = page_bytes;
  header.daemon_pid = static_cast<std::uint32_t>(::getpid());
  return segment;
}

Result<Segment> Segment::attach(UniqueFd fd) {
  Memfd memfd(std::move(fd));
  if (!memfd.is_sealed()) return bad_segment("it can still be truncated: its seals are missing");
  KT_TRY(const std::uint64_t segment_bytes, memfd.size());
  if (segment_bytes < kArenaOffset + kArenaBytesMin || segment_bytes > kArenaOffset + kArenaBytesMax) {
    return bad_segment("it has " + std::to_string(segment_bytes) + " bytes");
  }
  KT_TRY(auto region, map_region(memfd, bip::read_write, segment_bytes));
  const auto& header = *static_cast<const SegmentHeader*>(region.get_address());
  const std::uint32_t protocol = header.protocol;
  const std::uint64_t stated_bytes = header.segment_bytes;
  const std::uint64_t arena_bytes = header.arena_bytes;
  const std::uint32_t page_bytes = header.page_bytes == kHugePageBytes ? kHugePageBytes : kSmallPageBytes;
  if (header.magic != kSegmentMagic) return bad_segment("its magic number is wrong");
  if (protocol != kProtocolVersion) {
    return Error{ErrorCode::kVersionMismatch, "the daemon speaks another protocol version than this process",
                 "daemon " + std::to_string(protocol) + ", this process " + std::to_string(kProtocolVersion),
                 "run client and daemon of the same kt-coproc release"};
  }
  if (stated_bytes != segment_bytes || arena_bytes != segment_bytes - kArenaOffset) {
    return bad_segment("its header states " + std::to_string(stated_bytes) + " bytes, " + std::to_string(arena_bytes) +
                       " of them arena; it has " + std::to_string(segment_bytes));
  }
  return Segment(std::move(memfd), std::move(region), arena_bytes, page_bytes);
}

std::byte* Segment::at(std::uint64_t offset) const { return static_cast<std::byte*>(region_.get_address()) + offset; }

SegmentHeader& Segment::header() const { return *reinterpret_cast<SegmentHeader*>(at(0)); }

Slot& Segment::slot(std::uint32_t index) const {
  KT_DCHECK(index < kNumSlots);
  return reinterpret_cast<Slot*>(at(kRingOffset))[index];
}

StreamFlag& Segment::stream_flag(std::uint32_t index) const {
  KT_DCHECK(index < kNumSlots);
  return reinterpret_cast<StreamFlag*>(at(kFlagsOffset))[index];
}

std::span<char> Segment::message(std::uint32_t index) const {
  KT_DCHECK(index < kNumSlots);
  return {reinterpret_cast<char*>(at(kMessagesOffset + std::uint64_t{index} * kMessageBytes)), kMessageBytes};
}

std::byte* Segment::arena() const { return at(kArenaOffset); }

}  // namespace kt::shm
