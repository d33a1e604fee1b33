// Symmetric integers of 8 or 4 bits, with a scale per row and group. A group is
//   scales: [32] floats, 128 bytes;
//   int8:   [group/2][32][2] bytes, in the order of the panels of bf16: W[row, k] and W[row, k+1] side by side;
//   int4:   [group/4][16][4] bytes: 64 for four steps of k. Of the 128 bytes that int8 has for them, number 16·j + i is
//           here bits 4j … 4j+3 of the little-endian 32-bit unit i. All in two's complement.
//
// A weight is the bf16 nearest to integer · scale. The weight of a group that is the largest by magnitude becomes -128
// or -8, the others the nearest integer up to 127 or 7, so scales may be negative. They are cut to 17 significant bits
// of which the last is 1: a product with an integer is then exact in fp32 and never half-way between two bf16, so that
// every way of rounding to nearest gives the same bits. A group with a weight that is not finite has NaN as its scale;
// one whose weights are all below 2^-100 is zero.
#pragma once
#include "kernels/formats.h"
#include "kernels/generic/quantised.inl"

namespace kt::kernels::KT_TABLE {
namespace {

constexpr std::uint32_t kIntegersVersion = 2;

// Adding it to |x| < 2^22 rounds x to an integer, ties to even, whose two's complement is in the low mantissa bits.
constexpr float kRoundToInteger = 0x1.8p23f;

// The weight of the largest magnitude, a negative one before a positive one, NaN before infinity before all others.
inline float largest_weight(const Element* in, std::int64_t count) {
  I32 largest = {};
  for_vectors(count, [&](std::int64_t i, std::int64_t n) {
    // The sign goes to the lowest bit, which a bf16 does not use: as integers these are ordered as we want them.
    const U32 bits = as_u32(load(in + i, n));
    const I32 key = __builtin_bit_cast(I32, (bits & 0x7fffffffu) | bits >> 31);
    largest = key > largest ? key : largest;
  });
  std::int32_t lanes[kLanes];
  __builtin_memcpy(lanes, &largest, sizeof lanes);
  std::int32_t key = 0;
  for (const std::int32_t lane : lanes) key = lane > key ? lane : key;
  const auto bits = static_cast<std::uint32_t>(key);
  return __builtin_bit_cast(float, (bits & ~1u) | bits << 31);
}

// The scale with which `largest` becomes the lowest integer.
inline float integer_scale(float largest, float integer_max) {
  if (__builtin_fabsf(largest) < kSmallestWeight) return 0.0f;
  if (!(__builtin_fabsf(largest) < __builtin_inff())) return __builtin_nanf("");
  return __builtin_bit_cast(float, (__builtin_bit_cast(std::uint32_t, largest / -(integer_max + 1)) & ~0xffu) | 0x80u);
}

template <int kBits>
struct Integers {
  // The longest groups there are: their scales add 3 % to the bytes of int8 and 6 % to those of int4.
  static constexpr QuantLayout kLayout = {.group = kQuantGroupMax, .scale_bytes = 4 * kPanelRows, .k_bytes = 4 * kBits};
  static constexpr std::int64_t kScalePanels = 1;
  static constexpr std::int64_t kSteps = kQuantBlockBytes / kLayout.k_bytes;  // of k, in a block
  static constexpr float kMax = kBits == 8 ? 127.0f : 7.0f;

  // Writes the integer of one row at step k of its group; bits of others are left as they are, its own must be zero.
  static void put(std::uint8_t* codes, std::int64_t row, std::int64_t k, std::uint32_t value) {
    std::uint8_t* block = codes + k / kSteps * kQuantBlockBytes;
    const std::int64_t index = k % kSteps / 2 * 2 * kPanelRows + 2 * row + k % 2;
    if constexpr (kBits == 8) {
      block[index] = static_cast<std::uint8_t>(value);
    } else {
      const std::int64_t nibble = index / 16;
      std::uint8_t& byte = block[index % 16 * 4 + nibble / 2];
      byte = static_cast<std::uint8_t>(byte | (value & 15) << (nibble % 2 * 4));
    }
  }

  static void quantise(const QuantGroup& group) {
    auto* scales = static_cast<float*>(static_cast<void*>(group.out));
    auto* codes = static_cast<std::uint8_t*>(static_cast<void*>(group.out + kLayout.scale_bytes));
    for (std::int64_t row = 0; row < kPanelRows; ++row) {
      scales[row] = 0;
      if (row >= group.rows || group.columns == 0) continue;
      const Element* in = group.in + row * group.ld;
      scales[row] = integer_scale(largest_weight(in, group.columns), kMax);
      if (scales[row] == 0.0f) continue;
      std::uint32_t rounded[kQuantGroupMax + kLanes];
      const float reciprocal = 1.0f / scales[row];
      for_vectors(group.columns, [&](std::int64_t i, std::int64_t n) {
        F32 steps = load(in + i, n) * reciprocal;
        steps = steps > kMax ? splat(kMax) : steps;
        const U32 bits = as_u32(steps + kRoundToInteger);  // Of a NaN the low bits are zero.
        __builtin_memcpy(rounded + i, &bits, sizeof bits);
      });
      for (std::int64_t k = 0; k < group.columns; ++k) put(codes, row, k, rounded[k]);
    }
  }

  // The scales of a group as its weights lie: each twice, for the two k of a pair.
  struct Scales {
    explicit Scales(const std::byte* group) {
      const auto* scales = static_cast<const float*>(static_cast<const void*>(group));
      for (std::int64_t v = 0; v < kVectors; v += 2) {
        const F32 vector = load(scales + v / 2 * kLanes);
        of[v] = each_twice<0>(vector);
        of[v + 1] = each_twice<kLanes / 2>(vector);
      }
    }
    static constexpr std::int64_t kVectors = 2 * kPanelRows / kLanes;
    F32 of[kVectors];
  };

  // kLanes integers of a block, number v in the order of a panel.
  static F32 vector(const std::byte* block, std::int64_t v) {
    if constexpr (kBits == 8) {
      I8 bytes;
      __builtin_memcpy(&bytes, block + v * kLanes, sizeof bytes);
      return from_bytes(bytes);
    } else {
      constexpr std::int64_t kUnits = kQuantBlockBytes / 4;
      return from_nibbles(load_u32(block + v * kLanes % kUnits * 4), static_cast<int>(v * kLanes / kUnits));
    }
  }
  static constexpr std::int64_t kVectors = kSteps * kPanelRows / kLanes;

  static void decode(const std::byte* block, const Scales& scales, std::uint16_t* out) {
#pragma GCC unroll 16
    for (std::int64_t v = 0; v < kVectors; v += 2)
      store_nearest(out + v * kLanes, vector(block, v) * scales.of[v % Scales::kVectors],
                    vector(block, v + 1) * scales.of[(v + 1) % Scales::kVectors]);
  }

#if KT_LANES == 16
  struct Converted {
    explicit Converted(const std::byte* block) {
#pragma GCC unroll 8
      for (std::int64_t v = 0; v < kVectors; ++v) of[v] = vector(block, v);
    }
    F32 of[static_cast<std::size_t>(kVectors)];
  };
  static __m512bh line(const Converted& converted, const Scales& scales, std::int64_t number) {
    return nearest(converted.of[2 * number] * scales.of[2 * number % Scales::kVectors],
                   converted.of[2 * number + 1] * scales.of[(2 * number + 1) % Scales::kVectors]);
  }
#endif
};

}  // namespace
}  // namespace kt::kernels::KT_TABLE
