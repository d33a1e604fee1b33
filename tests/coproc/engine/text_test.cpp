#include "coproc/engine/text.h"

#include <gtest/gtest.h>

namespace kt::test {
namespace {

TEST(Text, OfANumberReadsBackAsTheSameNumber) {
  for (const double value : {0.1, 1e-8, 1.0 / 3, 1e300, -0.0}) {
    EXPECT_EQ(std::stod(coproc::number_text(value)), value) << coproc::number_text(value);
  }
  EXPECT_EQ(coproc::number_text(0.001), "0.001");
}

TEST(Text, OfRanksAndSecondsIsShort) {
  EXPECT_EQ(coproc::join_ranks({}), "");
  EXPECT_EQ(coproc::join_ranks({0, 2, 11}), "0,2,11");
  EXPECT_EQ(coproc::seconds_text(1'250'000'000), "1.2 s");
}

}  // namespace
}  // namespace kt::test
