// pack, transpose_panels and gather move elements: everything arrives where kernel_table.h says, the rest is zero.
#include <cstring>

#include "tests/kernels/kernel_suite.h"

namespace kt::test {
namespace {

class Layout : public KernelTest {
 protected:
  // Element (row, column) of the packed matrix, by the definition in kernel_table.h.
  const std::byte* packed_element(const std::byte* panel, std::int64_t row, std::int64_t k) const {
    const std::int64_t index = element_bytes() == 2 ? (k / 2 * 32 + row) * 2 + k % 2 : k * 32 + row;
    return panel + index * element_bytes();
  }

  bool is_zero(const std::byte* element) const {
    const std::byte zero[4] = {};
    return std::memcmp(element, zero, static_cast<std::size_t>(element_bytes())) == 0;
  }

  bool same(const std::byte* a, const std::byte* b) const {
    return std::memcmp(a, b, static_cast<std::size_t>(element_bytes())) == 0;
  }

  void expect_packed(std::int64_t n, std::int64_t k, std::int64_t k_padded, std::int64_t num_panels) {
    Matrix rows(n, k, element_bytes(), 3);
    rows.fill_bits(random_);
    const PackedWeights packed(table(), rows, k_padded, num_panels);
    std::int64_t num_wrong = 0;
    for (std::int64_t r = 0; r < num_panels * 32; ++r) {
      for (std::int64_t c = 0; c < k_padded; ++c) {
        const std::byte* got = packed_element(packed.panel(r / 32), r % 32, c);
        const bool right = r < n && c < k ? same(got, rows.row(r) + c * element_bytes()) : is_zero(got);
        if (!right && num_wrong++ == 0) ADD_FAILURE() << "first wrong element: row " << r << ", column " << c;
      }
    }
    EXPECT_EQ(num_wrong, 0) << "n " << n << ", k " << k << " in " << num_panels << " panels of " << k_padded;
    EXPECT_TRUE(packed.guards_are_intact());
  }
};

TEST_P(Layout, PackPutsEveryElementInItsPlaceAndZerosElsewhere) {
  expect_packed(32, 32, 32, 1);
  expect_packed(1, 1, 32, 1);
  expect_packed(31, 33, 64, 1);
  expect_packed(33, 31, 32, 2);
  expect_packed(65, 95, 96, 3);
  expect_packed(8, 64, 64, 1);  // a LoRA matrix of rank 8
  expect_packed(40, 7, 32, 4);  // panels without any row
  expect_packed(0, 16, 32, 1);
  if (!emulated()) expect_packed(200, 300, 320, 7);
}

TEST_P(Layout, PackReadsOnlyTheRowsAndColumnsItIsGiven) {
  // Elements behind the last row and column are NaN bits (Matrix): one of them in a panel would be seen above, so here
  // only the memory of a vector exactly as long as the matrix is offered; a sanitizer sees what reads beyond it.
  std::vector<std::byte> exact(static_cast<std::size_t>(3 * 5 * element_bytes()), std::byte{1});
  std::vector<std::byte> panel(static_cast<std::size_t>(32 * 32 * element_bytes()), std::byte{0xff});
  table().pack({exact.data(), 5, 3, 5, 32, 1, panel.data(), 0});
  EXPECT_TRUE(is_zero(packed_element(panel.data(), 3, 0)));
  EXPECT_TRUE(is_zero(packed_element(panel.data(), 2, 5)));
  EXPECT_FALSE(is_zero(packed_element(panel.data(), 2, 4)));
}

TEST_P(Layout, TransposePanelPutsEveryElementInItsPlace) {
  constexpr std::int64_t n = 96;
  constexpr std::int64_t k = 64;
  Matrix rows(n, k, element_bytes());
  rows.fill_bits(random_);
  const PackedWeights packed(table(), rows, k, n / 32);
  const auto panel_bytes = static_cast<std::size_t>(n * 32 * element_bytes());
  for (std::int64_t q = 0; q < k / 32; ++q) {
    std::vector<std::byte> out(panel_bytes + 64, std::byte{0xff});
    table().transpose_panels(packed.panels(), q, 1, out.data(), 0, {});
    for (std::int64_t r = 0; r < 32; ++r)
      for (std::int64_t c = 0; c < n; ++c)
        ASSERT_TRUE(same(packed_element(out.data(), r, c), rows.row(c) + (q * 32 + r) * element_bytes()))
            << "row " << r << ", column " << c << " of panel " << q;
    for (std::size_t b = panel_bytes; b < out.size(); ++b) ASSERT_EQ(out[b], std::byte{0xff}) << "behind the panel";
  }
}

// With something to fetch, which changes nothing.
TEST_P(Layout, SeveralTransposedPanelsAreEachTheirOwn) {
  constexpr std::int64_t n = 64;
  constexpr std::int64_t k = 128;
  Matrix rows(n, k, element_bytes());
  rows.fill_bits(random_);
  const PackedWeights packed(table(), rows, k, n / 32);
  const std::int64_t panel_bytes = n * 32 * element_bytes();
  const std::int64_t stride = panel_bytes + 64;
  std::vector<std::byte> out(static_cast<std::size_t>(3 * stride), std::byte{0xff});
  table().transpose_panels(packed.panels(), 1, 3, out.data(), stride, {packed.panels().data, 64, 128, 9});
  for (std::int64_t q = 0; q < 3; ++q) {
    std::vector<std::byte> want(static_cast<std::size_t>(stride), std::byte{0xff});
    table().transpose_panels(packed.panels(), q + 1, 1, want.data(), 0, {});
    EXPECT_EQ(std::memcmp(want.data(), out.data() + q * stride, static_cast<std::size_t>(stride)), 0) << "panel " << q;
  }
}

TEST_P(Layout, TheTransposeOfTheTransposeIsTheOriginal) {
  const std::int64_t n = emulated() ? 64 : 160;
  const std::int64_t k = emulated() ? 32 : 224;
  Matrix rows(n, k, element_bytes());
  rows.fill_bits(random_);
  const PackedWeights packed(table(), rows, k, n / 32);
  const auto stride = static_cast<std::size_t>(n * 32 * element_bytes());
  std::vector<std::byte> transposed(static_cast<std::size_t>(k / 32) * stride);
  for (std::int64_t q = 0; q < k / 32; ++q)
    table().transpose_panels(packed.panels(), q, 1, transposed.data() + static_cast<std::size_t>(q) * stride, 0, {});
  const kernels::Panels wt{
      .data = transposed.data(), .stride = static_cast<std::int64_t>(stride), .num_panels = k / 32, .k = n};
  const auto panel_bytes = static_cast<std::size_t>(k * 32 * element_bytes());
  std::vector<std::byte> again(panel_bytes);
  for (std::int64_t p = 0; p < n / 32; ++p) {
    table().transpose_panels(wt, p, 1, again.data(), 0, {});
    EXPECT_EQ(std::memcmp(again.data(), packed.panel(p), panel_bytes), 0) << "panel " << p;
  }
}

TEST_P(Layout, GatherCopiesRowsAndPadsThemWithZeros) {
  for (const std::int64_t n : {1, 31, 64, 77}) {
    const std::int64_t n_padded = (n + 31) / 32 * 32;
    Matrix x(9, n, element_bytes(), 1);
    x.fill_bits(random_);
    const std::vector<std::int32_t> row = {8, 0, 3, 3, 7};
    Matrix out(5, n_padded, element_bytes(), 2);
    table().gather(x.data(), x.ld(), row.data(), 5, n, n_padded, out.data(), out.ld());
    for (std::int64_t i = 0; i < 5; ++i) {
      const auto bytes = static_cast<std::size_t>(n * element_bytes());
      EXPECT_EQ(std::memcmp(out.row(i), x.row(row[static_cast<std::size_t>(i)]), bytes), 0);
      for (std::int64_t c = n; c < n_padded; ++c) EXPECT_TRUE(is_zero(out.row(i) + c * element_bytes()));
    }
    EXPECT_TRUE(out.guards_are_intact());
    table().gather(x.data(), x.ld(), nullptr, 0, n, n_padded, nullptr, 0);  // no rows: touches nothing
  }
}

KT_INSTANTIATE_KERNEL_TESTS(Layout);

}  // namespace
}  // namespace kt::test
