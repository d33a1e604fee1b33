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
    routes.group(items.views, kExperts, kTopK, 1);
    ASSERT_EQ(routes.num_rows, static_cast<std::int64_t>(want.size()));
    for (std::size_t row = 0; row < want.size(); ++row) {
      const auto [expert, item, slot] = want[row];
      EXPECT_EQ(routes.item[row], item);
      EXPECT_EQ(routes.route[row], slot);
      EXPECT_EQ(routes.token[row], slot / static_cast<std::int32_t>(kTopK));
      EXPECT_EQ(routes.weight[row], items.weights[static_cast<std::size_t>(item)][static_cast<std::size_t>(slot)]);
      EXPECT_LE(routes.begin_of(expert), static_cast<std::int64_t>(row));
      EXPECT_GT(routes.begin_of(expert) + routes.rows_of(expert), static_cast<std::int64_t>(row));
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
  routes.group({&item, 1}, 5, 2, 1);
  EXPECT_EQ(routes.experts, (std::vector<std::int32_t>{2, 4, 0}));
}

// Node 0 has the even experts, node 1 the odd ones.
TEST(Routes, AreSortedByNodeFirst) {
  const std::vector<std::int32_t> ids = {4, 1, 2, 3, 0, 1, 3, 5};  // 5 is the sentinel.
  const std::vector<float> weights(ids.size(), 1.0f);
  const RoutesOfItem item{ids.data(), weights.data(), 4};
  Routes routes;
  routes.group({&item, 1}, 5, 2, 2);
  EXPECT_EQ(routes.node_begin, (std::vector<std::int64_t>{0, 3, 7}));
  EXPECT_EQ(routes.first_row, (std::vector<std::int64_t>{0, 3, 1, 5, 2}));
  EXPECT_EQ(routes.num_rows_of, (std::vector<std::int64_t>{1, 2, 1, 2, 1}));
  EXPECT_EQ(routes.route, (std::vector<std::int32_t>{4, 2, 0, 1, 5, 3, 6}));
}

}  // namespace
}  // namespace kt::test
