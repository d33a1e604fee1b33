// The whole training of all ranks in double: what the co-process must reproduce.
#pragma once
#include <vector>

#include "tests/client/training_task.h"
#include "tests/support/checkpoint_writer.h"

namespace kt::client::testing {

// One result per rank; norms and params are the same in all. first: as rank 0 sees it.
std::vector<TrainingResult> train_in_double(const Task& task, const kt::testing::WrittenCheckpoint& checkpoint);

}  // namespace kt::client::testing
