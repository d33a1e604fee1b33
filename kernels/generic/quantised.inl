// Weights as small integers: quantise once, at load, and dequantise into panels of bf16, for every product of both
// directions. Layout and rounding: kernel_table.h. No include guard: see kernels/README.md.
namespace {

using I32 = std::int32_t __attribute__((vector_size(4 * kLanes)));

// A unit is 4 bytes of one weight row: 4 steps of k in 8 bits each, or 8 in 4 bits, the first one lowest.
template <int kBits>
constexpr std::int64_t kStepsPerUnit = 32 / kBits;
template <int kBits>
constexpr std::uint32_t kUnitMask = (1u << kBits) - 1;
template <int kBits>
constexpr float kIntegerMax = kBits == 8 ? 127.0f : 7.0f;

constexpr std::int64_t kScaleBytes = kPanelRows * 4;  // one float per row, before the integers of each group

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

// One row of one group: `count` weights, zeros up to `padded`. Consecutive units lie kPanelRows units apart.
template <int kBits>
void quantise_row(const Element* in, std::int64_t count, std::int64_t padded, float* scale, std::uint32_t* units) {
  std::uint32_t integers[kQuantGroupMax + kLanes] = {};
  *scale = scale_for(largest_weight(in, count), kIntegerMax<kBits>);
  if (*scale != 0.0f) {  // With a NaN all integers become 0.
    const float reciprocal = 1.0f / *scale;
    for_vectors(count, [&](std::int64_t i, std::int64_t n) {
      F32 steps = load(in + i, n) * reciprocal;
      steps = steps > kIntegerMax<kBits> ? splat(kIntegerMax<kBits>) : steps;
      const U32 rounded = as_u32(steps + kRoundToInteger) & kUnitMask<kBits>;
      __builtin_memcpy(integers + i, &rounded, sizeof rounded);
    });
  }
  for (std::int64_t u = 0; u < padded / kStepsPerUnit<kBits>; ++u) {
    std::uint32_t unit = 0;
    for (std::int64_t i = 0; i < kStepsPerUnit<kBits>; ++i)
      unit |= integers[u * kStepsPerUnit<kBits> + i] << (i * kBits);
    units[u * kPanelRows] = unit;
  }
}

template <int kBits>
void quantise_panel(const Element* in, std::int64_t ld, std::int64_t rows, std::int64_t k, std::int64_t k_padded,
                    std::int64_t group, std::byte* panel) {
  for (std::int64_t first = 0; first < k_padded; first += group) {
    const std::int64_t padded = k_padded - first < group ? k_padded - first : group;
    const std::int64_t left = first < k ? k - first : 0;
    float* scales = static_cast<float*>(static_cast<void*>(panel));
    std::uint32_t* units = static_cast<std::uint32_t*>(static_cast<void*>(panel + kScaleBytes));
    for (std::int64_t row = 0; row < kPanelRows; ++row) {
      const std::int64_t count = row < rows ? (left < padded ? left : padded) : 0;
      quantise_row<kBits>(count > 0 ? in + row * ld + first : in, count, padded, scales + row, units + row);
    }
    panel += kScaleBytes + padded * kBits * kPanelRows / 8;
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

// Integer number kIndex of each unit, times its row's scale: the bits of a float that the upper half of is the nearest
// bf16. Never half-way between two, so adding half of the last place and cutting is rounding, whatever happens to ties.
template <int kBits, int kIndex>
inline U32 scaled(I32 units, F32 scale) {
  constexpr int kAbove = 32 - kBits * (kIndex + 1);
  const I32 integers = (units << kAbove) >> (32 - kBits);
  return as_u32(__builtin_convertvector(integers, F32) * scale) + 0x8000u;
}

// The pairs of k of one vector of units, from pair kPair on, each to its line of the panel.
template <int kBits, int kPair = 0>
inline void dequantise_units(I32 units, F32 scale, std::uint32_t* out) {
  const U32 even = scaled<kBits, 2 * kPair>(units, scale) >> 16;
  const U32 odd = scaled<kBits, 2 * kPair + 1>(units, scale) & 0xffff0000u;
  const U32 pair = even | odd;
  __builtin_memcpy(out, &pair, sizeof pair);
  if constexpr (2 * (kPair + 1) < kStepsPerUnit<kBits>)
    dequantise_units<kBits, kPair + 1>(units, scale, out + kPanelRows);
}

// `num_units` units of all 32 rows.
template <int kBits>
void dequantise_steps(const std::byte* units, const float* scales, std::int64_t num_units, std::uint32_t* out) {
  for (std::int64_t u = 0; u < num_units; ++u) {
    for (std::int64_t row = 0; row < kPanelRows; row += kLanes)
      dequantise_units<kBits>(__builtin_bit_cast(I32, load_u32(units + (u * kPanelRows + row) * 4)), load(scales + row),
                              out + row);
    out += kStepsPerUnit<kBits> / 2 * kPanelRows;
  }
}

template <int kBits>
void dequantise_panel(const std::byte* panel, std::int64_t group, std::int64_t k_begin, std::int64_t k_count,
                      std::uint32_t* out) {
  constexpr std::int64_t kStepBytes = kBits * kPanelRows / 8;  // one k of all rows
  const std::int64_t group_bytes = kScaleBytes + group * kStepBytes;
  while (k_count > 0) {
    const std::int64_t in_group = k_begin % group;
    const std::int64_t count = k_count < group - in_group ? k_count : group - in_group;
    const std::byte* scales = panel + k_begin / group * group_bytes;
    dequantise_steps<kBits>(scales + kScaleBytes + in_group * kStepBytes,
                            static_cast<const float*>(static_cast<const void*>(scales)), count / kStepsPerUnit<kBits>,
                            out);
    out += count / 2 * kPanelRows;
    k_begin += count;
    k_count -= count;
  }
}

void dequantise(const QuantPanels& w, std::int64_t k_begin, std::int64_t k_count, void* out, std::int64_t out_stride) {
  const auto one_panel = w.format.bits == 8 ? dequantise_panel<8> : dequantise_panel<4>;
  for (std::int64_t panel = 0; panel < w.num_panels; ++panel)
    one_panel(w.data + panel * w.stride, w.format.group, k_begin, k_count,
              static_cast<std::uint32_t*>(static_cast<void*>(static_cast<std::byte*>(out) + panel * out_stride)));
}

}  // namespace
