// The kernel tests of the tables that need AVX-512, on any CPU: natively where it has what they need, else under the
// emulator, with small shapes.
#include <cstdio>

#include "kernels/cpu_features.h"
#include "tests/kernels/kernel_suite.h"
#include "tests/support/isa/evex_emulator.h"

namespace kt::test {
namespace {

bool runs_natively() { return (kernels::cpu_features() & kernels::kAvx512Bf16) != 0; }

class Emulated : public testing::Environment {
 public:
  void SetUp() override {
    native_ = runs_natively();
    if (native_) return;
    ASSERT_TRUE(install_evex_emulator()) << "the emulator needs a CPU with AVX2 and FMA";
    kernels::override_cpu_features_for_test(kernels::kAvx512Bf16);
  }

  void TearDown() override {
    if (native_ || testing::UnitTest::GetInstance()->test_to_run_count() == 0) return;
    kernels::override_cpu_features_for_test(std::nullopt);
    const EmulatorCounts counts = evex_emulator_counts();
    std::printf("emulated %llu instructions, %llu of them VDPBF16PS, in %llu traps\n",
                static_cast<unsigned long long>(counts.instructions), static_cast<unsigned long long>(counts.dots),
                static_cast<unsigned long long>(counts.traps));
  }

 private:
  bool native_ = false;
};

[[maybe_unused]] const testing::Environment* const environment = testing::AddGlobalTestEnvironment(new Emulated);

}  // namespace

const SuiteConfig& suite_config() {
  static const SuiteConfig config = [] {
    SuiteConfig c{.tables = {}, .row_counts = {0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 13, 18, 19, 40}, .emulated = true};
    for (const kernels::KernelTable* table : kernels::all_tables())
      if (table->required == kernels::kAvx512Bf16) c.tables.push_back(table);
    return c;
  }();
  return config;
}

}  // namespace kt::test
