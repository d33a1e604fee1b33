#include "coproc/engine/joins.h"

#include "tests/coproc/engine/owners_fixture.h"

namespace kt::test {
namespace {

constexpr std::uint64_t kAskedNs = 5'000;

Told ask(Owners& owners, const Rank& rank, std::uint32_t as_rank, std::uint32_t world_size, double seconds = 0) {
  Told told;
  owners.joins.ask(owners.session(rank), join_request(as_rank, world_size, "job", seconds), told.on_joined(), kAskedNs);
  return told;
}

TEST(Joins, WaitForAllMembersAndThenMerge) {
  Owners owners;
  const Rank& first = owners.open();
  const Rank& second = owners.open();
  const Told told_second = ask(owners, second, 0, 2);
  EXPECT_FALSE(owners.joins.run(kAskedNs + 1));
  EXPECT_TRUE(owners.joins.waits(owners.session(second)));
  EXPECT_FALSE(owners.joins.waits(owners.session(first)));
  const Told told_first = ask(owners, first, 1, 2);
  EXPECT_TRUE(owners.joins.run(kAskedNs + 1));
  EXPECT_EQ(told_first.answer->value().value().step, 0u);
  EXPECT_EQ(told_second.code(), ErrorCode::kOk);
  EXPECT_EQ(owners.session(second).rank, 0u);
  EXPECT_EQ(owners.session(first).job, owners.session(second).job);
  EXPECT_EQ(owners.joins.due_ns(), UINT64_MAX);
}

TEST(Joins, TimeOutAtTheirDeadlineAndTellALateMemberOnce) {
  Owners owners;
  const Rank& first = owners.open();
  const Rank& second = owners.open();
  const Told told = ask(owners, first, 0, 2);
  EXPECT_EQ(owners.joins.due_ns(), kAskedNs + Owners::kTimeoutNs);
  EXPECT_FALSE(owners.joins.run(kAskedNs + Owners::kTimeoutNs - 1));
  EXPECT_TRUE(owners.joins.run(kAskedNs + Owners::kTimeoutNs));
  EXPECT_EQ(told.code(), ErrorCode::kTimeout);
  EXPECT_EQ(ask(owners, second, 1, 2).code(), ErrorCode::kTimeout);  // At once.
  EXPECT_FALSE(ask(owners, second, 1, 2).given());                   // A new attempt.
}

TEST(Joins, OfOneJobTakeTheirOwnTimeout) {
  Owners owners;
  ask(owners, owners.open(), 0, 2, 2e-6);
  EXPECT_EQ(owners.joins.due_ns(), kAskedNs + 2000);
}

TEST(Joins, EndForTheOthersWhenAMemberLeaves) {
  Owners owners;
  const Rank& first = owners.open();
  const Rank& second = owners.open();
  const Told told = ask(owners, first, 0, 3);
  const Told never = ask(owners, second, 1, 3);
  owners.registry.end(second.session_id, SessionEnd::kBye);
  EXPECT_EQ(told.code(), ErrorCode::kRankDied);
  EXPECT_TRUE(has_text(told.answer->value().error().what, "left while joining")) << told.answer->value().error().text();
  EXPECT_FALSE(never.given());  // Its session has ended.
}

TEST(Joins, RefuseStatesThatCannotBecomeOne) {
  Owners owners;
  const Rank& first = owners.open();
  const Rank& second = owners.open();
  owners.create_adapter(first);
  const Told told = ask(owners, first, 0, 2);
  ask(owners, second, 1, 2);
  EXPECT_TRUE(owners.joins.run(kAskedNs));
  EXPECT_EQ(told.code(), ErrorCode::kDisagreement);
  EXPECT_TRUE(has_text(told.answer->value().error().why, "rank 0 has the adapters 1, rank 1 has none"));
  EXPECT_NE(owners.session(first).job, owners.session(second).job);
}

TEST(Joins, WaitUntilTheMembersQueuesAreEmpty) {
  Owners owners;
  Rank& rank = owners.open();
  rank.send_release(3);
  owners.intake.receive(owners.session(rank));
  const Told told = ask(owners, rank, 0, 1);
  EXPECT_FALSE(owners.joins.run(kAskedNs));
  owners.heads.advance(owners.session(rank));
  EXPECT_TRUE(owners.joins.run(kAskedNs));
  EXPECT_EQ(told.code(), ErrorCode::kOk);
}

}  // namespace
}  // namespace kt::test
