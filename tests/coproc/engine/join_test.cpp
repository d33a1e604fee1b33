// Control commands: how jobs of one become one job, when they may not, and adapters before and after.
#include "tests/coproc/engine/engine_fixture.h"

namespace kt::test {
namespace {

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

// Two sessions of one host, not joined.
class Join : public ::testing::Test {
 protected:
  void SetUp() override {
    for (auto& rank : ranks_) rank = host_.open("label");
  }
  // Both join as `a` and `b` ask; both must get the same error.
  std::string refused(JoinJob a, JoinJob b, ErrorCode code = ErrorCode::kDisagreement) {
    auto first = host_.join(*ranks_[0], std::move(a));
    auto second = host_.join(*ranks_[1], std::move(b));
    ErrorCode codes[2];
    const std::string errors[] = {error_of(get(std::move(first)), &codes[0]),
                                  error_of(get(std::move(second)), &codes[1])};
    EXPECT_EQ(codes[0], code) << errors[0];
    EXPECT_EQ(errors[0], errors[1]);
    return errors[0];
  }
  void joined(const std::string& job_id, std::uint64_t step = 0) {
    auto first = host_.join(*ranks_[0], join_request(0, 2, job_id));
    auto second = host_.join(*ranks_[1], join_request(1, 2, job_id));
    for (auto* call : {&first, &second}) {
      const Host::Answer answer = get(std::move(*call));
      EXPECT_EQ(error_of(answer), "");
      EXPECT_EQ(answer.value().step, step);
    }
  }
  void forward(Rank& rank, std::uint64_t act_id) {
    EXPECT_TRUE(rank.finish(rank.send_forward(1, 0, act_id, random_tokens(host_.shape(), 3, 1))).ok());
  }
  void create(std::uint32_t adapter_id = kAdapter) {
    for (auto& rank : ranks_) EXPECT_EQ(error_of(get(host_.create(*rank, adapter_id))), "");
  }

