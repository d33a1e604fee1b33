#include "coproc/engine/fair_share.h"

#include <gtest/gtest.h>

namespace kt::test {
namespace {

using coproc::CostEstimate;
using coproc::FairShare;

TEST(FairShares, GiveJobsEqualNanosecondsNotEqualTurns) {
  FairShare shares;
  const FairShare::Claim claims[] = {{3, 400}, {5, 100}, {9, 200}};
  std::size_t turns[3] = {};
  for (int i = 0; i < 700; ++i) ++turns[shares.pick(claims)];
  EXPECT_EQ(turns[0], 100u);
  EXPECT_EQ(turns[1], 400u);
  EXPECT_EQ(turns[2], 200u);
}

TEST(FairShares, ServeEveryoneWithinARoundAndForgetTheIdle) {
  FairShare shares;
  const FairShare::Claim only[] = {{4, 50}};
  for (int i = 0; i < 1000; ++i) EXPECT_EQ(shares.pick(only), 0u);
  // A newcomer is served within a round, however long the other was alone.
  const FairShare::Claim both[] = {{4, 50}, {8, 5000}};
  std::size_t waited = 0;
  while (shares.pick(both) != 1) ++waited;
  EXPECT_LE(waited, 100u);
  // What a job saved is gone once it had nothing to run.
  const FairShare::Claim small[] = {{4, 50}, {8, 1}};
  EXPECT_EQ(shares.pick(only), 0u);
  std::size_t turns[2] = {};
  for (int i = 0; i < 51 * 10; ++i) ++turns[shares.pick(small)];
  EXPECT_NEAR(static_cast<double>(turns[0]), 10, 1);
}

TEST(CostEstimates, FollowWhatBatchesTook) {
  CostEstimate cost;
  EXPECT_EQ(cost.batch_ns(0), 1u);
  for (int i = 0; i < 100; ++i) cost.observe(10, 50'000);
  EXPECT_NEAR(static_cast<double>(cost.batch_ns(7)), 7 * 5000.0, 100);
  cost.observe(0, 1'000'000'000);  // A batch without tokens says nothing.
  EXPECT_NEAR(static_cast<double>(cost.batch_ns(7)), 7 * 5000.0, 100);
}

}  // namespace
}  // namespace kt::test
