// What fp8 promises beyond what every format does: any scale, as a checkpoint may have it, gives the nearest bf16.
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/formats.h"
#include "tests/kernels/kernel_suite.h"
#include "tests/kernels/quantised_panels.h"
#include "tests/support/isa/bit_model.h"

namespace kt::test {
namespace {

using kernels::kPanelRows;

class Fp8 : public KernelTest {
 protected:
  // A panel of one group that holds every code eight times, scaled by `scale`.
  QuantisedPanels every_code(float scale) {
    const Matrix rows(kPanelRows, 64, element_bytes());
    QuantisedPanels panels(*kernels::find_kernels(table(), "fp8"), rows, 64, 1, 128);
    std::byte* group = panels.group(0, 0);
    std::memcpy(group, &scale, sizeof scale);
    for (int code = 0; code < 32 * 64; ++code) group[64 + code] = static_cast<std::byte>(code);
    return panels;
  }

  std::vector<std::byte> dequantised(const QuantisedPanels& panels) {
    std::vector<std::byte> out(static_cast<std::size_t>(kernels::panel_stride_bytes(64, element_bytes())));
    panels.kernels().dequantise(panels.panels(), 0, 64, out.data(), 0);
    return out;
  }

  // Any positive float from 2^-90 to 2^90.
  float random_scale() {
    return std::ldexp(1.0f + static_cast<float>(random_() >> 9) * 0x1p-23f, static_cast<int>(random_() % 180) - 90);
  }
};

TEST_P(Fp8, EveryCodeTimesAnyScaleIsTheNearestBf16) {
  // The last ones: products half-way between two bf16, and just beside that.
  std::vector<float> scales = {1.0f, 0x1p-100f, 1.0f + 0x1p-8f, 1.0f + 0x1p-8f + 0x1p-23f, 1.0f + 0x1p-8f - 0x1p-23f};
  for (int i = 0; i < (emulated() ? 10 : 2000); ++i) scales.push_back(random_scale());
  for (const float scale : scales) {
    const QuantisedPanels panels = every_code(scale);
    const std::vector<std::byte> out = dequantised(panels);
    for (std::int64_t at = 0; at < 32 * 64; ++at) {
      std::uint16_t bits;
      std::memcpy(&bits, out.data() + 2 * at, sizeof bits);
      const auto code = static_cast<std::int32_t>(at % 256);
      const float want = nearest_bf16(fp8_value(code) * static_cast<double>(scale));
      ASSERT_TRUE(same_bits(from_bf16(bits), want))
          << std::hexfloat << "code " << code << " of " << scale << ": " << from_bf16(bits) << ", want " << want;
    }
  }
}

TEST_P(Fp8, AScaleThatIsNotFiniteMakesEveryWeightNaN) {
  for (const float scale : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    const std::vector<std::byte> out = dequantised(every_code(scale));
    for (std::size_t at = 0; at < 32 * 64; ++at) {
      std::uint16_t bits;
      std::memcpy(&bits, out.data() + 2 * at, sizeof bits);
      ASSERT_TRUE(std::isnan(from_bf16(bits))) << "code " << at % 256 << " of " << scale;
    }
  }
}

TEST_P(Fp8, ProductsWithAnyScaleAreThoseOfTheDequantisedPanel) {
  QuantisedPanels panels = every_code(random_scale());
  for (std::int64_t at = 0; at < 32 * 64; ++at) {  // No NaN: it would hide the others.
    if (std::isnan(fp8_value(static_cast<std::int32_t>(at % 256)))) panels.group(0, 0)[64 + at] = std::byte{0x80};
  }
  const std::vector<std::byte> elements = dequantised(panels);
  for (const std::int64_t m : suite_config().row_counts) {
    Matrix a(m, 64, element_bytes(), 1);
    a.fill_normal(random_);
    Matrix want(m, kPanelRows, 4);
    Matrix got(m, kPanelRows, 4);
    table().gemm(a.data(), a.ld(), m, {elements.data(), 0, 1, 64}, want.floats(), want.ld(), false, {});
    panels.kernels().gemm(a.data(), a.ld(), m, panels.panels(), got.floats(), got.ld(), {});
    EXPECT_TRUE(same_matrix(want, got)) << m << " rows";
    EXPECT_TRUE(got.guards_are_intact());
  }
}

TEST_P(Fp8, TheLargestWeightOfABlockBecomes448AndIsKept) {
  Matrix rows(160, 160, element_bytes());
  rows.fill_normal(random_, 0.02f);
  rows.set(3, 5, -1.75f);    // 448 · 2^-8: its scale is a power of two
  rows.set(150, 140, 3.5f);  // in the last block
  const QuantisedPanels panels(*kernels::find_kernels(table(), "fp8"), rows, 160, 5, 128);
  EXPECT_EQ(panels.code(3, 5), 0xfe);
  EXPECT_EQ(panels.code(150, 140), 0x7e);
  for (std::int64_t row = 0; row < 160; ++row) {
    const bool is_first = row < 128;
    EXPECT_EQ(panels.scale(row, is_first ? 0 : 128), is_first ? 0x1p-8f : 0x1p-7f) << "row " << row;
    EXPECT_LT(panels.scale(row, is_first ? 128 : 0), 0x1p-9f) << "row " << row;
  }
}

INSTANTIATE_TEST_SUITE_P(Tables, Fp8, testing::ValuesIn(bf16_tables()), table_test_name);

}  // namespace
}  // namespace kt::test
