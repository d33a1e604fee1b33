#include "client/submission.h"

#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "shm/doorbell.h"
#include "tests/client/client_test.h"

namespace kt::client {
namespace {

using testing::HangWatchdog;

shm::Request request_of(shm::Verb verb, std::uint64_t act_id = 1) {
  shm::Request request;
  request.verb = verb;
  request.act_id = act_id;
  return request;
}

// Both ends of a ring in this thread: what the daemon does is written out in each test.
class SubmissionTest : public ::testing::Test {
 protected:
  SubmissionTest()
      : segment_(shm::Segment::create(1, shm::kArenaBytesMin).value()),
        doorbell_(shm::create_doorbell().value()),
        liveness_(4711, "/models/m"),
        submission_(segment_, doorbell_.get(), liveness_),
        daemon_(segment_) {}

  // Answers the next request.
  std::uint64_t answer(const Error* error = nullptr) {
    const auto received = daemon_.try_receive();
    EXPECT_TRUE(received.has_value());
    shm::Reply reply;
    reply.value = 0.5;
    daemon_.reply(received->sequence, reply, error);
    return received->sequence;
  }

  const HangWatchdog watchdog_;
  shm::Segment segment_;
  UniqueFd doorbell_;
  Liveness liveness_;
  Submission submission_;
  shm::DaemonRing daemon_;
};

TEST_F(SubmissionTest, AFullRingWaitsForAReplyToBeConsumed) {
  std::vector<std::uint64_t> sequences;
  for (std::uint32_t i = 0; i < shm::kNumSlots; ++i) {
    auto sequence = submission_.submit(request_of(shm::Verb::kForward), {});
    ASSERT_TRUE(sequence.ok());
    sequences.push_back(sequence.value());
  }
  EXPECT_FALSE(submission_.try_post(request_of(shm::Verb::kRelease)));
  std::atomic<bool> submitted = false;
  std::thread other([&] {
    EXPECT_TRUE(submission_.submit(request_of(shm::Verb::kForward), {}).ok());
    submitted = true;
  });
  answer();
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_FALSE(submitted) << "answered is not consumed";
  EXPECT_TRUE(submission_.finish(sequences.front()).ok());
  other.join();
  EXPECT_TRUE(submitted);
}

TEST_F(SubmissionTest, ARingFullOfPostedRequestsIsReapedByTheNextOne) {
  for (std::uint32_t i = 0; i < shm::kNumSlots; ++i) {
    ASSERT_TRUE(submission_.try_post(request_of(shm::Verb::kRelease)));
  }
  std::thread other([&] {
    auto sequence = submission_.submit(request_of(shm::Verb::kForward), {});
    ASSERT_TRUE(sequence.ok());
    EXPECT_TRUE(submission_.finish(sequence.value()).ok());
  });
  for (std::uint32_t i = 0; i < shm::kNumSlots; ++i) answer();
  testing::wait_until([&] { return daemon_.has_request(); });
  answer();
  other.join();
}

TEST_F(SubmissionTest, TheReplysErrorComesBackWithItsThreeLines) {
  auto sequence = submission_.submit(request_of(shm::Verb::kBackward), {});
  const Error sent{ErrorCode::kStale, "what", "why", "fix"};
  answer(&sent);
  const auto reply = submission_.finish(sequence.value());
  ASSERT_FALSE(reply.ok());
  EXPECT_EQ(reply.error().code, ErrorCode::kStale);
  EXPECT_EQ(reply.error().text(), sent.text());
  EXPECT_FALSE(liveness_.has_refusal());
}

TEST_F(SubmissionTest, CloseFillsUnansweredOutputsWithNaNAndKeepsAnsweredOnes) {
  std::vector<float> answered(8, 1.0f), unanswered(8, 1.0f);
  const auto part = [](std::vector<float>& values) {
    return OutputPart{reinterpret_cast<std::byte*>(values.data()), values.size() * sizeof(float)};
  };
  const std::array first = {part(answered)};
  const std::array second = {part(unanswered)};
  const auto first_sequence = submission_.submit(request_of(shm::Verb::kForward), first);
  const auto second_sequence = submission_.submit(request_of(shm::Verb::kForward), second);
  answer();
  liveness_.note_request(shm::Verb::kForward, 3, 12);
  liveness_.set_end(End::kDied);
  submission_.close();
  for (const float value : unanswered) EXPECT_TRUE(std::isnan(value));
  for (const float value : answered) EXPECT_EQ(value, 1.0f);
  EXPECT_TRUE(submission_.finish(first_sequence.value()).ok());
  const auto reply = submission_.finish(second_sequence.value());
  ASSERT_FALSE(reply.ok());
  EXPECT_EQ(reply.error().code, ErrorCode::kCoprocDied);
  for (const char* part_of_text : {"4711", "FORWARD", "layer 3", "step 12", "/models/m"}) {
    EXPECT_NE(reply.error().text().find(part_of_text), std::string::npos) << part_of_text << reply.error().text();
  }
  EXPECT_FALSE(submission_.submit(request_of(shm::Verb::kForward), {}).ok());
}

TEST_F(SubmissionTest, AllBitsSetIsNaNInBf16) {
  std::uint16_t value = 0;
  const std::array part = {OutputPart{reinterpret_cast<std::byte*>(&value), sizeof value}};
  poison(part);
  const std::uint32_t bits = std::uint32_t{value} << 16;
  float widened = 0;
  std::memcpy(&widened, &bits, sizeof widened);
  EXPECT_TRUE(std::isnan(widened));
}

TEST_F(SubmissionTest, CloseReleasesWaitersOfAFullRingAndOfReplies) {
  std::vector<std::thread> waiters;
  for (std::uint32_t i = 0; i < 4; ++i) {
    const auto sequence = submission_.submit(request_of(shm::Verb::kForward), {});
    waiters.emplace_back([this, sequence] { EXPECT_FALSE(submission_.finish(sequence.value()).ok()); });
  }
  for (std::uint32_t i = 4; i < shm::kNumSlots; ++i) {
    ASSERT_TRUE(submission_.submit(request_of(shm::Verb::kForward), {}).ok());
  }
  for (int i = 0; i < 3; ++i) {
    waiters.emplace_back([this] { EXPECT_FALSE(submission_.submit(request_of(shm::Verb::kForward), {}).ok()); });
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(10));
  liveness_.set_end(End::kDied);
  submission_.close();
  for (std::thread& waiter : waiters) waiter.join();
}

TEST_F(SubmissionTest, AShutdownRefusesNewRequestsAndLetsThoseInFlightComplete) {
  const auto sequence = submission_.submit(request_of(shm::Verb::kForward), {});
  segment_.header().state = shm::SessionState::kShuttingDown;
  const auto refused = submission_.submit(request_of(shm::Verb::kForward), {});
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.error().code, ErrorCode::kCoprocDied);
  EXPECT_NE(refused.error().what.find("shut down"), std::string::npos) << refused.error().text();
  answer();
  EXPECT_TRUE(submission_.finish(sequence.value()).ok());
}

}  // namespace
}  // namespace kt::client
