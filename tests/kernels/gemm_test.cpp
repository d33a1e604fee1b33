// gemm of every table: the bits of its dot instruction's model, for every number of rows, position and company, and
// fp64 within the tolerance of fp32 accumulation.
#include <algorithm>
#include <cmath>

#include "tests/kernels/kernel_suite.h"
#include "tests/support/isa/bit_model.h"

namespace kt::test {
namespace {

using kernels::Panels;

struct Shape {
  std::int64_t n;
  std::int64_t k;
};

enum class Values { kNormal, kAnyBits, kNearSubnormal };

class Gemm : public KernelTest {
 protected:
  // Odd and even numbers of panels; k below, at and above what `scalar` (256) and `avx2` (1024) take at a time.
  std::vector<Shape> shapes() const {
    std::vector<Shape> all = {{32, 32}, {64, 64}, {160, 96}};
    if (!emulated()) all.insert(all.end(), {{96, 256}, {32, 544}, {128, 288}, {64, 1024}, {64, 1056}});
    if (table().k_multiple < 32) all.insert(all.end(), {{32, table().k_multiple}, {96, 48}});
    return all;
  }

  std::int64_t max_rows() const { return *std::max_element(row_counts().begin(), row_counts().end()); }
  const std::vector<std::int64_t>& row_counts() const { return suite_config().row_counts; }

  Matrix make(std::int64_t rows, std::int64_t columns, Values values, std::int64_t gap) {
    Matrix m(rows, columns, element_bytes(), gap);
    if (values == Values::kAnyBits) {
      m.fill_bits(random_);
    } else {
      // 2^-63 each: products lie around the smallest normal number.
      m.fill_normal(random_, values == Values::kNormal ? 1.0f : std::ldexp(1.0f, -63));
    }
    return m;
  }

  Matrix make_floats(std::int64_t rows, std::int64_t columns, Values values) {
    Matrix m(rows, columns, 4, 3);
    if (values == Values::kAnyBits) {
      m.fill_bits(random_);
    } else {
      m.fill_normal(random_, values == Values::kNormal ? 1.0f : std::ldexp(1.0f, -126));
    }
    return m;
  }

  // What C must be; start null: not accumulating.
  Matrix model(const Matrix& a, const Matrix& w, const Matrix* start) const {
    Matrix c(a.num_rows(), w.num_rows(), 4, 3);
    for (std::int64_t m = 0; m < a.num_rows(); ++m)
      for (std::int64_t n = 0; n < w.num_rows(); ++n)
        c.set(m, n,
              dot_model(table(), start == nullptr ? 0.0f : start->get(m, n), a.row(m), w.row(n), a.num_columns()));
    return c;
  }

  // Computes rows [first, first + m) alone and compares them with the model's.
  void expect_rows(const Matrix& a, const Panels& w, const Matrix* start, const Matrix& want, std::int64_t first,
                   std::int64_t m) {
    Matrix got(m, want.num_columns(), 4, 3);
    Matrix expected(m, want.num_columns(), 4, 3);
    for (std::int64_t r = 0; r < m; ++r) {
      for (std::int64_t c = 0; c < want.num_columns(); ++c) {
        expected.set(r, c, want.get(first + r, c));
        if (start != nullptr) got.set(r, c, start->get(first + r, c));
      }
    }
    table().gemm(a.row(first), a.ld(), m, w, got.floats(), got.ld(), start != nullptr, {});
    EXPECT_TRUE(same_matrix(expected, got))
        << "rows " << first << " to " << first + m << ", n " << want.num_columns() << ", k " << w.k;
    EXPECT_TRUE(got.guards_are_intact());
  }

