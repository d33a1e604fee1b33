// quantise and dequantise of every format against a reference of its own, bit by bit, and the products made of them:
// the model of the table's dot instruction over the reference's weights, in both directions.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/formats.h"
#include "tests/kernels/kernel_suite.h"
#include "tests/kernels/quantised_panels.h"
#include "tests/support/formats/format_reference.h"
#include "tests/support/isa/bit_model.h"

namespace kt::test {
namespace {

using kernels::kPanelRows;
using kernels::Panels;
using kernels::QuantKernels;
using kernels::QuantPanels;

// A format of the table under test, in groups of its own length or shorter ones.
struct Grouped {
  const QuantKernels& kernels;
  std::int64_t group;
  std::string name() const { return std::string(kernels.format) + ", groups of " + std::to_string(group); }
};

class Quantisation : public KernelTest {
 protected:
  std::vector<float> floats_of(const Matrix& rows) const {
    std::vector<float> values;
    for (std::int64_t r = 0; r < rows.num_rows(); ++r)
      for (std::int64_t c = 0; c < rows.num_columns(); ++c) values.push_back(rows.get(r, c));
    return values;
  }

  std::vector<Grouped> formats() const {
    std::vector<Grouped> all;
    for (const QuantKernels& kernels : table().formats)
      for (const std::int64_t group : {32, 64, 128}) all.push_back({kernels, group});
    return all;
  }

  QuantReference reference(const Matrix& rows, const Grouped& format) const {
    return format_reference(format.kernels.format)
        .quantise(floats_of(rows), rows.num_rows(), rows.num_columns(), format.group);
  }

  QuantisedPanels quantise(const Matrix& rows, std::int64_t k_padded, std::int64_t num_panels,
                           const Grouped& format) const {
    return {format.kernels, rows, k_padded, num_panels, format.group};
  }

  // Normal weights; some groups of zeros, of numbers too small, with one large one, and with what is not finite.
  Matrix make(std::int64_t n, std::int64_t k) {
    Matrix rows(n, k, element_bytes(), 3);
    rows.fill_normal(random_, 0.03f);
    const float special[] = {0.0f,
                             std::ldexp(1.0f, -101),
                             -300.0f,
                             std::ldexp(1.0f, 120),
                             std::numeric_limits<float>::infinity(),
                             std::numeric_limits<float>::quiet_NaN()};
    for (std::int64_t r = 0; r < n && r < 6; ++r) {
      const float value = special[r];
      for (std::int64_t c = 0; c < k && (r < 2 || c < 1); ++c) rows.set(r, c, value);
    }
    return rows;
  }

  void expect_reference(std::int64_t n, std::int64_t k, std::int64_t k_padded, std::int64_t num_panels,
                        const Grouped& format) {
    SCOPED_TRACE(format.name() + ", n " + std::to_string(n) + ", k " + std::to_string(k));
    const Matrix rows = make(n, k);
    const QuantReference want = reference(rows, format);
    const QuantisedPanels got = quantise(rows, k_padded, num_panels, format);
    const std::int64_t num_groups = (k + format.group - 1) / format.group;
    std::int64_t num_wrong = 0;
    for (std::int64_t r = 0; r < num_panels * kPanelRows; ++r) {
      for (std::int64_t c = 0; c < k_padded; ++c) {
        const bool is_weight = r < n && c < k;
        const std::int32_t code = is_weight ? want.codes[static_cast<std::size_t>(r * k + c)] : 0;
        const bool has_scale = r < n && c / format.group < num_groups;
        const float scale = has_scale ? want.scales[static_cast<std::size_t>(r * num_groups + c / format.group)] : 0;
        const bool scale_is_right = has_scale ? same_bits(got.scale(r, c), scale) : std::isfinite(got.scale(r, c));
        if (got.code(r, c) == code && scale_is_right) continue;
        if (num_wrong++ == 0)
          ADD_FAILURE() << "row " << r << ", column " << c << ": " << got.code(r, c) << " of " << got.scale(r, c)
                        << ", want " << code << " of " << scale;
      }
    }
    EXPECT_EQ(num_wrong, 0);
    EXPECT_TRUE(got.pads_are_intact());
  }

