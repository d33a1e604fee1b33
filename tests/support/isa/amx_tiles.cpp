#include "tests/support/isa/amx_tiles.h"

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "tests/support/isa/flush_to_zero.h"

namespace kt::test {
namespace {

// Where LDTILECFG finds what it reads; everything else must be zero.
constexpr int kRowBytesOffset = 16;
constexpr int kRowsOffset = 48;
constexpr std::uint8_t kPalette = 1;

bool all_zero(const std::uint8_t* from, const std::uint8_t* to) {
  return std::all_of(from, to, [](std::uint8_t byte) { return byte == 0; });
}

// Row r of a, of `pairs` pairs, times b: 16 sums.
__attribute__((target("avx2,fma"))) void add_products(const std::uint8_t* a, const std::uint8_t (*b)[64], int pairs,
                                                      std::uint8_t* c) {
  const __m256i odd_mask = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  for (int half = 0; half < 64; half += 32) {
    __m256 even = _mm256_setzero_ps();
    __m256 odd = _mm256_setzero_ps();
    for (int k = 0; k < pairs; ++k) {
      std::int32_t pair;
      std::memcpy(&pair, a + 4 * k, sizeof pair);
      const __m256i x = _mm256_set1_epi32(pair);
      __m256i y;
      std::memcpy(&y, b[k] + half, sizeof y);
      even = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)),
                             _mm256_castsi256_ps(_mm256_slli_epi32(y, 16)), even);
      odd = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(x, odd_mask)),
                            _mm256_castsi256_ps(_mm256_and_si256(y, odd_mask)), odd);
    }
    __m256 sum;
    std::memcpy(&sum, c + half, sizeof sum);
    sum = _mm256_add_ps(sum, _mm256_add_ps(even, odd));
    std::memcpy(c + half, &sum, sizeof sum);
  }
}

}  // namespace

const char* AmxTiles::configure(const std::uint8_t* config) {
  if (config[0] != kPalette) return "ldtilecfg: a palette other than 1";
  if (config[1] != 0) return "ldtilecfg: a start row, which only the processor itself sets, after a fault";
  std::uint16_t row_bytes[16];
  std::memcpy(row_bytes, config + kRowBytesOffset, sizeof row_bytes);
  const std::uint8_t* rows = config + kRowsOffset;
  if (!all_zero(config + 2, config + kRowBytesOffset) || !all_zero(rows + kNumTiles, config + 64) ||
      std::any_of(row_bytes + kNumTiles, row_bytes + 16, [](std::uint16_t bytes) { return bytes != 0; }))
    return "ldtilecfg: reserved bytes or tiles that are not zero (general protection on hardware)";
  for (int t = 0; t < kNumTiles; ++t) {
    if (rows[t] > kRowsMax || row_bytes[t] > kRowBytesMax) return "ldtilecfg: a tile larger than 16 rows of 64 bytes";
    if ((rows[t] == 0) != (row_bytes[t] == 0)) return "ldtilecfg: a tile with rows but no columns, or the reverse";
    if (row_bytes[t] % 4 != 0) return "ldtilecfg: rows that are not whole 4-byte words, useless to any product";
  }
  release();
  configured_ = true;
  for (int t = 0; t < kNumTiles; ++t) {
    rows_[t] = rows[t];
    row_bytes_[t] = static_cast<std::uint8_t>(row_bytes[t]);
  }
  ++counts_.configures;
  return nullptr;
}

void AmxTiles::release() {
  const TileCounts counts = counts_;
  *this = AmxTiles();
  counts_ = counts;
}

const char* AmxTiles::refusal(int t) const {
  if (!configured_) return "tiles are not configured";
  if (t < 0 || t >= kNumTiles) return "there are only eight tiles";
  if (rows_[t] == 0) return "a tile that the configuration leaves out";
  return nullptr;
}

const char* AmxTiles::zero(int t) {
  if (const char* why = refusal(t)) return why;
  tiles_[t] = Tile();
  last_dot_[t] = 0;
  return nullptr;
}

const char* AmxTiles::load(int t, const std::uint8_t* from, std::int64_t stride) {
  if (const char* why = refusal(t)) return why;
  tiles_[t] = Tile();
  for (int r = 0; r < rows_[t]; ++r) std::memcpy(tiles_[t].row[r], from + r * stride, row_bytes_[t]);
  last_dot_[t] = 0;
  ++counts_.loads;
  counts_.load_rows += rows_[t];
  counts_.load_bytes += std::uint64_t{rows_[t]} * row_bytes_[t];
  return nullptr;
}

const char* AmxTiles::store(int t, std::uint8_t* to, std::int64_t stride) {
  if (const char* why = refusal(t)) return why;
  for (int r = 0; r < rows_[t]; ++r) std::memcpy(to + r * stride, tiles_[t].row[r], row_bytes_[t]);
  last_dot_[t] = 0;
  ++counts_.stores;
  counts_.store_rows += rows_[t];
  return nullptr;
}

const char* AmxTiles::dot(int c, int a, int b) {
  for (const int t : {c, a, b})
    if (const char* why = refusal(t)) return why;
  if (c == a || c == b || a == b) return "tdpbf16ps: its three operands must be different tiles";
  if (rows_[c] != rows_[a] || row_bytes_[c] != row_bytes_[b] || row_bytes_[a] / 4 != rows_[b])
    return "tdpbf16ps: the shapes of its tiles do not fit together";
  {
    const FlushToZero flush;
    for (int r = 0; r < rows_[c]; ++r) {
      std::uint8_t* sums = tiles_[c].row[r];
      add_products(tiles_[a].row[r], tiles_[b].row, rows_[b], sums);
      std::memset(sums + row_bytes_[c], 0, static_cast<std::size_t>(kRowBytesMax - row_bytes_[c]));  // NaN · 0
    }
  }
  ++counts_.dots;
  counts_.dot_rows += rows_[c];
  if (last_dot_[c] != 0) counts_.dot_distance_min = std::min(counts_.dot_distance_min, counts_.dots - last_dot_[c]);
  last_dot_[c] = counts_.dots;
  return nullptr;
}

}  // namespace kt::test
