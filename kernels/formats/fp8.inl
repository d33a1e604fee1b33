// FP8 of the kind E4M3 (OCP "FN": sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinity, 0x7f and 0xff are
// NaN) with a scale for each 128 × 128 block of W, as DeepSeek-V3 stores its weights. A group is
//   scale: a float, and 60 bytes of zeros; the four panels of a block have the same one;
//   codes: [group/2][32][2] bytes, in the order of the panels of bf16: W[row, k] and W[row, k+1] side by side.
//
// A weight is the bf16 nearest to code · scale, ties to even, for any scale: the exact product is rounded once.
// quantise makes the largest magnitude of a block 448 = 1.75 · 2^8, the greatest code; a weight becomes the code
// nearest to the float weight / scale. A block with a weight that is not finite has NaN as its scale; one whose weights
// are all below 2^-100 is zero.
#pragma once
#include "kernels/formats.h"
#include "kernels/generic/quantised.inl"

namespace kt::kernels::KT_TABLE {
namespace {

// What a code without its sign stands for.
struct Fp8Magnitudes {
  constexpr Fp8Magnitudes() {
    for (int code = 0; code < 128; ++code) {
      const int exponent = code >> 3;
      float value = static_cast<float>(exponent == 0 ? code : 8 + code % 8) * 0x1p-9f;
      for (int e = 1; e < exponent; ++e) value *= 2;
      of[code] = code == 127 ? __builtin_nanf("") : value;
    }
  }
  float of[128] = {};
};
constexpr Fp8Magnitudes kFp8Magnitudes = {};

struct Fp8 {
  static constexpr StorageFormat kRow = {
      .name = "fp8",
      .help = "half the memory, E4M3",
      .quantised = QuantLayout{.group = kQuantGroupMax, .scale_bytes = kLineBytes, .k_bytes = kPanelRows}};
  static constexpr std::int64_t kScalePanels = 128 / kPanelRows;
  static constexpr float kMax = 448.0f;
  static constexpr std::uint32_t kNaN = 0x7f;
  static constexpr float kSmallestNormal = 0x1p-6f;

  static float scale_of(const QuantGroup& group) {
    F32 largest = {};
    for (std::int64_t row = 0; row < group.rows; ++row) {
      for_vectors(group.columns, [&](std::int64_t i, std::int64_t n) {
        F32 magnitude = as_f32(as_u32(load(group.in + row * group.ld + i, n)) & 0x7fffffffu);
        magnitude = magnitude < __builtin_inff() ? magnitude : F32{};
        largest = magnitude > largest ? magnitude : largest;
      });
    }
    float scale = 0;
    for (int lane = 0; lane < kLanes; ++lane) scale = largest[lane] > scale ? largest[lane] : scale;
    return scale < kSmallestWeight ? 0.0f : scale / kMax;
  }

  // The nearest codes, ties to even. |x| may exceed 448 by what its division was rounded up.
  static U32 encode(F32 x) {
    const U32 sign = as_u32(x) & 0x80000000u;
    const F32 magnitude = as_f32(as_u32(x) ^ sign);
    const U32 bits = as_u32(magnitude > kMax ? splat(kMax) : magnitude);
    // A normal one keeps 3 bits of mantissa; its exponent has the bias 7 instead of 127.
    const U32 normal = ((bits + 0x7ffffu + (bits >> 20 & 1)) >> 20) - ((127 - 7) << 3);
    // Others are steps of 2^-9, which are the lowest bits of a float between 2^14 and 2^15.
    const U32 subnormal = as_u32(magnitude + 0x1p14f) & 0xff;
    const U32 code = magnitude < kSmallestNormal ? subnormal : normal;
    return (magnitude < __builtin_inff() ? code : U32{} + kNaN) | sign >> 24;
  }

