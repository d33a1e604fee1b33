#include "tests/support/isa/evex_lanes.h"

#include <immintrin.h>

#include <bit>
#include <cmath>
#include <cstring>

#include "tests/support/isa/flush_to_zero.h"

namespace kt::test {
namespace {

std::uint32_t float_bits(float x) { return std::bit_cast<std::uint32_t>(x); }

// Bit n of the immediate is the result where old, a and b have the bits of n, old's the highest.
std::uint32_t ternary(unsigned table, std::uint32_t old, std::uint32_t a, std::uint32_t b) {
  std::uint32_t result = 0;
  for (unsigned n = 0; n < 8; ++n) {
    if ((table >> n & 1) != 0)
      result |= ((n & 4) != 0 ? old : ~old) & ((n & 2) != 0 ? a : ~a) & ((n & 1) != 0 ? b : ~b);
  }
  return result;
}

}  // namespace

std::uint32_t compute_lane(const Instruction& in, std::uint32_t a, std::uint32_t b, std::uint32_t old) {
  const float x = std::bit_cast<float>(a);
  const float y = std::bit_cast<float>(b);
  const float z = std::bit_cast<float>(old);
  switch (in.op) {
    case Op::kAdd:
      return float_bits(x + y);
    case Op::kSub:
      return float_bits(x - y);
    case Op::kMul:
      return float_bits(x * y);
    case Op::kDiv:
      return float_bits(x / y);
    case Op::kSqrt:
      return float_bits(std::sqrt(y));
    case Op::kFma231:
      return float_bits(std::fma(x, y, z));
    case Op::kFma213:
      return float_bits(std::fma(x, z, y));
    case Op::kXor:
      return a ^ b;
    case Op::kAnd:
      return a & b;
    case Op::kOr:
      return a | b;
    case Op::kAddInt:
      return a + b;
    case Op::kSubInt:
      return a - b;
    case Op::kMaxInt:
      return static_cast<std::int32_t>(a) > static_cast<std::int32_t>(b) ? a : b;
    case Op::kMax:
      return x > y ? a : b;
    case Op::kTernary:
      return ternary(in.immediate, old, a, b);
    case Op::kConvertInt:
      return float_bits(static_cast<float>(static_cast<std::int32_t>(b)));
    case Op::kShiftRightSigned:
      return static_cast<std::uint32_t>(static_cast<std::int32_t>(b) >> (in.immediate > 31 ? 31 : in.immediate));
    case Op::kShiftRight:
      return in.immediate > 31 ? 0 : b >> in.immediate;
    default:
      return in.immediate > 31 ? 0 : b << in.immediate;  // kShiftLeft, the last of the list in evex_instruction.h
  }
}

bool compare(unsigned predicate, float a, float b) {
  const bool unordered = std::isnan(a) || std::isnan(b);
  switch (predicate & 15) {
    case 0:
      return a == b;
    case 1:
      return a < b;
    case 2:
      return a <= b;
    case 3:
      return unordered;
    case 4:
      return !(a == b);
    case 5:
      return !(a < b);
    case 6:
      return !(a <= b);
    case 7:
      return !unordered;
    case 8:
      return unordered || a == b;
    case 9:
      return !(a >= b);
    case 10:
      return !(a > b);
    case 11:
      return false;
    case 12:
      return !unordered && a != b;
    case 13:
      return a >= b;
    case 14:
      return a > b;
    default:
      return true;
  }
}

__attribute__((target("avx2,fma"))) void dot(const Zmm& a, const Zmm& b, Zmm* acc) {
  const FlushToZero flush;
  const __m256i odd = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  for (int half = 0; half < 64; half += 32) {
    __m256i x, y;
    __m256 sum;
    std::memcpy(&x, a.bytes + half, sizeof x);
    std::memcpy(&y, b.bytes + half, sizeof y);
    std::memcpy(&sum, acc->bytes + half, sizeof sum);
    sum = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(x, odd)), _mm256_castsi256_ps(_mm256_and_si256(y, odd)),
                          sum);
    sum = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(y, 16)),
                          sum);
    std::memcpy(acc->bytes + half, &sum, sizeof sum);
  }
}

std::uint16_t nearest_bf16(std::uint32_t bits) {
  constexpr std::uint32_t kExponent = 0x7f800000;
  if ((bits & kExponent) == 0) return static_cast<std::uint16_t>(bits >> 16 & 0x8000);
  if ((bits & kExponent) == kExponent) {
    const bool is_nan = (bits & ~(kExponent | 0x80000000)) != 0;
    return static_cast<std::uint16_t>(bits >> 16 | (is_nan ? 0x40 : 0));
  }
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace kt::test
