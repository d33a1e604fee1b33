// The doorbell, and both ends of the ring as threads. They share one mapping: TSan knows memory by its address.
#include "shm/doorbell.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/epoll.h>
#include <unistd.h>

#include <chrono>
#include <deque>
#include <memory>
#include <mutex>
#include <numeric>
#include <thread>
#include <vector>

#include "shm/ring.h"
#include "tests/shm/shm_test.h"

namespace kt::shm {
namespace {

using testing::make_reply;
using testing::make_request;
using testing::make_segment;
using testing::Watchdog;

constexpr std::uint64_t kForever = ~std::uint64_t{0};

bool is_ringing(int doorbell) {
  pollfd entry{doorbell, POLLIN, 0};
  return ::poll(&entry, 1, 0) == 1;
}

TEST(Doorbell, RingsOnlyWhileTheDaemonSleepsAndIsSilentOnceCleared) {
  const Segment segment = make_segment();
  auto doorbell = create_doorbell();
  ASSERT_TRUE(doorbell.ok());
  const int fd = doorbell.value().get();
  ring_if_sleeping(segment, fd);
  EXPECT_FALSE(is_ringing(fd));
  set_sleeping(segment, true);
  ring_if_sleeping(segment, fd);
  ring_if_sleeping(segment, fd);
  EXPECT_TRUE(is_ringing(fd));
  clear_doorbell(fd);
  EXPECT_FALSE(is_ringing(fd));
  set_sleeping(segment, false);
  ring_if_sleeping(segment, fd);
  EXPECT_FALSE(is_ringing(fd));
}

TEST(Doorbell, ClearingASilentOneNeverBlocksEvenWhenTheClientMadeItBlocking) {
  const Watchdog watchdog(5);
  auto doorbell = create_doorbell();
  ASSERT_TRUE(doorbell.ok());
  const int fd = doorbell.value().get();
  clear_doorbell(fd);
  ASSERT_EQ(::fcntl(fd, F_SETFL, 0), 0);
  clear_doorbell(fd);
  const std::uint64_t one = 1;
  ASSERT_EQ(::write(fd, &one, sizeof one), 8);
  clear_doorbell(fd);
  EXPECT_FALSE(is_ringing(fd));
}

TEST(Doorbell, AFullCounterStillRingsAndDoesNotBlockTheRank) {
  const Watchdog watchdog(5);
  const Segment segment = make_segment();
  auto doorbell = create_doorbell();
  ASSERT_TRUE(doorbell.ok());
  const int fd = doorbell.value().get();
  const std::uint64_t most = ~std::uint64_t{0} - 1;
  ASSERT_EQ(::write(fd, &most, sizeof most), 8);
  set_sleeping(segment, true);
  ring_if_sleeping(segment, fd);
  EXPECT_TRUE(is_ringing(fd));
  clear_doorbell(fd);
  EXPECT_FALSE(is_ringing(fd));
}

// A session as the fake daemon sees it.
struct FakeSession {
  FakeSession() : segment(make_segment()), doorbell(std::move(create_doorbell()).value()), ring(segment) {}
  Segment segment;
  UniqueFd doorbell;
  DaemonRing ring;
};

// The daemon's loop in small: answer what is there, else sleep in epoll without a time limit, so that a lost wake-up
// hangs the test. The reply's value is the sum of the payload, which is also written back doubled.
class FakeDaemon {
 public:
  explicit FakeDaemon(std::deque<FakeSession>& sessions) : sessions_(sessions), epoll_(::epoll_create1(EPOLL_CLOEXEC)) {
    for (std::size_t i = 0; i < sessions_.size(); ++i) {
      epoll_event event{EPOLLIN, {.u64 = i}};
      EXPECT_EQ(::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, sessions_[i].doorbell.get(), &event), 0);
    }
  }
  void run(std::uint64_t num_requests) {
    for (std::uint64_t num_answered = 0; num_answered < num_requests;) {
      std::uint64_t num_now = 0;
      for (FakeSession& session : sessions_) num_now += answer_all(session);
      num_answered += num_now;
      if (num_now == 0) sleep_if_idle();
    }
  }
  std::uint64_t num_sleeps() const { return num_sleeps_; }

 private:
  static std::uint64_t answer_all(FakeSession& session) {
    std::uint64_t num_answered = 0;
    while (const auto received = session.ring.try_receive()) {
      auto* const payload =
          reinterpret_cast<std::uint32_t*>(session.segment.arena() + received->request.payload_offset);
      double sum = 0;
      for (std::uint32_t i = 0; i < received->request.num_tokens; ++i) {
        sum += payload[i];
        payload[i] *= 2;
      }
      if (received->request.act_id % 16 == 0) {
        const Error error{ErrorCode::kNotFound, "activation " + std::to_string(received->request.act_id), "why", "fix"};
        session.ring.reply(received->sequence, make_reply(sum), &error);
      } else {
        session.ring.reply(received->sequence, make_reply(sum));
      }
      ++num_answered;
    }
    return num_answered;
  }

