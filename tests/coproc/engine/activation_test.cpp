// Activations: what is kept, for how long, and what happens when there is no room (B4, I3).
#include "coproc/engine/activation_budget.h"
#include "tests/coproc/engine/engine_fixture.h"

namespace kt::test {
namespace {

constexpr std::uint32_t kTokens = 6;
const std::size_t kRows = kTokens * std::size_t{64};

class Activations : public ::testing::Test {
 protected:
  void start(EngineOptions options = Host::default_options()) {
    host_ = std::make_unique<Host>(2, options);
    oracle_ = std::make_unique<Oracle>(*host_);
    oracle_->fill(7);
    rank_ = host_->open();
    ASSERT_EQ(error_of(get(host_->create(*rank_))), "");
    Oracle::fill(*rank_, *host_, 7);
  }
  Tokens tokens(std::uint32_t seed = 1) const { return random_tokens(host_->shape(), kTokens, seed); }
  Bytes dy(std::uint32_t seed = 2) const { return random_elements(host_->shape(), kRows, seed); }
  Outcome forward(std::uint64_t act_id, std::uint8_t flags = 0) {
    return rank_->finish(rank_->send_forward(2, kAdapter, act_id, tokens(), flags));
  }
  Outcome backward(std::uint64_t act_id, std::uint8_t flags = shm::kAccumulate) {
    return rank_->finish(rank_->send_backward(act_id, dy(), flags));
  }
  std::uint64_t live_bytes() {
    host_->rounds();
    return host_->page().bytes_activations.load();
  }

