// The loop nests of the amx table in software tiles: the bits of the model at full size, and the counts that stand for
// speed where there is no AMX to measure.
#include <algorithm>
#include <cmath>

#include "tests/kernels/kernel_suite.h"
#include "tests/kernels/software_tile.h"
#include "tests/support/isa/bit_model.h"

namespace kt::test {
namespace {

using kernels::KernelTable;

const KernelTable& amx_table() {
  const auto all = kernels::all_tables();
  return **std::find_if(all.begin(), all.end(), [](const KernelTable* table) { return table->name == "amx"; });
}

// Panels are the same for every bf16 table.
const KernelTable& packer() { return *kernels::find_table("scalar", 2, nullptr); }

class AmxNest : public testing::Test {
 protected:
  void SetUp() override {
    if (!SoftwareTile::runs_here()) GTEST_SKIP() << "software tiles need a CPU with AVX2 and FMA";
    const auto seed = static_cast<std::uint32_t>(testing::UnitTest::GetInstance()->random_seed());
    random_.seed(seed);
    std::cout << "seed " << seed << "\n";
  }

  Matrix normal(std::int64_t rows, std::int64_t columns, std::int64_t element_bytes, std::int64_t gap) {
    Matrix matrix(rows, columns, element_bytes, gap);
    matrix.fill_normal(random_);
    return matrix;
  }

  // Rows [first, first + m) of C against the model.
  static void expect_model(const Matrix& a, const Matrix& w, const Matrix* start, const Matrix& got, std::int64_t first,
                           std::int64_t m) {
    Matrix want(m, w.num_rows(), 4);
    Matrix rows(m, w.num_rows(), 4);
    for (std::int64_t r = 0; r < m; ++r) {
      for (std::int64_t n = 0; n < w.num_rows(); ++n) {
        const float begin = start == nullptr ? 0.0f : start->get(first + r, n);
        want.set(r, n, dot_model(amx_table(), begin, a.row(first + r), w.row(n), a.num_columns()));
        rows.set(r, n, got.get(first + r, n));
      }
    }
    EXPECT_TRUE(same_matrix(want, rows)) << a.num_rows() << " x " << w.num_rows() << " x " << a.num_columns();
  }

  void expect_product(std::int64_t m, std::int64_t n, std::int64_t k, bool accumulate) {
    const Matrix a = normal(m, k, 2, 5);
    const Matrix w = normal(n, k, 2, 0);
    const PackedWeights packed(packer(), w, k, n / 32);
    const Matrix start = normal(m, n, 4, 3);
    Matrix c = accumulate ? start : Matrix(m, n, 4, 3);
    software_gemm(a.data(), a.ld(), m, packed.panels(), c.floats(), c.ld(), accumulate);
    expect_model(a, w, accumulate ? &start : nullptr, c, 0, m);
    EXPECT_TRUE(c.guards_are_intact());
  }

  // What gemm does for a product of that size; the values do not matter.
  static TileCounts count(std::int64_t m, std::int64_t num_panels, std::int64_t k, bool accumulate = false) {
    const std::int64_t stride = kernels::panel_stride_bytes(k, 2);
    const std::vector<std::byte> panels(static_cast<std::size_t>(num_panels * stride));
    const std::vector<std::uint16_t> a(static_cast<std::size_t>(m * k));
    std::vector<float> c(static_cast<std::size_t>(m * num_panels * 32));
    return software_gemm(a.data(), k, m, {panels.data(), stride, num_panels, k}, c.data(), num_panels * 32, accumulate);
  }

  static double macs(std::int64_t m, std::int64_t num_panels, std::int64_t k) {
    return static_cast<double>(m * num_panels * 32 * k);
  }

