#include "coproc/model/convert.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "tests/support/checkpoint_writer.h"

namespace kt::coproc {
namespace {

std::uint16_t to_bf16(float value) {
  std::uint16_t out = 0;
  convert_elements(DType::kF32, &value, ElementType::kBf16, &out, 1);
  return out;
}
float from_bf16(std::uint16_t bits) {
  float out = 0;
  convert_elements(DType::kBf16, &bits, ElementType::kFp32, &out, 1);
  return out;
}
float from_f16(std::uint16_t bits) {
  float out = 0;
  convert_elements(DType::kF16, &bits, ElementType::kFp32, &out, 1);
  return out;
}

// By arithmetic on the fields, in double.
double value_of_f16(std::uint16_t bits) {
  const int exponent = (bits >> 10) & 31;
  const int mantissa = bits & 1023;
  const double magnitude = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

TEST(Convert, EveryF16ValueBecomesThatFloat) {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    const float value = from_f16(half);
    ASSERT_EQ(std::signbit(value), (bits & 0x8000) != 0) << std::hex << bits;
    if ((bits & 0x7c00) != 0x7c00) {
      ASSERT_EQ(static_cast<double>(value), value_of_f16(half)) << std::hex << bits;
    } else if ((bits & 0x3ff) == 0) {
      ASSERT_TRUE(std::isinf(value)) << std::hex << bits;
    } else {
      ASSERT_TRUE(std::isnan(value)) << std::hex << bits;
    }
  }
}

TEST(Convert, EveryBf16ValueSurvivesFp32) {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = from_bf16(static_cast<std::uint16_t>(bits));
    ASSERT_EQ(std::bit_cast<std::uint32_t>(value), bits << 16);
    const bool is_nan = (bits & 0x7f80) == 0x7f80 && (bits & 0x7f) != 0;
    ASSERT_EQ(to_bf16(value), is_nan ? bits | 0x40 : bits) << std::hex << bits;
  }
}

TEST(Convert, Fp32RoundsToNearestBf16TiesToEven) {
  EXPECT_EQ(to_bf16(std::bit_cast<float>(0x3f808000U)), 0x3f80);  // A tie, down to even.
  EXPECT_EQ(to_bf16(std::bit_cast<float>(0x3f818000U)), 0x3f82);  // A tie, up to even.
  EXPECT_EQ(to_bf16(std::bit_cast<float>(0x3f808001U)), 0x3f81);
  EXPECT_EQ(to_bf16(std::bit_cast<float>(0x3f817fffU)), 0x3f81);
  EXPECT_EQ(to_bf16(std::bit_cast<float>(0x7f7fffffU)), 0x7f80);  // Beyond the largest bf16: infinity.
  EXPECT_EQ(to_bf16(std::bit_cast<float>(0x00000001U)), 0x0000);  // The least denormal.
  EXPECT_EQ(to_bf16(std::bit_cast<float>(0x80008001U)), 0x8001);  // Denormals are kept, not flushed.
  EXPECT_EQ(to_bf16(-0.0F), 0x8000);
  EXPECT_EQ(to_bf16(std::bit_cast<float>(0x7f800001U)), 0x7fc0);  // A NaN whose upper half looks like infinity.
  EXPECT_EQ(to_bf16(std::bit_cast<float>(0xffffffffU)), 0xffff);
  EXPECT_EQ(to_bf16(std::bit_cast<float>(0xff800000U)), 0xff80);
}

TEST(Convert, RandomBitPatternsAgreeWithRoundingInDouble) {
  const std::uint32_t seed = 7;
  std::printf("seed %u\n", seed);
  std::mt19937 random(seed);
  for (int i = 0; i < 200000; ++i) {
    const auto value = std::bit_cast<float>(static_cast<std::uint32_t>(random()));
    if (std::isnan(value) || std::fabs(value) > 3.38e38F) continue;
    const float expected = testing::round_to(value, testing::WeightDType::kBf16);
    ASSERT_EQ(from_bf16(to_bf16(value)), expected) << std::hex << std::bit_cast<std::uint32_t>(value);
  }
}

TEST(Convert, F16ToBf16RoundsOnce) {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    std::uint16_t direct = 0;
    convert_elements(DType::kF16, &half, ElementType::kBf16, &direct, 1);
    ASSERT_EQ(direct, to_bf16(from_f16(half))) << std::hex << bits;
  }
}

TEST(Convert, ElementsOfTheSameTypeAreCopied) {
  const std::vector<std::uint16_t> bits = {0x7f81, 0x0001, 0x8000};  // Also a signalling NaN stays as it is.
  std::vector<std::uint16_t> copy(bits.size() + 1, 0xabcd);
  convert_elements(DType::kBf16, bits.data(), ElementType::kBf16, copy.data(), bits.size());
  EXPECT_EQ(copy, (std::vector<std::uint16_t>{0x7f81, 0x0001, 0x8000, 0xabcd}));
  EXPECT_FALSE(needs_conversion(DType::kBf16, ElementType::kBf16));
  EXPECT_FALSE(needs_conversion(DType::kF32, ElementType::kFp32));
  EXPECT_TRUE(needs_conversion(DType::kF16, ElementType::kBf16));
  EXPECT_TRUE(needs_conversion(DType::kBf16, ElementType::kFp32));
}

}  // namespace
}  // namespace kt::coproc
