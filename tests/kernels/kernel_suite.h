// What the kernel tests share: the tables under test, guarded matrices, seeds.
#pragma once
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "kernels/kernel_table.h"

namespace kt::kernels {
// Found by argument-dependent lookup; keeps addresses out of test output.
inline void PrintTo(const KernelTable* table, std::ostream* out) { *out << table->name; }
}  // namespace kt::kernels

namespace kt::test {

// Which tables this binary tests, and how large its shapes are. Defined by suite_native.cpp and suite_emulated.cpp.
struct SuiteConfig {
  std::vector<const kernels::KernelTable*> tables;
  std::vector<std::int64_t> row_counts;  // every M the GEMM is tried with
  bool emulated;                         // an instruction costs a microsecond: keep shapes small
};
const SuiteConfig& suite_config();

// Elements of 2 (bf16) or 4 bytes (float) in rows of `ld`, between canaries, first filled with NaN bits. Starts on an
// odd element, so that nobody relies on alignment.
class Matrix {
 public:
  Matrix(std::int64_t num_rows, std::int64_t num_columns, std::int64_t element_bytes, std::int64_t gap = 0);

  std::int64_t num_rows() const { return num_rows_; }
  std::int64_t num_columns() const { return num_columns_; }
  std::int64_t ld() const { return ld_; }
  std::byte* row(std::int64_t r) { return bytes_.data() + kGuardBytes + element_bytes_ + r * ld_ * element_bytes_; }
  const std::byte* row(std::int64_t r) const { return const_cast<Matrix*>(this)->row(r); }
  std::byte* data() { return row(0); }
  const std::byte* data() const { return row(0); }
  float* floats() { return static_cast<float*>(static_cast<void*>(data())); }
  const float* floats() const { return const_cast<Matrix*>(this)->floats(); }

  float get(std::int64_t r, std::int64_t c) const;
  void set(std::int64_t r, std::int64_t c, float value);  // rounds to the element type
  void fill_normal(std::mt19937& random, float deviation = 1.0f);
  void fill_bits(std::mt19937& random);  // any bits: NaN, infinities, subnormals

  // Nothing outside the rows and columns was written.
  testing::AssertionResult guards_are_intact() const;

 private:
  static constexpr std::int64_t kGuardBytes = 128;
  static constexpr std::byte kPoison{0xff};

  std::int64_t num_rows_;
  std::int64_t num_columns_;
  std::int64_t ld_;
  std::int64_t element_bytes_;
  std::vector<std::byte> bytes_;
};

// Same bits everywhere, NaN equal to NaN; names the first difference and the largest ones.
testing::AssertionResult same_matrix(const Matrix& want, const Matrix& got);

// A packed weight matrix with canaries in the pad of every panel.
class PackedWeights {
 public:
  PackedWeights(const kernels::KernelTable& table, const Matrix& rows, std::int64_t k_padded, std::int64_t num_panels);
  kernels::Panels panels() const { return panels_; }
  const std::byte* panel(std::int64_t p) const { return panels_.data + p * panels_.stride; }
  testing::AssertionResult guards_are_intact() const;

 private:
  std::int64_t panel_bytes_;
  std::vector<std::byte> bytes_;
  kernels::Panels panels_;
};

// One test per table; skipped, visibly, where this CPU cannot run the table. Prints its seed.
class KernelTest : public testing::TestWithParam<const kernels::KernelTable*> {
 protected:
  void SetUp() override;
  const kernels::KernelTable& table() const { return *GetParam(); }
  std::int64_t element_bytes() const { return GetParam()->element_bytes; }
  bool emulated() const { return suite_config().emulated; }

  std::mt19937 random_;
};

std::string table_test_name(const testing::TestParamInfo<const kernels::KernelTable*>& param_info);

#define KT_INSTANTIATE_KERNEL_TESTS(Suite) \
  INSTANTIATE_TEST_SUITE_P(Tables, Suite, testing::ValuesIn(kt::test::suite_config().tables), kt::test::table_test_name)

}  // namespace kt::test
