// The parts of the benchmarks that have an answer: routing, elements, the size of caches.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <set>

#include "coproc/bench/cache_size.h"
#include "coproc/bench/elements.h"
#include "coproc/bench/layer_bench.h"
#include "coproc/bench/routing.h"
#include "tests/support/temp_dir.h"

namespace kt::test {
namespace {

TEST(RouterTest, WithoutSkewEveryExpertComesEquallyOften) {
  coproc::Router router(12, 4, 0, 1);
  std::vector<int> counts(12);
  for (int call = 0; call < 6; ++call) {
    for (const std::int32_t expert : router.route(5)) ++counts[static_cast<std::size_t>(expert)];
  }
  EXPECT_EQ(counts, std::vector<int>(12, 10));
}

TEST(RouterTest, WithSkewATokensExpertsDifferAndFewExpertsGetMost) {
  coproc::Router router(64, 4, 1.0, 2);
  const std::vector<std::int32_t> ids = router.route(1000);
  std::vector<int> counts(64);
  for (std::size_t token = 0; token < 1000; ++token) {
    const std::set<std::int32_t> of_token(ids.data() + 4 * token, ids.data() + 4 * token + 4);
    EXPECT_EQ(of_token.size(), 4u);
    for (const std::int32_t expert : of_token) ++counts[static_cast<std::size_t>(expert)];
  }
  std::sort(counts.rbegin(), counts.rend());
  EXPECT_GT(counts[0], 5 * 4000 / 64);
  EXPECT_GT(counts[0], 8 * counts[40]);
}

TEST(ElementsTest, AreNormalNumbersOfBothSigns) {
  const std::vector<std::byte> bytes = coproc::random_elements(1000, 4, 3);
  ASSERT_EQ(bytes.size(), 4000u);
  int num_negative = 0;
  for (std::size_t n = 0; n < 1000; ++n) {
    float value = 0;
    std::memcpy(&value, bytes.data() + 4 * n, sizeof value);
    EXPECT_GE(std::abs(value), 0.0078125f);
    EXPECT_LT(std::abs(value), 0.03125f);
    num_negative += value < 0 ? 1 : 0;
  }
  EXPECT_GT(num_negative, 300);
  EXPECT_LT(num_negative, 700);
}

TEST(CacheSizeTest, AddsUpTheCachesOfTheLastLevel) {
  const kt::testing::TempDir directory;
  const auto write = [&](int cpu, int index, const char* level, const char* size, const char* cpus) {
    const std::filesystem::path folder = directory.path() / "sys/devices/system/cpu" / ("cpu" + std::to_string(cpu)) /
                                         "cache" / ("index" + std::to_string(index));
    std::filesystem::create_directories(folder);
    std::ofstream(folder / "level") << level << "\n";
    std::ofstream(folder / "size") << size << "\n";
    std::ofstream(folder / "shared_cpu_list") << cpus << "\n";
  };
  EXPECT_EQ(coproc::last_level_cache_bytes(directory.path().string()), 32u << 20);  // Unknown.
  for (const int cpu : {0, 1, 2}) {
    write(cpu, 2, "2", "512K", std::to_string(cpu).c_str());
    write(cpu, 3, "3", cpu < 2 ? "4096K" : "2M", cpu < 2 ? "0-1" : "2");
  }
  EXPECT_EQ(coproc::last_level_cache_bytes(directory.path().string()), 6u << 20);
}

TEST(RooflineTest, IsTheSlowerOfComputingAndReading) {
  coproc::LayerRow row;
  row.flops = 100;
  row.bytes = 30;
  EXPECT_EQ(row.roofline_seconds({50, 10}), 3);
  EXPECT_EQ(row.roofline_seconds({20, 10}), 5);
}

}  // namespace
}  // namespace kt::test
