// Claims against a daemon in this process: tensors in the arena, pieces, and what a claim does when it is misused.
#include "client/claim.h"

#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "tests/client/session_call.h"

namespace kt::client {
namespace {

using testing::Call;
using testing::connect;
using testing::count_verb;
using testing::FakeDaemon;
using testing::FakeModel;
using testing::HangWatchdog;
using testing::wait_until;

// Tokens of a forward that takes more than half of the smallest arena.
constexpr std::uint32_t kMostOfTheArena = 5000;

class ClaimTest : public ::testing::Test {
 protected:
  ClaimTest() : daemon_(model_), session_(connect(daemon_)) {}
  explicit ClaimTest(FakeModel model) : model_(model), daemon_(model_), session_(connect(daemon_)) {}

  Claim claim(const auto& call) {
    auto claimed = session_->claim(call);
    EXPECT_TRUE(claimed.ok()) << claimed.error().text();
    return std::move(claimed).value();
  }
  static bool is_nan(std::span<const std::byte> rows) {
    for (std::size_t i = 0; i < rows.size(); i += sizeof(float)) {
      float value = 0;
      std::memcpy(&value, &rows[i], sizeof value);
      if (!std::isnan(value)) return false;
    }
    return true;
  }

  const HangWatchdog watchdog_;
  const FakeModel model_;
  FakeDaemon daemon_;
  std::unique_ptr<Session> session_;
};

class SplitClaimTest : public ClaimTest {
 protected:
  SplitClaimTest() : ClaimTest(FakeModel{.batch_tokens_max = 100}) {}
};

TEST_F(ClaimTest, TensorsLieInTheArenaBothWays) {
  Call call(model_, 7, 1);
  const std::uint64_t act_id = session_->new_act_id();
  {
    Claim forward = claim(ForwardCall{1, 1, act_id, shm::kKeepY, 7});
    EXPECT_EQ(forward.first_token(), 0u);
    EXPECT_EQ(forward.num_tokens(), 7u);
    EXPECT_EQ(forward.input().size_bytes(), call.x.size() * 4);
    EXPECT_EQ(forward.ids().size(), call.ids.size());
    EXPECT_EQ(forward.routing_weights().size(), call.weights.size());
    EXPECT_TRUE(forward.grad_weights().empty());
    call.write(forward);
    EXPECT_TRUE(daemon_.requests().empty()) << "nothing is sent before submit";
    ASSERT_TRUE(forward.submit().ok());
    EXPECT_FALSE(forward.next());
    call.read(forward);
    call.expect_forward();
  }
  Claim fetch = claim(FetchCall{act_id, 7});
  EXPECT_TRUE(fetch.input().empty());
  ASSERT_TRUE(fetch.submit().ok());
  EXPECT_EQ(std::memcmp(fetch.output().data(), call.y.data(), fetch.output().size()), 0);
  Claim backward = claim(BackwardCall{act_id, shm::kAccumulate, 7});
  EXPECT_TRUE(backward.ids().empty());
  call.write(backward);
  ASSERT_TRUE(backward.submit().ok());
  call.read(backward);
  call.expect_backward();
  EXPECT_EQ(std::memcmp(fetch.output().data(), call.y.data(), fetch.output().size()), 0)
      << "valid as long as its claim";
}

TEST_F(SplitClaimTest, PiecesCoverTheCallInOrder) {
  Claim forward = claim(ForwardCall{.layer = 1, .num_tokens = 250});
  std::vector<std::pair<std::uint32_t, std::uint32_t>> pieces;
  do {
    std::fill(forward.ids().begin(), forward.ids().end(), 0);
    pieces.emplace_back(forward.first_token(), forward.num_tokens());
    ASSERT_TRUE(forward.submit().ok());
  } while (forward.next());
  EXPECT_EQ(pieces, (std::vector<std::pair<std::uint32_t, std::uint32_t>>{{0, 83}, {83, 83}, {166, 84}}));
  EXPECT_FALSE(forward.next());
}

TEST_F(ClaimTest, AnAbandonedClaimGivesItsRoomBackAndLeavesTheRingAsItWas) {
  Call call(model_, kMostOfTheArena, 2);
  const std::uint64_t act_id = session_->new_act_id();
  for (unsigned i = 0; i < 2 * shm::kNumSlots; ++i) {
    Claim abandoned = claim(ForwardCall{1, 1, act_id, 0, kMostOfTheArena});
    abandoned.ids()[0] = -1;
  }
  EXPECT_TRUE(daemon_.requests().empty());
  ASSERT_TRUE(call.forward(*session_, act_id).ok());
  call.expect_forward();
  static_cast<void>(claim(BackwardCall{act_id, 0, kMostOfTheArena}));
  EXPECT_EQ(daemon_.num_live_activations(), 1u) << "an abandoned backward consumes nothing";
  ASSERT_TRUE(call.backward(*session_, act_id).ok());
  call.expect_backward();
}

TEST_F(SplitClaimTest, AForwardThatIsAbandonedHalfWayReleasesWhatItKept) {
  Call call(model_, 250, 3);
  const std::uint64_t act_id = session_->new_act_id();
  {
    Claim abandoned = claim(ForwardCall{1, 1, act_id, 0, 250});
    call.write(abandoned);
    ASSERT_TRUE(abandoned.submit().ok());
    ASSERT_TRUE(abandoned.next());
    EXPECT_EQ(session_->claim(BackwardCall{act_id, 0, 250}).error().code, ErrorCode::kNotFound);
    EXPECT_EQ(daemon_.num_live_activations(), 1u);
  }
  wait_until([&] { return daemon_.num_live_activations() == 0; });
  ASSERT_TRUE(call.forward(*session_, act_id).ok()) << "the id is free";
  EXPECT_EQ(daemon_.num_live_activations(), 3u);
}

TEST_F(SplitClaimTest, ABackwardThatFailedHalfWayGoesOnWithWhatItLeft) {
  Call call(model_, 250, 4);
  const std::uint64_t act_id = session_->new_act_id();
  ASSERT_TRUE(call.forward(*session_, act_id).ok());
  daemon_.refuse_next({ErrorCode::kStale, "stale", "1 of 1", "wait"}, 1);
  Claim failing = claim(BackwardCall{act_id, 0, 250});
  call.write(failing);
  ASSERT_TRUE(failing.submit().ok());
  call.read(failing);
  ASSERT_TRUE(failing.next());
  EXPECT_EQ(failing.submit().error().code, ErrorCode::kStale);
  EXPECT_TRUE(is_nan(failing.output()));
  EXPECT_FALSE(failing.next());
  Claim rest = claim(BackwardCall{act_id, 0, 250});
  EXPECT_EQ(rest.first_token(), 83u);
  ASSERT_TRUE(call.backward(*session_, act_id).ok());
  call.expect_backward();
  EXPECT_EQ(daemon_.num_live_activations(), 0u);
}

TEST_F(ClaimTest, ASecondSubmitIsRefusedAndChangesNothing) {
  Call call(model_, 7, 5);
  Claim forward = claim(ForwardCall{.layer = 1, .num_tokens = 7});
  call.write(forward);
  ASSERT_TRUE(forward.submit().ok());
  EXPECT_EQ(forward.submit().error().code, ErrorCode::kInvalidArgument);
  call.read(forward);
  call.expect_forward();
  EXPECT_EQ(daemon_.requests().size(), 1u);
}

TEST_F(ClaimTest, AClaimThatWasRefusedHasNaNForOutputsAndTakesNothingMore) {
  Call call(model_, 7, 6);
  Claim forward = claim(ForwardCall{.layer = 1, .num_tokens = 7});
  call.write(forward);
  forward.ids()[5] = -3;
  const Status refused = forward.submit();
  ASSERT_FALSE(refused.ok());
  EXPECT_NE(refused.error().why.find("ids[2, 1] is -3"), std::string::npos) << refused.error().text();
  EXPECT_TRUE(is_nan(forward.output()));
  forward.ids()[5] = 0;
  EXPECT_FALSE(forward.submit().ok());
  EXPECT_TRUE(daemon_.requests().empty()) << "the daemon would have ended the session";
}

TEST_F(ClaimTest, OfTwoClaimsThatKeepUnderOneIdTheSecondIsRefused) {
  Call call(model_, 7, 7);
  const std::uint64_t act_id = session_->new_act_id();
  Claim first = claim(ForwardCall{1, 1, act_id, 0, 7});
  Claim second = claim(ForwardCall{1, 1, act_id, 0, 7});
  call.write(first);
  call.write(second);
  ASSERT_TRUE(first.submit().ok());
  EXPECT_EQ(second.submit().error().code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(daemon_.requests().size(), 1u);
}

TEST_F(ClaimTest, AClaimWaitsForTheRoomOfAnother) {
  Call call(model_, kMostOfTheArena, 8);
  std::optional<Claim> first = claim(ForwardCall{.layer = 1, .num_tokens = kMostOfTheArena});
  std::thread other([&] { EXPECT_TRUE(call.forward(*session_, 0).ok()); });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT_TRUE(daemon_.requests().empty());
  first.reset();
  other.join();
  call.expect_forward();
}

TEST_F(ClaimTest, ASessionThatEndsBetweenClaimAndSubmitSaysSoAndReleasesWhoWaitsForRoom) {
  Call call(model_, kMostOfTheArena, 9);
  Claim forward = claim(ForwardCall{.layer = 1, .num_tokens = kMostOfTheArena});
  call.write(forward);
  std::thread other([&] { EXPECT_EQ(call.forward(*session_, 0).error().code, ErrorCode::kCoprocDied); });
  daemon_.shut_down();
  daemon_.hang_up();
  other.join();
  EXPECT_EQ(forward.submit().error().code, ErrorCode::kCoprocDied);
  EXPECT_TRUE(is_nan(forward.output()));
  EXPECT_TRUE(daemon_.requests().empty());
}

TEST_F(ClaimTest, AForkedChildCannotSubmitAndDoesNotFreeItsParentsRoom) {
  Call call(model_, kMostOfTheArena, 10);
  std::optional<Claim> forward = claim(ForwardCall{.layer = 1, .num_tokens = kMostOfTheArena});
  call.write(*forward);
  const pid_t child = ::fork();
  if (child == 0) {
    const bool refused = forward->submit().error().code == ErrorCode::kUnsupported;
    forward.reset();
    ::_exit(refused ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  Call small(model_, 100, 11);
  ASSERT_TRUE(small.forward(*session_, 0).ok()) << "would lie in the freed room";
  ASSERT_TRUE(forward->submit().ok());
  call.read(*forward);
  call.expect_forward();
}

}  // namespace
}  // namespace kt::client
