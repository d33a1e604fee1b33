#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "tests/support/formats/format_reference.h"

namespace kt::test {
namespace {

constexpr std::int64_t kRows = 32;
constexpr std::int64_t kScaleBytes = kRows * 4;

// `digits` binary digits of x, cut, the last one made 1.
float cut_to_odd(float x, int digits) {
  int exponent = 0;
  const auto mantissa = static_cast<std::int64_t>(std::ldexp(std::frexp(std::abs(x), &exponent), digits));
  return std::copysign(static_cast<float>(std::ldexp(static_cast<double>(mantissa | 1), exponent - digits)), x);
}

// Makes the largest weight by magnitude, of equal ones a negative one, the lowest integer.
float scale_of(const float* group, std::int64_t count, std::int32_t integer_min) {
  float largest = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    if (!std::isfinite(group[i])) return std::numeric_limits<float>::quiet_NaN();
    if (std::abs(group[i]) > std::abs(largest) || group[i] == -std::abs(largest)) largest = group[i];
  }
  return std::abs(largest) < std::ldexp(1.0f, -100) ? 0 : cut_to_odd(largest / static_cast<float>(integer_min), 17);
}

QuantReference quantise(const std::vector<float>& rows, std::int64_t n, std::int64_t k, std::int64_t group,
                        std::int32_t integer_min) {
  QuantReference result;
  for (std::int64_t row = 0; row < n; ++row) {
    for (std::int64_t first = 0; first < k; first += group) {
      const float* weights = rows.data() + row * k + first;
      const std::int64_t count = std::min(group, k - first);
      const float scale = scale_of(weights, count, integer_min);
      result.scales.push_back(scale);
      for (std::int64_t i = 0; i < count; ++i) {
        const float steps = std::abs(scale) > 0 ? weights[i] * (1 / scale) : 0;
        const auto integer = std::min(static_cast<std::int32_t>(std::nearbyint(steps)), -integer_min - 1);
        result.codes.push_back(integer);
        result.weights.push_back(nearest_bf16(integer * static_cast<double>(scale)));
      }
    }
  }
  return result;
}

// The place of a code in the order of the panels of bf16.
std::int64_t place(std::int64_t row, std::int64_t k) { return (k / 2 * kRows + row) * 2 + k % 2; }

}  // namespace

QuantReference quantise_int8(const std::vector<float>& rows, std::int64_t n, std::int64_t k, std::int64_t group) {
  return quantise(rows, n, k, group, -128);
}
QuantReference quantise_int4(const std::vector<float>& rows, std::int64_t n, std::int64_t k, std::int64_t group) {
  return quantise(rows, n, k, group, -8);
}

std::int32_t int8_code(const std::byte* group, std::int64_t row, std::int64_t k) {
  return static_cast<std::int8_t>(group[kScaleBytes + place(row, k)]);
}

std::int32_t int4_code(const std::byte* group, std::int64_t row, std::int64_t k) {
  const std::int64_t at = place(row, k);
  std::uint32_t unit;  // 128 bytes of int8 are 16 units, whose bits 4j … belong to bytes 16j …
  std::memcpy(&unit, group + kScaleBytes + at / 128 * 64 + at % 16 * 4, sizeof unit);
  const auto nibble = static_cast<std::int32_t>(unit >> (at % 128 / 16 * 4) & 15);
  return nibble < 8 ? nibble : nibble - 16;
}

float integer_scale(const std::byte* group, std::int64_t row) {
  float value;
  std::memcpy(&value, group + row * 4, sizeof value);
  return value;
}

}  // namespace kt::test
