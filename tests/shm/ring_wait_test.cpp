// Sleeping on a request's futex, and being released from it.
#include <thread>
#include <vector>

#include "shm/ring.h"
#include "tests/shm/shm_test.h"

namespace kt::shm {
namespace {

using testing::make_request;
using testing::make_segment;
using testing::make_segment_after;
using testing::Watchdog;

constexpr std::uint64_t kForever = ~std::uint64_t{0};

TEST(RingWait, EndsByItsTimeoutWhenNoReplyComes) {
  const Watchdog watchdog;
  const Segment segment = make_segment();
  RankRing rank(segment);
  const auto sequence = rank.try_submit(make_request(1));
  EXPECT_FALSE(rank.wait_done(*sequence, 0, 0));
  EXPECT_FALSE(rank.wait_done(*sequence, 1'000, 2'000'000));
  EXPECT_FALSE(rank.wait_done(*sequence, kForever, 2'000'000)) << "spinning ends by the timeout, too";
}

TEST(RingWait, SeveralThreadsSleepingOnOneRequestAllWake) {
  const Watchdog watchdog;
  const Segment segment = make_segment();
  RankRing rank(segment);
  DaemonRing daemon(segment);
  const auto sequence = rank.try_submit(make_request(1));
  std::vector<std::thread> waiters;
  for (int i = 0; i < 3; ++i) waiters.emplace_back([&] { EXPECT_TRUE(rank.wait_done(*sequence, 0, kForever)); });
  while (segment.slot(0).reply.waiting.load() == 0) std::this_thread::yield();
  ASSERT_TRUE(daemon.try_receive().has_value());
  daemon.reply(*sequence, Reply{});
  for (std::thread& waiter : waiters) waiter.join();
}

TEST(RingWait, AWaiterThatWasOvertakenByALapEnds) {
  const Watchdog watchdog;
  const Segment segment = make_segment_after(1000);
  const RankRing rank(segment);
  EXPECT_TRUE(rank.wait_done(1000, 0, kForever));
  EXPECT_TRUE(rank.wait_done(1000 - kNumSlots, 0, kForever));
  EXPECT_FALSE(rank.try_reply(1000 - kNumSlots).has_value()) << "its reply is gone";
}

TEST(RingWait, TheWatchdogReleasesSleepersOfTodayAndOfLater) {
  const Watchdog watchdog;
  for (int round = 0; round < 20; ++round) {
    const Segment segment = make_segment();
    RankRing rank(segment);
    std::vector<std::thread> waiters;
    for (std::uint64_t i = 1; i <= 3; ++i) {
      ASSERT_EQ(rank.try_submit(make_request(i)), i);
      waiters.emplace_back([&rank, i] { EXPECT_FALSE(rank.wait_done(i, 0, kForever)); });
    }
    if (round % 2 == 0) {
      while (segment.slot(0).reply.waiting.load() == 0) std::this_thread::yield();
    }
    rank.wake_all_waiters();
    for (std::thread& waiter : waiters) waiter.join();
    EXPECT_FALSE(rank.wait_done(1, 0, kForever));
  }
}

TEST(RingWait, ARequestThatWasDoneCountsAsDoneAlsoAfterTheRelease) {
  const Watchdog watchdog;
  const Segment segment = make_segment();
  RankRing rank(segment);
  DaemonRing daemon(segment);
  const auto sequence = rank.try_submit(make_request(1));
  ASSERT_TRUE(daemon.try_receive().has_value());
  daemon.reply(*sequence, Reply{});
  rank.wake_all_waiters();
  EXPECT_TRUE(rank.wait_done(*sequence, 0, kForever));
}

}  // namespace
}  // namespace kt::shm
