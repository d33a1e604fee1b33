#include "shm/status_page.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <thread>

#include "shm/doorbell.h"
#include "tests/shm/shm_test.h"

namespace kt::shm {
namespace {

using testing::Watchdog;

UniqueFd duplicate(int fd) { return UniqueFd(::dup(fd)); }

TEST(StatusPage, AMonitorSeesWhatTheDaemonWrites) {
  const auto owner = StatusPageOwner::create();
  ASSERT_TRUE(owner.ok()) << owner.error().text();
  const auto view = StatusPageView::attach(duplicate(owner.value().fd()));
  ASSERT_TRUE(view.ok()) << view.error().text();
  owner.value().page().totals.batches = 17;
  EXPECT_EQ(view.value().page().totals.batches.load(), 17u);
}

TEST(StatusPage, NobodyButTheCreatorCanWriteOrTruncateIt) {
  const auto owner = StatusPageOwner::create();
  ASSERT_TRUE(owner.ok());
  const UniqueFd fd = duplicate(owner.value().fd());
  EXPECT_EQ(::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0), MAP_FAILED);
  EXPECT_EQ(errno, EPERM);
  EXPECT_EQ(::pwrite(fd.get(), "x", 1, 0), -1);
  EXPECT_EQ(errno, EPERM);
  EXPECT_EQ(::ftruncate(fd.get(), 0), -1);
  EXPECT_EQ(errno, EPERM);
  void* const readable = ::mmap(nullptr, 4096, PROT_READ, MAP_SHARED, fd.get(), 0);
  ASSERT_NE(readable, MAP_FAILED);
  EXPECT_EQ(::mprotect(readable, 4096, PROT_READ | PROT_WRITE), -1) << "a read-only mapping must stay one";
  ::munmap(readable, 4096);
  const std::string path = "/proc/self/fd/" + std::to_string(fd.get());
  const UniqueFd reopened(::open(path.c_str(), O_RDWR | O_CLOEXEC));
  EXPECT_EQ(::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, reopened.get(), 0), MAP_FAILED);
}

// A page of another build or of a hostile daemon.
Result<StatusPageView> attach_forged(std::uint64_t bytes, std::uint64_t magic, std::uint32_t schema,
                                     std::uint32_t layout_bytes, bool sealed) {
  auto memfd = Memfd::create("forged", bytes, false);
  EXPECT_TRUE(memfd.ok());
  void* const page = ::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, memfd.value().fd(), 0);
  const std::uint32_t numbers[2] = {schema, layout_bytes};
  std::memcpy(page, &magic, 8);
  std::memcpy(static_cast<char*>(page) + 8, numbers, 8);
  ::munmap(page, 4096);
  if (sealed) {
    EXPECT_TRUE(memfd.value().seal(true).ok());
  }
  return StatusPageView::attach(duplicate(memfd.value().fd()));
}

TEST(StatusPage, AnotherLayoutIsRefused) {
  constexpr std::uint32_t kBytes = sizeof(StatusPage);
  EXPECT_TRUE(attach_forged(kBytes, kStatusMagic, kStatusSchema, kBytes, true).ok());
  EXPECT_FALSE(attach_forged(kBytes, kStatusMagic, kStatusSchema, kBytes, false).ok());
  EXPECT_FALSE(attach_forged(kBytes, kStatusMagic ^ 1, kStatusSchema, kBytes, true).ok());
  EXPECT_FALSE(attach_forged(kBytes, kStatusMagic, kStatusSchema + 1, kBytes, true).ok());
  EXPECT_FALSE(attach_forged(kBytes, kStatusMagic, kStatusSchema, kBytes - 8, true).ok());
  EXPECT_FALSE(attach_forged(kBytes + 4096, kStatusMagic, kStatusSchema, kBytes, true).ok());
  EXPECT_FALSE(attach_forged(4096, kStatusMagic, kStatusSchema, kBytes, true).ok());
  EXPECT_FALSE(StatusPageView::attach(UniqueFd(::open("/dev/zero", O_RDONLY | O_CLOEXEC))).ok());
}