  Host host_;
  std::unique_ptr<Rank> ranks_[2];
};

TEST_F(Join, KeepsTheLowestRanksAdapterForAll) {
  create();
  Oracle oracle(host_);
  oracle.fill(1);
  Oracle::fill(*ranks_[0], host_, 1);
  Oracle::fill(*ranks_[1], host_, 2);
  joined("job");
  expect_same_adapter(*ranks_[1], oracle, {TensorKind::kParam});
  host_.rounds();
  const nlohmann::json status = shm::status_json(host_.page());
  ASSERT_EQ(status.at("jobs").size(), 1u);
  EXPECT_EQ(status.at("jobs")[0].at("job_id"), "job");
  EXPECT_EQ(status.at("jobs")[0].at("world_size"), 2);
  EXPECT_EQ(status.at("ranks").size(), 2u);
}

TEST_F(Join, AgainByAllIsANoOpAlsoUnderAnotherJobIdAndWithGradientsAndActivations) {
  create();
  joined("job");
  const Ticket a = ranks_[0]->send_step(kAdapter, 0), b = ranks_[1]->send_step(kAdapter, 0);
  EXPECT_TRUE(ranks_[0]->finish(a).ok());
  EXPECT_TRUE(ranks_[1]->finish(b).ok());
  forward(*ranks_[0], 4);
  joined("job", 1);
  joined("another nonce", 1);
  EXPECT_TRUE(ranks_[0]->finish(ranks_[0]->send_backward(4, Bytes(3 * 64 * 2), 0)).ok());
}

TEST_F(Join, OfASingleMemberCompletesAtOnceAndCountsStepsAnew) {
  ASSERT_EQ(error_of(get(host_.create(*ranks_[0]))), "");
  EXPECT_TRUE(ranks_[0]->finish(ranks_[0]->send_step(kAdapter, 0)).ok());
  JoinJob join = join_request(3, 1, "alone");
  join.world_size = 8;
  join.members = {3};
  const Host::Answer answer = get(host_.join(*ranks_[0], join));
  EXPECT_EQ(error_of(answer), "");
  EXPECT_EQ(answer.value().step, 0u);
  EXPECT_TRUE(ranks_[0]->finish(ranks_[0]->send_step(kAdapter, 0)).ok());
}

TEST_F(Join, RefusesMembersThatDisagree) {
  JoinJob other_world = join_request(1, 2, "a");
  other_world.world_size = 3;
  EXPECT_TRUE(
      contains(refused(join_request(0, 2, "a"), other_world), "rank 0 asks for a join with world_size 2, rank 1"));
  JoinJob other_members = join_request(1, 3, "b");
  other_members.members = {1, 2};
  EXPECT_TRUE(
      contains(refused(join_request(0, 3, "b"), other_members), "members 0,1,2, rank 1 for a join with members 1,2"));
  EXPECT_TRUE(contains(refused(join_request(1, 2, "c"), join_request(1, 2, "c")), "both say that they are rank 1"));
  joined("all is well afterwards");
}

TEST_F(Join, RefusesDifferentAdapters) {
  create();
  ASSERT_EQ(error_of(get(host_.create(*ranks_[1], 2))), "");
  EXPECT_TRUE(
      contains(refused(join_request(0, 2, "a"), join_request(1, 2, "a")), "rank 0 has the adapters 1, rank 1 has 1,2"));
  coproc::AdapterLayerSpec spec = default_spec();
  spec.down.r = 7;
  ASSERT_EQ(error_of(get(host_.create(*ranks_[0], 2, {3}, spec))), "");
  EXPECT_TRUE(contains(refused(join_request(0, 2, "b"), join_request(1, 2, "b")), "adapter 2, layer 1"));
}

TEST_F(Join, RefusesGradientsAndLiveActivationsAndWorksOnceTheyAreGone) {
  create();
  const Tokens tokens = random_tokens(host_.shape(), 3, 1);
  EXPECT_TRUE(ranks_[1]->finish(ranks_[1]->send_forward(1, kAdapter, 4, tokens)).ok());
  EXPECT_TRUE(contains(refused(join_request(0, 2, "a"), join_request(1, 2, "a")), "rank 1 holds 1 activations"));
  EXPECT_TRUE(ranks_[1]->finish(ranks_[1]->send_backward(4, Bytes(3 * 64 * 2), shm::kAccumulate)).ok());
  EXPECT_TRUE(
      contains(refused(join_request(0, 2, "a"), join_request(1, 2, "a")), "rank 1 holds gradients in adapter 1"));
  EXPECT_TRUE(ranks_[1]->finish(ranks_[1]->send_discard(kAdapter)).ok());
  joined("a");
}

TEST_F(Join, WaitsForEarlierRequestsOfItsMembers) {
  forward(*ranks_[0], 4);
  std::vector<Host::Call> calls;
  Ticket released;
  {
    const Host::Pause pause(host_);
    released = ranks_[0]->send_release(4);  // Still in the ring when the members ask.
    for (std::uint32_t i = 0; i < 2; ++i) calls.push_back(host_.join(*ranks_[i], join_request(i, 2, "a")));
  }
  for (Host::Call& call : calls) EXPECT_EQ(error_of(get(std::move(call))), "");
  EXPECT_TRUE(ranks_[0]->finish(released).ok());
}

TEST_F(Join, OfPartOfAJobIsRefused) {
  joined("job");
  auto third = host_.open();
  auto first = host_.join(*ranks_[0], join_request(0, 2, "half"));
  auto second = host_.join(*third, join_request(1, 2, "half"));
  EXPECT_TRUE(
      contains(error_of(get(std::move(first))), "is in job 'job' with a process that does not join (pid 1002)"));
  EXPECT_FALSE(error_of(get(std::move(second))).empty());
}

TEST_F(Join, MergesWholeJobs) {
  create();
  joined("job");
  auto third = host_.open();
  ASSERT_EQ(error_of(get(host_.create(*third))), "");
  std::vector<Host::Call> calls;
  calls.push_back(host_.join(*ranks_[0], join_request(0, 3, "larger")));
  calls.push_back(host_.join(*ranks_[1], join_request(1, 3, "larger")));
  calls.push_back(host_.join(*third, join_request(2, 3, "larger")));
  for (auto& call : calls) EXPECT_EQ(error_of(get(std::move(call))), "");
  const Ticket tickets[] = {ranks_[0]->send_barrier(0), ranks_[1]->send_barrier(0), third->send_barrier(0)};
  EXPECT_TRUE(ranks_[0]->finish(tickets[0]).ok());
  EXPECT_TRUE(ranks_[1]->finish(tickets[1]).ok());
  EXPECT_TRUE(third->finish(tickets[2]).ok());
}

TEST_F(Join, EndsWithRankDiedForThoseWhoWaitAndThoseWhoComeLater) {
  auto third = host_.open();
  auto first = host_.join(*ranks_[0], join_request(0, 3, "job"));
  auto second = host_.join(*ranks_[1], join_request(1, 3, "job"));
  host_.end(*ranks_[1], SessionEnd::kDied);
  ErrorCode code{};
  EXPECT_TRUE(contains(error_of(get(std::move(first)), &code), "rank 1 (pid 1002) died while joining job 'job'"));
  EXPECT_EQ(code, ErrorCode::kRankDied);
  EXPECT_FALSE(error_of(get(host_.join(*third, join_request(2, 3, "job"))), &code).empty());
  EXPECT_EQ(code, ErrorCode::kRankDied);
  forward(*ranks_[0], 1);  // It is still a job of one.
}

TEST_F(Join, TimesOutNamingWhoIsMissing) {
  ErrorCode code{};
  const std::string error = error_of(get(host_.join(*ranks_[0], join_request(0, 4, "job", 0.1))), &code);
  EXPECT_EQ(code, ErrorCode::kTimeout);
  EXPECT_TRUE(contains(error, "missing are ranks 1,2,3")) << error;
  // A late one is told; when all ask again it is a new attempt.
  EXPECT_TRUE(contains(error_of(get(host_.join(*ranks_[1], join_request(1, 4, "job", 0.1)))), "timed out"));
  joined("other");
}

TEST_F(Join, OfAFailedJobIsRefused) {
  joined("job");
  host_.end(*ranks_[1], SessionEnd::kDied);
  ErrorCode code{};
  EXPECT_FALSE(error_of(get(host_.join(*ranks_[0], join_request(0, 1, "new"))), &code).empty());
  EXPECT_EQ(code, ErrorCode::kRankDied);
}

TEST_F(Join, MakesAdapterCommandsCollective) {
  create();
  joined("job");
  auto first = host_.create(*ranks_[0], 2);
  host_.rounds();
  EXPECT_EQ(first.wait_for(std::chrono::seconds(0)), std::future_status::timeout);
  auto second = host_.create(*ranks_[1], 2);
  EXPECT_EQ(error_of(get(std::move(first))), "");
  EXPECT_EQ(error_of(get(std::move(second))), "");

  coproc::AdapterLayerSpec spec = default_spec();
  spec.down.r = 9;
  first = host_.create(*ranks_[0], 3);
  second = host_.create(*ranks_[1], 3, kMoeLayers, spec);
  ErrorCode code{};
  EXPECT_TRUE(contains(error_of(get(std::move(first)), &code), "down r 3 and scaling 2, rank 1 for adapter_create"));
  EXPECT_EQ(code, ErrorCode::kDisagreement);
  EXPECT_FALSE(error_of(get(std::move(second))).empty());

  first = host_.remove(*ranks_[0], 2);
  second = host_.remove(*ranks_[1], 2);
  EXPECT_EQ(error_of(get(std::move(first))), "");
  EXPECT_EQ(error_of(get(std::move(second))), "");
  EXPECT_TRUE(ranks_[0]->finish(ranks_[0]->send_forward(1, kAdapter, 0, random_tokens(host_.shape(), 1, 1))).ok());
}

TEST_F(Join, MakesAnAdapterCommandAgainstAStepADisagreement) {
  create();
  joined("job");
  const Ticket step = ranks_[0]->send_step(kAdapter, 0);
  auto call = host_.create(*ranks_[1], 2);
  ErrorCode code{};
  EXPECT_TRUE(contains(error_of(get(std::move(call)), &code), "rank 0 asks for STEP, rank 1 for adapter_create"));
  EXPECT_EQ(code, ErrorCode::kDisagreement);
  EXPECT_EQ(ranks_[0]->finish(step).error.code, ErrorCode::kDisagreement);
}

TEST(Adapters, OfAJobOfOneAreCreatedExtendedAndDeletedAtOnce) {
  Host host;
  auto rank = host.open();
  ErrorCode code{};
  EXPECT_EQ(error_of(get(host.create(*rank, kAdapter, {1, 2}))), "");
  EXPECT_EQ(error_of(get(host.create(*rank, kAdapter, {3}))), "");
  for (const auto& layers : std::vector<std::vector<std::uint32_t>>{{3}, {0}, {99}}) {
    EXPECT_FALSE(error_of(get(host.create(*rank, kAdapter, layers)), &code).empty());
    EXPECT_EQ(code, ErrorCode::kInvalidArgument);
  }
  EXPECT_FALSE(error_of(get(host.remove(*rank, 9)), &code).empty());
  EXPECT_EQ(code, ErrorCode::kNotFound);
  host.rounds();
  EXPECT_GT(host.page().bytes_adapters.load(), 0u);

  // An activation of a deleted adapter has nothing to run its backward through.
  const Tokens tokens = random_tokens(host.shape(), 3, 1);
  ASSERT_TRUE(rank->finish(rank->send_forward(1, kAdapter, 4, tokens)).ok());
  ASSERT_TRUE(rank->finish(rank->send_forward(1, 0, 5, tokens)).ok());
  EXPECT_EQ(error_of(get(host.remove(*rank, kAdapter))), "");
  EXPECT_EQ(rank->finish(rank->send_backward(4, Bytes(3 * 64 * 2), 0)).error.code, ErrorCode::kNotFound);
  EXPECT_TRUE(rank->finish(rank->send_backward(5, Bytes(3 * 64 * 2), 0)).ok());
  const Outcome forward = rank->finish(rank->send_forward(1, kAdapter, 0, tokens));
  EXPECT_EQ(forward.error.code, ErrorCode::kNotFound);
  EXPECT_TRUE(contains(forward.error.why, "no adapters")) << forward.error.text();
  host.rounds();
  EXPECT_EQ(host.page().bytes_adapters.load(), 0u);
}

}  // namespace
}  // namespace kt::test
