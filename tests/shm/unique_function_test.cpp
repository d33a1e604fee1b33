#include "shm/base/unique_function.h"

#include <gtest/gtest.h>

#include <memory>
#include <vector>

namespace kt::test {
namespace {

TEST(UniqueFunctions, HoldWhatCanOnlyBeMoved) {
  auto owned = std::make_unique<int>(7);
  UniqueFunction<int(int)> add = [owned = std::move(owned)](int more) { return *owned + more; };
  EXPECT_EQ(add(3), 10);
  UniqueFunction<int(int)> moved = std::move(add);
  EXPECT_EQ(moved(1), 8);
}

TEST(UniqueFunctions, AreFalseWhenEmptyOrMovedFrom) {
  UniqueFunction<void()> empty;
  EXPECT_FALSE(empty);
  UniqueFunction<void()> full = [] {};
  EXPECT_TRUE(full);
  const UniqueFunction<void()> taken = std::move(full);
  EXPECT_TRUE(taken);
  EXPECT_FALSE(full);  // NOLINT(bugprone-use-after-move): that is what is tested.
}

TEST(UniqueFunctions, PassArgumentsOnWithoutCopiesAndKeepTheirState) {
  int calls = 0;
  UniqueFunction<std::unique_ptr<int>(std::unique_ptr<int>)> pass = [calls](std::unique_ptr<int> value) mutable {
    *value += ++calls;
    return value;
  };
  EXPECT_EQ(*pass(std::make_unique<int>(10)), 11);
  EXPECT_EQ(*pass(std::make_unique<int>(10)), 12);
  EXPECT_EQ(calls, 0);
}

TEST(UniqueFunctions, DestroyWhatTheyHold) {
  const auto shared = std::make_shared<int>(1);
  std::vector<UniqueFunction<int()>> functions;
  functions.emplace_back([shared] { return *shared; });
  EXPECT_EQ(shared.use_count(), 2);
  functions.clear();
  EXPECT_EQ(shared.use_count(), 1);
}

}  // namespace
}  // namespace kt::test
