#include "tests/kernels/kernel_suite.h"

#include <cmath>
#include <cstring>
#include <iostream>

#include "kernels/cpu_features.h"
#include "tests/support/isa/bit_model.h"

namespace kt::test {

using kernels::KernelTable;

Matrix::Matrix(std::int64_t num_rows, std::int64_t num_columns, std::int64_t element_bytes, std::int64_t gap)
    : num_rows_(num_rows),
      num_columns_(num_columns),
      ld_(num_columns + gap),
      element_bytes_(element_bytes),
      bytes_(static_cast<std::size_t>(2 * kGuardBytes + element_bytes * (1 + num_rows * ld_)), kPoison) {}

float Matrix::get(std::int64_t r, std::int64_t c) const {
  const std::byte* at = row(r) + c * element_bytes_;
  if (element_bytes_ == 2) {
    std::uint16_t bits;
    std::memcpy(&bits, at, sizeof bits);
    return from_bf16(bits);
  }
  float value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

void Matrix::set(std::int64_t r, std::int64_t c, float value) {
  std::byte* at = row(r) + c * element_bytes_;
  const std::uint16_t bits = to_bf16(value);
  std::memcpy(at, element_bytes_ == 2 ? static_cast<const void*>(&bits) : &value,
              static_cast<std::size_t>(element_bytes_));
}

void Matrix::fill_normal(std::mt19937& random, float deviation) {
  std::normal_distribution<float> normal(0.0f, deviation);
  for (std::int64_t r = 0; r < num_rows_; ++r)
    for (std::int64_t c = 0; c < num_columns_; ++c) set(r, c, normal(random));
}

void Matrix::fill_bits(std::mt19937& random) {
  for (std::int64_t r = 0; r < num_rows_; ++r)
    for (std::int64_t b = 0; b < num_columns_ * element_bytes_; ++b) row(r)[b] = static_cast<std::byte>(random());
}

testing::AssertionResult Matrix::guards_are_intact() const {
  std::vector<bool> owned(bytes_.size(), false);
  for (std::int64_t r = 0; r < num_rows_; ++r) {
    const auto first = static_cast<std::size_t>(row(r) - bytes_.data());
    for (std::size_t b = 0; b < static_cast<std::size_t>(num_columns_ * element_bytes_); ++b) owned[first + b] = true;
  }
  for (std::size_t b = 0; b < bytes_.size(); ++b) {
    if (!owned[b] && bytes_[b] != kPoison)
      return testing::AssertionFailure() << "byte " << b << " of " << bytes_.size() << ", outside the matrix of "
                                         << num_rows_ << " x " << num_columns_ << ", was overwritten";
  }
  return testing::AssertionSuccess();
}

testing::AssertionResult same_matrix(const Matrix& want, const Matrix& got) {
  std::int64_t num_different = 0;
  std::string first;
  double max_abs = 0;
  double max_rel = 0;
  for (std::int64_t r = 0; r < want.num_rows(); ++r) {
    for (std::int64_t c = 0; c < want.num_columns(); ++c) {
      const float w = want.get(r, c);
      const float g = got.get(r, c);
      if (same_bits(w, g)) continue;
      if (num_different++ == 0)
        first = "[" + std::to_string(r) + ", " + std::to_string(c) + "] want " + testing::PrintToString(w) + " got " +
                testing::PrintToString(g);
      max_abs = std::fmax(max_abs, std::fabs(double{w} - double{g}));
      max_rel = std::fmax(max_rel, std::fabs(double{w} - double{g}) / std::fabs(double{w}));
    }
  }
  if (num_different == 0) return testing::AssertionSuccess();
  return testing::AssertionFailure() << num_different << " of " << want.num_rows() << " x " << want.num_columns()
                                     << " differ, first " << first << ", max abs " << max_abs << ", max rel "
                                     << max_rel;
}

PackedWeights::PackedWeights(const KernelTable& table, const Matrix& rows, std::int64_t k_padded,
                             std::int64_t num_panels)
    : panel_bytes_(k_padded * kernels::kPanelRows * table.element_bytes) {
  const std::int64_t stride = kernels::panel_stride_bytes(k_padded, table.element_bytes);
  bytes_.assign(static_cast<std::size_t>(num_panels * stride), std::byte{0xff});
  panels_ = {.data = bytes_.data(), .stride = stride, .num_panels = num_panels, .k = k_padded};
  table.pack(
      {rows.data(), rows.ld(), rows.num_rows(), rows.num_columns(), k_padded, num_panels, bytes_.data(), stride});
}

testing::AssertionResult PackedWeights::guards_are_intact() const {
  for (std::int64_t p = 0; p < panels_.num_panels; ++p)
    for (std::int64_t b = panel_bytes_; b < panels_.stride; ++b)
      if (panel(p)[b] != std::byte{0xff})
        return testing::AssertionFailure() << "byte " << b << " of panel " << p << ", in its pad, was overwritten";
  return testing::AssertionSuccess();
}

void KernelTest::SetUp() {
  const std::string missing = kernels::missing_cpu_features(table().required);
  if (!missing.empty()) GTEST_SKIP() << table().name << " needs what this CPU lacks: " << missing;
  const auto seed = static_cast<std::uint32_t>(testing::UnitTest::GetInstance()->random_seed());
  random_.seed(seed);
  std::cout << "seed " << seed << " (repeat with --gtest_random_seed=" << seed << ")\n";
}

std::string table_test_name(const testing::TestParamInfo<const KernelTable*>& param_info) {
  return std::string(param_info.param->name) + (param_info.param->element_bytes == 2 ? "_bf16" : "_fp32");
}

}  // namespace kt::test
