#include "coproc/experts/routes.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <iostream>
#include <random>
#include <tuple>

namespace kt::test {
namespace {

using coproc::Routes;
using coproc::RoutesOfItem;

struct Items {
  std::vector<std::vector<std::int32_t>> ids;
  std::vector<std::vector<float>> weights;
  std::vector<RoutesOfItem> views;
};

Items random_items(std::initializer_list<std::uint32_t> tokens, std::int32_t num_experts, std::uint32_t top_k,
                   std::uint32_t seed) {
  std::cout << "seed " << seed << "\n";
  std::mt19937 random(seed);
  std::uniform_int_distribution<std::int32_t> expert(0, num_experts);
  Items items;
  for (const std::uint32_t num_tokens : tokens) {
    items.ids.emplace_back(num_tokens * top_k);
    items.weights.emplace_back(num_tokens * top_k);
    for (std::int32_t& id : items.ids.back()) id = expert(random);
    for (float& weight : items.weights.back()) weight = static_cast<float>(random() % 1000);
  }
  std::size_t n = 0;
  for (const std::uint32_t num_tokens : tokens) {
    items.views.push_back({items.ids[n].data(), items.weights[n].data(), num_tokens});
    ++n;
  }
  return items;
}

TEST(Routes, AreSortedByExpertThenItemThenTokenThenSlot) {
  constexpr std::int32_t kExperts = 9;
  constexpr std::uint32_t kTopK = 3;
  const Items items = random_items({20, 0, 1, 7}, kExperts, kTopK, 61);
  std::vector<std::tuple<std::int32_t, std::int32_t, std::int32_t>> want;  // expert, item, slot
  for (std::size_t n = 0; n < items.ids.size(); ++n) {
    for (std::size_t slot = 0; slot < items.ids[n].size(); ++slot) {
      if (items.ids[n][slot] == kExperts) continue;
      want.emplace_back(items.ids[n][slot], static_cast<std::int32_t>(n), static_cast<std::int32_t>(slot));
    }
  }
  std::sort(want.begin(), want.end());
  Routes routes;
  for (int round = 0; round < 2; ++round) {  // The second time over the first one's memory.
    routes.group(items.views, kExperts, kTopK);
    ASSERT_EQ(routes.num_rows, static_cast<std::int64_t>(want.size()));
    for (std::size_t row = 0; row < want.size(); ++row) {
      const auto [expert, item, slot] = want[row];
      EXPECT_EQ(routes.item[row], item);
      EXPECT_EQ(routes.route[row], slot);
      EXPECT_EQ(routes.token[row], slot / static_cast<std::int32_t>(kTopK));
      EXPECT_EQ(routes.weight[row], items.weights[static_cast<std::size_t>(item)][static_cast<std::size_t>(slot)]);
      EXPECT_LE(routes.first_row[static_cast<std::size_t>(expert)], static_cast<std::int64_t>(row));
      EXPECT_GT(routes.first_row[static_cast<std::size_t>(expert) + 1], static_cast<std::int64_t>(row));
      EXPECT_EQ(routes.row[static_cast<std::size_t>(routes.first_slot[static_cast<std::size_t>(item)] + slot)],
                static_cast<std::int32_t>(row));
    }
  }
  EXPECT_EQ(std::count(routes.row.begin(), routes.row.end(), -1),
            static_cast<std::ptrdiff_t>(routes.row.size() - want.size()));
}

TEST(Routes, ListExpertsWithTokensMostTokensFirst) {
  const std::vector<std::int32_t> ids = {4, 2, 2, 0, 2, 4, 5, 5};  // 5 is the sentinel.
  const std::vector<float> weights(ids.size(), 1.0f);
  const RoutesOfItem item{ids.data(), weights.data(), 4};
  Routes routes;
  routes.group({&item, 1}, 5, 2);
  EXPECT_EQ(routes.experts, (std::vector<std::int32_t>{2, 4, 0}));
}

TEST(Routes, TasksCoverEveryRowTokenAndPanelOnce) {
  const Items items = random_items({300, 0, 65}, 4, 2, 62);
  Routes routes;
  routes.group(items.views, 4, 2);
  std::vector<coproc::RowTask> rows;
  coproc::plan_rows(routes, rows);
  std::vector<int> row_seen(static_cast<std::size_t>(routes.num_rows));
  for (const auto& task : rows) {
    for (std::int64_t row = task.begin; row < task.end; ++row) {
      ++row_seen[static_cast<std::size_t>(row)];
      EXPECT_GE(row, routes.first_row[static_cast<std::size_t>(task.expert)]);
      EXPECT_LT(row, routes.first_row[static_cast<std::size_t>(task.expert) + 1]);
    }
  }
  EXPECT_EQ(row_seen, std::vector<int>(row_seen.size(), 1));
  std::vector<coproc::TokenTask> tokens;
  coproc::plan_tokens(items.views, tokens);
  std::int64_t num_tokens = 0;
  for (const auto& task : tokens) num_tokens += task.end - task.begin;
  EXPECT_EQ(num_tokens, 365);
  for (const int num_workers : {1, 2, 56}) {
    for (const std::int64_t num_panels : {2, 48, 514}) {
      std::vector<coproc::PanelTask> panels;
      coproc::plan_panels(routes, num_panels, 4096, 2, num_workers, panels);
      std::vector<int> panel_seen(static_cast<std::size_t>(num_panels * 4));
      for (const auto& task : panels) {
        EXPECT_EQ(task.begin % 2, 0);
        EXPECT_EQ(task.end % 2, 0);
        EXPECT_LE(task.end - task.begin, coproc::kTaskPanelsMax);
        for (std::int64_t p = task.begin; p < task.end; ++p) {
          ++panel_seen[static_cast<std::size_t>(task.expert * num_panels + p)];
        }
      }
      EXPECT_EQ(panel_seen, std::vector<int>(panel_seen.size(), 1));
    }
  }
}

}  // namespace
}  // namespace kt::test
