// For test programs that run the tables with AVX-512 or AMX on any CPU: natively where it has what they need, else
// under the emulator.
#pragma once
#include <gtest/gtest.h>

#include "kernels/kernel_table.h"

namespace kt::test {

// To be given to testing::AddGlobalTestEnvironment. From its SetUp on, find_table gives the emulable tables.
testing::Environment* emulated_environment();

// Whether the table has instructions that the emulator executes.
bool is_emulable(const kernels::KernelTable& table);

}  // namespace kt::test