  void expect_model(const Shape& shape, Values values, bool accumulate) {
    const Matrix a = make(max_rows(), shape.k, values, 5);
    const Matrix w = make(shape.n, shape.k, values, 7);
    const Matrix start = make_floats(max_rows(), shape.n, values);
    const Matrix want = model(a, w, accumulate ? &start : nullptr);
    const PackedWeights packed(table(), w, shape.k, shape.n / kernels::kPanelRows);
    for (const std::int64_t m : row_counts()) {
      const std::int64_t first = std::uniform_int_distribution<std::int64_t>(0, max_rows() - m)(random_);
      expect_rows(a, packed.panels(), accumulate ? &start : nullptr, want, first, m);
    }
  }
};

TEST_P(Gemm, ARowHasTheBitsOfTheModelForEveryNumberOfRowsAndPosition) {
  for (const Shape& shape : shapes()) expect_model(shape, Values::kNormal, false);
}

TEST_P(Gemm, AccumulatingStartsTheReductionFromC) {
  for (const Shape& shape : shapes()) expect_model(shape, Values::kNormal, true);
}

TEST_P(Gemm, NanInfinitiesAndSubnormalsFollowTheModel) {
  expect_model({64, 32}, Values::kAnyBits, true);
  expect_model({96, 64}, Values::kNearSubnormal, true);
  expect_model({32, 64}, Values::kNearSubnormal, false);
}

// More rows and more of k than any table takes at a time.
TEST_P(Gemm, ManyRowsOfGreatDepthHaveTheBitsOfTheModel) {
  const Matrix a = make(70, 320, Values::kNormal, 0);
  const Matrix w = make(96, 320, Values::kNormal, 0);
  const Matrix start = make_floats(70, 96, Values::kNormal);
  const PackedWeights packed(table(), w, 320, 3);
  for (const Matrix* from : {&start, static_cast<const Matrix*>(nullptr)})
    expect_rows(a, packed.panels(), from, model(a, w, from), 0, 70);
}

// k may come in two calls, or the panels of the second part continue those of the first.
TEST_P(Gemm, AProductInTwoPartsOfKHasTheBitsOfTheWhole) {
  constexpr std::int64_t kFirst = 64;
  constexpr std::int64_t kColumns = 96;
  constexpr std::int64_t kPanels = kColumns / kernels::kPanelRows;
  for (const std::int64_t second_k : {table().k_multiple, std::int64_t{64}}) {
    const Matrix a = make(max_rows(), kFirst + second_k, Values::kNormal, 6);
    const Matrix w = make(kColumns, kFirst + second_k, Values::kNormal, 0);
    const Matrix want = model(a, w, nullptr);
    Matrix first(kColumns, kFirst, element_bytes());
    Matrix second(kColumns, second_k, element_bytes());
    for (std::int64_t n = 0; n < kColumns; ++n) {
      for (std::int64_t k = 0; k < kFirst; ++k) first.set(n, k, w.get(n, k));
      for (std::int64_t k = 0; k < second_k; ++k) second.set(n, k, w.get(n, kFirst + k));
    }
    const PackedWeights first_packed(table(), first, kFirst, kPanels);
    const PackedWeights second_packed(table(), second, std::max(second_k, kernels::kPanelRows), kPanels);
    Panels behind = second_packed.panels();
    behind.k = second_k;
    Panels continued = first_packed.panels();
    continued.more = &behind;
    for (const std::int64_t m : row_counts()) {
      Matrix got(m, kColumns, 4);
      table().gemm(a.data(), a.ld(), m, first_packed.panels(), got.floats(), got.ld(), false, {});
      table().gemm(a.data() + kFirst * element_bytes(), a.ld(), m, behind, got.floats(), got.ld(), true, {});
      Matrix expected(m, kColumns, 4);
      for (std::int64_t r = 0; r < m; ++r)
        for (std::int64_t n = 0; n < kColumns; ++n) expected.set(r, n, want.get(r, n));
      EXPECT_TRUE(same_matrix(expected, got)) << "two calls, rows " << m << ", second k " << second_k;
      expect_rows(a, continued, nullptr, want, 0, m);
    }
  }
}

// Products with rows that are said to be zero may be left out: C has zeros there either way.
TEST_P(Gemm, RowsBehindTheLastOnesAreZeroInC) {
  constexpr std::int64_t kK = 64;
  for (const std::int64_t num_panels : {1, 3}) {
    const std::int64_t n = num_panels * kernels::kPanelRows;
    for (const std::int64_t last_rows : {1, 16, 17, 32}) {
      const Matrix a = make(max_rows(), kK, Values::kNormal, 0);
      Matrix w = make(n, kK, Values::kNormal, 0);
      for (std::int64_t row = n - kernels::kPanelRows + last_rows; row < n; ++row)
        for (std::int64_t k = 0; k < kK; ++k) w.set(row, k, 0.0f);
      const PackedWeights packed(table(), w, kK, num_panels);
      Panels panels = packed.panels();
      panels.last_rows = last_rows;
      const Matrix want = model(a, w, nullptr);
      for (const std::int64_t m : row_counts()) expect_rows(a, panels, nullptr, want, 0, m);
    }
  }
}

TEST_P(Gemm, EverySecondPanelIsAViewLikeAnyOther) {
  const Matrix a = make(3, 32, Values::kNormal, 0);
  const Matrix w = make(160, 32, Values::kNormal, 0);
  const PackedWeights packed(table(), w, 32, 5);
  Panels odd = packed.panels();
  odd.data += odd.stride;
  odd.stride *= 2;
  odd.num_panels = 2;
  Matrix got(3, 64, 4);
  table().gemm(a.data(), a.ld(), 3, odd, got.floats(), got.ld(), false, {});
  Matrix want(3, 64, 4);
  for (std::int64_t m = 0; m < 3; ++m)
    for (std::int64_t n = 0; n < 64; ++n)
      want.set(m, n, dot_model(table(), 0.0f, a.row(m), w.row(32 + n / 32 * 64 + n % 32), 32));
  EXPECT_TRUE(same_matrix(want, got));
}

TEST_P(Gemm, MeetsFp64WithinTheToleranceOfFp32Accumulation) {
  const Shape shape = emulated() ? Shape{64, 96} : Shape{96, 2048};
  const std::int64_t m = std::min<std::int64_t>(17, max_rows());
  const Matrix a = make(m, shape.k, Values::kNormal, 0);
  const Matrix w = make(shape.n, shape.k, Values::kNormal, 0);
  Matrix got(m, shape.n, 4);
  table().gemm(a.data(), a.ld(), m, PackedWeights(table(), w, shape.k, shape.n / 32).panels(), got.floats(), got.ld(),
               false, {});
  double error = 0;
  double norm = 0;
  for (std::int64_t r = 0; r < m; ++r) {
    for (std::int64_t n = 0; n < shape.n; ++n) {
      double want = 0;
      for (std::int64_t k = 0; k < shape.k; ++k) want += double{a.get(r, k)} * double{w.get(n, k)};
      error += (want - double{got.get(r, n)}) * (want - double{got.get(r, n)});
      norm += want * want;
    }
  }
  EXPECT_LT(std::sqrt(error / norm), 3e-6);  // √k roundings of 2^-25 each, k = 2048, are 1.4e-6
}

// Backward's product: a panel of Wᵀ made in scratch, then the same gemm.
TEST_P(Gemm, ATransposedPanelGivesTheProductWithTheTranspose) {
  const std::int64_t n = emulated() ? 64 : 224;  // becomes k
  const std::int64_t k = emulated() ? 64 : 96;   // becomes n
  const std::int64_t m = std::min<std::int64_t>(7, max_rows());
  const Matrix w = make(n, k, Values::kNormal, 0);
  const Matrix dy = make(m, n, Values::kNormal, 0);
  const PackedWeights packed(table(), w, k, n / 32);
  Matrix wt(k, n, element_bytes());
  for (std::int64_t r = 0; r < n; ++r)
    for (std::int64_t c = 0; c < k; ++c) wt.set(c, r, w.get(r, c));
  Matrix got(m, k, 4);
  for (std::int64_t q = 0; q < k / 32; ++q) {
    std::vector<std::byte> scratch(static_cast<std::size_t>(n * 32 * element_bytes()));
    table().transpose_panels(packed.panels(), q, 1, scratch.data(), 0, {});
    const Panels one{.data = scratch.data(), .stride = 0, .num_panels = 1, .k = n};
    table().gemm(dy.data(), dy.ld(), m, one, got.floats() + q * 32, got.ld(), false, {});
  }
  EXPECT_TRUE(same_matrix(model(dy, wt, nullptr), got));
}

KT_INSTANTIATE_KERNEL_TESTS(Gemm);

}  // namespace
}  // namespace kt::test
