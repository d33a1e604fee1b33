// Weights as small integers: quantise once, at load, and dequantise into panels of bf16, for every product of both
// directions. Layout and rounding: kernel_table.h.
#pragma once
#include "kernels/generic/panel.inl"
#include "kernels/generic/vector.inl"

namespace kt::kernels::KT_TABLE {
namespace {

template <int kBits>
constexpr std::int64_t kBytesOfK = std::int64_t{kBits} * kPanelRows / 8;  // one k of all rows
template <int kBits>
constexpr float kIntegerMax = kBits == 8 ? 127.0f : 7.0f;

// 64 bytes: all rows of a pair of k in 8 bits, of two pairs in 4.
constexpr std::int64_t kQuantBlockBytes = 64;
template <int kBits>
constexpr std::int64_t kBlockSteps = kQuantBlockBytes / kBytesOfK<kBits>;

// Below it a group of weights is taken as zero, so that neither its scale nor the scale's reciprocal is subnormal.
constexpr float kSmallestWeight = 0x1p-100f;
// Adding it to |x| < 2^22 rounds x to an integer, ties to even, whose two's complement is in the low mantissa bits.
constexpr float kRoundToInteger = 0x1.8p23f;

// The weight of the largest magnitude, a negative one before a positive one, NaN before infinity before all others.
float largest_weight(const Element* in, std::int64_t count) {
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

// The scale with which `largest` becomes the lowest integer, in 17 significant bits, the last of them 1
// (kernel_table.h).
float scale_for(float largest, float integer_max) {
  if (__builtin_fabsf(largest) < kSmallestWeight) return 0.0f;
  if (!(__builtin_fabsf(largest) < __builtin_inff())) return __builtin_nanf("");
  return __builtin_bit_cast(float, (__builtin_bit_cast(std::uint32_t, largest / -(integer_max + 1)) & ~0xffu) | 0x80u);
}

// Writes the integer of one row at step k of its group; bits of others are left as they are, its own must be zero.
template <int kBits>
void put_integer(std::uint8_t* integers, std::int64_t row, std::int64_t k, std::uint32_t value) {
  std::uint8_t* block = integers + k / kBlockSteps<kBits> * kQuantBlockBytes;
  const std::int64_t index = k % kBlockSteps<kBits> / 2 * 2 * kPanelRows + 2 * row + k % 2;
  if constexpr (kBits == 8) {
    block[index] = static_cast<std::uint8_t>(value);
  } else {
    const std::int64_t nibble = index / 16;
    std::uint8_t& byte = block[index % 16 * 4 + nibble / 2];
    byte = static_cast<std::uint8_t>(byte | (value & 15) << (nibble % 2 * 4));
  }
}

// One row of one group: its scale, and the integers of `count` weights; the others of the group stay zero.
template <int kBits>
void quantise_row(const Element* in, std::int64_t count, float* scale, std::int64_t row, std::uint8_t* integers) {
  std::uint32_t rounded[kQuantGroupMax + kLanes] = {};
  *scale = scale_for(largest_weight(in, count), kIntegerMax<kBits>);
  if (*scale != 0.0f) {  // With a NaN all integers become 0.
    const float reciprocal = 1.0f / *scale;
    for_vectors(count, [&](std::int64_t i, std::int64_t n) {
      F32 steps = load(in + i, n) * reciprocal;
      steps = steps > kIntegerMax<kBits> ? splat(kIntegerMax<kBits>) : steps;
      const U32 bits = as_u32(steps + kRoundToInteger);
      __builtin_memcpy(rounded + i, &bits, sizeof bits);
    });
    for (std::int64_t k = 0; k < count; ++k) put_integer<kBits>(integers, row, k, rounded[k]);
  }
}

template <int kBits>
void quantise_panel(const Element* in, std::int64_t ld, std::int64_t rows, std::int64_t k, std::int64_t k_padded,
                    std::int64_t group, std::byte* panel) {
  for (std::int64_t first = 0; first < k_padded; first += group) {
    const std::int64_t padded = k_padded - first < group ? k_padded - first : group;
    const std::int64_t left = first < k ? k - first : 0;
    float* scales = static_cast<float*>(static_cast<void*>(panel));
    auto* integers = static_cast<std::uint8_t*>(static_cast<void*>(panel + kQuantScaleBytes));
    __builtin_memset(integers, 0, static_cast<std::size_t>(padded * kBytesOfK<kBits>));
    for (std::int64_t row = 0; row < kPanelRows; ++row) {
      const std::int64_t count = row < rows ? (left < padded ? left : padded) : 0;
      quantise_row<kBits>(count > 0 ? in + row * ld + first : in, count, scales + row, row, integers);
    }
    panel += kQuantScaleBytes + padded * kBytesOfK<kBits>;
  }
}

void quantise(const void* rows, std::int64_t ld, std::int64_t n, std::int64_t k, std::int64_t k_padded,
              std::int64_t num_panels, QuantFormat format, void* panels, std::int64_t stride) {
  const Element* in = static_cast<const Element*>(rows);
  const auto one_panel = format.bits == 8 ? quantise_panel<8> : quantise_panel<4>;
  for (std::int64_t panel = 0; panel < num_panels; ++panel) {
    const std::int64_t first = panel * kPanelRows;
    const std::int64_t left = first < n ? n - first : 0;
    one_panel(in + (left > 0 ? first * ld : 0), ld, left < kPanelRows ? left : kPanelRows, k, k_padded, format.group,
              static_cast<std::byte*>(panels) + panel * stride);
  }
}

// The scales of a group as its weights lie: each twice, for the two k of a pair.
struct Scales {
  explicit Scales(const float* scales) {
    for (std::int64_t v = 0; v < kVectors; ++v) {
      U32 lanes;
      for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = static_cast<std::uint32_t>(lane / 2 + v % 2 * kLanes / 2);
      of[v] = __builtin_shuffle(load(scales + v / 2 * kLanes), lanes);
    }
  }
  static constexpr std::int64_t kVectors = 2 * kPanelRows / kLanes;
  F32 of[kVectors];
};

// kLanes integers of a block, number v in the order of a panel.
template <int kBits>
inline F32 integers(const std::byte* block, std::int64_t v) {
  if constexpr (kBits == 8) {
    I8 bytes;
    __builtin_memcpy(&bytes, block + v * kLanes, sizeof bytes);
    return from_bytes(bytes);
  } else {
    constexpr std::int64_t kUnits = kQuantBlockBytes / 4;
    return from_nibbles(load_u32(block + v * kLanes % kUnits * 4), static_cast<int>(v * kLanes / kUnits));
  }
}

// A block as lines of a panel: integer · scale, to the nearest bf16.
template <int kBits>
inline void dequantise_block(const std::byte* block, const Scales& scales, std::uint16_t* out) {
  constexpr std::int64_t kVectors = kQuantBlockBytes * 8 / kBits / kLanes;
#pragma GCC unroll 16
  for (std::int64_t v = 0; v < kVectors; v += 2)
    store_nearest(out + v * kLanes, integers<kBits>(block, v) * scales.of[v % Scales::kVectors],
                  integers<kBits>(block, v + 1) * scales.of[(v + 1) % Scales::kVectors]);
}

template <int kBits>
void dequantise_panel(const std::byte* panel, std::int64_t group, std::int64_t k_begin, std::int64_t k_count,
                      std::uint16_t* out) {
  const std::int64_t group_bytes = kQuantScaleBytes + group * kBytesOfK<kBits>;
  while (k_count > 0) {
    const std::int64_t in_group = k_begin % group;
    const std::int64_t count = k_count < group - in_group ? k_count : group - in_group;
    const std::byte* data = panel + k_begin / group * group_bytes;
    const Scales scales(static_cast<const float*>(static_cast<const void*>(data)));
    data += kQuantScaleBytes + in_group * kBytesOfK<kBits>;
    for (std::int64_t k = 0; k < count; k += kBlockSteps<kBits>)
      dequantise_block<kBits>(data + k * kBytesOfK<kBits>, scales, out + k * kPanelRows);
    out += count * kPanelRows;
    k_begin += count;
    k_count -= count;
  }
}

void dequantise(const QuantPanels& w, std::int64_t k_begin, std::int64_t k_count, void* out, std::int64_t out_stride) {
  const auto one_panel = w.format.bits == 8 ? dequantise_panel<8> : dequantise_panel<4>;
  for (std::int64_t panel = 0; panel < w.num_panels; ++panel)
    one_panel(w.data + panel * w.stride, w.format.group, k_begin, k_count,
              static_cast<std::uint16_t*>(static_cast<void*>(static_cast<std::byte*>(out) + panel * out_stride)));
}

}  // namespace
}  // namespace kt::kernels::KT_TABLE
