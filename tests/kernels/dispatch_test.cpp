// find_table: the best table this CPU runs, or the one asked for, or a reason that a person can act on.
#include <gtest/gtest.h>

#include "kernels/cpu_features.h"
#include "kernels/kernel_table.h"

namespace kt::kernels {
namespace {

TEST(Dispatch, ScalarRunsEverywhereInBothElementTypes) {
  for (const std::int64_t element_bytes : {2, 4}) {
    const KernelTable* table = find_table("scalar", element_bytes, nullptr);
    ASSERT_NE(table, nullptr);
    EXPECT_EQ(table->element_bytes, element_bytes);
    EXPECT_EQ(table->required, 0u);
  }
}

TEST(Dispatch, AutoAndTheEmptyNameAreTheBestTable) {
  for (const std::int64_t element_bytes : {2, 4}) {
    const KernelTable* best = find_table("auto", element_bytes, nullptr);
    ASSERT_NE(best, nullptr);
    EXPECT_EQ(best, find_table("", element_bytes, nullptr));
    for (const KernelTable* table : all_tables()) {
      if (table->element_bytes != element_bytes || (table->required & ~cpu_features()) != 0) continue;
      EXPECT_EQ(best, table) << "the first runnable table of the list is the best";
      break;
    }
  }
}

TEST(Dispatch, ATableThatCannotRunIsRefusedWithWhatTheCpuLacks) {
  override_cpu_features_for_test(0);
  std::string why;
  EXPECT_EQ(find_table("avx512", 2, &why), nullptr);
  EXPECT_NE(why.find("avx512 needs what this CPU lacks: "), std::string::npos) << why;
  EXPECT_EQ(find_table("auto", 2, nullptr)->name, "scalar");
  override_cpu_features_for_test(kAvx512Bf16);
  EXPECT_EQ(find_table("auto", 2, nullptr)->name, "avx512");
  EXPECT_NE(find_table("avx512", 2, nullptr), nullptr);
  override_cpu_features_for_test(std::nullopt);
}

TEST(Dispatch, Avx2ComesBetweenAvx512AndScalar) {
  override_cpu_features_for_test(kAvx2Fma);
  EXPECT_EQ(find_table("auto", 2, nullptr)->name, "avx2");
  EXPECT_EQ(find_table("auto", 4, nullptr)->name, "scalar");
  override_cpu_features_for_test(kAvx2Fma | kAvx512Bf16);
  EXPECT_EQ(find_table("auto", 2, nullptr)->name, "avx512");
  EXPECT_EQ(find_table("avx2", 2, nullptr)->name, "avx2");
  override_cpu_features_for_test(kAvx512Bf16);
  std::string why;
  EXPECT_EQ(find_table("avx2", 2, &why), nullptr);
  EXPECT_NE(why.find("avx2 needs what this CPU lacks: "), std::string::npos) << why;
  override_cpu_features_for_test(std::nullopt);
}

TEST(Dispatch, AmxNeedsTilesAndAvx512AndComesFirst) {
  override_cpu_features_for_test(kAmxBf16 | kAvx512Bf16);
  EXPECT_EQ(find_table("auto", 2, nullptr)->name, "amx");
  for (const std::uint32_t half : {kAmxBf16, kAvx512Bf16}) {
    override_cpu_features_for_test(half);
    std::string why;
    EXPECT_EQ(find_table("amx", 2, &why), nullptr);
    EXPECT_NE(why.find("amx needs what this CPU lacks: "), std::string::npos) << why;
    EXPECT_NE(find_table("auto", 2, nullptr)->name, "amx");
  }
  override_cpu_features_for_test(std::nullopt);
  const bool native = (cpu_features() & kAmxBf16) != 0;
  EXPECT_EQ(missing_cpu_features(kAmxBf16).find("tile") == std::string::npos, native) << "names what the CPU lacks";
}

// "auto, " and the names of all tables for that element size, best first.
std::string names(std::int64_t element_bytes) {
  std::string list = "auto";
  for (const KernelTable* table : all_tables())
    if (table->element_bytes == element_bytes) list += ", " + std::string(table->name);
  return list;
}

TEST(Dispatch, AnUnknownNameIsRefusedWithTheNamesThatExist) {
  std::string why;
  EXPECT_EQ(find_table("sse9", 2, &why), nullptr);
  EXPECT_EQ(why, "no kernels named 'sse9' for bf16 weights; there are: " + names(2));
  EXPECT_EQ(find_table("avx512", 4, &why), nullptr);
  EXPECT_EQ(why, "no kernels named 'avx512' for fp32 weights; there are: " + names(4));
  EXPECT_EQ(find_table("sse9", 2, nullptr), nullptr);
}

TEST(Dispatch, NothingMissingIsAnEmptyList) {
  EXPECT_EQ(missing_cpu_features(0), "");
  EXPECT_EQ(missing_cpu_features(cpu_features()), "");
}

}  // namespace
}  // namespace kt::kernels
