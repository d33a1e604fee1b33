// The kernel tests of the tables that need AVX-512 or AMX, on any CPU: natively where it has what they need, else under
// the emulator, with small shapes.
#include <numeric>

#include "tests/kernels/kernel_suite.h"
#include "tests/support/isa/emulated_environment.h"

namespace kt::test {
namespace {

[[maybe_unused]] const testing::Environment* const environment =
    testing::AddGlobalTestEnvironment(emulated_environment());

}  // namespace

const SuiteConfig& suite_config() {
  static const SuiteConfig config = [] {
    SuiteConfig c{.tables = {}, .row_counts = std::vector<std::int64_t>(41), .emulated = true};
    std::iota(c.row_counts.begin(), c.row_counts.end(), 0);
    for (const kernels::KernelTable* table : kernels::all_tables())
      if (is_emulable(*table)) c.tables.push_back(table);
    return c;
  }();
  return config;
}

}  // namespace kt::test
