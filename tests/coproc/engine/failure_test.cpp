// The job as the unit of failure: disagreement, timeout, the death of a member in each phase, READ afterwards, and a
// second job beside it that notices nothing.
#include <functional>

#include "tests/coproc/engine/engine_fixture.h"

namespace kt::test {
namespace {

using shm::Verb;

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

struct Difference {
  const char* name;
  std::function<Ticket(Rank&)> lowest;
  std::function<Ticket(Rank&)> other;
  const char* why;  // Part of it.
};
void PrintTo(const Difference& difference, std::ostream* out) { *out << difference.name; }

Ticket step_with(Rank& rank, const std::function<void(StepArgs&)>& change) {
  StepArgs args;
  change(args);
  return rank.send_step(kAdapter, 0, args);
}
std::function<Ticket(Rank&)> step_of(std::function<void(StepArgs&)> change) {
  return [change = std::move(change)](Rank& rank) { return step_with(rank, change); };
}
std::function<Ticket(Rank&)> mask_of(std::uint8_t value, bool norm) {
  return [value, norm](Rank& rank) {
    StepArgs args;
    args.group_of.assign(4 * shm::kNumAdapterTensors, 0);
    args.group_of[2 * shm::kNumAdapterTensors + 3] = value;
    return norm ? rank.send_norm(kAdapter, args.group_of) : rank.send_step(kAdapter, 0, args);
  };
}
Ticket plain_step(Rank& rank) { return rank.send_step(kAdapter, 0); }

class Disagreement : public ::testing::TestWithParam<Difference> {};

TEST_P(Disagreement, FailsTheJobNamesRanksFieldAndValuesAndAppliesNothing) {
  Host host;
  Oracle oracle(host);
  oracle.fill(7);
  auto ranks = host.open_job(3, "job");
  ASSERT_TRUE(ranks[0]->finish(ranks[0]->send_forward(1, kAdapter, 3, random_tokens(host.shape(), 4, 1))).ok());
  ASSERT_TRUE(
      ranks[0]->finish(ranks[0]->send_backward(3, random_elements(host.shape(), 4 * 64, 2), shm::kAccumulate)).ok());
  const std::vector<Ticket> tickets = {GetParam().lowest(*ranks[0]), GetParam().lowest(*ranks[1]),
                                       GetParam().other(*ranks[2])};
  for (std::size_t i = 0; i < 3; ++i) {
    const Outcome outcome = ranks[i]->finish(tickets[i]);
    EXPECT_EQ(outcome.error.code, ErrorCode::kDisagreement);
    EXPECT_TRUE(contains(outcome.error.why, GetParam().why)) << outcome.error.text();
    EXPECT_TRUE(contains(outcome.error.what, "job 'job'")) << outcome.error.text();
  }
  const Outcome later = ranks[1]->finish(ranks[1]->send_forward(1, kAdapter, 0, random_tokens(host.shape(), 1, 1)));
  EXPECT_EQ(later.error.code, ErrorCode::kDisagreement);
  expect_same_adapter(*ranks[2], oracle, {TensorKind::kParam, TensorKind::kT});
}

INSTANTIATE_TEST_SUITE_P(
    Fields, Disagreement,
    ::testing::Values(
        Difference{"verb", plain_step, [](Rank& rank) { return rank.send_norm(kAdapter); },
                   "rank 0 asks for STEP, rank 2 for NORM"},
        Difference{"step", plain_step, [](Rank& rank) { return rank.send_step(kAdapter, 4); },
                   "rank 0 asks for STEP at step 0, rank 2 for STEP at step 4"},
        Difference{"adapter", plain_step, [](Rank& rank) { return rank.send_step(2, 0); },
                   "rank 0 asks for STEP of adapter 1, rank 2 for STEP of adapter 2"},
        Difference{"num_groups", plain_step, step_of([](StepArgs& args) { args.groups.push_back(args.groups[0]); }),
                   "rank 0 asks for STEP with 1 groups, rank 2 for STEP with 2 groups"},
        Difference{"lr", plain_step, step_of([](StepArgs& args) { args.groups[0].lr = 0.002; }),
                   "rank 0 asks for STEP with lr 0.001 in group 0, rank 2 for STEP with lr 0.002 in group 0"},
        Difference{"beta1", plain_step, step_of([](StepArgs& args) { args.groups[0].beta1 = 0.5; }),
                   "STEP with beta1 0.9 in group 0, rank 2 for STEP with beta1 0.5"},
        Difference{"beta2", plain_step, step_of([](StepArgs& args) { args.groups[0].beta2 = 0.5; }),
                   "STEP with beta2 0.999 in group 0, rank 2 for STEP with beta2 0.5"},
        Difference{"eps", plain_step, step_of([](StepArgs& args) { args.groups[0].eps = 0.5; }),
                   "STEP with eps 1e-08 in group 0, rank 2 for STEP with eps 0.5"},
        Difference{"weight_decay", plain_step, step_of([](StepArgs& args) { args.groups[0].weight_decay = 0.5; }),
                   "STEP with weight_decay 0.01 in group 0, rank 2 for STEP with weight_decay 0.5"},
        Difference{"decoupled", plain_step, step_of([](StepArgs& args) { args.groups[0].decoupled = 0; }),
                   "STEP with decoupled 1 in group 0, rank 2 for STEP with decoupled 0"},
        Difference{"group_of", mask_of(0, false), mask_of(shm::kFrozen, false),
                   "STEP with up_b of layer 2 in group 0, rank 2 for STEP with up_b of layer 2 frozen"},
        Difference{"norm_mask", mask_of(3, true), mask_of(shm::kFrozen, true),
                   "NORM with up_b of layer 2 counted, rank 2 for NORM with up_b of layer 2 frozen"},
        Difference{"scale", step_of([](StepArgs& args) { args.scale = 1; }),
                   step_of([](StepArgs& args) { args.scale = 1.0001; }),
                   "rank 0 asks for STEP with scale 1, rank 2 for STEP with scale 1.0001"},
        Difference{"of_all_with_the_job", [](Rank& rank) { return rank.send_step(kAdapter, 2); },
                   [](Rank& rank) { return rank.send_step(kAdapter, 2); },
                   "every rank asks for STEP at step 2, but the job has completed 0 STEPs"}),
    [](const auto& test) { return test.param.name; });

TEST(Agreement, TakesAnyGroupNumberInNormForCounted) {
  Host host;
  auto ranks = host.open_job(2, "job");
  const Ticket a = mask_of(0, true)(*ranks[0]);
  const Ticket b = mask_of(9, true)(*ranks[1]);
  EXPECT_TRUE(ranks[0]->finish(a).ok());
  EXPECT_TRUE(ranks[1]->finish(b).ok());
}

TEST(Agreement, OnAnUnknownAdapterIsAnErrorForAllAndTheJobLives) {
  Host host;
  auto ranks = host.open_job(2, "job");
  const Ticket a = ranks[0]->send_norm(8), b = ranks[1]->send_norm(8);
  EXPECT_EQ(ranks[0]->finish(a).error.code, ErrorCode::kNotFound);
  EXPECT_EQ(ranks[1]->finish(b).error.code, ErrorCode::kNotFound);
  const Ticket c = ranks[0]->send_barrier(0), d = ranks[1]->send_barrier(0);
  EXPECT_TRUE(ranks[0]->finish(c).ok());
  EXPECT_TRUE(ranks[1]->finish(d).ok());
}

TEST(Timeout, NamesTheMissingRankAndItsLastRequestAndFailsTheJob) {
  Host host;
  auto ranks = host.open_job(3, "job", 7, 0.2);
  ASSERT_TRUE(ranks[1]->finish(ranks[1]->send_forward(3, kAdapter, 5, random_tokens(host.shape(), 4, 1))).ok());
  const Ticket a = ranks[0]->send_step(kAdapter, 0), c = ranks[2]->send_step(kAdapter, 0);
  for (const auto& [rank, ticket] : {std::pair(0, a), std::pair(2, c)}) {
    const Outcome outcome = ranks[static_cast<std::size_t>(rank)]->finish(ticket);
    EXPECT_EQ(outcome.error.code, ErrorCode::kTimeout);
    EXPECT_TRUE(contains(outcome.error.what, "missing is rank 1 (pid 1002)")) << outcome.error.text();
    EXPECT_TRUE(contains(outcome.error.why, "rank 0 in STEP, rank 2 in STEP")) << outcome.error.text();
    EXPECT_TRUE(contains(outcome.error.why, "the last request of rank 1 was FORWARD of layer 3 in step 0"))
        << outcome.error.text();
  }
  // The late one is told the same instead of waiting.
  EXPECT_EQ(ranks[1]->finish(ranks[1]->send_step(kAdapter, 0)).error.code, ErrorCode::kTimeout);
}

// What the two ranks of the failing job do before the second one dies; returns the survivor's open request, if any.
struct Phase {
  const char* name;
  std::uint64_t last_step;  // Of the victim's last request.
  std::function<std::vector<Ticket>(Rank& survivor, Rank& victim)> act;
};
void PrintTo(const Phase& phase, std::ostream* out) { *out << phase.name; }

Ticket live_forward(Rank& rank) { return rank.send_forward(2, kAdapter, 77, random_tokens(rank.shape(), 4, 1)); }

class Death : public ::testing::TestWithParam<Phase> {};

TEST_P(Death, EndsTheJobWithRankDiedKeepsTheAdapterReadableAndSparesTheOtherJob) {
  Host host;
  Oracle oracle(host);
  oracle.fill(7);
  auto job = host.open_job(2, "failing");
  auto other = host.open_job(2, "healthy", 8);
  Oracle healthy(host);
  healthy.fill(8);
  // Both jobs make one step first: READ must show that one afterwards.
  const Tokens tokens = random_tokens(host.shape(), 6, 3);
  const Bytes dy = random_elements(host.shape(), 6 * 64, 4);
  for (auto* ranks : {&job, &other}) {
    Oracle& same = ranks == &job ? oracle : healthy;
    coproc::SavedActivation kept;
    EXPECT_EQ((*ranks)[0]->finish((*ranks)[0]->send_forward(2, kAdapter, 1, tokens)).rows,
              same.forward(2, true, tokens, &kept));
    EXPECT_EQ((*ranks)[0]->finish((*ranks)[0]->send_backward(1, dy, shm::kAccumulate)).rows,
              same.backward({&kept}, {dy}, true)[0].dx);
    const Ticket a = (*ranks)[0]->send_step(kAdapter, 0), b = (*ranks)[1]->send_step(kAdapter, 0);
    EXPECT_TRUE((*ranks)[0]->finish(a).ok());
    EXPECT_TRUE((*ranks)[1]->finish(b).ok());
    same.step({});
  }
  const std::vector<Ticket> open = GetParam().act(*job[0], *job[1]);
  host.rounds();
  for (const Ticket& ticket : open) EXPECT_FALSE(job[0]->is_done(ticket));
  host.end(*job[1], SessionEnd::kDied);

  for (const Ticket& ticket : open) {
    const Outcome outcome = job[0]->finish(ticket);
    EXPECT_EQ(outcome.error.code, ErrorCode::kRankDied);
    EXPECT_EQ(outcome.reply.rank, 1u);
    EXPECT_EQ(outcome.reply.step, GetParam().last_step);
  }
  const Outcome later = job[0]->finish(job[0]->send_forward(1, kAdapter, 0, tokens));
  EXPECT_EQ(later.error.code, ErrorCode::kRankDied);
  EXPECT_TRUE(contains(later.error.what, "rank 1 (pid 1002) of job 'failing' died")) << later.error.text();
  EXPECT_TRUE(contains(later.error.why, "in step " + std::to_string(GetParam().last_step))) << later.error.text();
  EXPECT_EQ(job[0]->finish(job[0]->send_backward(77, Bytes(4 * 64 * 2), 0)).error.code, ErrorCode::kRankDied);
  EXPECT_EQ(job[0]->finish(job[0]->send_write(kAdapter, TensorKind::kT, 1, AdapterTensor::kGateA, 1, {3})).error.code,
            ErrorCode::kRankDied);
  EXPECT_EQ(error_of(get(host.create(*job[0], 5))).empty(), false);
  EXPECT_TRUE(job[0]->finish(job[0]->send_release(77)).ok());
  expect_same_adapter(*job[0], oracle, {TensorKind::kParam, TensorKind::kGrad, TensorKind::kExpAvg, TensorKind::kT});

  // The other job, from the same state, does the same bits as ever.
  coproc::SavedActivation kept;
  EXPECT_EQ(other[1]->finish(other[1]->send_forward(2, kAdapter, 2, tokens)).rows,
            healthy.forward(2, true, tokens, &kept));
  EXPECT_EQ(other[1]->finish(other[1]->send_backward(2, dy, shm::kAccumulate)).rows,
            healthy.backward({&kept}, {dy}, true)[0].dx);
  const Ticket a = other[0]->send_step(kAdapter, 1), b = other[1]->send_step(kAdapter, 1);
  EXPECT_TRUE(other[0]->finish(a).ok());
  EXPECT_TRUE(other[1]->finish(b).ok());
  healthy.step({});
  expect_same_adapter(*other[0], healthy, {TensorKind::kParam, TensorKind::kExpAvgSq});
  EXPECT_EQ(host.page().bytes_activations.load(), 0u);
}

INSTANTIATE_TEST_SUITE_P(
    Phases, Death,
    ::testing::Values(Phase{"idle", 0, [](Rank&, Rank&) { return std::vector<Ticket>{}; }},
                      Phase{"with_forwards_live", 1,
                            [](Rank& survivor, Rank& victim) {
                              EXPECT_TRUE(survivor.finish(live_forward(survivor)).ok());
                              EXPECT_TRUE(victim.finish(live_forward(victim)).ok());
                              return std::vector<Ticket>{};
                            }},
                      Phase{"with_gradients_summed", 1,
                            [](Rank& survivor, Rank& victim) {
                              EXPECT_TRUE(victim.finish(live_forward(victim)).ok());
                              const Bytes dy = random_elements(victim.shape(), 4 * 64, 9);
                              EXPECT_TRUE(victim.finish(victim.send_backward(77, dy, shm::kAccumulate)).ok());
                              static_cast<void>(survivor);
                              return std::vector<Ticket>{};
                            }},
                      Phase{"survivor_in_norm", 0,
                            [](Rank& survivor, Rank&) { return std::vector<Ticket>{survivor.send_norm(kAdapter)}; }},
                      Phase{"survivor_in_step_with_more_behind", 0,
                            [](Rank& survivor, Rank&) {
                              const Ticket step = survivor.send_step(kAdapter, 1);
                              return std::vector<Ticket>{step, live_forward(survivor)};
                            }},
                      Phase{"victim_in_step", 1,
                            [](Rank&, Rank& victim) {
                              victim.send_step(kAdapter, 1);
                              return std::vector<Ticket>{};
                            }},
                      Phase{"between_norm_and_step", 1,
                            [](Rank& survivor, Rank& victim) {
                              const Ticket a = survivor.send_norm(kAdapter), b = victim.send_norm(kAdapter);
                              EXPECT_TRUE(survivor.finish(a).ok());
                              EXPECT_TRUE(victim.finish(b).ok());
                              return std::vector<Ticket>{survivor.send_step(kAdapter, 1)};
                            }}),
    [](const auto& test) { return test.param.name; });

TEST(Bye, LeavesForwardsOfTheOthersRunningAndAnswersTheirCollectives) {
  Host host;
  auto ranks = host.open_job(2, "job");
  const Ticket waiting = ranks[0]->send_norm(kAdapter);
  host.rounds();
  host.end(*ranks[1], SessionEnd::kBye);
  const Outcome outcome = ranks[0]->finish(waiting);
  EXPECT_EQ(outcome.error.code, ErrorCode::kRankDied);
  EXPECT_EQ(outcome.reply.rank, 1u);
  EXPECT_TRUE(contains(outcome.error.what, "rank 1 (pid 1002) of job 'job' has left")) << outcome.error.text();
  EXPECT_TRUE(ranks[0]->finish(ranks[0]->send_forward(1, kAdapter, 4, random_tokens(host.shape(), 2, 1))).ok());
  EXPECT_TRUE(ranks[0]->finish(ranks[0]->send_backward(4, Bytes(2 * 64 * 2), shm::kAccumulate)).ok());
  EXPECT_EQ(ranks[0]->finish(ranks[0]->send_step(kAdapter, 0)).error.code, ErrorCode::kRankDied);
  ErrorCode code{};
  EXPECT_TRUE(contains(error_of(get(host.create(*ranks[0], 2)), &code), "has left"));
  EXPECT_EQ(code, ErrorCode::kRankDied);
}

}  // namespace
}  // namespace kt::test
