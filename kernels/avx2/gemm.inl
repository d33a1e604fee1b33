// gemm and transpose_panels with AVX2 and FMA: acc = fma(a, b, acc), k ascending, on bf16 widened to fp32, which is
// exact. B is widened in registers on its way from the panel: two operations for 16 weights, which the ports beside the
// two of FMA do. A comes broadcast from memory and must be fp32 there: its rows are widened into scratch on the stack,
// those of the next product between the operations of this one.
#pragma once
#include <immintrin.h>

#include <utility>

#include "kernels/generic/continued_gemm.inl"
#include "kernels/generic/fetch.inl"
#include "kernels/generic/panel.inl"
#include "kernels/generic/vector.inl"

namespace kt::kernels::KT_TABLE {
namespace {

// Register block: 6 rows × 16 columns = 12 accumulators, 2 vectors of B, one of A, and the mask of the odd elements.
constexpr std::int64_t kRowsMax = 6;
constexpr std::int64_t kVectorBytes = 4 * kLanes;
constexpr std::int64_t kVectorsPerPair = kPairBytes / kVectorBytes;
constexpr std::int64_t kStep = 2 * kLanes;      // k in one vector of A before widening
constexpr std::int64_t kDepthMultiple = kStep;  // KernelTable::k_multiple
constexpr std::int64_t kStepPairs = kStep / 2;
constexpr std::int64_t kBlockK = 1024;                // k at a time: 6 widened rows are 24 KiB
constexpr std::int64_t kRowFloats = kBlockK + kStep;  // one cache line more: rows then start in different L1 sets

inline F32 even_elements(U32 pairs) { return as_f32(pairs << 16); }
inline F32 odd_elements(U32 pairs) { return as_f32(pairs & 0xffff0000u); }

// Calls body(Index<0>), body(Index<1>), …: every index is a constant, so arrays that it selects from stay in registers.
template <std::int64_t I>
struct Index {
  constexpr operator std::int64_t() const { return I; }
};
template <std::int64_t... I, typename Body>
[[gnu::always_inline]] inline void for_indices(std::integer_sequence<std::int64_t, I...>, Body body) {
  (body(Index<I>{}), ...);
}
template <std::int64_t N, typename Body>
[[gnu::always_inline]] inline void unrolled(Body body) {
  for_indices(std::make_integer_sequence<std::int64_t, N>{}, body);
}

// Rows of A to widen to fp32, k elements of each. In every kStep of them the even ones come first, then the odd ones.
struct Widening {
  const Element* from;
  std::int64_t lda;
  std::int64_t rows;
  std::int64_t k;
  float* to;  // [rows][kRowFloats]
};

inline void widen_step(const Widening& w, std::int64_t k) {
  for (std::int64_t r = 0; r < w.rows; ++r) {
    const U32 pairs = load_u32(w.from + r * w.lda + k);
    store(w.to + r * kRowFloats + k, even_elements(pairs));
    store(w.to + r * kRowFloats + k + kLanes, odd_elements(pairs));
  }
}

// One k: acc[r][v] += a[r] · b[v].
template <std::int64_t R, std::int64_t V>
[[gnu::always_inline]] inline void multiply_k(const float* a, Vectors<V>& b, Vectors<R * V>& acc) {
  unrolled<R>([&](auto r) __attribute__((always_inline)) {
    const F32 x = _mm256_broadcast_ss(a + r * kRowFloats);
    unrolled<V>([&](auto v) __attribute__((always_inline)) { acc[r * V + v] = multiply_add(x, b[v], acc[r * V + v]); });
  });
}

// C[R, V vectors] from R widened rows and as many columns of a panel. On the way widens the rows that come next; one
// tick of the fetcher for each kStep of k.
template <std::int64_t R, std::int64_t V>
void multiply_rows(const float* a, const std::byte* panel, std::int64_t k, float* c, std::int64_t ldc, bool accumulate,
                   const Widening& next, Fetcher& fetcher) {
  Vectors<R * V> acc;
  if (accumulate) {
    unrolled<R * V>([&](auto i) __attribute__((always_inline)) { acc[i] = load(c + i / V * ldc + i % V * kLanes); });
  }
  for (std::int64_t step = 0; step < k; step += kStep) {
    if (step < next.k) widen_step(next, step);
    fetcher.tick();
    unrolled<kStepPairs>([&](auto i) __attribute__((always_inline)) {
      const std::byte* pair = panel + i * kPairBytes;
      Vectors<V> b;
      unrolled<V>([&](auto v)
                      __attribute__((always_inline)) { b[v] = even_elements(load_u32(pair + v * kVectorBytes)); });
      multiply_k<R, V>(a + i, b, acc);
      unrolled<V>([&](auto v)
                      __attribute__((always_inline)) { b[v] = odd_elements(load_u32(pair + v * kVectorBytes)); });
      multiply_k<R, V>(a + kLanes + i, b, acc);
    });
    a += kStep;
    panel += kStepPairs * kPairBytes;
  }
  unrolled<R * V>([&](auto i) __attribute__((always_inline)) { store(c + i / V * ldc + i % V * kLanes, acc[i]); });
}

// R rows of C, all panels of w from its k on.
template <std::int64_t R>
void multiply_panels(const float* a, const Panels& w, float* c, std::int64_t ldc, bool accumulate, const Widening& next,
                     Fetcher& fetcher) {
  constexpr std::int64_t kVectors = R <= 2 ? 4 : 2;  // at least 4 chains of additions, better 8: FMA takes 4 cycles
  const Widening nothing = {};
  for (std::int64_t panel = 0; panel < w.num_panels; ++panel) {
    for (std::int64_t v = 0; v < kVectorsPerPair; v += kVectors) {
      multiply_rows<R, kVectors>(a, w.data + panel * w.stride + v * kVectorBytes, w.k,
                                 c + panel * kPanelRows + v * kLanes, ldc, accumulate,
                                 panel == 0 && v == 0 ? next : nothing, fetcher);
    }
  }
}

using MultiplyPanels = void (*)(const float*, const Panels&, float*, std::int64_t, bool, const Widening&, Fetcher&);
constexpr MultiplyPanels kMultiplyPanels[kRowsMax] = {multiply_panels<1>, multiply_panels<2>, multiply_panels<3>,
                                                      multiply_panels<4>, multiply_panels<5>, multiply_panels<6>};

// Chunks of rows as equal as can be: 7 rows are 3 + 4, not 6 + 1, whose single row would wait for its own additions.
// Between blocks of k the accumulators rest in C: storing a float does not round it.
void multiply_all(const void* a, std::int64_t lda, std::int64_t m, const Panels& w, float* c, std::int64_t ldc,
                  bool accumulate, const Fetch& fetch) {
  if (m == 0) return;
  alignas(kLineBytes) float widened[2][kRowsMax * kRowFloats];  // of this chunk and of the next one
  const std::int64_t num_chunks = (m + kRowsMax - 1) / kRowsMax;
  const auto first_row = [&](std::int64_t chunk) { return chunk * m / num_chunks; };
  const auto widening = [&](std::int64_t chunk, std::int64_t k, float* to) {
    const std::int64_t left = w.k - k;  // none: behind the last block
    return Widening{static_cast<const Element*>(a) + first_row(chunk) * lda + (left > 0 ? k : 0), lda,
                    first_row(chunk + 1) - first_row(chunk), left < kBlockK ? left : kBlockK, to};
  };
  const std::int64_t products_per_panel = m <= 2 ? 1 : 2;  // as kVectors has it
  Fetcher fetcher(fetch, num_chunks * w.num_panels * products_per_panel * (w.k / kStep));
  int current = 0;
  const Widening first = widening(0, 0, widened[current]);
  for (std::int64_t step = 0; step < first.k; step += kStep) widen_step(first, step);
  for (std::int64_t k = 0; k < w.k; k += kBlockK) {
    const Panels block = {.data = w.data + k / 2 * kPairBytes,
                          .stride = w.stride,
                          .num_panels = w.num_panels,
                          .k = w.k - k < kBlockK ? w.k - k : kBlockK};
    for (std::int64_t chunk = 0; chunk < num_chunks; ++chunk) {
      const bool last = chunk + 1 == num_chunks;
      const Widening next = widening(last ? 0 : chunk + 1, last ? k + kBlockK : k, widened[1 - current]);
      const std::int64_t row = first_row(chunk);
      kMultiplyPanels[first_row(chunk + 1) - row - 1](widened[current], block, c + row * ldc, ldc, accumulate || k > 0,
                                                      next, fetcher);
      current = 1 - current;
    }
  }
}

constexpr auto gemm = continued_gemm<multiply_all>;

inline __m256i load_words(const std::byte* p) { return __builtin_bit_cast(__m256i, load_u32(p)); }
inline void store_words(std::byte* p, __m256i words) { __builtin_memcpy(p, &words, sizeof words); }

// Writes the transpose of 4 × 4 64-bit words; rows of both sides are one pair of k (kPairBytes) apart.
inline void transpose_words(const std::byte* in, std::byte* out) {
  // A word holds rows n and n + 1 of W at k and k + 1: n,k  n,k+1  n+1,k  n+1,k+1. Its middle two change places.
  const __m256i swap_middle =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
  __m256i row[4], pair[4];
  for (int i = 0; i < 4; ++i) row[i] = _mm256_shuffle_epi8(load_words(in + i * kPairBytes), swap_middle);
  for (int i = 0; i < 4; i += 2) {
    pair[i] = _mm256_unpacklo_epi64(row[i], row[i + 1]);
    pair[i + 1] = _mm256_unpackhi_epi64(row[i], row[i + 1]);
  }
  // pair[2i + b] holds, in 128-bit lane j, column 2j + b of rows 2i and 2i + 1.
  for (int b = 0; b < 2; ++b) {
    store_words(out + b * kPairBytes, _mm256_permute2x128_si256(pair[b], pair[2 + b], 0x20));        // lanes 0
    store_words(out + (2 + b) * kPairBytes, _mm256_permute2x128_si256(pair[b], pair[2 + b], 0x31));  // lanes 1
  }
}

// A 32 × 32 block is 16 × 16 words of pairs of rows by pairs of columns.
void transpose_panels(const Panels& w, std::int64_t q, std::int64_t count, void* out, std::int64_t out_stride,
                      const Fetch& next) {
  constexpr std::int64_t kPairs = kPanelRows / 2;
  Fetcher fetcher(next, w.num_panels * count * 4);
  for (std::int64_t panel = 0; panel < w.num_panels; ++panel) {
    for (std::int64_t column = 0; column < count; ++column) {
      const std::byte* in = w.data + panel * w.stride + (q + column) * kBlockBytes;
      std::byte* to = static_cast<std::byte*>(out) + column * out_stride + panel * kBlockBytes;
      for (std::int64_t i = 0; i < kPairs; i += 4) {
        fetcher.tick();
        for (std::int64_t j = 0; j < kPairs; j += 4)
          transpose_words(in + i * kPairBytes + j * 8, to + j * kPairBytes + i * 8);
      }
    }
  }
}

}  // namespace
}  // namespace kt::kernels::KT_TABLE
