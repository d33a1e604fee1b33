#include "coproc/engine/agreement.h"

#include <gtest/gtest.h>

#include <limits>

namespace kt::test {
namespace {

using coproc::Offer;
using coproc::Pending;
using coproc::RankedRequest;

std::string why(const std::optional<coproc::Disagreement>& disagreement) {
  return disagreement ? disagreement->field + ": " + disagreement->why : "";
}

Pending step(double scale = 1, double lr = 1e-3, std::vector<std::uint8_t> group_of = {0, shm::kFrozen}) {
  Pending pending;
  pending.request.verb = shm::Verb::kStep;
  pending.header = std::make_unique<shm::StepHeader>();
  pending.header->scale = scale;
  pending.header->num_groups = 1;
  pending.header->groups[0] = {lr, 0.9, 0.999, 1e-8, 0.01, 1};
  pending.group_of = std::move(group_of);
  return pending;
}

Pending plain(shm::Verb verb, std::vector<std::uint8_t> group_of = {}) {
  Pending pending;
  pending.request.verb = verb;
  pending.group_of = std::move(group_of);
  return pending;
}

std::string between(const Pending& lowest, const Pending& other) {
  const RankedRequest requests[] = {{2, &lowest, lowest.request.adapter_id, 0},
                                    {5, &other, other.request.adapter_id, 0}};
  return why(ring_disagreement(requests));
}

TEST(Agreement, IsReachedByEqualRequests) {
  EXPECT_EQ(between(step(), step()), "");
  EXPECT_EQ(between(plain(shm::Verb::kBarrier), plain(shm::Verb::kBarrier)), "");
  const double nan = std::numeric_limits<double>::quiet_NaN();
  EXPECT_EQ(between(step(1, nan), step(1, nan)), "");
}

TEST(Agreement, NamesTheFirstFieldThatDiffersAndBothValues) {
  EXPECT_EQ(between(plain(shm::Verb::kNorm), plain(shm::Verb::kDiscard)),
            "the verb: rank 2 asks for NORM, rank 5 for DISCARD");
  EXPECT_EQ(between(step(1, 1e-3), step(7, 2e-3)),
            "lr in group 0: rank 2 asks for STEP with lr 0.001 in group 0, rank 5 for STEP with lr 0.002 in group 0");
  EXPECT_EQ(between(step(1, 1e-3, {0, 0}), step(1, 1e-3, {0, shm::kFrozen})),
            "the group of gate_b of layer 0: rank 2 asks for STEP with gate_b of layer 0 in group 0, rank 5 for STEP "
            "with gate_b of layer 0 frozen");
  Pending other = plain(shm::Verb::kDiscard);
  other.request.adapter_id = 3;
  EXPECT_EQ(between(plain(shm::Verb::kDiscard), other),
            "the adapter: rank 2 asks for DISCARD of adapter 0, rank 5 for DISCARD of adapter 3");
  Pending later = step();
  later.request.step = 4;
  EXPECT_EQ(between(step(), later), "the step: rank 2 asks for STEP at step 0, rank 5 for STEP at step 4");
}

TEST(Agreement, AllowsScalesThatDifferByRounding) {
  EXPECT_EQ(between(step(1), step(1 + 0.9 * coproc::kScaleTolerance)), "");
  EXPECT_EQ(between(step(1), step(1.5)), "scale: rank 2 asks for STEP with scale 1, rank 5 for STEP with scale 1.5");
}

TEST(Agreement, OnlyAsksOfANormWhetherATensorCounts) {
  EXPECT_EQ(between(plain(shm::Verb::kNorm, {0, 4}), plain(shm::Verb::kNorm, {9, 1})), "");
  EXPECT_EQ(between(plain(shm::Verb::kNorm, {0}), plain(shm::Verb::kNorm, {shm::kFrozen})),
            "the group of gate_a of layer 0: rank 2 asks for NORM with gate_a of layer 0 counted, rank 5 for NORM with "
            "gate_a of layer 0 frozen");
}

TEST(Agreement, NamesSixOfThoseWhoDifferAndCountsTheRest) {
  std::vector<Offer> offers = {{0, {{"colour", "red"}}}};
  for (std::uint32_t rank = 1; rank <= 9; ++rank) offers.push_back({rank, {{"colour", "blue"}}});
  const std::string text = why(first_disagreement(offers));
  EXPECT_NE(text.find("rank 6 for blue, and 3 more ranks differ"), std::string::npos) << text;
  EXPECT_EQ(text.find("rank 7"), std::string::npos) << text;
}

TEST(Agreement, OfCommandsComparesEveryValue) {
  const coproc::AdapterCommand one = coproc::CreateAdapter{1, {0, 1}, {{4, 0.5}, false, {3, 2}}};
  const auto between = [&](const coproc::AdapterCommand& other) {
    const coproc::RankedCommand commands[] = {{0, &one}, {1, &other}};
    return why(command_disagreement(commands));
  };
  EXPECT_EQ(between(one), "");
  EXPECT_EQ(between(coproc::DeleteAdapter{1}),
            "the command: rank 0 asks for adapter_create, rank 1 for adapter_delete");
  EXPECT_EQ(between(coproc::CreateAdapter{1, {0, 2}, {{4, 0.5}, false, {3, 2}}}),
            "the layers: rank 0 asks for adapter_create for layers 0,1, rank 1 for adapter_create for layers 0,2");
  EXPECT_EQ(between(coproc::CreateAdapter{1, {0, 1}, {{4, 0.5}, true, {3, 2}}}),
            "shared_a: rank 0 asks for adapter_create without shared_a, rank 1 for adapter_create with shared_a");
}

}  // namespace
}  // namespace kt::test
