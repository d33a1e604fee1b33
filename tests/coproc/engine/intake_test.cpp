#include "coproc/engine/intake.h"

#include "tests/coproc/engine/owners_fixture.h"

namespace kt::test {
namespace {

TEST(Intake, QueuesRequestsInRingOrderWithTheOrderOfTheirArrival) {
  Owners owners;
  Rank& first = owners.open();
  Rank& second = owners.open();
  first.send_release(1);
  first.send_barrier(0);
  second.send_release(2);
  EXPECT_TRUE(owners.intake.receive(owners.session(second)));
  EXPECT_TRUE(owners.intake.receive(owners.session(first)));
  EXPECT_FALSE(owners.intake.receive(owners.session(first)));
  const auto& queue = owners.session(first).queue;
  ASSERT_EQ(queue.size(), 2u);
  EXPECT_EQ(queue[0].request.act_id, 1u);
  EXPECT_EQ(queue[1].request.verb, shm::Verb::kBarrier);
  EXPECT_EQ(owners.session(second).queue.front().arrival, 1u);
  EXPECT_EQ(queue[0].arrival, 2u);
  EXPECT_STREQ(owners.session(first).last.name, "BARRIER");  // A RELEASE is not noted.
  EXPECT_EQ(owners.page.page().ranks[0].in_flight.load(), 2u);
}

TEST(Intake, TakesARingsWorthAtMost) {
  Owners owners;
  Rank& rank = owners.open();
  for (std::uint32_t i = 0; i < shm::kNumSlots; ++i) rank.send_release(1 + i);
  EXPECT_TRUE(owners.intake.receive(owners.session(rank)));
  EXPECT_EQ(owners.session(rank).queue.size(), shm::kNumSlots);
}

TEST(Intake, EndsTheSessionOfAMalformedRequestOrSequence) {
  for (const bool sequence : {false, true}) {
    Owners owners;
    Error told;
    owners.registry.on_session_ended = [&](std::uint32_t, const Error& error) { told = error; };
    Rank& rank = owners.open();
    if (sequence) {
      rank.send_sequence(5);
    } else {
      rank.send_raw({}, {});
    }
    EXPECT_TRUE(owners.intake.receive(owners.session(rank)));
    EXPECT_EQ(owners.registry.find(rank.session_id), nullptr);
    EXPECT_EQ(told.code, ErrorCode::kInvalidArgument);
    EXPECT_TRUE(has_text(told.why, sequence ? "the next request is 1" : "verb is 0")) << told.text();
  }
}

TEST(Intake, RefusesWhatComesDuringTheShutdown) {
  Owners owners;
  Rank& rank = owners.open();
  const Ticket before = rank.send_barrier(0);
  owners.intake.receive(owners.session(rank));
  owners.registry.shut_down();
  const Ticket after = rank.send_barrier(0);
  owners.intake.receive(owners.session(rank));
  EXPECT_EQ(rank.finish(after).error.code, ErrorCode::kCoprocDied);
  EXPECT_FALSE(rank.is_done(before));  // It goes on.
}

}  // namespace
}  // namespace kt::test
