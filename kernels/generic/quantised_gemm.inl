// quantised_gemm out of dequantise and gemm: 128 of k of two panels at a time, so that the weights stay in L1 between
// the two. gemm in several steps of k has the bits of one.
#pragma once
#include "kernels/generic/panel.inl"
#include "kernels/generic/quantised.inl"
#include KT_GEMM

namespace kt::kernels::KT_TABLE {
namespace {

// The share of one of num_steps steps; of several blocks, all to the last one.
Fetch part_of(const Fetch& next, std::int64_t step, std::int64_t num_steps) {
  if (next.count != 1) return step + 1 == num_steps ? next : Fetch{};
  const std::int64_t num_lines = next.block_bytes / kLineBytes;
  const std::int64_t begin = num_lines * step / num_steps;
  const std::int64_t end = num_lines * (step + 1) / num_steps;
  return {next.data + begin * kLineBytes, (end - begin) * kLineBytes, 0, 1};
}

constexpr std::int64_t kQuantisedRowsMax = 0;  // QuantKernels::gemm_rows_max: it is not faster.

template <class Format>
void quantised_gemm(const void* a, std::int64_t lda, std::int64_t m, const QuantPanels& w, float* c, std::int64_t ldc,
                    const Fetch& next) {
  constexpr std::int64_t kStride = panel_stride_bytes(kQuantGroupMax, sizeof(Element));
  alignas(64) std::byte weights[2 * kStride];
  const std::int64_t num_steps = (w.num_panels + 1) / 2 * ((w.k + kQuantGroupMax - 1) / kQuantGroupMax);
  std::int64_t step = 0;
  for (std::int64_t panel = 0; panel < w.num_panels; panel += 2) {
    QuantPanels few = w;
    few.data += panel * w.stride;
    few.num_panels = w.num_panels - panel < 2 ? 1 : 2;
    for (std::int64_t k = 0; k < w.k; k += kQuantGroupMax) {
      const std::int64_t count = w.k - k < kQuantGroupMax ? w.k - k : kQuantGroupMax;
      dequantise<Format>(few, k, count, weights, kStride);
      gemm(static_cast<const Element*>(a) + k, lda, m, {weights, kStride, few.num_panels, count},
           c + panel * kPanelRows, ldc, k > 0, part_of(next, step++, num_steps));
    }
  }
}

}  // namespace
}  // namespace kt::kernels::KT_TABLE
