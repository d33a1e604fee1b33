// The list of storage formats: what everybody who reads it takes for granted.
#include "kernels/formats.h"

#include <gtest/gtest.h>

#include <set>

namespace kt::test {
namespace {

TEST(Formats, AreFoundByTheirNamesAndNoOther) {
  std::set<std::string_view> names;
  for (const kernels::StorageFormat& format : kernels::formats()) {
    EXPECT_TRUE(names.insert(format.name).second) << format.name;
    EXPECT_EQ(kernels::find_format(format.name), &format);
    EXPECT_FALSE(format.help.empty()) << format.name;
    EXPECT_LT(format.name.size(), 8u) << format.name << " does not fit into the status page";
  }
  for (const char* name : {"", "int", "int88", "BF16"}) EXPECT_EQ(kernels::find_format(name), nullptr) << name;
}

TEST(Formats, RunOnSomeTableAndOnTheBestOne) {
  for (const kernels::StorageFormat& format : kernels::formats()) {
    EXPECT_EQ(kernels::why_not_on(format, "auto"), "") << format.name;
    bool runs = false;
    for (const kernels::KernelTable* table : kernels::all_tables()) {
      if (table->element_bytes == format.element_bytes) {
        runs = true;
        EXPECT_EQ(kernels::why_not_on(format, table->name), "") << format.name << " on " << table->name;
        EXPECT_EQ(kernels::find_kernels(*table, format.name) != nullptr, format.quantised.has_value())
            << format.name << " on " << table->name;
      }
    }
    EXPECT_TRUE(runs) << format.name;
  }
  EXPECT_EQ(kernels::why_not_on(*kernels::find_format("fp32"), "avx2"),
            "weight format fp32 runs on the scalar kernels only");
}

TEST(Formats, HavePanelsOfWholeCacheLines) {
  for (const kernels::StorageFormat& format : kernels::formats()) {
    for (std::int64_t k = 32; k <= 4096; k += 32) {
      EXPECT_EQ(format.panel_stride(k) % 64, 0) << format.name << ", k " << k;
      EXPECT_GT(format.panel_stride(k + 32), format.panel_stride(k)) << format.name << ", k " << k;
    }
  }
}

}  // namespace
}  // namespace kt::test
