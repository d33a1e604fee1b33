#include "coproc/model/convert.h"

#include <bit>
#include <cstring>

#include "shm/base/result.h"

namespace kt::coproc {
namespace {

float float_from_bf16(std::uint16_t bits) { return std::bit_cast<float>(std::uint32_t{bits} << 16); }

// Integer arithmetic only: the result does not depend on the MXCSR of the thread (denormals are not flushed).
float float_from_f16(std::uint16_t bits) {
  const std::uint32_t sign = (std::uint32_t{bits} & 0x8000U) << 16;
  const std::uint32_t exponent = (bits >> 10) & 0x1fU;
  std::uint32_t mantissa = bits & 0x3ffU;
  if (exponent == 0x1f) return std::bit_cast<float>(sign | 0x7f800000U | (mantissa << 13));
  if (exponent != 0) return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));  // 112 = 127 - 15
  if (mantissa == 0) return std::bit_cast<float>(sign);
  // A denormal mantissa · 2^-24: shift its first one up to the hidden bit (bit 10).
  const auto shift = static_cast<std::uint32_t>(std::countl_zero(mantissa)) - 21U;
  mantissa = (mantissa << shift) & 0x3ffU;
  return std::bit_cast<float>(sign | ((113 - shift) << 23) | (mantissa << 13));
}

std::uint16_t bf16_from_float(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & 0x7fffffffU) > 0x7f800000U) return static_cast<std::uint16_t>((bits >> 16) | 0x40U);  // NaN, made quiet.
  // Adding just below one half of the last place, and one more when that place is odd, carries exactly when RNE does.
  return static_cast<std::uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

template <class From, class To, class Convert>
void convert_all(const void* from, void* out, std::uint64_t n, Convert convert) {
  const auto* source = static_cast<const From*>(from);
  auto* target = static_cast<To*>(out);
  for (std::uint64_t i = 0; i < n; ++i) target[i] = convert(source[i]);
}

}  // namespace

bool needs_conversion(DType from, ElementType to) {
  return from != (to == ElementType::kBf16 ? DType::kBf16 : DType::kF32);
}

void convert_elements(DType from_type, const void* from, ElementType to_type, void* out, std::uint64_t n) {
  KT_CHECK(from_type == DType::kBf16 || from_type == DType::kF16 || from_type == DType::kF32);
  if (!needs_conversion(from_type, to_type)) {
    std::memcpy(out, from, n * element_bytes(to_type));
  } else if (to_type == ElementType::kFp32) {
    const auto convert = from_type == DType::kBf16 ? float_from_bf16 : float_from_f16;
    convert_all<std::uint16_t, float>(from, out, n, convert);
  } else if (from_type == DType::kF32) {
    convert_all<float, std::uint16_t>(from, out, n, bf16_from_float);
  } else {
    convert_all<std::uint16_t, std::uint16_t>(from, out, n,
                                              [](std::uint16_t bits) { return bf16_from_float(float_from_f16(bits)); });
  }
}

}  // namespace kt::coproc
