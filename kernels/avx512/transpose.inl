// transpose_panels of bf16 panels in 512-bit shuffles: of the tables avx512 and amx.
#pragma once
#include <immintrin.h>

#include "kernels/generic/fetch.inl"
#include "kernels/generic/panel.inl"

namespace kt::kernels::KT_TABLE {
namespace {

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
void transpose_panels(const Panels& w, std::int64_t q, std::int64_t count, void* out, std::int64_t out_stride,
                      const Fetch& next) {
  Fetcher fetcher(next, w.num_panels * count * 4);
  for (std::int64_t panel = 0; panel < w.num_panels; ++panel) {
    for (std::int64_t column = 0; column < count; ++column) {
      const std::byte* in = w.data + panel * w.stride + (q + column) * kBlockBytes;
      std::byte* to = static_cast<std::byte*>(out) + column * out_stride + panel * kBlockBytes;
      for (std::int64_t i = 0; i < 2; ++i) {
        for (std::int64_t j = 0; j < 2; ++j) {
          fetcher.tick();
          transpose_words(in + i * 8 * kPairBytes + j * kLineBytes, to + j * 8 * kPairBytes + i * kLineBytes);
        }
      }
    }
  }
}

}  // namespace
}  // namespace kt::kernels::KT_TABLE
