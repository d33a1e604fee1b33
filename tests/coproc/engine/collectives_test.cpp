#include "coproc/engine/collectives.h"

#include "shm/doorbell.h"
#include "tests/coproc/engine/owners_fixture.h"

namespace kt::test {
namespace {

struct CollectivesOwner : testing::Test {
  CollectivesOwner() {
    owners.open();
    owners.open();
    job = &owners.join_all();
  }
  Rank& rank(std::size_t i) { return *owners.ranks[i]; }
  coproc::Session& session(std::size_t i) { return owners.session(rank(i)); }
  Owners owners;
  coproc::Job* job = nullptr;
};

TEST_F(CollectivesOwner, RunOnceWhenEveryMemberAsks) {
  const Ticket first = rank(0).send_step(kAdapter, 0);
  owners.receive_and_advance();
  const std::uint64_t now = shm::now_ns();
  EXPECT_FALSE(owners.collectives.run(session(0).queue.front().head_ns));
  EXPECT_EQ(owners.collectives.due_ns(), session(0).queue.front().head_ns + Owners::kTimeoutNs);
  const Ticket second = rank(1).send_step(kAdapter, 0);
  owners.receive_and_advance();
  EXPECT_TRUE(owners.collectives.run(now));
  EXPECT_EQ(rank(0).finish(first).reply.step, 1u);
  EXPECT_TRUE(rank(1).finish(second).ok());
  EXPECT_EQ(job->step, 1u);
  EXPECT_EQ(owners.page.page().totals.steps.load(), 1u);
  EXPECT_EQ(owners.collectives.due_ns(), UINT64_MAX);
}

TEST_F(CollectivesOwner, FailTheJobWhenMembersAskForDifferentThings) {
  rank(0).send_norm(kAdapter);
  const Ticket discard = rank(1).send_discard(kAdapter);
  owners.receive_and_advance();
  EXPECT_TRUE(owners.collectives.run(0));
  ASSERT_TRUE(job->failure);
  EXPECT_EQ(job->failure->error.code, ErrorCode::kDisagreement);
  EXPECT_TRUE(has_text(job->failure->error.why, "rank 0 asks for NORM, rank 1 for DISCARD"));
  EXPECT_FALSE(owners.collectives.run(0));
  owners.receive_and_advance();  // Tells the heads.
  EXPECT_EQ(rank(1).finish(discard).error.code, ErrorCode::kDisagreement);
}

TEST_F(CollectivesOwner, TimeOutAtTheDeadlineNamingWhoIsMissing) {
  rank(1).send_barrier(0);
  owners.receive_and_advance();
  const std::uint64_t since = session(1).queue.front().head_ns;
  EXPECT_FALSE(owners.collectives.run(since + Owners::kTimeoutNs - 1));
  EXPECT_TRUE(owners.collectives.run(since + Owners::kTimeoutNs));
  ASSERT_TRUE(job->failure);
  EXPECT_EQ(job->failure->error.code, ErrorCode::kTimeout);
  EXPECT_TRUE(has_text(job->failure->error.what, "missing is rank 0 (pid 1001)")) << job->failure->error.text();
  EXPECT_TRUE(has_text(job->failure->error.why, "rank 1 in BARRIER waited")) << job->failure->error.text();
}

TEST_F(CollectivesOwner, OfAnAdapterCommandRunOnceAndFailWithoutTheJob) {
  const Told first, second;
  owners.commands.ask(session(0), coproc::DeleteAdapter{kAdapter}, first.on_done(), 1);
  EXPECT_FALSE(owners.collectives.run(1));
  EXPECT_FALSE(first.given());
  owners.commands.ask(session(1), coproc::DeleteAdapter{7}, second.on_done(), 2);
  EXPECT_TRUE(owners.collectives.run(2));
  EXPECT_EQ(first.code(), ErrorCode::kDisagreement);
  EXPECT_EQ(second.code(), ErrorCode::kDisagreement);
  EXPECT_FALSE(job->failure);
  EXPECT_NE(job->find_adapter(kAdapter), nullptr);
}

TEST_F(CollectivesOwner, FailWhenOneWaitsInTheRingAndTheOtherInACommand) {
  const Told told;
  rank(0).send_step(kAdapter, 0);
  owners.receive_and_advance();
  owners.commands.ask(session(1), coproc::DeleteAdapter{kAdapter}, told.on_done(), 1);
  EXPECT_TRUE(owners.collectives.run(1));
  ASSERT_TRUE(job->failure);
  EXPECT_EQ(told.code(), ErrorCode::kDisagreement);
  EXPECT_TRUE(has_text(job->failure->error.why, "rank 0 asks for STEP, rank 1 for adapter_delete"));
}

TEST_F(CollectivesOwner, AreAnsweredAtOnceAfterAMemberSaidBye) {
  owners.registry.end(2, SessionEnd::kBye);
  const Told told;
  owners.commands.ask(session(0), coproc::DeleteAdapter{kAdapter}, told.on_done(), 1);
  EXPECT_EQ(told.code(), ErrorCode::kRankDied);
  const Ticket barrier = rank(0).send_barrier(0);
  owners.receive_and_advance();
  EXPECT_EQ(rank(0).finish(barrier).error.code, ErrorCode::kRankDied);
}

}  // namespace
}  // namespace kt::test
