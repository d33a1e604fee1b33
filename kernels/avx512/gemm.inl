// gemm with AVX512_BF16. acc = fma(a odd, b odd, acc), then fma(a even, b even, acc): one VDPBF16PS
// per pair of k, pairs ascending, rounded to nearest, subnormals taken and given as zero.
#pragma once
#include <immintrin.h>

#include "kernels/avx512/transpose.inl"
#include "kernels/generic/fetch.inl"
#include "kernels/generic/panel.inl"
#include "kernels/generic/vector.inl"

namespace kt::kernels::KT_TABLE {
namespace {

// Register block: 6 rows × 64 columns, or 12 × 32 (or × 16) of a lone panel: 24 accumulators and 4 vectors of B; A
// comes broadcast from memory.
constexpr std::int64_t kAccumulatorsMax = 24;
constexpr std::int64_t kRowsMax = 6;
constexpr std::int64_t kRowsMaxOfOnePanel = 12;
constexpr std::int64_t kDepthMultiple = 2;  // KernelTable::k_multiple

// acc + the pair of bf16 at `a` times 16 pairs of b.
inline F32 dot_pair(F32 acc, const Element* a, __m512bh b) {
  std::int32_t pair;
  __builtin_memcpy(&pair, a, sizeof pair);
  return _mm512_dpbf16_ps(acc, b, __builtin_bit_cast(__m512bh, _mm512_set1_epi32(pair)));
}

// The panels of W or those that continue them, and the row of A that meets them.
struct Operands {
  const Element* a;
  std::int64_t lda;
  const std::byte* panel;
  std::int64_t stride;
  std::int64_t k;
};

// One or two rows only wait for memory, which comes fastest as two streams close ahead of what is multiplied: the two
// panels at `panel`, then those behind them, where what comes next usually lies. A tick for each pair of k.
constexpr std::int64_t kStreamRowsMax = 2;
class Stream {
 public:
  Stream(const std::byte* panel, const Panels& w)
      : line_(panel + kAhead),
        end_(panel + w.k * kPairBytes / 2),
        stride_(w.stride),
        jump_(2 * w.stride - w.k * kPairBytes / 2) {}
  void tick() {
    for (const std::byte* panel : {line_, line_ + stride_}) {
      __builtin_prefetch(panel, 0, 2);
      __builtin_prefetch(panel + kLineBytes, 0, 2);
    }
    line_ += kPairBytes;
    if (line_ == end_) line_ += jump_;
  }