TEST(Latency, AnEmptyHistogramHasNoQuantiles) {
  const LatencyHistogram histogram{};
  EXPECT_TRUE(std::isnan(latency_quantile_seconds(histogram, 0.5)));
}

TEST(Latency, AQuantileIsWithinFivePercentOfTheSample) {
  for (double ns = 1000; ns < 3e12; ns *= 1.37) {
    LatencyHistogram histogram{};
    record_latency(histogram, static_cast<std::uint64_t>(ns));
    for (const double quantile : {0.0, 0.5, 1.0}) {
      EXPECT_NEAR(latency_quantile_seconds(histogram, quantile) / (ns * 1e-9), 1, 0.05) << ns;
    }
  }
}

TEST(Latency, QuantilesSplitTheSamplesWhereTheyShould) {
  LatencyHistogram histogram{};
  for (int i = 0; i < 980; ++i) record_latency(histogram, 10'000);
  for (int i = 0; i < 20; ++i) record_latency(histogram, 5'000'000);
  EXPECT_NEAR(latency_quantile_seconds(histogram, 0.50), 10e-6, 0.5e-6);
  EXPECT_NEAR(latency_quantile_seconds(histogram, 0.98), 10e-6, 0.5e-6);
  EXPECT_NEAR(latency_quantile_seconds(histogram, 0.99), 5e-3, 0.25e-3);
}

TEST(Latency, TheShortestAndTheLongestTimesFallIntoTheOuterBuckets) {
  LatencyHistogram histogram{};
  record_latency(histogram, 0);
  record_latency(histogram, 999);
  record_latency(histogram, ~std::uint64_t{0});
  EXPECT_EQ(histogram.counts.front().load(), 2u);
  EXPECT_EQ(histogram.counts.back().load(), 1u);
}

TEST(StatusText, AFieldIsCutAtACharacterAndAlwaysEnds) {
  char field[8];
  std::memset(field, 'x', sizeof field);
  set_text(field, sizeof field, "abc");
  EXPECT_STREQ(field, "abc");
  EXPECT_EQ(field[7], '\0') << "nothing of the former text stays behind";
  set_text(field, sizeof field, "abcdefghij");
  EXPECT_STREQ(field, "abcdefg");
  set_text(field, sizeof field, "abcdef€");
  EXPECT_STREQ(field, "abcdef");
  set_text(field, sizeof field, "");
  EXPECT_STREQ(field, "");
}

TEST(StatusText, AFieldWithoutAnEndIsReadUpToItsSize) {
  char field[4] = {'a', 'b', 'c', 'd'};
  EXPECT_EQ(get_text(field, sizeof field), "abcd");
}

TEST(StatusRow, AReaderNeverSeesARowHalfWritten) {
  const Watchdog watchdog(50);
  const auto owner = StatusPageOwner::create();
  ASSERT_TRUE(owner.ok());
  // Reader and writer share one mapping, so that TSan sees that they touch the same memory.
  const auto pause = [] {
    for (int i = 0; i < 1000; ++i) cpu_relax();
  };
  std::atomic<bool> stop = false;
  std::thread writer([&] {
    RankRow& row = owner.value().page().ranks[5];
    for (std::uint32_t i = 1; !stop; ++i) {
      {
        RowWriter guard(row.version);
        row.used = 1;
        row.rank = i;
        pause();  // Longer than a reader needs for the whole row.
        set_text(row.job_id, sizeof row.job_id, "job " + std::to_string(i));
        row.pid = i;
      }
      pause();
    }
  });
  int num_seen = 0;
  while (num_seen < 200) {
    const nlohmann::json status = status_json(owner.value().page());
    for (const auto& rank : status["ranks"]) {
      ++num_seen;
      ASSERT_EQ(rank["rank"], rank["pid"]);
      ASSERT_EQ(rank["job_id"], "job " + std::to_string(rank["rank"].get<std::uint32_t>()));
    }
  }
  stop = true;
  writer.join();
}

}  // namespace
}  // namespace kt::shm
