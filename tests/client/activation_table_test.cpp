#include "client/activation_table.h"

#include "tests/client/client_test.h"

namespace kt::client {
namespace {

LiveActivation two_chunks() { return {3, 10, {{101, 6}, {102, 4}}}; }

TEST(ActivationTable, ReleaseMovesAnActivationOnceAndIgnoresUnknownOnes) {
  ActivationTable table;
  table.insert(1, two_chunks());
  table.release(99);
  table.release(1);
  table.release(1);
  EXPECT_FALSE(table.find(1).has_value());
  const auto released = table.take_released();
  ASSERT_EQ(released.size(), 1u);
  EXPECT_EQ(released.at(1).chunks.size(), 2u);
  EXPECT_TRUE(table.take_released().empty());
}

TEST(ActivationTable, ABackwardThatFailedHalfWayLeavesTheOtherChunksToRelease) {
  ActivationTable table;
  table.insert(1, two_chunks());
  table.consume(1, 1);
  table.release(1);
  const auto released = table.take_released();
  ASSERT_EQ(released.at(1).chunks.size(), 1u);
  EXPECT_EQ(released.at(1).chunks.front().act_id, 102u);
}

TEST(ActivationTable, AConsumedActivationIsGone) {
  ActivationTable table;
  table.insert(1, two_chunks());
  table.consume(1, 2);
  EXPECT_FALSE(table.find(1).has_value());
  table.release(1);
  EXPECT_TRUE(table.take_released().empty());
}

TEST(ActivationTable, WhatIsGivenBackWaitsAgain) {
  ActivationTable table;
  table.insert(1, two_chunks());
  table.insert(2, two_chunks());
  table.release(1);
  auto released = table.take_released();
  table.release(2);
  table.give_back(std::move(released));
  EXPECT_EQ(table.take_released().size(), 2u);
}

}  // namespace
}  // namespace kt::client
