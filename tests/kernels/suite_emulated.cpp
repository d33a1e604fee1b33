// The kernel tests of the tables that need AVX-512 or AMX, on any CPU: natively where it has what they need, else under
// the emulator, with small shapes.
#include <cstdio>
#include <numeric>

#include "kernels/cpu_features.h"
#include "tests/kernels/kernel_suite.h"
#include "tests/support/isa/amx_execute.h"
#include "tests/support/isa/emulator.h"

namespace kt::test {
namespace {

constexpr std::uint32_t kEmulable = kernels::kAvx512Bf16 | kernels::kAmxBf16;

class Emulated : public testing::Environment {
 public:
  void SetUp() override {
    const std::uint32_t features = kernels::cpu_features();
    native_ = (features & kEmulable) == kEmulable;
    if (native_) return;
    ASSERT_TRUE(install_emulator()) << "the emulator needs a CPU with AVX2 and FMA";
    permit_tiles(true);
    const std::uint32_t emulated = kernels::kAmxBf16 | (emulates_avx512() ? kernels::kAvx512Bf16 : 0u);
    kernels::override_cpu_features_for_test(features | emulated);
  }

  void TearDown() override {
    if (native_ || testing::UnitTest::GetInstance()->test_to_run_count() == 0) return;
    kernels::override_cpu_features_for_test(std::nullopt);
    permit_tiles(false);
    const EmulatorCounts counts = emulator_counts();
    std::printf("emulated %llu instructions, %llu of them VDPBF16PS, %llu TDPBF16PS, in %llu traps\n",
                static_cast<unsigned long long>(counts.instructions),
                static_cast<unsigned long long>(counts.vector_dots), static_cast<unsigned long long>(counts.tile_dots),
                static_cast<unsigned long long>(counts.traps));
  }

 private:
  bool native_ = false;
};

[[maybe_unused]] const testing::Environment* const environment = testing::AddGlobalTestEnvironment(new Emulated);

}  // namespace

const SuiteConfig& suite_config() {
  static const SuiteConfig config = [] {
    SuiteConfig c{.tables = {}, .row_counts = std::vector<std::int64_t>(41), .emulated = true};
    std::iota(c.row_counts.begin(), c.row_counts.end(), 0);
    for (const kernels::KernelTable* table : kernels::all_tables())
      if ((table->required & kEmulable) != 0) c.tables.push_back(table);
    return c;
  }();
  return config;
}

}  // namespace kt::test
