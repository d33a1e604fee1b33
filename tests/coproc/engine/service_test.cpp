// The engine as a service: fairness between jobs, the status page, limits, shutdown, and real concurrency.
#include <atomic>
#include <thread>

#include "tests/coproc/engine/engine_fixture.h"

namespace kt::test {
namespace {

// Both jobs have everything queued. At the moment the small job is through, how far is the large one?
std::uint64_t large_jobs_turns(std::uint32_t large_tokens) {
  Host host;
  auto large = host.open();
  auto small = host.open();
  std::uint64_t turns = 0;
  host.when_broken([&] { turns = host.page().ranks[0].totals.forward_requests.load(); });
  const Tokens of_large = random_tokens(host.shape(), large_tokens, 1);
  Tokens of_small = random_tokens(host.shape(), 8, 2);
  {
    const Host::Pause pause(host);
    for (int i = 0; i < 60; ++i) large->send_forward(1, 0, 0, of_large);
    for (int i = 0; i < 40; ++i) small->send_forward(1, 0, 0, of_small);
    of_small.ids[0] = 99;  // Marks the end: seen when it is the head.
    small->send_forward(1, 0, 0, of_small);
  }
  for (int i = 0; i < 1000 && host.broken().empty(); ++i) host.rounds(1);
  EXPECT_EQ(host.broken().size(), 1u);
  return turns;
}

TEST(Fairness, LetsEqualJobsAlternate) {
  const std::uint64_t turns = large_jobs_turns(8);
  EXPECT_GE(turns, 38u);
  EXPECT_LE(turns, 42u);
}

TEST(Fairness, LetsAJobOfSmallRequestsRunMoreOfThem) {
  const std::uint64_t turns = large_jobs_turns(32);  // Four times as many tokens: a quarter of the turns.
  EXPECT_GE(turns, 8u);
  EXPECT_LE(turns, 14u);
}

TEST(Status, CountsExactlyAndRatesFallToZeroWhenIdle) {
  Host host;
  auto rank = host.open("label");
  const Tokens tokens = random_tokens(host.shape(), 5, 1);
  double forward_rate = 0;
  std::uint64_t num_forwards = 0;
  for (; num_forwards < 20'000 && forward_rate == 0; ++num_forwards) {
    ASSERT_TRUE(rank->finish(rank->send_forward(1, 0, 0, tokens)).ok());
    forward_rate = host.page().forward_tokens_per_second.load();
  }
  EXPECT_GT(forward_rate, 0);
  EXPECT_GT(host.page().worker_busy_ratio.load(), 0);
  EXPECT_EQ(host.page().tokens_per_batch.load(), 5);
  EXPECT_GT(host.page().ranks[0].waiting_ratio.load(), 0);
  EXPECT_FALSE(rank->finish(rank->send_fetch(1, 5)).ok());
  host.rounds();
  const shm::StatusPage& page = host.page();
  for (const shm::Totals* totals : {&page.totals, &page.ranks[0].totals}) {
    EXPECT_EQ(totals->forward_requests.load(), num_forwards);
    EXPECT_EQ(totals->forward_layer_tokens.load(), 5 * num_forwards);
    EXPECT_EQ(totals->backward_requests.load(), 0u);
    EXPECT_EQ(totals->errors.load(), 1u);
  }
  EXPECT_EQ(page.totals.sessions_attached.load(), 1u);
  EXPECT_EQ(page.bytes_weights.load(), host.weights().bytes());
  EXPECT_EQ(page.bytes_arenas.load(), rank->segment().arena_bytes());
  EXPECT_EQ(page.ranks[0].in_flight.load(), 0u);
  const nlohmann::json status = shm::status_json(page);
  EXPECT_EQ(status.at("jobs")[0].at("name"), "label");
  EXPECT_EQ(status.at("ranks")[0].at("state"), "idle");
  EXPECT_EQ(status.at("ranks")[0].at("pid"), 1001);

  for (int i = 0; i < 300 && page.forward_tokens_per_second.load() > 0; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
  EXPECT_EQ(page.forward_tokens_per_second.load(), 0);
  for (int i = 0; i < 300 && page.ranks[0].waiting_ratio.load() > 0; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
  EXPECT_EQ(page.ranks[0].waiting_ratio.load(), 0);
  host.end(*rank, SessionEnd::kBye);
  host.rounds();
  EXPECT_EQ(page.ranks[0].used.load(), 0u);
  EXPECT_EQ(page.jobs[0].used.load(), 0u);
  EXPECT_EQ(page.bytes_arenas.load(), 0u);
  EXPECT_EQ(page.totals.forward_requests.load(), num_forwards);  // Ended sessions stay counted.
}

// No command wakes the engine here: it publishes on its own, also while another rank keeps it busy.
TEST(Status, ShowsActivationsComeAndGoWhetherTheEngineIsBusyOrNot) {
  for (const bool busy : {false, true}) {
    Host host;
    auto rank = host.open();
    auto other = host.open();
    std::atomic<bool> done = false;
    std::thread traffic([&] {
      const Tokens tokens = random_tokens(host.shape(), 3, 1);
      while (busy && !done.load()) EXPECT_TRUE(other->finish(other->send_forward(1, 0, 0, tokens)).ok());
    });
    const auto becomes = [&](bool zero) {
      for (int i = 0; i < 3000; ++i) {
        if ((host.page().bytes_activations.load() == 0) == zero) return true;
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
      }
      return false;
    };
    EXPECT_TRUE(rank->finish(rank->send_forward(1, 0, 7, random_tokens(host.shape(), 5, 2))).ok());
    EXPECT_TRUE(becomes(false));
    EXPECT_TRUE(rank->finish(rank->send_release(7)).ok());
    EXPECT_TRUE(becomes(true));
    done.store(true);
    traffic.join();
  }
}

TEST(Status, ShowsARankThatWaitsInACollective) {
  Host host;
  auto ranks = host.open_job(2, "job");
  ranks[0]->send_barrier(0);
  ranks[0]->send_forward(1, 0, 0, random_tokens(host.shape(), 1, 1));
  host.rounds();
  const nlohmann::json status = shm::status_json(host.page());
  EXPECT_EQ(status.at("ranks")[0].at("state"), "collective");
  EXPECT_EQ(status.at("ranks")[0].at("in_flight"), 2);
  EXPECT_EQ(status.at("ranks")[1].at("state"), "idle");
}

TEST(Limits, RefuseASessionWhenAllRowsAreTaken) {
  Host host;
  for (std::uint32_t i = 1; i < shm::kNumRankRowsMax; ++i) host.page().ranks[i].used.store(1);
  for (std::uint32_t i = 0; i < shm::kNumJobRowsMax; ++i) host.page().jobs[i].used.store(1);
  auto rank = host.open();  // Jobs without a row run all the same.
  const Error refused = host.refused_open();
  EXPECT_EQ(refused.code, ErrorCode::kNoResources);
  EXPECT_EQ(host.page().totals.sessions_rejected.load(), 1u);
  EXPECT_TRUE(rank->finish(rank->send_forward(1, 0, 0, random_tokens(host.shape(), 1, 1))).ok());
  host.page().jobs[3].used.store(0);
  host.end(*rank, SessionEnd::kBye);
  auto next = host.open();  // Takes the rows that became free.
  EXPECT_EQ(host.page().jobs[3].used.load(), 1u);
}

TEST(Shutdown, CompletesWhatWasReceivedAndRefusesTheRest) {
  Host host;
  auto ranks = host.open_job(2, "job");
  auto alone = host.open();
  std::promise<void> done;
  std::vector<Ticket> forwards;
  Ticket step;
  auto join = host.join(*alone, join_request(0, 2, "never"));
  {
    const Host::Pause pause(host);
    for (std::uint32_t layer : kMoeLayers) {
      forwards.push_back(ranks[0]->send_forward(layer, kAdapter, layer, random_tokens(host.shape(), 3, 1)));
    }
    step = ranks[0]->send_step(kAdapter, 0);  // Rank 1 will never ask for it.
    forwards.push_back(ranks[0]->send_forward(1, kAdapter, 9, random_tokens(host.shape(), 3, 1)));
    host.engine().shut_down([&] { done.set_value(); });
  }
  ASSERT_EQ(done.get_future().wait_for(std::chrono::seconds(30)), std::future_status::ready);
  for (const Ticket& forward : forwards) EXPECT_TRUE(ranks[0]->finish(forward).ok());
  const Outcome refused = ranks[0]->finish(step);
  EXPECT_EQ(refused.error.code, ErrorCode::kCoprocDied);
  EXPECT_NE(refused.error.what.find("kt-coproc (pid "), std::string::npos) << refused.error.text();
  ErrorCode code{};
  EXPECT_FALSE(error_of(get(std::move(join)), &code).empty());
  EXPECT_EQ(code, ErrorCode::kCoprocDied);
  const Outcome later = ranks[1]->finish(ranks[1]->send_forward(1, kAdapter, 0, random_tokens(host.shape(), 3, 1)));
  EXPECT_EQ(later.error.code, ErrorCode::kCoprocDied);
  EXPECT_FALSE(error_of(get(host.create(*alone)), &code).empty());
  EXPECT_EQ(code, ErrorCode::kCoprocDied);
  EXPECT_EQ(host.refused_open().code, ErrorCode::kCoprocDied);
  for (auto& rank : ranks) EXPECT_EQ(rank->segment().header().state.load(), shm::SessionState::kShuttingDown);
  host.end(*ranks[0], SessionEnd::kBye);
}

// Two jobs of two ranks, each rank on its own thread: for the race detector, and against lost wake-ups.
TEST(Concurrency, OfRanksOnThreadsLosesNothing) {
  Host host;
  auto first = host.open_job(2, "first", 3);
  auto second = host.open_job(2, "second", 4);
  constexpr std::uint64_t kSteps = 15;
  const auto train = [&](Rank& rank, std::uint32_t seed) {
    for (std::uint64_t step = 0; step < kSteps; ++step) {
      const Tokens tokens = random_tokens(host.shape(), 3 + seed, seed);
      const Bytes dy = random_elements(host.shape(), tokens.num_tokens * std::size_t{64}, seed);
      for (const std::uint32_t layer : kMoeLayers) {
        EXPECT_TRUE(rank.finish(rank.send_forward(layer, kAdapter, layer, tokens)).ok());
      }
      for (const std::uint32_t layer : kMoeLayers) {
        EXPECT_TRUE(rank.finish(rank.send_backward(layer, dy, shm::kAccumulate)).ok());
      }
      EXPECT_TRUE(rank.finish(rank.send_norm(kAdapter)).ok());
      const Outcome outcome = rank.finish(rank.send_step(kAdapter, step));
      EXPECT_TRUE(outcome.ok()) << outcome.error.text();
      if (step % 5 == seed) std::this_thread::sleep_for(std::chrono::milliseconds(2));  // Let the engine fall asleep.
    }
  };
  std::vector<std::thread> threads;
  for (std::uint32_t i = 0; i < 2; ++i) {
    threads.emplace_back([&, i] { train(*first[i], i); });
    threads.emplace_back([&, i] { train(*second[i], i + 2); });
  }
  for (std::thread& thread : threads) thread.join();
  host.rounds();
  EXPECT_EQ(host.page().totals.steps.load(), 2 * kSteps);
  EXPECT_EQ(host.page().totals.forward_requests.load(), 4 * kSteps * 3);
  EXPECT_EQ(host.page().totals.errors.load(), 0u);
  Oracle shapes(host);
  for (const auto* job : {&first, &second}) {
    EXPECT_EQ(read_tensor(*(*job)[0], shapes, TensorKind::kParam, 2, AdapterTensor::kUpB),
              read_tensor(*(*job)[1], shapes, TensorKind::kParam, 2, AdapterTensor::kUpB));
  }
}

}  // namespace
}  // namespace kt::test
