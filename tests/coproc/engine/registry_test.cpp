#include "coproc/engine/registry.h"

#include "tests/coproc/engine/owners_fixture.h"

namespace kt::test {
namespace {

using coproc::Job;
using coproc::Session;

// What a listener hears, as "leaving 1".
struct Listener : coproc::SessionListener {
  void on_leaving(Session& session, SessionEnd) override { heard.push_back("leaving " + std::to_string(session.id)); }
  void on_job_failed(Session& session, const Error&) override {
    heard.push_back("failed " + std::to_string(session.id));
  }
  void on_peer_departed(Session& session, const Error&) override {
    heard.push_back("departed " + std::to_string(session.id));
  }
  std::vector<std::string> heard;
};

TEST(Registry, MakesEverySessionAJobOfOne) {
  Owners owners;
  const Rank& first = owners.open();
  const Rank& second = owners.open();
  EXPECT_EQ(owners.registry.sessions().size(), 2u);
  EXPECT_EQ(owners.registry.jobs().size(), 2u);
  EXPECT_NE(owners.session(first).job, owners.session(second).job);
  EXPECT_EQ(owners.session(second).job->id, "session-2");
  EXPECT_EQ(owners.registry.memory().arenas, first.segment().arena_bytes() + second.segment().arena_bytes());
  owners.registry.end(1, SessionEnd::kBye);
  owners.registry.end(1, SessionEnd::kBye);  // It has ended.
  EXPECT_EQ(owners.registry.find(1), nullptr);
  EXPECT_EQ(owners.registry.jobs().size(), 1u);
  EXPECT_EQ(owners.registry.memory().arenas, second.segment().arena_bytes());
}

TEST(Registry, MergesJobsUnderTheAdaptersOfTheLowestRank) {
  Owners owners;
  owners.open();
  owners.open();
  Job& job = owners.join_all();
  EXPECT_EQ(owners.registry.jobs().size(), 1u);
  EXPECT_EQ(job.ranks(), (std::vector<std::uint32_t>{0, 1}));
  EXPECT_NE(job.find_adapter(kAdapter), nullptr);
  EXPECT_EQ(owners.session(*owners.ranks[1]).rank, 1u);
  EXPECT_GT(owners.registry.memory().adapters, 0u);
  EXPECT_STREQ(owners.page.page().jobs[job.row - owners.page.page().jobs].members, "0,1");
}

TEST(Registry, FailsAJobWhoseMemberDiesAndTellsListeners) {
  Owners owners;
  Listener listener;
  owners.registry.add_listener(listener);
  owners.open();
  owners.open();
  Job& job = owners.join_all();
  owners.session(*owners.ranks[1]).activations.add(3, {});
  owners.registry.end(1, SessionEnd::kDied);
  EXPECT_EQ(listener.heard, (std::vector<std::string>{"leaving 1", "failed 2"}));
  ASSERT_TRUE(job.failure);
  EXPECT_EQ(job.failure->error.code, ErrorCode::kRankDied);
  EXPECT_EQ(owners.session(*owners.ranks[1]).activations.size(), 0u);
  owners.registry.end(2, SessionEnd::kDied);
  EXPECT_TRUE(owners.registry.jobs().empty());
}

TEST(Registry, LetsAJobGoOnWhenAMemberSaysBye) {
  Owners owners;
  Listener listener;
  owners.registry.add_listener(listener);
  owners.open();
  owners.open();
  const Job& job = owners.join_all();
  owners.registry.end(2, SessionEnd::kBye);
  EXPECT_EQ(listener.heard, (std::vector<std::string>{"leaving 2", "departed 1"}));
  EXPECT_FALSE(job.failure);
  ASSERT_TRUE(job.departure);
  EXPECT_EQ(job.departure->rank, 1u);
}

TEST(Registry, EndsASessionThatBrokeTheProtocolAndSaysSo) {
  Owners owners;
  std::uint32_t ended = 0;
  owners.registry.on_session_ended = [&](std::uint32_t session_id, const Error& error) {
    EXPECT_EQ(error.why, "because");
    EXPECT_EQ(owners.registry.find(session_id), nullptr);
    ended = session_id;
  };
  const Rank& rank = owners.open();
  owners.registry.break_session(owners.session(rank), Error{ErrorCode::kInvalidArgument, "what", "because", "fix"});
  EXPECT_EQ(ended, 1u);
}

TEST(Registry, VisitsEverySessionAlsoWhenTheVisitedEnds) {
  Owners owners;
  for (int i = 0; i < 5; ++i) owners.open();
  std::vector<std::uint32_t> visited;
  const bool did = owners.registry.any_session([&](Session& session) {
    const std::uint32_t id = session.id;
    visited.push_back(id);
    if (id % 2 == 0) owners.registry.end(id, SessionEnd::kDied);
    return id == 3;
  });
  EXPECT_TRUE(did);
  EXPECT_EQ(visited, (std::vector<std::uint32_t>{1, 2, 3, 4, 5}));
  EXPECT_EQ(owners.registry.sessions().size(), 3u);
}

TEST(Registry, TakesNobodyWhileItShutsDown) {
  Owners owners;
  const Rank& rank = owners.open();
  owners.registry.shut_down();
  EXPECT_EQ(rank.segment().header().state.load(), shm::SessionState::kShuttingDown);
  EXPECT_THROW(owners.open(), std::runtime_error);
  EXPECT_EQ(owners.page.page().totals.sessions_rejected.load(), 1u);
}

}  // namespace
}  // namespace kt::test
