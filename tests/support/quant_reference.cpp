#include "tests/support/quant_reference.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace kt::test {
namespace {

// `digits` binary digits of x, cut, the last one made 1.
float cut_to_odd(float x, int digits) {
  int exponent = 0;
  const auto mantissa = static_cast<std::int64_t>(std::ldexp(std::frexp(std::abs(x), &exponent), digits));
  return std::copysign(static_cast<float>(std::ldexp(static_cast<double>(mantissa | 1), exponent - digits)), x);
}

// The bf16 nearest to x, of two equally near the even one: 8 binary digits.
float nearest_bf16(double x) {
  if (!std::isfinite(x) || x == 0) return static_cast<float>(x);
  int exponent = 0;
  const double digits = std::ldexp(std::frexp(x, &exponent), 8);
  return static_cast<float>(std::ldexp(std::nearbyint(digits), exponent - 8));
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

}  // namespace

QuantReference quant_reference(const std::vector<float>& rows, std::int64_t n, std::int64_t k, std::int32_t bits,
                               std::int32_t group) {
  QuantReference result;
  for (std::int64_t row = 0; row < n; ++row) {
    for (std::int64_t first = 0; first < k; first += group) {
      const float* weights = rows.data() + row * k + first;
      const std::int64_t count = std::min<std::int64_t>(group, k - first);
      const std::int32_t integer_min = bits == 8 ? -128 : -8;
      const float scale = scale_of(weights, count, integer_min);
      result.scales.push_back(scale);
      for (std::int64_t i = 0; i < count; ++i) {
        const float steps = std::abs(scale) > 0 ? weights[i] * (1 / scale) : 0;
        const auto integer = std::min(static_cast<std::int32_t>(std::nearbyint(steps)), -integer_min - 1);
        result.integers.push_back(integer);
        result.weights.push_back(nearest_bf16(integer * static_cast<double>(scale)));
      }
    }
  }
  return result;
}

}  // namespace kt::test
