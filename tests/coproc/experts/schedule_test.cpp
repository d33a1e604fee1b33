#include "coproc/experts/schedule.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <iostream>
#include <random>
#include <set>

namespace kt::test {
namespace {

using coproc::ExpertPlan;
using coproc::Routes;
using coproc::RoutesOfItem;

// Routes with so many rows for each expert.
Routes routes_of(const std::vector<int>& num_rows, std::int64_t num_nodes = 1) {
  std::vector<std::int32_t> ids;
  for (std::size_t e = 0; e < num_rows.size(); ++e) {
    ids.insert(ids.end(), static_cast<std::size_t>(num_rows[e]), static_cast<std::int32_t>(e));
  }
  const std::vector<float> weights(ids.size(), 1.0f);
  const RoutesOfItem item{ids.data(), weights.data(), static_cast<std::uint32_t>(ids.size())};
  Routes routes;
  routes.group({&item, 1}, static_cast<std::int64_t>(num_rows.size()), 1, num_nodes);
  return routes;
}

ExpertPlan plan_of(const Routes& routes, int num_workers, std::int64_t node = 0, std::int64_t num_nodes = 1) {
  ExpertPlan plan;
  coproc::plan_experts(routes, node, num_nodes, num_workers, plan);
  return plan;
}

TEST(Schedule, ManyExpertsAreComputedWholeBiggestFirst) {
  std::vector<int> rows(128);
  std::mt19937 random(91);
  std::cout << "seed 91\n";
  for (int& n : rows) n = 20 + static_cast<int>(random() % 24);
  const ExpertPlan plan = plan_of(routes_of(rows), 2);
  EXPECT_TRUE(plan.shared.empty());
  ASSERT_EQ(plan.whole.size(), 128u);
  for (std::size_t n = 1; n < plan.whole.size(); ++n) {
    EXPECT_GE(rows[static_cast<std::size_t>(plan.whole[n - 1])], rows[static_cast<std::size_t>(plan.whole[n])]);
  }
}

TEST(Schedule, OneWorkerComputesEverythingWhole) {
  const ExpertPlan plan = plan_of(routes_of({5000, 0, 1, 3}), 1);
  EXPECT_EQ(plan.whole, (std::vector<std::int32_t>{0, 3, 2}));
  EXPECT_TRUE(plan.shared.empty());
}

TEST(Schedule, AnExpertBeyondAWorkersShareIsShared) {
  const ExpertPlan plan = plan_of(routes_of({5000, 0, 1, 3, 40, 40}), 3);
  EXPECT_EQ(plan.shared, (std::vector<std::int32_t>{0}));
  EXPECT_EQ(plan.whole, (std::vector<std::int32_t>{4, 5, 3, 2}));
  EXPECT_EQ(plan_of(routes_of({0, 7, 0}), 2).shared, (std::vector<std::int32_t>{1}));
}

// 128 equal experts, 56 workers: two each, and sixteen for all to share.
TEST(Schedule, WhatDoesNotDivideEvenlyIsShared) {
  const ExpertPlan plan = plan_of(routes_of(std::vector<int>(128, 256)), 56);
  EXPECT_EQ(plan.whole.size(), 112u);
  EXPECT_EQ(plan.shared.size(), 16u);
}

TEST(Schedule, EveryNodeHasItsOwnExperts) {
  const Routes routes = routes_of({9, 8, 0, 7, 6, 5, 4}, 3);
  std::set<std::int32_t> seen;
  for (std::int64_t node = 0; node < 3; ++node) {
    const ExpertPlan plan = plan_of(routes, 2, node, 3);
    for (const auto& experts : {plan.whole, plan.shared}) {
      for (const std::int32_t expert : experts) {
        EXPECT_EQ(expert % 3, node);
        EXPECT_TRUE(seen.insert(expert).second);
      }
    }
  }
  EXPECT_EQ(seen, (std::set<std::int32_t>{0, 1, 3, 4, 5, 6}));
}

TEST(Schedule, TasksCoverEveryRowTokenAndPanelOnce) {
  const Routes routes = routes_of({300, 1, 65, 0});
  const std::vector<std::int32_t> shared = {0, 2, 1};
  std::vector<coproc::SharedTask> rows;
  coproc::plan_rows(routes, shared, rows);
  std::vector<std::int64_t> num_rows(3);
  for (const auto& task : rows) {
    EXPECT_EQ(task.begin, num_rows[static_cast<std::size_t>(task.index)]);  // In order, without gaps.
    num_rows[static_cast<std::size_t>(task.index)] = task.end;
  }
  EXPECT_EQ(num_rows, (std::vector<std::int64_t>{300, 65, 1}));

  const std::vector<RoutesOfItem> items = {{nullptr, nullptr, 300}, {nullptr, nullptr, 0}, {nullptr, nullptr, 65}};
  std::vector<coproc::TokenTask> tokens;
  coproc::plan_tokens(items, tokens);
  std::int64_t num_tokens = 0;
  for (const auto& task : tokens) num_tokens += task.end - task.begin;
  EXPECT_EQ(num_tokens, 365);

  for (const int num_workers : {1, 2, 56}) {
    for (const std::int64_t num_panels : {1, 2, 3, 48, 515}) {
      std::vector<coproc::SharedTask> panels;
      coproc::plan_panels(shared, num_panels, 4096, num_workers, panels);
      std::vector<std::int64_t> seen(3);
      for (const auto& task : panels) {
        EXPECT_EQ(task.begin % 2, 0);  // A gate panel and its up panel stay together.
        EXPECT_EQ(task.begin, seen[static_cast<std::size_t>(task.index)]);
        EXPECT_LE((task.end - task.begin) * 4096, 262144);
        seen[static_cast<std::size_t>(task.index)] = task.end;
      }
      EXPECT_EQ(seen, (std::vector<std::int64_t>(3, num_panels)));
    }
  }
}

TEST(Schedule, BlocksOfRowsAreNearlyEqualAndNeverAboveTheLimit) {
  for (const std::int64_t num_rows : {1, 32, 33, 64, 100, 1000}) {
    const coproc::RowBlocks blocks(num_rows, 32);
    std::int64_t least = num_rows;
    std::int64_t most = 0;
    for (std::int64_t b = 0; b < blocks.num_blocks; ++b) {
      least = std::min(least, blocks.begin(b + 1) - blocks.begin(b));
      most = std::max(most, blocks.begin(b + 1) - blocks.begin(b));
    }
    EXPECT_EQ(blocks.begin(0), 0);
    EXPECT_EQ(blocks.begin(blocks.num_blocks), num_rows);
    EXPECT_LE(most, 32);
    EXPECT_LE(most - least, 1);
  }
}

}  // namespace
}  // namespace kt::test