 private:
  static constexpr std::int64_t kAhead = 2048;
  const std::byte* line_;
  const std::byte* end_;
  std::int64_t stride_;
  std::int64_t jump_;
};

// acc[R][V] += R rows of A times V vectors of columns. One tick of the fetcher for each pair of k.
template <std::int64_t R, std::int64_t V, class AnyFetcher>
[[gnu::always_inline]] inline void multiply_pairs(const Operands& in, Vectors<R * V>& acc, AnyFetcher& fetch) {
  for (std::int64_t pair = 0; pair < in.k / 2; ++pair) {
    __m512bh b[static_cast<std::size_t>(V)];
    for (std::int64_t v = 0; v < V; ++v)
      __builtin_memcpy(&b[v], in.panel + v / 2 * in.stride + pair * kPairBytes + v % 2 * kLineBytes, kLineBytes);
    fetch.tick();
    for (std::int64_t r = 0; r < R; ++r)
      for (std::int64_t v = 0; v < V; ++v)
        acc[r * V + v] = dot_pair(acc[r * V + v], in.a + r * in.lda + 2 * pair, b[v]);
  }
}

// C[R, 16·V] from R rows of A and W, then of `more`, whose k may be 0.
template <std::int64_t R, std::int64_t V, class AnyFetcher = Fetcher>
void multiply_rows(const Operands& w, const Operands& more, float* c, std::int64_t ldc, bool accumulate,
                   AnyFetcher& fetcher) {
  Vectors<R * V> acc;
  for (std::int64_t r = 0; r < R; ++r)
    for (std::int64_t v = 0; v < V; ++v) acc[r * V + v] = accumulate ? load(c + r * ldc + v * kLanes) : F32{};
  AnyFetcher fetch = fetcher;
  multiply_pairs<R, V>(w, acc, fetch);
  multiply_pairs<R, V>(more, acc, fetch);
  fetcher = fetch;
  for (std::int64_t r = 0; r < R; ++r)
    for (std::int64_t v = 0; v < V; ++v) store(c + r * ldc + v * kLanes, acc[r * V + v]);
}

using MultiplyRows = void (*)(const Operands&, const Operands&, float*, std::int64_t, bool, Fetcher&);
// For 1 … 12 rows, as far as the accumulators are registers.
template <std::int64_t R, std::int64_t V>
constexpr MultiplyRows multiply_rows_if_they_fit() {
  if constexpr (R * V <= kAccumulatorsMax) return multiply_rows<R, V>;
  return nullptr;
}
template <std::int64_t V>
constexpr MultiplyRows kMultiplyRows[] = {multiply_rows<1, V>,
                                          multiply_rows<2, V>,
                                          multiply_rows<3, V>,
                                          multiply_rows<4, V>,
                                          multiply_rows<5, V>,
                                          multiply_rows<6, V>,
                                          multiply_rows_if_they_fit<7, V>(),
                                          multiply_rows_if_they_fit<8, V>(),
                                          multiply_rows_if_they_fit<9, V>(),
                                          multiply_rows_if_they_fit<10, V>(),
                                          multiply_rows_if_they_fit<11, V>(),
                                          multiply_rows_if_they_fit<12, V>()};

void clear_columns(float* c, std::int64_t ldc, std::int64_t m) {
  for (std::int64_t row = 0; row < m; ++row) store(c + row * ldc, F32{});
}

// Chunks of rows as equal as can be: 7 rows are 4 + 3, not 6 + 1, whose single row would wait for its own additions.
void gemm(const void* a, std::int64_t lda, std::int64_t m, const Panels& w, float* c, std::int64_t ldc, bool accumulate,
          const Fetch& next) {
  if (m == 0) return;
  const auto* first = static_cast<const Element*>(a);
  const Panels nothing;
  const Panels& more = w.more == nullptr ? nothing : *w.more;
  for (std::int64_t panel = 0; panel < w.num_panels; panel += 2) {
    const std::int64_t left = w.num_panels - panel - 2;
    const std::int64_t rows_max = left >= 0 ? kRowsMax : kRowsMaxOfOnePanel;
    const std::int64_t num_chunks = (m + rows_max - 1) / rows_max;
    const bool half = left == -1 && w.last_rows <= kLanes;
    const MultiplyRows* multiply = left >= 0 ? kMultiplyRows<4> : half ? kMultiplyRows<1> : kMultiplyRows<2>;
    const std::byte* data = w.data + panel * w.stride;
    if (left >= 0 && m <= kStreamRowsMax && (left > 0 || next.count > 0)) {
      Stream stream(data, w);
      const auto multiply_few = m == 1 ? multiply_rows<1, 4, Stream> : multiply_rows<2, 4, Stream>;
      multiply_few({first, lda, data, w.stride, w.k},
                   {first + w.k, lda, more.data + panel * more.stride, more.stride, more.k}, c + panel * kPanelRows,
                   ldc, accumulate, stream);
      continue;
    }
    Fetcher fetcher(left > 0 ? Fetch{data + 2 * w.stride, w.k * kPairBytes / 2, w.stride, left < 2 ? left : 2} : next,
                    num_chunks * (w.k + more.k) / 2);
    std::int64_t row = 0;
    for (std::int64_t chunk = 0; chunk < num_chunks; ++chunk) {
      const std::int64_t rows = (m - row + num_chunks - chunk - 1) / (num_chunks - chunk);
      const Element* from = first + row * lda;
      multiply[rows - 1]({from, lda, data, w.stride, w.k},
                         {from + w.k, lda, more.data + panel * more.stride, more.stride, more.k},
                         c + row * ldc + panel * kPanelRows, ldc, accumulate, fetcher);
      row += rows;
    }
    if (half && !accumulate) clear_columns(c + panel * kPanelRows + kLanes, ldc, m);
  }
}

}  // namespace
}  // namespace kt::kernels::KT_TABLE
