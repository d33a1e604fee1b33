// The tests of the experts (forward, backward, LoRA gradients, AdamW step) with the tables that need AVX-512 or AMX.
#include "tests/support/isa/emulated_environment.h"

namespace {
[[maybe_unused]] const testing::Environment* const environment =
    testing::AddGlobalTestEnvironment(kt::test::emulated_environment());
}  // namespace
