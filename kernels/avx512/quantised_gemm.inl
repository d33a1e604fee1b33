// quantised_gemm in registers: 64 bytes of integers become lines of a panel on their way to the products. Rows and
// panels are reduced in the order of gemm.
#pragma once
#include "kernels/avx512/gemm.inl"
#include "kernels/generic/fetch.inl"
#include "kernels/generic/panel.inl"
#include "kernels/generic/quantised.inl"

namespace kt::kernels::KT_TABLE {
namespace {

// Of 64 bytes of integers: vectors of floats, and the lines of a panel that they become; two lines are a pair of k.
template <int kBits>
constexpr std::int64_t kVectorsPerBlock = kQuantBlockBytes * 8 / kBits / kLanes;
template <int kBits>
constexpr std::int64_t kLinesPerBlock = kVectorsPerBlock<kBits> / 2;

template <int kBits>
struct Converted {
  explicit Converted(const std::byte* block) {
#pragma GCC unroll 8
    for (std::int64_t v = 0; v < kVectorsPerBlock<kBits>; ++v) of[v] = integers<kBits>(block, v);
  }
  F32 of[kVectorsPerBlock<kBits>];
};

template <int kBits>
struct Lines {
  Lines(const Converted<kBits>& converted, const Scales& scales) {
#pragma GCC unroll 4
    for (std::int64_t line = 0; line < kLinesPerBlock<kBits>; ++line)
      of[line] = nearest(converted.of[2 * line] * scales.of[2 * line % Scales::kVectors],
                         converted.of[2 * line + 1] * scales.of[(2 * line + 1) % Scales::kVectors]);
  }
  __m512bh of[kLinesPerBlock<kBits>];
};

// acc[R][2 vectors] += R rows of A times the lines of a block.
template <std::int64_t R, int kBits>
[[gnu::always_inline]] inline void multiply_lines(const Element* a, std::int64_t lda, const Lines<kBits>& lines,
                                                  Vectors<2 * R>& acc) {
#pragma GCC unroll 4
  for (std::int64_t line = 0; line < kLinesPerBlock<kBits>; ++line)
    for (std::int64_t r = 0; r < R; ++r)
      acc[2 * r + line % 2] = dot_pair(acc[2 * r + line % 2], a + r * lda + line / 2 * 2, lines.of[line]);
}

// C[R, 32] from R rows of A and one panel. One tick of the fetcher for each block.
template <std::int64_t R, int kBits>
void multiply_integers(const Element* a, std::int64_t lda, const std::byte* panel, std::int64_t k, std::int64_t group,
                       float* c, std::int64_t ldc, Fetcher& fetcher) {
  Vectors<2 * R> acc;
  Fetcher fetch = fetcher;
  while (k > 0) {
    const Scales scales(static_cast<const float*>(static_cast<const void*>(panel)));
    const std::byte* block = panel + kQuantScaleBytes;
    const std::int64_t count = k < group ? k : group;
    // The next block is converted while this one is multiplied. Behind the last block of a panel that is its pad.
    Converted<kBits> converted(block);
    Lines<kBits> lines(converted, scales);
    for (std::int64_t i = 0; i < count; i += kBlockSteps<kBits>) {
      fetch.tick();
      block += kQuantBlockBytes;
      converted = Converted<kBits>(block);
      multiply_lines<R, kBits>(a + i, lda, lines, acc);
      lines = Lines<kBits>(converted, scales);
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

using MultiplyIntegers = void (*)(const Element*, std::int64_t, const std::byte*, std::int64_t, std::int64_t, float*,
                                  std::int64_t, Fetcher&);
constexpr std::int64_t kIntegerRowsMax = 6;  // With scales and what is on its way, all in registers.
template <int kBits>
constexpr MultiplyIntegers kMultiplyIntegers[kIntegerRowsMax] = {
    multiply_integers<1, kBits>, multiply_integers<2, kBits>, multiply_integers<3, kBits>,
    multiply_integers<4, kBits>, multiply_integers<5, kBits>, multiply_integers<6, kBits>};

void quantised_gemm(const void* a, std::int64_t lda, std::int64_t m, const QuantPanels& w, float* c, std::int64_t ldc,
                    const Fetch&) {
  const MultiplyIntegers* multiply = w.format.bits == 8 ? kMultiplyIntegers<8> : kMultiplyIntegers<4>;
  const std::int64_t num_groups = (w.k + w.format.group - 1) / w.format.group;
  const std::int64_t panel_bytes = num_groups * kQuantScaleBytes + w.k * w.format.bits * kPanelRows / 8;
  const std::int64_t num_chunks = (m + kIntegerRowsMax - 1) / kIntegerRowsMax;
  for (std::int64_t panel = 0; panel < w.num_panels; ++panel) {
    const std::byte* data = w.data + panel * w.stride;
    Fetcher fetcher({data + kAheadBytes, panel_bytes, 0, 1},
                    num_chunks * w.k * w.format.bits * kPanelRows / 8 / kQuantBlockBytes);
    std::int64_t row = 0;
    for (std::int64_t chunk = 0; chunk < num_chunks; ++chunk) {
      const std::int64_t rows = (m - row + num_chunks - chunk - 1) / (num_chunks - chunk);
      multiply[rows - 1](static_cast<const Element*>(a) + row * lda, lda, data, w.k, w.format.group,
                         c + row * ldc + panel * kPanelRows, ldc, fetcher);
      row += rows;
    }
  }
}

}  // namespace
}  // namespace kt::kernels::KT_TABLE
