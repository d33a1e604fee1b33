// Ranks and daemons that are killed in the middle of a training: who hears of it, and who does not.
#include <signal.h>

#include <algorithm>
#include <chrono>
#include <thread>

#include "shm/base/result.h"
#include "tests/client/daemon_fixture.h"

namespace kt::client::testing {
namespace {

using Failure = DaemonFixture;

std::uint32_t code_of(const nlohmann::json& report) { return report.at("error").at("code").get<std::uint32_t>(); }
std::string text_of(const nlohmann::json& report) { return report.at("error").at("text").get<std::string>(); }
bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

constexpr auto kRankDied = static_cast<std::uint32_t>(ErrorCode::kRankDied);
constexpr auto kCoprocDied = static_cast<std::uint32_t>(ErrorCode::kCoprocDied);

const Task kOther{7, 1, 12, false, true};    // The job beside: one rank, so that its bits are reproducible.
const Task kVictims{8, 3, 12, false, true};  // The job that loses a rank.

void expect_equal_bits(const TrainingResult& got, const TrainingResult& want) {
  EXPECT_FALSE(want.params.empty());
  EXPECT_EQ(got.losses, want.losses);
  EXPECT_EQ(got.norms, want.norms);
  EXPECT_EQ(got.params, want.params);
}

TEST_F(Failure, ARankKilledInMidStepEndsItsJobAndNothingElse) {
  ASSERT_NO_FATAL_FAILURE(start_daemon(false));
  auto alone = start_ranks(kOther, "alone");
  const auto undisturbed = results_of(alone);

  auto victims = start_ranks(kVictims, "victims", 2, 1);
  auto beside = start_ranks(kOther, "beside", 5);  // Has work in flight before and after.
  ASSERT_NO_FATAL_FAILURE(wait_paused(beside[0]));
  ASSERT_NO_FATAL_FAILURE(wait_paused(victims[1]));
  victims[1].process.signal(SIGKILL);
  for (const std::size_t rank : {std::size_t{0}, std::size_t{2}}) {
    const auto report = report_of(victims[rank], 3);
    ASSERT_TRUE(report.contains("error")) << report;
    EXPECT_EQ(code_of(report), kRankDied) << text_of(report);
    EXPECT_TRUE(contains(text_of(report), "rank 1")) << text_of(report);
    EXPECT_TRUE(contains(text_of(report), "step 2")) << text_of(report);
    EXPECT_EQ(report.at("later"), kRankDied) << "every later collective says so too";
    EXPECT_EQ(report.at("alive"), true);
  }
  resume(beside[0]);
  expect_equal_bits(results_of(beside)[0], undisturbed[0]);

  // The training starts again against the same daemon, whose weights are still loaded.
  EXPECT_TRUE(daemon_->is_running());
  auto again = start_ranks(kOther, "again");
  expect_equal_bits(results_of(again)[0], undisturbed[0]);
}

TEST_F(Failure, ADaemonThatIsKilledIsNamedByEveryRankAndNobodyHangs) {
  ASSERT_NO_FATAL_FAILURE(start_daemon(false));
  auto ranks = start_ranks({9, 2, 4, false, true}, "job", 1, 1);
  auto busy = start_ranks({10, 1, 1'000'000, false, true}, "busy", 0);
  ASSERT_NO_FATAL_FAILURE(wait_paused(busy[0]));
  ASSERT_NO_FATAL_FAILURE(wait_paused(ranks[1]));
  resume(busy[0]);  // From now on it always has something in flight.
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  daemon_->signal(SIGKILL);
  EXPECT_EQ(daemon_->wait(), 128 + SIGKILL);
  resume(ranks[1]);
  ranks.push_back(std::move(busy[0]));
  for (Rank& rank : ranks) {
    const auto report = report_of(rank, 3);
    ASSERT_TRUE(report.contains("error")) << report;
    EXPECT_EQ(code_of(report), kCoprocDied) << text_of(report);
    EXPECT_TRUE(contains(text_of(report), "pid " + std::to_string(daemon_->pid()))) << text_of(report);
    EXPECT_TRUE(contains(text_of(report), "step ")) << text_of(report);
    EXPECT_EQ(report.at("later"), kCoprocDied);
    EXPECT_EQ(report.at("alive"), false);
  }
}

TEST_F(Failure, ADaemonThatIsKilledBetweenClaimAndSubmitLeavesNaN) {
  ASSERT_NO_FATAL_FAILURE(start_daemon(false));
  ConnectOptions options;
  options.address = address();
  options.arena_bytes = shm::kArenaBytesMin;
  auto session = Session::connect(options);
  ASSERT_TRUE(session.ok()) << session.error().text();
  auto claim = session.value()->claim(ForwardCall{.layer = kOther.sizes.moe_layers[0], .num_tokens = 3});
  ASSERT_TRUE(claim.ok()) << claim.error().text();
  const auto ids = claim.value().ids();
  std::fill(ids.begin(), ids.end(), 0);
  daemon_->signal(SIGKILL);
  EXPECT_EQ(daemon_->wait(), 128 + SIGKILL);
  const Status status = claim.value().submit();
  ASSERT_FALSE(status.ok());
  EXPECT_EQ(status.error().code, ErrorCode::kCoprocDied) << status.error().text();
  for (const std::byte byte : claim.value().output()) ASSERT_EQ(byte, std::byte{0xFF});
}

TEST_F(Failure, ADaemonThatIsAskedToStopTellsItsRanksSo) {
  ASSERT_NO_FATAL_FAILURE(start_daemon(false));
  auto ranks = start_ranks({11, 2, 4, false, true}, "job", 1, 1);
  ASSERT_NO_FATAL_FAILURE(wait_paused(ranks[1]));
  daemon_->signal(SIGTERM);
  EXPECT_EQ(daemon_->wait(), 0) << daemon_->log();
  resume(ranks[1]);
  for (Rank& rank : ranks) {
    const auto report = report_of(rank, 3);
    ASSERT_TRUE(report.contains("error")) << report;
    EXPECT_EQ(code_of(report), kCoprocDied) << text_of(report);
    EXPECT_TRUE(contains(text_of(report), "shut")) << text_of(report);
    EXPECT_EQ(report.at("later"), kCoprocDied);
  }
}

TEST_F(Failure, AnOrdinaryEndOfARankLeavesNothingBehind) {
  ASSERT_NO_FATAL_FAILURE(start_daemon(false));
  ConnectOptions options;
  options.address = address();
  options.arena_bytes = shm::kArenaBytesMin;
  auto monitor = Session::connect(options);
  ASSERT_TRUE(monitor.ok()) << monitor.error().text();
  auto ranks = start_ranks({12, 2, 2, false, true}, "job");
  EXPECT_EQ(results_of(ranks).size(), 2u);
  wait_until([&] {
    const auto stats = monitor.value()->stats();
    return stats.at("ranks").size() == 1 && stats.at("memory_bytes").at("activations") == 0;
  });
  const auto totals = monitor.value()->stats().at("totals");
  EXPECT_EQ(totals.at("forward_requests"), 2u * 2 * 2 * 2) << "ranks, steps, micro-batches, layers";
  EXPECT_EQ(totals.at("backward_requests"), 2u * 2 * 2 * 2);
  EXPECT_EQ(totals.at("steps"), 2u);
}

}  // namespace
}  // namespace kt::client::testing
