#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "tests/support/formats/format_reference.h"

namespace kt::test {
namespace {

constexpr std::int64_t kBlockRows = 128;

float scale_of(const std::vector<float>& rows, std::int64_t k, std::int64_t row, std::int64_t num_rows,
               std::int64_t column, std::int64_t num_columns) {
  float largest = 0;
  for (std::int64_t r = row; r < row + num_rows; ++r) {
    for (std::int64_t c = column; c < column + num_columns; ++c) {
      const float weight = rows[static_cast<std::size_t>(r * k + c)];
      if (std::isfinite(weight)) largest = std::max(largest, std::abs(weight));
    }
  }
  return largest < std::ldexp(1.0f, -100) ? 0 : largest / 448;
}

// Looks at every code that is a number: the nearest one, of two equally near the one whose mantissa is even.
std::int32_t nearest_code(float x) {
  std::int32_t best = std::isfinite(x) ? 0 : 127;
  for (std::int32_t code = 1; code < 127 && std::isfinite(x); ++code) {
    const double nearer = std::abs(std::abs(static_cast<double>(x)) - fp8_value(best)) -
                          std::abs(std::abs(static_cast<double>(x)) - fp8_value(code));
    if (nearer > 0 || (nearer >= 0 && code % 2 == 0)) best = code;
  }
  return best | (std::signbit(x) ? 128 : 0);
}

}  // namespace

double fp8_value(std::int32_t code) {
  const int exponent = code >> 3 & 15;
  const int mantissa = code & 7;
  if (exponent == 15 && mantissa == 7) return std::numeric_limits<double>::quiet_NaN();
  const double value = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return code < 128 ? value : -value;
}

QuantReference quantise_fp8(const std::vector<float>& rows, std::int64_t n, std::int64_t k, std::int64_t group) {
  QuantReference result;
  for (std::int64_t row = 0; row < n; ++row) {
    const std::int64_t first_row = row / kBlockRows * kBlockRows;
    for (std::int64_t first = 0; first < k; first += group) {
      const std::int64_t count = std::min(group, k - first);
      const float scale = scale_of(rows, k, first_row, std::min(kBlockRows, n - first_row), first, count);
      result.scales.push_back(scale);
      for (std::int64_t i = 0; i < count; ++i) {
        const std::int32_t code =
            nearest_code(rows[static_cast<std::size_t>(row * k + first + i)] / (scale > 0 ? scale : 1));
        result.codes.push_back(code);
        result.weights.push_back(nearest_bf16(fp8_value(code) * static_cast<double>(scale)));
      }
    }
  }
  return result;
}

std::int32_t fp8_code(const std::byte* group, std::int64_t row, std::int64_t k) {
  return static_cast<std::uint8_t>(group[64 + (k / 2 * 32 + row) * 2 + k % 2]);
}

float fp8_scale(const std::byte* group, std::int64_t) {
  float value;
  std::memcpy(&value, group, sizeof value);
  return value;
}

}  // namespace kt::test
