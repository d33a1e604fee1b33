// A training step, event by event, for one rank and for several: every y, dx and dw must be bit-equal to a direct call
// of the experts, and the adapter to one that was stepped directly.
#include <algorithm>

#include "coproc/experts/adapter_layer.h"
#include "tests/coproc/engine/engine_fixture.h"

namespace kt::test {
namespace {

constexpr std::uint8_t kAccumulate = shm::kAccumulate;

struct MicroBatch {
  std::map<std::uint32_t, coproc::SavedActivation> kept;  // By layer.
};

// Forward through all layers, checked against the oracle. act_id = first_act + layer.
MicroBatch forward_all(Rank& rank, Oracle& oracle, const Tokens& tokens, std::uint64_t first_act) {
  MicroBatch micro_batch;
  for (const std::uint32_t layer : kMoeLayers) {
    const Outcome outcome = rank.finish(rank.send_forward(layer, kAdapter, first_act + layer, tokens));
    EXPECT_TRUE(outcome.ok()) << outcome.error.text();
    EXPECT_EQ(outcome.rows, oracle.forward(layer, true, tokens, &micro_batch.kept[layer])) << "layer " << layer;
  }
  return micro_batch;
}

void backward_all(Rank& rank, Oracle& oracle, const MicroBatch& micro_batch, const Bytes& dy, std::uint64_t first_act) {
  for (auto layer = kMoeLayers.rbegin(); layer != kMoeLayers.rend(); ++layer) {
    const Outcome outcome = rank.finish(rank.send_backward(first_act + *layer, dy, kAccumulate));
    EXPECT_TRUE(outcome.ok()) << outcome.error.text();
    const auto expected = oracle.backward({&micro_batch.kept.at(*layer)}, {dy}, true);
    EXPECT_EQ(outcome.rows, expected[0].dx) << "layer " << *layer;
    EXPECT_EQ(outcome.extra, expected[0].dw) << "layer " << *layer;
  }
}

class Step : public ::testing::TestWithParam<std::uint32_t> {};
INSTANTIATE_TEST_SUITE_P(ElementBytes, Step, ::testing::Values(2u, 4u));

TEST_P(Step, OfOneRankEqualsDirectCallsBitForBit) {
  Host host(GetParam());
  Oracle oracle(host);
  auto rank = host.open();
  ASSERT_EQ(error_of(get(host.create(*rank))), "");
  Oracle::fill(*rank, host, 7);
  oracle.fill(7);
  for (std::uint64_t step = 0; step < 3; ++step) {
    for (std::uint32_t micro = 0; micro < 2; ++micro) {
      const auto seed = static_cast<std::uint32_t>(10 * step + micro);
      const Tokens tokens = random_tokens(host.shape(), 5 + 8 * micro, seed);
      const Bytes dy = random_elements(host.shape(), tokens.num_tokens * std::size_t{64}, 100 + seed);
      const MicroBatch micro_batch = forward_all(*rank, oracle, tokens, 100 * micro);
      backward_all(*rank, oracle, micro_batch, dy, 100 * micro);
    }
    const Outcome norm = rank->finish(rank->send_norm(kAdapter));
    EXPECT_EQ(norm.reply.value, oracle.squared_norm());
    EXPECT_GT(norm.reply.value, 0);
    StepArgs args;
    args.scale = 0.25;
    const Outcome stepped = rank->finish(rank->send_step(kAdapter, step, args));
    ASSERT_TRUE(stepped.ok()) << stepped.error.text();
    EXPECT_EQ(stepped.reply.step, step + 1);
    oracle.step(args);
    expect_same_adapter(
        *rank, oracle,
        {TensorKind::kParam, TensorKind::kGrad, TensorKind::kExpAvg, TensorKind::kExpAvgSq, TensorKind::kT});
  }
}

class JoinedStep : public ::testing::TestWithParam<std::uint32_t> {};
INSTANTIATE_TEST_SUITE_P(Ranks, JoinedStep, ::testing::Values(2u, 4u));

TEST_P(JoinedStep, GivesEveryRankTheSameAdapterAlsoWithUnequalTokensAndARankWithNone) {
  Host host;
  Oracle oracle(host);
  oracle.fill(7);
  auto ranks = host.open_job(GetParam(), "job");
  for (std::uint64_t step = 0; step < 2; ++step) {
    for (std::uint32_t i = 0; i < ranks.size(); ++i) {
      const Tokens tokens = random_tokens(host.shape(), i == 1 ? 0 : 4 + 5 * i, i);
      const Bytes dy = random_elements(host.shape(), tokens.num_tokens * std::size_t{64}, 100 + i);
      const MicroBatch micro_batch = forward_all(*ranks[i], oracle, tokens, 0);
      backward_all(*ranks[i], oracle, micro_batch, dy, 0);
    }
    std::vector<Ticket> norms, steps;
    for (auto& rank : ranks) norms.push_back(rank->send_norm(kAdapter));
    for (std::size_t i = 0; i < ranks.size(); ++i) {
      EXPECT_EQ(ranks[i]->finish(norms[i]).reply.value, oracle.squared_norm());
    }
    StepArgs args;
    for (std::size_t i = 0; i < ranks.size(); ++i) {
      args.scale = 0.5 * (1 + 1e-7 * static_cast<double>(i));  // Within the tolerance: the lowest rank's is used.
      steps.push_back(ranks[i]->send_step(kAdapter, step, args));
    }
    for (std::size_t i = 0; i < ranks.size(); ++i) EXPECT_TRUE(ranks[i]->finish(steps[i]).ok());
    args.scale = 0.5;
    oracle.step(args);
    for (auto& rank : ranks) expect_same_adapter(*rank, oracle, {TensorKind::kParam, TensorKind::kExpAvg});
  }
  host.rounds();
  EXPECT_EQ(host.page().totals.steps.load(), 2u);  // Once per collective, not per rank.
}

TEST(Batches, FuseRanksWithoutChangingOneBitAndAddEveryContributionOnce) {
  Host host;
  Oracle oracle(host);
  oracle.fill(7);
  auto ranks = host.open_job(4, "job");
  std::vector<Ticket> tickets;
  std::vector<coproc::SavedActivation> kept(4);
  std::vector<Bytes> dy;
  {
    const Host::Pause pause(host);
    for (std::uint32_t i = 0; i < 4; ++i) {
      tickets.push_back(ranks[i]->send_forward(2, kAdapter, 9, random_tokens(host.shape(), 3 + i, i)));
    }
  }
  for (std::uint32_t i = 0; i < 4; ++i) {
    const Outcome outcome = ranks[i]->finish(tickets[i]);
    EXPECT_EQ(outcome.rows, oracle.forward(2, true, random_tokens(host.shape(), 3 + i, i), &kept[i])) << "rank " << i;
    dy.push_back(random_elements(host.shape(), (3 + i) * std::size_t{64}, 50 + i));
  }
  EXPECT_EQ(host.page().totals.batches.load(), 1u);
  tickets.clear();
  {
    const Host::Pause pause(host);
    for (std::uint32_t i = 4; i-- > 0;) {  // The order of arrival does not matter: a batch is in rank order.
      tickets.insert(tickets.begin(), ranks[i]->send_backward(9, dy[i], kAccumulate));
    }
  }
  const auto expected = oracle.backward({&kept[0], &kept[1], &kept[2], &kept[3]}, dy, true);
  for (std::size_t i = 0; i < 4; ++i) {
    const Outcome outcome = ranks[i]->finish(tickets[i]);
    EXPECT_EQ(outcome.rows, expected[i].dx);
    EXPECT_EQ(outcome.extra, expected[i].dw);
  }
  EXPECT_EQ(host.page().totals.batches.load(), 2u);
  expect_same_adapter(*ranks[3], oracle, {TensorKind::kGrad});
}

TEST(Batches, StayWithinBatchTokensMaxAndALargerRequestRunsAlone) {
  EngineOptions options = Host::default_options();
  options.batch_tokens_max = 10;
  Host host(2, options);
  auto ranks = host.open_job(4, "job");
  std::vector<Ticket> tickets;
  {
    const Host::Pause pause(host);
    const std::uint32_t num_tokens[] = {12, 6, 6, 4};  // Batches: {rank 0}, {rank 1, rank 3}, {rank 2}.
    for (std::uint32_t i = 0; i < 4; ++i) {
      tickets.push_back(ranks[i]->send_forward(1, kAdapter, 0, random_tokens(host.shape(), num_tokens[i], i)));
    }
  }
  for (std::size_t i = 0; i < 4; ++i) EXPECT_TRUE(ranks[i]->finish(tickets[i]).ok());
  EXPECT_EQ(host.page().totals.batches.load(), 3u);
}

TEST(Collectives, HoldAFastRankUntilTheOthersArriveAndItsNextForwardSeesTheNewParameters) {
  Host host;
  Oracle oracle(host);
  oracle.fill(7);
  auto ranks = host.open_job(2, "job");
  const Tokens tokens = random_tokens(host.shape(), 6, 1);
  const Bytes dy = random_elements(host.shape(), 6 * 64, 2);
  const MicroBatch fast = forward_all(*ranks[0], oracle, tokens, 0);
  const MicroBatch slow = forward_all(*ranks[1], oracle, tokens, 0);
  backward_all(*ranks[0], oracle, fast, dy, 0);
  const Ticket norm = ranks[0]->send_norm(kAdapter);
  const Ticket step = ranks[0]->send_step(kAdapter, 0);
  const Ticket ahead = ranks[0]->send_forward(1, kAdapter, 0, tokens);
  host.rounds();
  EXPECT_FALSE(ranks[0]->is_done(norm));
  backward_all(*ranks[1], oracle, slow, dy, 0);
  const Outcome slow_norm = ranks[1]->finish(ranks[1]->send_norm(kAdapter));
  EXPECT_EQ(ranks[0]->finish(norm).reply.value, slow_norm.reply.value);
  EXPECT_EQ(slow_norm.reply.value, oracle.squared_norm());  // All of the slow rank's gradients are in it.
  host.rounds();
  EXPECT_FALSE(ranks[0]->is_done(step));
  EXPECT_FALSE(ranks[0]->is_done(ahead));
  const Ticket slow_step = ranks[1]->send_step(kAdapter, 0);
  EXPECT_TRUE(ranks[1]->finish(slow_step).ok());
  EXPECT_TRUE(ranks[0]->finish(step).ok());
  oracle.step({});
  EXPECT_EQ(ranks[0]->finish(ahead).rows, oracle.forward(1, true, tokens));
}

TEST(Collectives, DiscardDropsGradientsAndAStepThenLeavesEverythingAlone) {
  Host host;
  Oracle oracle(host);
  oracle.fill(7);
  auto ranks = host.open_job(2, "job");
  const Tokens tokens = random_tokens(host.shape(), 6, 1);
  const Bytes dy = random_elements(host.shape(), 6 * 64, 2);
  Oracle scratch(host);
  scratch.fill(7);
  const MicroBatch micro_batch = forward_all(*ranks[0], scratch, tokens, 0);
  backward_all(*ranks[0], scratch, micro_batch, dy, 0);
  std::vector<Ticket> tickets;
  for (auto& rank : ranks) tickets.push_back(rank->send_discard(kAdapter));
  for (auto& rank : ranks) tickets.push_back(rank->send_norm(kAdapter));
  for (auto& rank : ranks) tickets.push_back(rank->send_step(kAdapter, 0));  // Weight decay would show.
  for (std::size_t i = 0; i < tickets.size(); ++i) {
    const Outcome outcome = ranks[i % 2]->finish(tickets[i]);
    EXPECT_TRUE(outcome.ok()) << outcome.error.text();
    EXPECT_EQ(outcome.reply.value, 0);
  }
  expect_same_adapter(*ranks[1], oracle, {TensorKind::kParam, TensorKind::kGrad, TensorKind::kT});
}

TEST(Collectives, StepMovesOnlyTheLayersThatRanAndTheTensorsWithAGroup) {
  Host host;
  Oracle oracle(host);
  oracle.fill(7);
  auto rank = host.open();
  ASSERT_EQ(error_of(get(host.create(*rank))), "");
  Oracle::fill(*rank, host, 7);
  // Layer 2 runs with no token at all: its gradient is zero, not missing, so weight decay and t move.
  ASSERT_TRUE(rank->finish(rank->send_forward(2, kAdapter, 5, random_tokens(host.shape(), 0, 0))).ok());
  ASSERT_TRUE(rank->finish(rank->send_backward(5, {}, kAccumulate)).ok());
  oracle.adapter().layer(2)->touched = true;
  StepArgs args;
  args.groups.push_back({5e-3, 0.8, 0.99, 1e-6, 0.5, 1});
  args.group_of.assign(4 * shm::kNumAdapterTensors, 1);
  args.group_of[2 * shm::kNumAdapterTensors + 5] = shm::kFrozen;  // down_b
  ASSERT_TRUE(rank->finish(rank->send_step(kAdapter, 0, args)).ok());
  oracle.step(args);
  expect_same_adapter(*rank, oracle, {TensorKind::kParam, TensorKind::kT});
  EXPECT_EQ(read_tensor(*rank, oracle, TensorKind::kT, 2, AdapterTensor::kGateA)[0], 1);
  EXPECT_EQ(read_tensor(*rank, oracle, TensorKind::kT, 2, AdapterTensor::kDownB)[0], 0);
  EXPECT_EQ(read_tensor(*rank, oracle, TensorKind::kT, 1, AdapterTensor::kGateA)[0], 0);
}

TEST(Deterministic, ModeAddsContributionsInRankOrderWhateverTheOrderOfArrival) {
  EngineOptions options = Host::default_options();
  options.deterministic = true;
  options.batch_tokens_max = 8;  // Two batches of the four ranks.
  Host host(2, options);
  auto ranks = host.open_job(4, "job");
  const std::vector<std::vector<std::size_t>> orders = {{0, 1, 2, 3}, {3, 2, 1, 0}, {2, 0, 3, 1}};
  std::vector<std::vector<float>> sums;
  Oracle oracle(host);
  for (const auto& order : orders) {
    std::vector<Ticket> tickets(4);
    for (std::uint32_t i = 0; i < 4; ++i) {
      ASSERT_TRUE(ranks[i]->finish(ranks[i]->send_forward(2, kAdapter, 9, random_tokens(host.shape(), 4, i))).ok());
    }
    for (const std::size_t i : order) {
      EXPECT_FALSE(tickets[i].sequence != 0);
      tickets[i] = ranks[i]->send_backward(9, random_elements(host.shape(), 4 * 64, static_cast<std::uint32_t>(50 + i)),
                                           kAccumulate);
      if (i != order.back()) {
        host.rounds(1);
        EXPECT_FALSE(ranks[i]->is_done(tickets[i]));
      }
    }
    for (std::size_t i = 0; i < 4; ++i) EXPECT_TRUE(ranks[i]->finish(tickets[i]).ok());
    sums.push_back(read_tensor(*ranks[0], oracle, TensorKind::kGrad, 2, AdapterTensor::kGateA));
    tickets.clear();
    for (auto& rank : ranks) tickets.push_back(rank->send_discard(kAdapter));
    for (std::size_t i = 0; i < 4; ++i) EXPECT_TRUE(ranks[i]->finish(tickets[i]).ok());
  }
  EXPECT_NE(sums[0], std::vector<float>(sums[0].size(), 0.0f));
  EXPECT_EQ(sums[0], sums[1]);
  EXPECT_EQ(sums[0], sums[2]);
}

TEST(Deterministic, ModeEndsInDisagreementWhenRanksRunDifferentLayers) {
  EngineOptions options = Host::default_options();
  options.deterministic = true;
  Host host(2, options);
  auto ranks = host.open_job(2, "job");
  std::vector<Ticket> tickets;
  for (std::uint32_t i = 0; i < 2; ++i) {
    ASSERT_TRUE(ranks[i]->finish(ranks[i]->send_forward(1 + i, kAdapter, 9, random_tokens(host.shape(), 4, i))).ok());
  }
  for (auto& rank : ranks)
    tickets.push_back(rank->send_backward(9, random_elements(host.shape(), 4 * 64, 1), kAccumulate));
  for (std::size_t i = 0; i < 2; ++i) {
    const Outcome outcome = ranks[i]->finish(tickets[i]);
    EXPECT_EQ(outcome.error.code, ErrorCode::kDisagreement);
    EXPECT_NE(outcome.error.why.find("rank 0 asks for BACKWARD of layer 1, rank 1 for BACKWARD of layer 2"),
              std::string::npos)
        << outcome.error.text();
  }
}

}  // namespace
}  // namespace kt::test
