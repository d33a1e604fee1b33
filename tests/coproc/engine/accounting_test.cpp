#include "coproc/engine/accounting.h"

#include <gtest/gtest.h>

#include "coproc/engine/job.h"
#include "tests/coproc/engine/engine_fixture.h"

namespace kt::test {
namespace {

using coproc::RankAccount;
using shm::Verb;

constexpr std::uint64_t kMs = 1'000'000;

struct Accounting : testing::Test {
  coproc::WorkerPool pool{std::vector<int>{-1}};
  shm::StatusPageOwner owner = make_page();
  shm::StatusPage& page = owner.page();
  coproc::Accounting accounting{page, 3, pool};  // Three MoE layers.
};

TEST_F(Accounting, GivesRowsAndTakesThemBack) {
  RankAccount first, second;
  ASSERT_TRUE(accounting.open_rank(first, 0));
  accounting.describe_rank(first, 7, 99, 3, "job");  // From here on the row is taken.
  ASSERT_TRUE(accounting.open_rank(second, 0));
  accounting.describe_rank(second, 8, 98, 4, "job");
  EXPECT_NE(first.row, second.row);
  EXPECT_EQ(first.row->pid.load(), 99u);
  EXPECT_EQ(page.totals.sessions_attached.load(), 2u);
  shm::RankRow* const row = first.row;
  accounting.close_rank(first);
  EXPECT_EQ(row->used.load(), 0u);
  RankAccount third;
  ASSERT_TRUE(accounting.open_rank(third, 0));
  EXPECT_EQ(third.row, row);
}

TEST_F(Accounting, RefusesARankWithoutARow) {
  for (shm::RankRow& row : page.ranks) row.used.store(1);
  RankAccount account;
  EXPECT_FALSE(accounting.open_rank(account, 0));
  accounting.reject_session();
  EXPECT_EQ(page.totals.sessions_rejected.load(), 1u);
}

TEST_F(Accounting, CountsByVerbAndNotWhatFailed) {
  RankAccount account;
  ASSERT_TRUE(accounting.open_rank(account, 0));
  accounting.describe_rank(account, 1, 1, 0, "job");
  for (int i = 0; i < 3; ++i) accounting.received(account, 0);
  EXPECT_EQ(account.row->in_flight.load(), 3u);
  accounting.answered(account, Verb::kForward, 5, true, 0, kMs);
  accounting.answered(account, Verb::kForward, 7, false, 0, kMs);
  accounting.answered(account, Verb::kFetch, 5, true, 0, kMs);
  for (const shm::Totals* totals : {&page.totals, &account.row->totals}) {
    EXPECT_EQ(totals->forward_requests.load(), 1u);
    EXPECT_EQ(totals->forward_layer_tokens.load(), 5u);
    EXPECT_EQ(totals->fetch_requests.load(), 1u);
    EXPECT_EQ(totals->errors.load(), 1u);
  }
  EXPECT_EQ(account.row->in_flight.load(), 0u);
}

TEST_F(Accounting, PublishesRatesOverTheLastSecondAndComesToRest) {
  RankAccount account;
  ASSERT_TRUE(accounting.open_rank(account, 0));
  EXPECT_FALSE(accounting.needs_ticks());
  std::uint64_t now = 50 * kMs;
  // 300 layer tokens each 100 ms through 3 layers are 1000 tokens a second; a request is in flight half of the time.
  for (int i = 0; i < 20; ++i) {
    accounting.received(account, now);
    accounting.answered(account, Verb::kForward, 300, true, now, now + 50 * kMs);
    accounting.count_batch(300);
    now += 100 * kMs;
    EXPECT_TRUE(accounting.tick(now));
    EXPECT_FALSE(accounting.tick(now + 99 * kMs));
  }
  EXPECT_TRUE(accounting.needs_ticks());
  EXPECT_NEAR(page.forward_tokens_per_second.load(), 1000, 1);
  EXPECT_NEAR(page.tokens_per_batch.load(), 300, 1e-9);
  EXPECT_NEAR(account.row->waiting_ratio.load(), 0.5, 0.01);
  for (int i = 0; i < 20; ++i) accounting.tick(now += 100 * kMs);
  EXPECT_EQ(page.forward_tokens_per_second.load(), 0);
  EXPECT_EQ(account.row->waiting_ratio.load(), 0);
  EXPECT_FALSE(accounting.needs_ticks());
}

TEST_F(Accounting, ShowsWhatTheHeadOfAQueueIs) {
  RankAccount account;
  ASSERT_TRUE(accounting.open_rank(account, 0));
  const auto shown = [&](Verb verb) {
    accounting.show_state(account, verb);
    return static_cast<shm::RankState>(account.row->state.load());
  };
  EXPECT_EQ(shown(Verb::kForward), shm::RankState::kForward);
  EXPECT_EQ(shown(Verb::kNorm), shm::RankState::kCollective);
  EXPECT_EQ(shown(Verb::kRead), shm::RankState::kOther);
  EXPECT_EQ(shown(Verb::kNone), shm::RankState::kIdle);
}

TEST_F(Accounting, PublishesJobsAndMemory) {
  coproc::Job job;
  job.id = "job";
  job.members = {{0, nullptr}, {2, nullptr}};
  job.step = 4;
  accounting.publish_job(job);
  ASSERT_NE(job.row, nullptr);
  EXPECT_STREQ(job.row->members, "0,2");
  EXPECT_EQ(job.row->step.load(), 4u);
  accounting.close_job(job);
  EXPECT_EQ(page.jobs[0].used.load(), 0u);
  accounting.set_memory({1, 2, 3, 4, 5});
  EXPECT_EQ(page.bytes_optimizer.load(), 3u);
  EXPECT_EQ(page.bytes_arenas.load(), 5u);
}

}  // namespace
}  // namespace kt::test
