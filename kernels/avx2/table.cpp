// The table for AVX2 and FMA: 8 lanes, bf16 widened to fp32 in registers, products fused with their additions.
#include <immintrin.h>

#include <utility>

#include "kernels/cpu_features.h"
#include "kernels/kernel_table.h"

namespace kt::kernels::avx2 {
namespace {
using Element = std::uint16_t;
constexpr int kLanes = 8;
}  // namespace

// The order counts: each file uses the ones above it.
// clang-format off
#include "kernels/generic/types.inl"
#include "kernels/avx2/primitives.inl"
#include "kernels/generic/vector.inl"
#include "kernels/generic/layout.inl"
#include "kernels/generic/fetch.inl"
#include "kernels/generic/quantised.inl"
#include "kernels/avx2/gemm.inl"
#include "kernels/generic/continued_gemm.inl"
#include "kernels/generic/quantised_gemm.inl"
#include "kernels/generic/rows.inl"
#include "kernels/generic/lora_wgrad.inl"
#include "kernels/generic/adamw.inl"
// clang-format on

extern const KernelTable kTable;
constinit const KernelTable kTable = {
    .name = "avx2",
    .required = kAvx2Fma,
    .element_bytes = sizeof(Element),
    .k_multiple = kDepthMultiple,
    .l2_bytes = 512 << 10,
    .quantised_rows_max = 0,
    .pack = pack,
    .quantise = quantise,
    .dequantise = dequantise,
    .transpose_panels = transpose_panels,
    .gemm = gemm,
    .quantised_gemm = quantised_gemm,
    .round_rows = round_rows,
    .gather = gather,
    .swiglu = swiglu,
    .swiglu_backward = swiglu_backward,
    .lora_wgrad = lora_wgrad,
    .sum_routes = sum_routes,
    .adamw = adamw,
};

}  // namespace kt::kernels::avx2