  // Columns [begin, begin + count) of the dequantised panels against the reference's weights.
  void expect_weights(const QuantisedPanels& quantised, const QuantReference& want, std::int64_t k, std::int64_t begin,
                      std::int64_t count) {
    const std::int64_t panel_bytes = count * kPanelRows * element_bytes();
    const std::int64_t num_panels = quantised.panels().num_panels;
    std::vector<std::byte> out(static_cast<std::size_t>(num_panels * (panel_bytes + 64)), std::byte{0xff});
    quantised.kernels().dequantise(quantised.panels(), begin, count, out.data(), panel_bytes + 64);
    std::int64_t num_wrong = 0;
    for (std::int64_t r = 0; r < num_panels * kPanelRows; ++r) {
      for (std::int64_t c = 0; c < count; ++c) {
        const std::byte* at =
            out.data() + r / kPanelRows * (panel_bytes + 64) + ((c / 2 * kPanelRows + r % kPanelRows) * 2 + c % 2) * 2;
        std::uint16_t bits;
        std::memcpy(&bits, at, sizeof bits);
        const float weight = want.weights[static_cast<std::size_t>(r * k + begin + c)];
        if (same_bits(from_bf16(bits), weight)) continue;
        if (num_wrong++ == 0)
          ADD_FAILURE() << "row " << r << ", column " << begin + c << ": " << from_bf16(bits) << ", want " << weight;
      }
    }
    EXPECT_EQ(num_wrong, 0);
    for (std::int64_t p = 0; p < num_panels; ++p)
      for (std::int64_t b = 0; b < 64; ++b)
        ASSERT_EQ(out[static_cast<std::size_t>((p + 1) * panel_bytes + p * 64 + b)], std::byte{0xff}) << "panel " << p;
  }