  std::unique_ptr<Host> host_;
  std::unique_ptr<Oracle> oracle_;
  std::unique_ptr<Rank> rank_;
};

TEST_F(Activations, LiveUntilTheirBackwardTheirReleaseOrTheEndOfTheSession) {
  start();
  EXPECT_TRUE(forward(0).ok());
  EXPECT_EQ(live_bytes(), 0u);
  EXPECT_TRUE(forward(1).ok());
  EXPECT_TRUE(forward(2).ok());
  EXPECT_TRUE(forward(3).ok());
  const std::uint64_t bytes = live_bytes();
  EXPECT_EQ(bytes, 3 * (coproc::activation_input_bytes(host_->dims(), kTokens, false) +
                        coproc::activation_gate_up_bytes(host_->dims(), kTokens)));
  EXPECT_TRUE(backward(2).ok());
  EXPECT_EQ(live_bytes(), bytes / 3 * 2);
  EXPECT_TRUE(rank_->finish(rank_->send_release(1)).ok());
  EXPECT_TRUE(rank_->finish(rank_->send_release(1)).ok());  // Again: idempotent.
  EXPECT_EQ(live_bytes(), bytes / 3);
  host_->end(*rank_, SessionEnd::kBye);
  EXPECT_EQ(live_bytes(), 0u);
}

TEST_F(Activations, AreUsedUpByABackwardUnlessItKeepsThem) {
  start();
  coproc::SavedActivation kept;
  EXPECT_EQ(forward(1).rows, oracle_->forward(2, true, tokens(), &kept));
  const auto expected = oracle_->backward({&kept}, {dy()}, false);
  EXPECT_EQ(backward(1, shm::kKeep).rows, expected[0].dx);
  EXPECT_EQ(backward(1, 0).rows, expected[0].dx);
  const Outcome third = backward(1, 0);
  EXPECT_EQ(third.error.code, ErrorCode::kNotFound);
  EXPECT_NE(third.error.what.find("BACKWARD of activation 1"), std::string::npos) << third.error.text();
  EXPECT_NE(third.error.fix.find("retain_graph"), std::string::npos) << third.error.text();
  EXPECT_TRUE(forward(1).ok());  // The id is free again.
  EXPECT_EQ(backward(99).error.code, ErrorCode::kNotFound);
}

TEST_F(Activations, AddToTheGradientsOnlyWithAccumulate) {
  start();
  EXPECT_TRUE(forward(1).ok());
  EXPECT_TRUE(backward(1, shm::kKeep).ok());
  EXPECT_EQ(rank_->finish(rank_->send_norm(kAdapter)).reply.value, 0);
  EXPECT_TRUE(backward(1, shm::kAccumulate).ok());
  EXPECT_GT(rank_->finish(rank_->send_norm(kAdapter)).reply.value, 0);
  // Adapter 0 has nothing to add to: ACCUMULATE means nothing there.
  EXPECT_TRUE(rank_->finish(rank_->send_forward(2, 0, 3, tokens())).ok());
  EXPECT_TRUE(backward(3, shm::kAccumulate).ok());
}

TEST_F(Activations, GiveBackTheOutputTheyKept) {
  start();
  const Outcome first = forward(1, shm::kKeepY);
  EXPECT_EQ(rank_->finish(rank_->send_fetch(1, kTokens)).rows, first.rows);
  EXPECT_EQ(rank_->finish(rank_->send_fetch(1, kTokens)).rows, first.rows);
  EXPECT_TRUE(forward(2).ok());
  const Outcome without = rank_->finish(rank_->send_fetch(2, kTokens));
  EXPECT_EQ(without.error.code, ErrorCode::kNotFound);
  EXPECT_NE(without.error.why.find("KEEP_Y"), std::string::npos) << without.error.text();
  EXPECT_EQ(rank_->finish(rank_->send_fetch(3, kTokens)).error.code, ErrorCode::kNotFound);
  // None of these ended the session, and no token is a forward too.
  EXPECT_TRUE(
      rank_->finish(rank_->send_forward(2, kAdapter, 9, random_tokens(host_->shape(), 0, 1), shm::kKeepY)).ok());
  EXPECT_TRUE(rank_->finish(rank_->send_fetch(9, 0)).ok());
  host_->rounds();
  EXPECT_EQ(host_->page().totals.fetch_requests.load(), 3u);
}

TEST_F(Activations, OfAnotherStepAreStaleUnlessTheyUsedNoAdapter) {
  start();
  EXPECT_TRUE(forward(1).ok());
  EXPECT_TRUE(rank_->finish(rank_->send_forward(2, 0, 2, tokens())).ok());
  ASSERT_TRUE(rank_->finish(rank_->send_step(kAdapter, 0)).ok());
  ASSERT_TRUE(rank_->finish(rank_->send_step(kAdapter, 1)).ok());
  const Outcome stale = backward(1);
  EXPECT_EQ(stale.error.code, ErrorCode::kStale);
  EXPECT_NE(stale.error.why.find("layer 2 ran in step 0, the job is at step 2"), std::string::npos)
      << stale.error.text();
  EXPECT_TRUE(backward(2).ok());
}

TEST_F(Activations, BeyondTheLimitKeepOnlyTheInputAndBackwardGivesTheSameBits) {
  EngineOptions options = Host::default_options();
  start(options);  // Only for the sizes.
  const std::uint64_t input = coproc::activation_input_bytes(host_->dims(), kTokens, false);
  const std::uint64_t gate_up = coproc::activation_gate_up_bytes(host_->dims(), kTokens);
  options.activation_bytes_max = 3 * input + gate_up;  // One whole activation and two inputs.
  start(options);
  coproc::SavedActivation kept;
  const Bytes y = oracle_->forward(2, true, tokens(), &kept);
  const auto expected = oracle_->backward({&kept}, {dy()}, true);
  EXPECT_EQ(forward(1).rows, y);
  EXPECT_EQ(forward(2).rows, y);
  EXPECT_EQ(forward(3).rows, y);
  EXPECT_EQ(live_bytes(), options.activation_bytes_max);
  const Outcome refused = forward(4);
  EXPECT_EQ(refused.error.code, ErrorCode::kActivationLimit);
  for (const std::string& number : {std::to_string(input), std::to_string(options.activation_bytes_max),
                                    std::string("layer 2"), std::string("step 0")}) {
    EXPECT_NE((refused.error.what + refused.error.why).find(number), std::string::npos) << refused.error.text();
  }
  EXPECT_EQ(forward(0).rows, y);  // Evaluation needs no room.
  const Outcome recomputed = backward(3);
  EXPECT_EQ(recomputed.rows, expected[0].dx);
  EXPECT_EQ(recomputed.extra, expected[0].dw);
  EXPECT_EQ(read_tensor(*rank_, *oracle_, TensorKind::kGrad, 2, AdapterTensor::kUpA),
            oracle_->read(TensorKind::kGrad, 2, AdapterTensor::kUpA));
  EXPECT_TRUE(forward(4).ok());  // There is room again.
}

TEST(ActivationBudget, IsSharedEquallyAndGateAndUpGiveWayFirst) {
  using coproc::Keep;
  coproc::ActivationBudget budget{1000, 2, 0, 0};
  EXPECT_EQ(budget.share_bytes(), 500u);
  EXPECT_EQ(budget.decide(100, 400), Keep::kAll);
  EXPECT_EQ(budget.decide(100, 401), Keep::kInputOnly);
  EXPECT_EQ(budget.decide(501, 0), Keep::kRefused);
  budget.job_bytes = 450;
  EXPECT_EQ(budget.decide(50, 1), Keep::kInputOnly);
  EXPECT_EQ(budget.decide(51, 0), Keep::kRefused);
  // Another job still holds all memory from a time when it was alone: this one gets its inputs, no more.
  budget = {1000, 2, 0, 1000};
  EXPECT_EQ(budget.decide(100, 1), Keep::kInputOnly);
  EXPECT_EQ(budget.decide(UINT64_MAX, UINT64_MAX), Keep::kRefused);
}

}  // namespace
}  // namespace kt::test
