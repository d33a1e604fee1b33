// The kernel tests on the CPU as it is: tables it cannot run are skipped.
#include <numeric>

#include "tests/kernels/kernel_suite.h"

namespace kt::test {

const SuiteConfig& suite_config() {
  static const SuiteConfig config = [] {
    const auto all = kernels::all_tables();
    SuiteConfig c{.tables = {all.begin(), all.end()}, .row_counts = std::vector<std::int64_t>(41), .emulated = false};
    std::iota(c.row_counts.begin(), c.row_counts.end(), 0);
    return c;
  }();
  return config;
}

}  // namespace kt::test
