// The compiled amx table executes what the loop nests in software tiles count: no load more, no TDPBF16PS less.
#include "kernels/cpu_features.h"
#include "tests/kernels/kernel_suite.h"
#include "tests/kernels/software_tile.h"
#include "tests/support/isa/amx_execute.h"
#include "tests/support/isa/emulator.h"

namespace kt::test {
namespace {

TEST(AmxCounts, OfTheCompiledTableAreThoseOfTheNests) {
  const kernels::KernelTable* table = kernels::find_table("amx", 2, nullptr);
  if (table == nullptr) GTEST_SKIP() << "this CPU neither runs nor emulates the amx table";
  constexpr std::int64_t kPanels = 3;
  constexpr std::int64_t kDepth = 288;
  const std::int64_t stride = kernels::panel_stride_bytes(kDepth, 2);
  const std::vector<std::byte> panels(static_cast<std::size_t>(kPanels * stride));
  const kernels::Panels w{panels.data(), stride, kPanels, kDepth};
  for (const std::int64_t m : {1, 2, 9, 16, 17, 32, 40, 64, 70}) {
    const std::vector<std::uint16_t> a(static_cast<std::size_t>(m * kDepth));
    std::vector<float> c(static_cast<std::size_t>(m * kPanels * 32));
    const TileCounts before = this_threads_tiles().counts();
    const std::uint64_t dots_before = emulator_counts().tile_dots;
    table->gemm(a.data(), kDepth, m, w, c.data(), kPanels * 32, true, {});
    if (emulator_counts().tile_dots == dots_before) GTEST_SKIP() << "the CPU has AMX: nothing was emulated";
    const TileCounts after = this_threads_tiles().counts();
    const TileCounts nests = software_gemm(a.data(), kDepth, m, w, c.data(), kPanels * 32, true);
    EXPECT_EQ(after.configures - before.configures, nests.configures) << "m " << m;
    EXPECT_EQ(after.load_bytes - before.load_bytes, nests.load_bytes) << "m " << m;
    EXPECT_EQ(after.loads - before.loads, nests.loads) << "m " << m;
    EXPECT_EQ(after.stores - before.stores, nests.stores) << "m " << m;
    EXPECT_EQ(after.dots - before.dots, nests.dots) << "m " << m;
    EXPECT_EQ(after.dot_rows - before.dot_rows, nests.dot_rows) << "m " << m;
    EXPECT_FALSE(this_threads_tiles().configured()) << "m " << m;
  }
}

}  // namespace
}  // namespace kt::test
