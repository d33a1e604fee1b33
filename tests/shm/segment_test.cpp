#include "shm/segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "tests/shm/shm_test.h"

namespace kt::shm {
namespace {

using testing::make_segment;

UniqueFd duplicate(int fd) { return UniqueFd(::dup(fd)); }

TEST(Segment, BothMappingsSeeTheSameBytes) {
  const Segment daemon = make_segment();
  auto rank = Segment::attach(duplicate(daemon.fd()));
  ASSERT_TRUE(rank.ok()) << rank.error().text();
  EXPECT_NE(rank.value().arena(), daemon.arena());
  EXPECT_EQ(rank.value().arena_bytes(), daemon.arena_bytes());
  EXPECT_EQ(rank.value().page_bytes(), daemon.page_bytes());
  EXPECT_EQ(rank.value().header().session_id, 7u);
  EXPECT_EQ(rank.value().header().daemon_pid, static_cast<std::uint32_t>(::getpid()));
  rank.value().arena()[daemon.arena_bytes() - 1] = std::byte{42};
  EXPECT_EQ(daemon.arena()[daemon.arena_bytes() - 1], std::byte{42});
  rank.value().message(255)[kMessageBytes - 1] = 'z';
  EXPECT_EQ(daemon.message(255)[kMessageBytes - 1], 'z');
  rank.value().stream_flag(255).ready = 9;
  EXPECT_EQ(daemon.stream_flag(255).ready.load(), 9u);
}

TEST(Segment, TheArenaIsRoundedUpToHugePagesAndStartsZeroedOnAHugePageBoundary) {
  const Segment segment = make_segment(kArenaBytesMin + 1);
  EXPECT_EQ(segment.arena_bytes(), 2u * 1024 * 1024);
  EXPECT_TRUE(segment.page_bytes() == 4096 || segment.page_bytes() == 2 * 1024 * 1024) << segment.page_bytes();
  for (std::uint64_t i = 0; i < segment.arena_bytes(); i += 511) ASSERT_EQ(segment.arena()[i], std::byte{0}) << i;
  if (segment.page_bytes() != 4096) {
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(segment.arena()) % segment.page_bytes(), 0u);
  }
}

TEST(Segment, AnArenaOutsideTheLimitsIsRefusedWithTheNumbers) {
  for (const std::uint64_t bytes : {std::uint64_t{0}, kArenaBytesMin - 1, kArenaBytesMax + 1, ~std::uint64_t{0}}) {
    const auto segment = Segment::create(1, bytes);
    ASSERT_FALSE(segment.ok()) << bytes;
    EXPECT_EQ(segment.error().code, ErrorCode::kInvalidArgument);
    EXPECT_NE(segment.error().what.find(std::to_string(bytes)), std::string::npos) << segment.error().text();
  }
}

TEST(Segment, NobodyCanTruncateGrowOrUnsealIt) {
  const Segment segment = make_segment();
  EXPECT_EQ(::ftruncate(segment.fd(), 0), -1);
  EXPECT_EQ(errno, EPERM);
  EXPECT_EQ(::ftruncate(segment.fd(), 1 << 30), -1);
  EXPECT_EQ(errno, EPERM);
  EXPECT_EQ(::fcntl(segment.fd(), F_ADD_SEALS, F_SEAL_WRITE), -1);
  EXPECT_EQ(errno, EPERM);
}

TEST(Segment, AccessorsStayWhereTheyAreWhenTheObjectIsMoved) {
  Segment first = make_segment();
  Slot* const slot = &first.slot(17);
  const Segment second = std::move(first);
  EXPECT_EQ(&second.slot(17), slot);
}

// A memfd of `bytes` with a header, sealed or not, as a hostile or old daemon could send it.
UniqueFd forged(std::uint64_t bytes, const SegmentHeader& source, bool sealed) {
  auto memfd = Memfd::create("forged", bytes, false);
  EXPECT_TRUE(memfd.ok());
  if (bytes >= 4096) {
    void* const page = ::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, memfd.value().fd(), 0);
    std::memcpy(page, reinterpret_cast<const void*>(&source), 64);
    ::munmap(page, 4096);
  }
  if (sealed) {
    EXPECT_TRUE(memfd.value().seal(false).ok());
  }
  return duplicate(memfd.value().fd());
}

class SegmentAttach : public ::testing::Test {
 protected:
  SegmentAttach() {
    header_.magic = kSegmentMagic;
    header_.protocol = kProtocolVersion;
    header_.segment_bytes = kBytes;
    header_.arena_bytes = kBytes - kArenaOffset;
    header_.page_bytes = 4096;
  }
  static constexpr std::uint64_t kBytes = kArenaOffset + 2 * 1024 * 1024;
  SegmentHeader header_{};
};

TEST_F(SegmentAttach, AcceptsACorrectOne) {
  const auto segment = Segment::attach(forged(kBytes, header_, true));
  ASSERT_TRUE(segment.ok()) << segment.error().text();
  EXPECT_EQ(segment.value().page_bytes(), 4096u);
}

TEST_F(SegmentAttach, RefusesOneThatCouldStillBeTruncated) {
  const auto segment = Segment::attach(forged(kBytes, header_, false));
  ASSERT_FALSE(segment.ok());
  EXPECT_NE(segment.error().why.find("seals"), std::string::npos);
}

TEST_F(SegmentAttach, RefusesAWrongMagicNumber) {
  header_.magic ^= 1;
  EXPECT_FALSE(Segment::attach(forged(kBytes, header_, true)).ok());
}

TEST_F(SegmentAttach, RefusesAnotherProtocolVersionAndNamesBoth) {
  header_.protocol = 77;
  const auto segment = Segment::attach(forged(kBytes, header_, true));
  ASSERT_FALSE(segment.ok());
  EXPECT_EQ(segment.error().code, ErrorCode::kVersionMismatch);
  EXPECT_NE(segment.error().why.find("daemon 77, this process 1"), std::string::npos) << segment.error().text();
}

TEST_F(SegmentAttach, RefusesSizesThatDoNotMatchTheFile) {
  header_.segment_bytes += 4096;
  EXPECT_FALSE(Segment::attach(forged(kBytes, header_, true)).ok());
  header_.segment_bytes = kBytes;
  header_.arena_bytes = ~std::uint64_t{0};
  EXPECT_FALSE(Segment::attach(forged(kBytes, header_, true)).ok());
}

TEST_F(SegmentAttach, RefusesAFileThatIsTooSmallForTheLayout) {
  EXPECT_FALSE(Segment::attach(forged(0, header_, true)).ok());
  EXPECT_FALSE(Segment::attach(forged(4096, header_, true)).ok());
  EXPECT_FALSE(Segment::attach(forged(kArenaOffset, header_, true)).ok());
}

TEST_F(SegmentAttach, RefusesWhatIsNotAMemfd) {
  EXPECT_FALSE(Segment::attach(UniqueFd(::open("/dev/null", O_RDWR | O_CLOEXEC))).ok());
  EXPECT_FALSE(Segment::attach(UniqueFd()).ok());
}

TEST(Memfd, AnEmptyPoolOfHugePagesIsNoResourcesAndNeverASignal) {
  constexpr std::uint64_t kBytes = std::uint64_t{1} << 46;  // More than any machine has.
  const auto memfd = Memfd::create("huge", kBytes, true);
  ASSERT_FALSE(memfd.ok());
  EXPECT_EQ(memfd.error().code, ErrorCode::kNoResources);
}

}  // namespace
}  // namespace kt::shm
