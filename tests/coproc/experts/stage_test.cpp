#include "coproc/experts/stage.h"

#include <gtest/gtest.h>

namespace kt::test {
namespace {

using coproc::Stage;

Stage stage_of(coproc::Operands reads, coproc::Operands writes) {
  return {coproc::StageId::kGatherX, coproc::Division::kRows, nullptr, reads, writes};
}

TEST(Stage, IsInThePhaseAfterThoseThatWriteWhatItReads) {
  using namespace coproc;
  const StageList stages = {stage_of(kInput, kX), stage_of(kX, kZ), stage_of(kGradOutput, kDy),
                            stage_of(kZ | kDy, kOut), stage_of(kZ, kZa)};
  EXPECT_EQ(phases_of(stages), (std::vector<int>{0, 1, 0, 2, 2}));
}

TEST(Stage, DoesNotWriteWhatAnotherOneOfItsPhaseReadsOrWrites) {
  using namespace coproc;
  const StageList stages = {stage_of(kInput, kX), stage_of(kX, kZ), stage_of(kInput, kX), stage_of(kGateUp, kZ)};
  EXPECT_EQ(phases_of(stages), (std::vector<int>{0, 1, 2, 2}));
}

}  // namespace
}  // namespace kt::test
