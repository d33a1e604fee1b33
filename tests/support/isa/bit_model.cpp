#include "tests/support/isa/bit_model.h"

#include <bit>
#include <cmath>
#include <cstdlib>
#include <limits>

namespace kt::test {
namespace {

constexpr float kSmallestNormal = std::numeric_limits<float>::min();

float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

// fma with DAZ and FTZ. A result is tiny when, rounded to 24 bits with an unbounded exponent, it is below the smallest
// normal number; the case next to that border is decided at 2^32 times its size, where nothing is subnormal. (The
// factors cannot overflow there: a product of a factor above 2^96 is a multiple of 2^-54.)
float fma_flushing(float a, float b, float c) {
  a = flush(a);
  b = flush(b);
  c = flush(c);
  const float result = std::fmaf(a, b, c);
  if (!(std::fabs(result) <= kSmallestNormal) || result == 0.0f) return result;
  constexpr float kScale = 4294967296.0f;
  const float scaled = std::fmaf(a * kScale, b, c * kScale);
  return std::fabs(scaled) < kSmallestNormal * kScale ? std::copysign(0.0f, result) : result;
}

// Exact where it is tiny: a sum of floats is a multiple of the smallest subnormal number.
float add_flushing(float a, float b) {
  const volatile float sum = flush(a) + flush(b);
  return flush(sum);
}

float separate(float left, float right, float acc) {
  const volatile float product = left * right;  // volatile: no compiler may fuse it with the addition
  return acc + product;
}

template <typename T>
float sequential(float acc, const T* a, const T* b, std::int64_t k) {
  for (std::int64_t i = 0; i < k; ++i) {
    if constexpr (sizeof(T) == 2) {
      acc = separate(from_bf16(a[i]), from_bf16(b[i]), acc);
    } else {
      acc = separate(a[i], b[i], acc);
    }
  }
  return acc;
}

float fused(float acc, const std::uint16_t* a, const std::uint16_t* b, std::int64_t k) {
  for (std::int64_t i = 0; i < k; ++i) acc = std::fmaf(from_bf16(a[i]), from_bf16(b[i]), acc);
  return acc;
}

float vdpbf16ps(float acc, const std::uint16_t* a, const std::uint16_t* b, std::int64_t k) {
  for (std::int64_t i = 0; i < k; i += 2) {
    acc = fma_flushing(from_bf16(a[i + 1]), from_bf16(b[i + 1]), acc);
    acc = fma_flushing(from_bf16(a[i]), from_bf16(b[i]), acc);
  }
  return acc;
}

float tile_steps(float acc, const std::uint16_t* a, const std::uint16_t* b, std::int64_t k) {
  constexpr std::int64_t kStep = 32;
  for (std::int64_t i = 0; i < k; i += kStep) acc = tdpbf16ps_model(acc, a + i, b + i, kStep / 2);
  return acc;
}

}  // namespace

float tdpbf16ps_model(float c, const std::uint16_t* a, const std::uint16_t* b, std::int64_t pairs) {
  float even = 0.0f;
  float odd = 0.0f;
  for (std::int64_t i = 0; i < 2 * pairs; i += 2) {
    even = fma_flushing(from_bf16(a[i]), from_bf16(b[i]), even);
    odd = fma_flushing(from_bf16(a[i + 1]), from_bf16(b[i + 1]), odd);
  }
  return add_flushing(c, add_flushing(even, odd));
}

float dot_model(const kernels::KernelTable& table, float acc, const void* a, const void* b, std::int64_t k) {
  if (table.element_bytes == 4) return sequential(acc, static_cast<const float*>(a), static_cast<const float*>(b), k);
  const auto* left = static_cast<const std::uint16_t*>(a);
  const auto* right = static_cast<const std::uint16_t*>(b);
  if (table.name == "scalar") return sequential(acc, left, right, k);
  if (table.name == "avx2") return fused(acc, left, right, k);
  if (table.name == "avx512") return vdpbf16ps(acc, left, right, k);
  if (table.name == "amx") return tile_steps(acc, left, right, k);
  std::abort();  // a new table must bring its model
}

float from_bf16(std::uint16_t bits) { return std::bit_cast<float>(std::uint32_t{bits} << 16); }

std::uint16_t to_bf16(float value) {
  const auto towards_zero = static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value) >> 16);
  if (std::isnan(value)) return towards_zero | 0x40;
  if (std::isinf(value)) return towards_zero;
  const auto away = static_cast<std::uint16_t>(towards_zero + 1);
  const double limit = std::ldexp(1.0, 128);  // what infinity stands for when rounding
  const double low = std::fabs(double{value}) - std::fabs(double{from_bf16(towards_zero)});
  const double high = std::fmin(std::fabs(double{from_bf16(away)}), limit) - std::fabs(double{value});
  if (low == high) return (towards_zero & 1) == 0 ? towards_zero : away;
  return low < high ? towards_zero : away;
}

bool same_bits(float a, float b) {
  return (std::isnan(a) && std::isnan(b)) || std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b);
}

}  // namespace kt::test
