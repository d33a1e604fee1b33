#include "tests/support/isa/emulated_environment.h"

#include <cstdio>

#include "kernels/cpu_features.h"
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

}  // namespace

testing::Environment* emulated_environment() { return new Emulated; }

bool is_emulable(const kernels::KernelTable& table) { return (table.required & kEmulable) != 0; }

}  // namespace kt::test
