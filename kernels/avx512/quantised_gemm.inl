// quantised_gemm in registers: 64 bytes of codes become lines of a panel on their way to the products. Rows and panels
// are reduced in the order of gemm.
#pragma once
#include "kernels/avx512/gemm.inl"
#include "kernels/generic/fetch.inl"
#include "kernels/generic/panel.inl"
#include "kernels/generic/quantised.inl"

namespace kt::kernels::KT_TABLE {
namespace {

// Lines of a panel that 64 bytes of codes become; two lines are a pair of k.
template <class Format>
constexpr std::int64_t kLinesPerBlock = kBlockSteps<Format>;

template <class Format>
struct Lines {
  Lines(const typename Format::Converted& converted, const typename Format::Scales& scales) {
#pragma GCC unroll 4
    for (std::int64_t number = 0; number < kLinesPerBlock<Format>; ++number)
      of[number] = Format::line(converted, scales, number);
  }
  __m512bh of[kLinesPerBlock<Format>];
};

// acc[R][2 vectors] += R rows of A times the lines of a block.
template <std::int64_t R, class Format>
[[gnu::always_inline]] inline void multiply_lines(const Element* a, std::int64_t lda, const Lines<Format>& lines,
                                                  Vectors<2 * R>& acc) {
#pragma GCC unroll 4
  for (std::int64_t line = 0; line < kLinesPerBlock<Format>; ++line)
    for (std::int64_t r = 0; r < R; ++r)
      acc[2 * r + line % 2] = dot_pair(acc[2 * r + line % 2], a + r * lda + line / 2 * 2, lines.of[line]);
}

// C[R, 32] from R rows of A and one panel. One tick of the fetcher for each block.
template <std::int64_t R, class Format>
void multiply_codes(const Element* a, std::int64_t lda, const std::byte* panel, std::int64_t k,
                    const QuantLayout& layout, float* c, std::int64_t ldc, Fetcher& fetcher) {
  Vectors<2 * R> acc;
  Fetcher fetch = fetcher;
  while (k > 0) {
    const typename Format::Scales scales(panel);
    const std::byte* block = panel + layout.scale_bytes;
    const std::int64_t count = k < layout.group ? k : layout.group;
    // The next block is converted while this one is multiplied. Behind the last block of a panel that is its pad.
    typename Format::Converted converted(block);
    Lines<Format> lines(converted, scales);
    for (std::int64_t i = 0; i < count; i += kBlockSteps<Format>) {
      fetch.tick();
      block += kQuantBlockBytes;
      converted = typename Format::Converted(block);
      multiply_lines<R, Format>(a + i, lda, lines, acc);
      lines = Lines<Format>(converted, scales);
    }
    panel = block;
    a += count;
    k -= count;
  }
  fetcher = fetch;
  for (std::int64_t r = 0; r < R; ++r)
    for (std::int64_t v = 0; v < 2; ++v) store(c + r * ldc + v * kLanes, acc[2 * r + v]);
}

constexpr std::int64_t kAheadBytes = 8192;

constexpr std::int64_t kQuantisedRowsMax = 6;  // With scales and what is on its way, all in registers.
template <class Format>
constexpr decltype(&multiply_codes<1, Format>) kMultiplyCodes[kQuantisedRowsMax] = {
    multiply_codes<1, Format>, multiply_codes<2, Format>, multiply_codes<3, Format>,
    multiply_codes<4, Format>, multiply_codes<5, Format>, multiply_codes<6, Format>};

template <class Format>
void quantised_gemm(const void* a, std::int64_t lda, std::int64_t m, const QuantPanels& w, float* c, std::int64_t ldc,
                    const Fetch&) {
  const std::int64_t code_bytes = w.k * w.layout.k_bytes;
  const std::int64_t num_groups = (w.k + w.layout.group - 1) / w.layout.group;
  const std::int64_t num_chunks = (m + kQuantisedRowsMax - 1) / kQuantisedRowsMax;
  for (std::int64_t panel = 0; panel < w.num_panels; ++panel) {
    const std::byte* data = w.data + panel * w.stride;
    Fetcher fetcher({data + kAheadBytes, num_groups * w.layout.scale_bytes + code_bytes, 0, 1},
                    num_chunks * code_bytes / kQuantBlockBytes);
    std::int64_t row = 0;
    for (std::int64_t chunk = 0; chunk < num_chunks; ++chunk) {
      const std::int64_t rows = (m - row + num_chunks - chunk - 1) / (num_chunks - chunk);
      kMultiplyCodes<Format>[rows - 1](static_cast<const Element*>(a) + row * lda, lda, data, w.k, w.layout,
                                       c + row * ldc + panel * kPanelRows, ldc, fetcher);
      row += rows;
    }
  }
}

}  // namespace
}  // namespace kt::kernels::KT_TABLE
