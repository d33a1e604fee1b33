#include "shm/base/activation.h"

#include <gtest/gtest.h>

#include <limits>

namespace kt {
namespace {

TEST(Activation, EveryRowIsFoundByItsKindAndByItsName) {
  for (std::size_t i = 0; i < kActivations.size(); ++i) {
    const ActivationRow& row = kActivations[i];
    EXPECT_EQ(static_cast<std::size_t>(row.kind), i) << row.name;
    EXPECT_EQ(find_activation(row.kind), &row);
    EXPECT_EQ(find_activation(row.name), &row);
  }
}

TEST(Activation, WhatIsNotInTheListIsNotFound) {
  EXPECT_EQ(find_activation("gelu"), nullptr);
  EXPECT_EQ(find_activation(""), nullptr);
  EXPECT_EQ(find_activation(static_cast<ActivationKind>(kActivations.size())), nullptr);
  EXPECT_EQ(find_activation(static_cast<ActivationKind>(0xffffffff)), nullptr);
}

TEST(Activation, OnlyAKnownKindWithTheLimitThatItHasIsValid) {
  EXPECT_TRUE(is_valid({}));
  EXPECT_TRUE(is_valid({ActivationKind::kClampedSwiGlu, 7.0f}));
  EXPECT_FALSE(is_valid({ActivationKind::kSwiGlu, 7.0f}));
  EXPECT_FALSE(is_valid({static_cast<ActivationKind>(kActivations.size()), 0.0f}));
  for (const float limit : {0.0f, -1.0f, std::numeric_limits<float>::infinity(), std::nanf("")})
    EXPECT_FALSE(is_valid({ActivationKind::kClampedSwiGlu, limit})) << limit;
}

}  // namespace
}  // namespace kt