  std::mt19937 random_;
};

TEST_F(AmxNest, EveryShapeOfBlocksHasTheBitsOfTheModel) {
  std::vector<std::int64_t> row_counts = {52, 64, 70, 100};
  for (std::int64_t m = 1; m <= 40; ++m) row_counts.push_back(m);
  for (const std::int64_t m : row_counts) {
    expect_product(m, 32, 32, false);
    expect_product(m, 96, 64, true);
    if (m % 7 != 0 && m < 52) continue;
    expect_product(m, 64, 288, true);  // blocks of k: 256 and the rest
    expect_product(m, 96, 544, false);
  }
}

TEST_F(AmxNest, NoRowsAreNoInstructions) {
  const TileCounts counts = count(0, 3, 64);
  EXPECT_EQ(counts.configures + counts.loads + counts.stores + counts.dots, 0u);
}

TEST_F(AmxNest, NoDepthIsZeroOrC) {
  const kernels::Panels w{.data = nullptr, .stride = 0, .num_panels = 3, .k = 0};
  for (const std::int64_t m : {1, 16, 40, 64}) {
    Matrix c = normal(m, 96, 4, 1);
    const Matrix before = c;
    software_gemm(nullptr, 0, m, w, c.floats(), c.ld(), true);
    EXPECT_TRUE(same_matrix(before, c));
    software_gemm(nullptr, 0, m, w, c.floats(), c.ld(), false);
    for (std::int64_t r = 0; r < m; ++r)
      for (std::int64_t n = 0; n < 96; ++n) EXPECT_EQ(c.get(r, n), 0.0f);
  }
}

// Gate and up of an expert of Qwen3-30B-A3B, a batch of 128 rows.
TEST_F(AmxNest, AtFullSizeRowsHaveTheBitsOfTheModelAndDoNotDependOnTheirCompany) {
  constexpr std::int64_t m = 128, n = 1536, k = 2048;
  const Matrix a = normal(m, k, 2, 32);
  const Matrix w = normal(n, k, 2, 0);
  const PackedWeights packed(packer(), w, k, n / 32);
  Matrix together(m, n, 4);
  software_gemm(a.data(), a.ld(), m, packed.panels(), together.floats(), together.ld(), false);
  for (const std::int64_t row : {0, 61, 127}) expect_model(a, w, nullptr, together, row, 1);
  Matrix apart(m, n, 4);
  for (std::int64_t row = 0; row < m;) {
    const std::int64_t count = std::min(m - row, std::uniform_int_distribution<std::int64_t>(1, 40)(random_));
    software_gemm(a.row(row), a.ld(), count, packed.panels(), apart.floats() + row * n, n, false);
    row += count;
  }
  EXPECT_TRUE(same_matrix(together, apart));
}

// The ideal is one TDPBF16PS, 16 cycles, for each 16 · 16 · 32 multiplications; loads and stores run beside them.
TEST_F(AmxNest, ModelledCyclesFrom64RowsAreWithin15PercentOfTheIdeal) {
  double worst_whole = 0;
  double worst_rows = 0;
  for (const auto& [num_panels, k] : {std::pair<std::int64_t, std::int64_t>{2, 2048}, {2, 768}, {1, 2048}}) {
    for (std::int64_t m = 64; m <= 256; ++m) {
      const TileCounts c = count(m, num_panels, k, m % 2 == 0);
      ASSERT_EQ(static_cast<double>(c.dot_rows) * 16 * 32, macs(m, num_panels, k)) << "a padded row, m " << m;
      const double ideal = macs(m, num_panels, k) / (16 * 32);
      const auto moved_whole = static_cast<double>(8 * c.loads + 16 * c.stores);
      const auto moved = static_cast<double>(c.load_rows) / 2 + static_cast<double>(c.store_rows);
      const auto dots_whole = static_cast<double>(16 * c.dots);
      worst_whole = std::max(worst_whole, std::max(dots_whole, moved_whole) / dots_whole);
      worst_rows = std::max(worst_rows, std::max(static_cast<double>(c.dot_rows), moved) / ideal);
      // Even if a TDPBF16PS of few rows took 16 cycles, nearly nothing but whole tiles would be lost: as few row tiles
      // as m needs, one more for a lone panel's rest.
      const std::int64_t row_tiles = (m + 15) / 16 + (num_panels == 1 && (m + 15) / 16 % 2 == 1 ? 1 : 0);
      EXPECT_LE(c.dots, static_cast<std::uint64_t>(row_tiles * 2 * num_panels * k / 32)) << "m " << m;
    }
  }
  std::cout << "modelled / ideal cycles, worst of m 64 to 256: " << worst_whole << " with whole tiles, " << worst_rows
            << " by rows\n";
  EXPECT_LE(worst_whole, 1.15);
  EXPECT_LE(worst_rows, 1.15);
}

TEST_F(AmxNest, TileLoadsPerUsefulMultiplicationStayLow) {
  struct Limit {
    std::int64_t m;
    std::int64_t num_panels;
    double bytes_per_mac;
  };
  // 2 × 2 tiles: 4 KB for 32 · 32 · 32; 1 × 4: 4 KB of B and 64 bytes per row of A for 64 · 32 per row.
  for (const Limit& limit : {Limit{1, 2, 2.04}, Limit{4, 2, 0.54}, Limit{16, 2, 0.157}, Limit{16, 1, 0.19},
                             Limit{32, 2, 0.126}, Limit{64, 2, 0.141}, Limit{128, 2, 0.141}, Limit{256, 1, 0.141}}) {
    const TileCounts c = count(limit.m, limit.num_panels, 2048);
    const double bytes = static_cast<double>(c.load_bytes) / macs(limit.m, limit.num_panels, 2048);
    std::cout << "m " << limit.m << ", " << limit.num_panels << " panels: " << c.loads << " loads, " << c.dots
              << " TDPBF16PS, " << c.stores << " stores, " << bytes << " bytes loaded per multiplication\n";
    EXPECT_LE(bytes, limit.bytes_per_mac) << "m " << limit.m;
    if (limit.m >= 16) {
      EXPECT_LE(8 * c.loads + 16 * c.stores, 16 * c.dots) << "m " << limit.m << ": bound by moving tiles";
    }
  }
  for (std::int64_t m = 64; m <= 256; ++m)
    EXPECT_LE(static_cast<double>(count(m, 2, 2048).load_bytes) / macs(m, 2, 2048), 0.17) << "m " << m;
}

TEST_F(AmxNest, FourAccumulatorsAreInFlight) {
  for (std::int64_t m = 2; m <= 100; ++m)
    for (const std::int64_t num_panels : {1, 2, 3}) EXPECT_GE(count(m, num_panels, 96).dot_distance_min, 4u) << m;
  EXPECT_GE(count(1, 2, 96).dot_distance_min, 4u);
  EXPECT_EQ(count(1, 1, 96).dot_distance_min, 2u) << "one row of one panel has no more";
}

TEST_F(AmxNest, TilesAreConfiguredAtMostThreeTimesACall) {
  for (std::int64_t m = 1; m <= 200; ++m)
    for (const std::int64_t num_panels : {1, 2, 5}) EXPECT_LE(count(m, num_panels, 32).configures, 3u) << m;
}

}  // namespace
}  // namespace kt::test