  // C of every number of rows against the model over `weights` [n, k]; with `codes`, also C straight from them.
  void expect_products(const Panels& w, const std::vector<float>& weights, std::int64_t n,
                       const QuantisedPanels* codes = nullptr) {
    const std::int64_t rows_max = suite_config().row_counts.back();
    Matrix a(rows_max, w.k, element_bytes(), 1);
    a.fill_normal(random_);
    Matrix rows(n, w.k, element_bytes());
    for (std::int64_t r = 0; r < n; ++r)
      for (std::int64_t c = 0; c < w.k; ++c) rows.set(r, c, weights[static_cast<std::size_t>(r * w.k + c)]);
    Matrix want(rows_max, n, 4);
    for (std::int64_t m = 0; m < rows_max; ++m)
      for (std::int64_t r = 0; r < n; ++r) want.set(m, r, dot_model(table(), 0.0f, a.row(m), rows.row(r), w.k));
    for (const std::int64_t m : suite_config().row_counts) {
      Matrix got(m, n, 4, 3);
      const std::int64_t first = std::uniform_int_distribution<std::int64_t>(0, rows_max - m)(random_);
      table().gemm(a.row(first), a.ld(), m, w, got.floats(), got.ld(), false, {});
      Matrix expected(m, n, 4);
      for (std::int64_t r = 0; r < m; ++r)
        for (std::int64_t c = 0; c < n; ++c) expected.set(r, c, want.get(first + r, c));
      EXPECT_TRUE(same_matrix(expected, got)) << m << " rows from " << first;
      EXPECT_TRUE(got.guards_are_intact());
      if (codes == nullptr) continue;
      Matrix straight(m, n, 4, 3);
      codes->kernels().gemm(a.row(first), a.ld(), m, codes->panels(), straight.floats(), straight.ld(),
                            {w.data, 128, 64, 3});
      EXPECT_TRUE(same_matrix(expected, straight)) << m << " rows from " << first << ", from the codes";
      EXPECT_TRUE(straight.guards_are_intact());
    }
  }
};

TEST_P(Quantisation, CodesAndScalesAreTheReferences) {
  for (const Grouped& format : formats()) {
    expect_reference(33, 45, 64, 2, format);
    expect_reference(7, 32, 32, 1, format);
    expect_reference(3, 5, 32, 2, format);  // a panel without any row
    if (emulated()) continue;
    expect_reference(70, 321, 352, 3, format);  // 352: a last group that is shorter than 64 and 128
    expect_reference(32, 256, 256, 1, format);
    expect_reference(150, 130, 160, 6, format);  // rows of a second block of 128, and a panel without any
  }
}

TEST_P(Quantisation, DequantisedWeightsAreTheNearestBf16) {
  const std::int64_t k = emulated() ? 96 : 352;
  for (const Grouped& format : formats()) {
    SCOPED_TRACE(format.name());
    const Matrix rows = make(64, k);
    const QuantReference want = reference(rows, format);
    const QuantisedPanels quantised = quantise(rows, k, 2, format);
    expect_weights(quantised, want, k, 0, k);
    expect_weights(quantised, want, k, k - 32, 32);
    expect_weights(quantised, want, k, 32, 32);
    if (!emulated()) expect_weights(quantised, want, k, 96, 224);
  }
}

// How many integers of each sign a format has; 0: its codes are none.
std::int32_t integers_of(const Grouped& format) {
  return format.kernels.format == "int8" ? 128 : format.kernels.format == "int4" ? 8 : 0;
}

// What lets every table round as it likes: no product needs more than 24 bits or lies half-way between two bf16.
TEST_P(Quantisation, NoProductOfAnIntegerAndAScaleNeedsADecisionAboutTies) {
  if (emulated()) GTEST_SKIP() << "a property of scales, which are the same natively";
  for (const Grouped& format : formats()) {
    const std::int32_t integer_max = integers_of(format);
    if (integer_max == 0 || format.group != 32) continue;
    Matrix rows(512, 32, element_bytes());
    rows.fill_normal(random_, 3.0f);
    const QuantisedPanels quantised = quantise(rows, 32, 16, format);
    for (std::int64_t r = 0; r < 512; ++r) {
      const float scale = quantised.scale(r, 0);
      for (std::int32_t integer = 1; integer <= integer_max; ++integer) {
        const double exact = static_cast<double>(scale) * integer;
        ASSERT_EQ(static_cast<double>(static_cast<float>(exact)), exact) << integer << " of " << scale;
        int exponent = 0;
        const double digits = std::ldexp(std::frexp(exact, &exponent), 8);
        ASSERT_NE(digits - std::floor(digits), 0.5) << integer << " of " << scale;
      }
    }
  }
}

TEST_P(Quantisation, AWeightIsAtMostHalfAStepFromItsIntegerUnlessThatIsTheLargest) {
  const std::int64_t k = emulated() ? 32 : 256;
  for (const Grouped& format : formats()) {
    SCOPED_TRACE(format.name());
    const std::int32_t integers = integers_of(format);
    if (integers == 0) continue;
    Matrix rows(32, k, element_bytes());
    rows.fill_normal(random_, 0.02f);
    const QuantisedPanels quantised = quantise(rows, k, 1, format);
    for (std::int64_t r = 0; r < 32; ++r) {
      for (std::int64_t c = 0; c < k; ++c) {
        const double scale = static_cast<double>(quantised.scale(r, c));
        const std::int32_t integer = quantised.code(r, c);
        const double error = std::abs(scale * integer - static_cast<double>(rows.get(r, c)));
        // What is as large as the largest but of the other sign loses a whole step.
        const double steps = integer == integers - 1 ? 1.00001 : 0.50001;
        ASSERT_LE(error, std::abs(scale) * steps) << "row " << r << ", column " << c;
      }
    }
  }
}

TEST_P(Quantisation, ProductsWithDequantisedPanelsAndWithCodesHaveTheBitsOfTheModel) {
  const std::int64_t n = 96;
  const std::int64_t k = emulated() ? 64 : 352;
  for (const Grouped& format : formats()) {
    if (emulated() && format.group == 64) continue;
    SCOPED_TRACE(format.name());
    Matrix rows(n, k, element_bytes());
    rows.fill_normal(random_, 0.1f);
    const QuantReference want = reference(rows, format);
    const QuantisedPanels quantised = quantise(rows, k, n / kPanelRows, format);
    const std::int64_t stride = kernels::panel_stride_bytes(k, element_bytes());
    std::vector<std::byte> panels(static_cast<std::size_t>(n / kPanelRows * stride));
    format.kernels.dequantise(quantised.panels(), 0, k, panels.data(), stride);
    expect_products({panels.data(), stride, n / kPanelRows, k}, want.weights, n, &quantised);
  }
}

// Backward: 32 columns dequantised, and transposed.
TEST_P(Quantisation, ProductsWithTransposedColumnsHaveTheBitsOfTheModel) {
  const std::int64_t n = emulated() ? 64 : 160;  // becomes k
  constexpr std::int64_t k = 96;
  constexpr std::int64_t q = 1;
  for (const Grouped& format : formats()) {
    if (format.group == 64) continue;
    SCOPED_TRACE(format.name());
    Matrix rows(n, k, element_bytes());
    rows.fill_normal(random_, 0.1f);
    const QuantReference want = reference(rows, format);
    const QuantisedPanels quantised = quantise(rows, k, n / kPanelRows, format);
    const std::int64_t block_bytes = kPanelRows * kPanelRows * element_bytes();
    std::vector<std::byte> blocks(static_cast<std::size_t>(n / kPanelRows * block_bytes));
    std::vector<std::byte> transposed(blocks.size());
    format.kernels.dequantise(quantised.panels(), q * kPanelRows, kPanelRows, blocks.data(), block_bytes);
    table().transpose_panels({blocks.data(), block_bytes, n / kPanelRows, kPanelRows}, 0, 1, transposed.data(), 0, {});
    std::vector<float> weights;
    for (std::int64_t r = 0; r < kPanelRows; ++r)
      for (std::int64_t c = 0; c < n; ++c)
        weights.push_back(want.weights[static_cast<std::size_t>(c * k + q * kPanelRows + r)]);
    expect_products({transposed.data(), 0, 1, n}, weights, kPanelRows);
  }
}

INSTANTIATE_TEST_SUITE_P(Tables, Quantisation, testing::ValuesIn(bf16_tables()), table_test_name);

TEST(QuantisationOfTables, IsThereForBf16OnlyAndForEveryQuantisedFormat) {
  for (const kernels::KernelTable* table : kernels::all_tables()) {
    std::vector<std::string_view> want;
    for (const kernels::StorageFormat& format : kernels::formats())
      if (format.quantised && format.element_bytes == table->element_bytes) want.push_back(format.name);
    std::vector<std::string_view> got;
    for (const QuantKernels& kernels : table->formats) got.push_back(kernels.format);
    EXPECT_EQ(got, want) << table->name;
    EXPECT_EQ(table->formats.empty(), table->element_bytes == 4) << table->name;
  }
}

}  // namespace
}  // namespace kt::test
