// gemm and transpose_panel with AVX512_BF16. acc = fma(a odd, b odd, acc), then fma(a even, b even, acc): one VDPBF16PS
// per pair of k, pairs ascending, rounded to nearest, subnormals taken and given as zero. No include guard.
namespace {

// Register block: 6 rows × 64 columns = 24 accumulators and 4 vectors of B; A comes broadcast from memory.
constexpr std::int64_t kRowsMax = 6;
constexpr std::int64_t kPairsPerBlock = kPanelRows / 2;  // k is a multiple of 32: whole blocks of 16 pairs
constexpr std::int64_t kPairBytes = kPanelRows * 4;      // one pair of k in a panel: two vectors, two cache lines
constexpr std::int64_t kLineBytes = 64;

// acc + the pair of bf16 at `a` times 16 pairs of b.
inline F32 dot_pair(F32 acc, const Element* a, __m512bh b) {
  std::int32_t pair;
  __builtin_memcpy(&pair, a, sizeof pair);
  return _mm512_dpbf16_ps(acc, b, __builtin_bit_cast(__m512bh, _mm512_set1_epi32(pair)));
}

// What one call of multiply_rows brings to cache while it computes: blocks first, first + step, … of the panels that
// come next. All calls on the same panels together fetch all of it, a little at a time.
struct Prefetch {
  const std::byte* next;  // null: nothing follows
  std::int64_t first;
  std::int64_t step;
};

// C[R, 32·P] from R rows of A and P panels, `stride` bytes apart.
template <std::int64_t R, std::int64_t P>
void multiply_rows(const Element* a, std::int64_t lda, const std::byte* panel, std::int64_t stride, std::int64_t k,
                   float* c, std::int64_t ldc, bool accumulate, Prefetch prefetch) {
  constexpr std::int64_t kVectors = 2 * P;
  Vectors<R * kVectors> acc;
  if (accumulate) {
    for (std::int64_t r = 0; r < R; ++r)
      for (std::int64_t v = 0; v < kVectors; ++v) acc[r * kVectors + v] = load(c + r * ldc + v * kLanes);
  }
  std::int64_t next_fetch = prefetch.next == nullptr ? -1 : prefetch.first;
  for (std::int64_t block = 0; block * kPanelRows < k; ++block) {
    const bool fetch = block == next_fetch;
    if (fetch) next_fetch += prefetch.step;
    for (std::int64_t i = 0; i < kPairsPerBlock; ++i) {
      const std::int64_t pair = block * kPairsPerBlock + i;
      __m512bh b[static_cast<std::size_t>(kVectors)];
      for (std::int64_t v = 0; v < kVectors; ++v)
        __builtin_memcpy(&b[v], panel + v / 2 * stride + pair * kPairBytes + v % 2 * kLineBytes, kLineBytes);
      if (fetch) {
        for (std::int64_t v = 0; v < kVectors; ++v)
          __builtin_prefetch(prefetch.next + v / 2 * stride + pair * kPairBytes + v % 2 * kLineBytes);
      }
      for (std::int64_t r = 0; r < R; ++r)
        for (std::int64_t v = 0; v < kVectors; ++v)
          acc[r * kVectors + v] = dot_pair(acc[r * kVectors + v], a + r * lda + 2 * pair, b[v]);
    }
  }
  for (std::int64_t r = 0; r < R; ++r)
    for (std::int64_t v = 0; v < kVectors; ++v) store(c + r * ldc + v * kLanes, acc[r * kVectors + v]);
}

using MultiplyRows = void (*)(const Element*, std::int64_t, const std::byte*, std::int64_t, std::int64_t, float*,
                              std::int64_t, bool, Prefetch);
template <std::int64_t P>
constexpr MultiplyRows kMultiplyRows[kRowsMax] = {multiply_rows<1, P>, multiply_rows<2, P>, multiply_rows<3, P>,
                                                  multiply_rows<4, P>, multiply_rows<5, P>, multiply_rows<6, P>};

// Chunks of rows as equal as can be: 7 rows are 4 + 3, not 6 + 1, whose single row would wait for its own additions.
void gemm(const void* a, std::int64_t lda, std::int64_t m, const Panels& w, float* c, std::int64_t ldc,
          bool accumulate) {
  const std::int64_t num_chunks = (m + kRowsMax - 1) / kRowsMax;
  for (std::int64_t panel = 0; panel < w.num_panels; panel += 2) {
    const bool two = panel + 1 < w.num_panels;
    const std::byte* data = w.data + panel * w.stride;
    const std::byte* next =
        panel + 3 < w.num_panels ? data + 2 * w.stride : nullptr;  // a lone last panel is not fetched
    std::int64_t row = 0;
    for (std::int64_t chunk = 0; chunk < num_chunks; ++chunk) {
      const std::int64_t rows = (m - row + num_chunks - chunk - 1) / (num_chunks - chunk);
      const MultiplyRows multiply = (two ? kMultiplyRows<2> : kMultiplyRows<1>)[rows - 1];
      multiply(static_cast<const Element*>(a) + row * lda, lda, data, w.stride, w.k, c + row * ldc + panel * kPanelRows,
               ldc, accumulate, {next, chunk, num_chunks});
      row += rows;
    }
  }
}

// Writes the transpose of 8 × 8 64-bit words; rows of both sides are one pair of k (kPairBytes) apart.
void transpose_words(const std::byte* in, std::byte* out) {
  // A word holds rows n and n + 1 of W at k and k + 1: n,k  n,k+1  n+1,k  n+1,k+1. Its middle two change places.
  const __m512i swap_middle =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
  __m512i row[8], pair[8], quad[8];
  for (int i = 0; i < 8; ++i) row[i] = _mm512_shuffle_epi8(_mm512_loadu_si512(in + i * kPairBytes), swap_middle);
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm512_unpacklo_epi64(row[i], row[i + 1]);
    pair[i + 1] = _mm512_unpackhi_epi64(row[i], row[i + 1]);
  }
  // pair[2i + b] holds, in 128-bit lane j, column 2j + b of rows 2i and 2i + 1. Next: lanes of two such vectors.
  for (int b = 0; b < 2; ++b) {
    for (int half = 0; half < 2; ++half) {
      quad[4 * half + b] = _mm512_shuffle_i64x2(pair[4 * half + b], pair[4 * half + 2 + b], 0x88);      // lanes 0 2
      quad[4 * half + 2 + b] = _mm512_shuffle_i64x2(pair[4 * half + b], pair[4 * half + 2 + b], 0xdd);  // lanes 1 3
    }
    // quad[b]: lanes j = 0, 2 of rows 0-1, then of rows 2-3; quad[4 + b]: of rows 4-5, 6-7. quad[2 + b], quad[6 + b]: j
    // = 1, 3.
    for (int odd = 0; odd < 2; ++odd) {
      const __m512i low = quad[2 * odd + b];
      const __m512i high = quad[4 + 2 * odd + b];
      _mm512_storeu_si512(out + (2 * odd + b) * kPairBytes, _mm512_shuffle_i64x2(low, high, 0x88));
      _mm512_storeu_si512(out + (2 * odd + 4 + b) * kPairBytes, _mm512_shuffle_i64x2(low, high, 0xdd));
    }
  }
}

// A 32 × 32 block is 16 × 16 words of pairs of rows by pairs of columns: four transpositions of 8 × 8.
void transpose_panel(const Panels& w, std::int64_t q, void* out) {
  constexpr std::int64_t kBlockBytes = kPairsPerBlock * kPairBytes;
  for (std::int64_t panel = 0; panel < w.num_panels; ++panel) {
    const std::byte* in = w.data + panel * w.stride + q * kBlockBytes;
    std::byte* to = static_cast<std::byte*>(out) + panel * kBlockBytes;
    for (std::int64_t i = 0; i < 2; ++i)
      for (std::int64_t j = 0; j < 2; ++j)
        transpose_words(in + i * 8 * kPairBytes + j * kLineBytes, to + j * 8 * kPairBytes + i * kLineBytes);
  }
}

}  // namespace
