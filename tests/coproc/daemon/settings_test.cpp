// Names of settings, and whether the engine hangs.
#include "coproc/daemon/settings.h"

#include <gtest/gtest.h>

#include "coproc/daemon/stall_detector.h"

namespace kt::coproc {
namespace {

TEST(Settings, EveryNameHasItsEnvironmentVariable) {
  EXPECT_EQ(environment_name("weight-format"), "KT_COPROC_WEIGHT_FORMAT");
  for (const Setting& setting : all_settings()) {
    EXPECT_EQ(find_setting(setting.name), &setting);
    // These belong to the training job.
    EXPECT_NE(environment_name(setting.name), "KT_COPROC_JOB");
    EXPECT_NE(environment_name(setting.name), "KT_COPROC_OTHER_MODELS");
  }
  EXPECT_EQ(find_setting("thread"), nullptr);
}

constexpr std::uint64_t kSecond = 1'000'000'000;

TEST(StallDetector, WorkThatDoesNotMoveForTenSecondsIsAStall) {
  StallDetector detector;
  EXPECT_FALSE(detector.update(100 * kSecond, true, 5));
  EXPECT_FALSE(detector.update(109 * kSecond, true, 5));
  EXPECT_TRUE(detector.update(110 * kSecond, true, 5));
  EXPECT_FALSE(detector.update(111 * kSecond, true, 6)) << "it moved";
  EXPECT_TRUE(detector.update(121 * kSecond, true, 6));
  EXPECT_FALSE(detector.update(122 * kSecond, false, 6)) << "nothing to do";
  EXPECT_FALSE(detector.update(131 * kSecond, true, 6)) << "the clock starts with the work";
}

TEST(StallDetector, OnlyRequestsTheDaemonCouldWorkOnCount) {
  const auto page = std::make_unique<shm::StatusPage>();
  EXPECT_FALSE(work_in_flight(*page, false));
  shm::RankRow& row = page->ranks[7];
  row.in_flight = 1;
  row.state = static_cast<std::uint32_t>(shm::RankState::kForward);
  EXPECT_FALSE(work_in_flight(*page, false)) << "a free row";
  row.used = 1;
  EXPECT_TRUE(work_in_flight(*page, false));
  row.state = static_cast<std::uint32_t>(shm::RankState::kCollective);
  EXPECT_FALSE(work_in_flight(*page, false));
  row.state = static_cast<std::uint32_t>(shm::RankState::kBackward);
  EXPECT_TRUE(work_in_flight(*page, false));
  EXPECT_FALSE(work_in_flight(*page, true)) << "deterministic backwards wait for each other";
}

TEST(StallDetector, EveryAnswerIsProgress) {
  const auto page = std::make_unique<shm::StatusPage>();
  const std::uint64_t before = engine_progress(*page);
  page->ranks[3].used = 1;
  shm::record_latency(page->ranks[3].latency, 1000);
  EXPECT_NE(engine_progress(*page), before);
}

}  // namespace
}  // namespace kt::coproc