  void sleep_if_idle() {
    bool idle = true;
    for (FakeSession& session : sessions_) set_sleeping(session.segment, true);
    for (FakeSession& session : sessions_) idle = idle && !session.ring.has_request();
    if (idle) {
      ++num_sleeps_;
      std::vector<epoll_event> events(sessions_.size());
      const int num_events = ::epoll_wait(epoll_.get(), events.data(), static_cast<int>(events.size()), -1);
      for (int i = 0; i < num_events; ++i) {
        clear_doorbell(sessions_[events[static_cast<std::size_t>(i)].data.u64].doorbell.get());
      }
    }
    for (FakeSession& session : sessions_) set_sleeping(session.segment, false);
  }

  std::deque<FakeSession>& sessions_;
  UniqueFd epoll_;
  std::uint64_t num_sleeps_ = 0;
};

// One rank: several threads share the ring's rank end, as the client library does.
class FakeRank {
 public:
  static constexpr std::uint32_t kNumThreads = 2;
  static constexpr std::uint32_t kNumTokens = 16;

  explicit FakeRank(const FakeSession& session)
      : segment_(session.segment), doorbell_(session.doorbell.get()), ring_(segment_) {}

  // Sends `num_requests`; every second one sleeps at once, the others spin first.
  void run(std::uint32_t thread_index, std::uint64_t num_requests) {
    const std::uint64_t offset = thread_index * 4096;
    auto* const payload = reinterpret_cast<std::uint32_t*>(segment_.arena() + offset);
    for (std::uint64_t i = 1; i <= num_requests; ++i) {
      std::iota(payload, payload + kNumTokens, static_cast<std::uint32_t>(i));
      const double sum = std::accumulate(payload, payload + kNumTokens, 0.0);
      Request request = make_request(i);
      request.payload_offset = offset;
      request.num_tokens = kNumTokens;
      const std::uint64_t sequence = submit(request);
      ring_if_sleeping(segment_, doorbell_);
      ASSERT_TRUE(ring_.wait_done(sequence, i % 2 == 0 ? 0 : 2'000, kForever));
      const auto reply = ring_.try_reply(sequence);
      ASSERT_TRUE(reply.has_value());
      ASSERT_EQ(reply->value, sum);
      ASSERT_EQ(payload[kNumTokens - 1], 2 * (static_cast<std::uint32_t>(i) + kNumTokens - 1));
      if (i % 16 == 0) {
        const Error error = error_from_reply(*reply, ring_.message(sequence, *reply));
        ASSERT_EQ(error.code, ErrorCode::kNotFound);
        ASSERT_EQ(error.what, "activation " + std::to_string(i));
      }
      const std::lock_guard lock(mutex_);
      ring_.consume(sequence);
    }
  }

 private:
  // The ring is full when the other thread went round it while this one held its slot.
  std::uint64_t submit(const Request& request) {
    for (;;) {
      {
        const std::lock_guard lock(mutex_);
        if (const auto sequence = ring_.try_submit(request)) return *sequence;
      }
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  }

  const Segment& segment_;
  const int doorbell_;
  std::mutex mutex_;
  RankRing ring_;
};

TEST(DoorbellStress, SleepingDaemonAndSleepingRanksNeverMissEachOther) {
  const Watchdog watchdog(50);
  constexpr std::uint64_t kNumRequests = 20'000;
  constexpr std::uint32_t kNumRanks = 2;
  std::deque<FakeSession> sessions;
  for (std::uint32_t i = 0; i < kNumRanks; ++i) sessions.emplace_back();
  std::vector<std::unique_ptr<FakeRank>> ranks;
  for (const FakeSession& session : sessions) ranks.push_back(std::make_unique<FakeRank>(session));
  FakeDaemon daemon(sessions);
  std::thread daemon_thread([&] { daemon.run(kNumRanks * FakeRank::kNumThreads * kNumRequests); });
  std::vector<std::thread> rank_threads;
  for (const auto& rank : ranks) {
    for (std::uint32_t thread_index = 0; thread_index < FakeRank::kNumThreads; ++thread_index) {
      rank_threads.emplace_back([&rank, thread_index] { rank->run(thread_index, kNumRequests); });
    }
  }
  for (std::thread& thread : rank_threads) thread.join();
  daemon_thread.join();
  EXPECT_GT(daemon.num_sleeps(), 0u) << "the test did not test the doorbell";
}

}  // namespace
}  // namespace kt::shm