  static void quantise(const QuantGroup& group) {
    const float scale = scale_of(group);
    for (std::int64_t panel = 0; panel < group.num_panels; ++panel)
      __builtin_memcpy(group.out + panel * group.stride, &scale, sizeof scale);
    const float divisor = scale == 0.0f ? 1.0f : scale;
    for (std::int64_t row = 0; row < group.rows; ++row) {
      std::byte* codes = group.out + row / kPanelRows * group.stride + kLineBytes + row % kPanelRows * 2;
      std::uint32_t rounded[kQuantGroupMax + kLanes];
      for_vectors(group.columns, [&](std::int64_t i, std::int64_t n) {
        const U32 vector = encode(load(group.in + row * group.ld + i, n) / divisor);
        __builtin_memcpy(rounded + i, &vector, sizeof vector);
      });
      for (std::int64_t k = 0; k < group.columns; ++k)
        codes[k / 2 * 2 * kPanelRows + k % 2] = static_cast<std::byte>(rounded[k]);
    }
  }

  // magnitude · scale to the nearest bf16. The scale's upper and lower 12 bits are multiplied exactly, and so is known
  // what their rounded sum has lost. Where that is not zero the last bit is made 1, between the two floats that are
  // next to the product (rounding to odd): rounding that to bf16 gives what rounding the exact product would.
  static F32 product(F32 magnitude, float upper, float lower) {
    const F32 high = magnitude * upper;
    const F32 low = magnitude * lower;
    const F32 sum = high + low;
    const F32 lost = low - (sum - high);
    const U32 bits = as_u32(sum);
    const U32 is_below = (bits ^ as_u32(lost)) >> 31;  // The product is nearer to zero than its sum.
    const U32 odd = (bits - (is_below & ~bits & 1)) | 1;
    return lost != 0.0f ? as_f32(odd) : sum;
  }

  // What each code of a group stands for, in bf16: without the sign for 16 lanes, else also with it.
  struct Scales {
    explicit Scales(const std::byte* group) {
      float scale;
      __builtin_memcpy(&scale, group, sizeof scale);
      const float upper = __builtin_bit_cast(float, __builtin_bit_cast(std::uint32_t, scale) & ~0xfffu);
      for (std::int64_t i = 0; i < 128; i += kLanes) {
        const F32 weights = product(load(kFp8Magnitudes.of + i), upper, scale - upper);
        store(of + i, weights);
        if (kLanes < 16) store(of + 128 + i, -weights);
      }
    }
    alignas(64) std::uint16_t of[kLanes < 16 ? 256 : 128];
  };

#if KT_LANES == 16
  struct Converted {
    explicit Converted(const std::byte* block) {
      for (std::int64_t i = 0; i < 2; ++i)
        of[i] =
            _mm512_cvtepu8_epi16(_mm256_loadu_si256(static_cast<const __m256i*>(static_cast<const void*>(block)) + i));
    }
    __m512i of[2];  // Codes as words.
  };
  static __m512bh line(const Converted& converted, const Scales& scales, std::int64_t number) {
    const __m512i codes = converted.of[number];
    const __mmask32 is_large = _mm512_test_epi16_mask(codes, _mm512_set1_epi32(0x00400040));
    const auto part = [&](int i) { return _mm512_load_si512(scales.of + 32 * i); };
    const __m512i magnitude = _mm512_mask_mov_epi16(_mm512_permutex2var_epi16(part(0), codes, part(1)), is_large,
                                                    _mm512_permutex2var_epi16(part(2), codes, part(3)));
    const __m512i sign = _mm512_and_si512(_mm512_slli_epi32(codes, 8), _mm512_set1_epi32(-0x7fff8000));
    return __builtin_bit_cast(__m512bh, _mm512_or_si512(magnitude, sign));
  }
  static void decode(const std::byte* block, const Scales& scales, std::uint16_t* out) {
    const Converted converted(block);
    for (std::int64_t i = 0; i < 2; ++i) {
      const __m512bh both = line(converted, scales, i);
      __builtin_memcpy(out + 32 * i, &both, sizeof both);
    }
  }
#else
  static void decode(const std::byte* block, const Scales& scales, std::uint16_t* out) {
#pragma GCC unroll 8
    for (std::int64_t i = 0; i < kQuantBlockBytes; ++i) out[i] = scales.of[static_cast<std::uint8_t>(block[i])];
  }
#endif
};

}  // namespace
}  // namespace kt::kernels::KT_TABLE
