// The table for AVX512_BF16: 16 lanes, products in bf16 with fp32 accumulation.
#include <immintrin.h>

#include "kernels/cpu_features.h"
#include "kernels/kernel_table.h"

namespace kt::kernels::avx512 {
namespace {
using Element = std::uint16_t;
constexpr int kLanes = 16;
}  // namespace

// The order counts: each file uses the ones above it.
// clang-format off
#include "kernels/generic/types.inl"
#include "kernels/avx512/primitives.inl"
#include "kernels/generic/vector.inl"
#include "kernels/generic/layout.inl"
#include "kernels/generic/fetch.inl"
#include "kernels/generic/quantised.inl"
#include "kernels/avx512/transpose.inl"
#include "kernels/avx512/gemm.inl"
#include "kernels/avx512/quantised_gemm.inl"
#include "kernels/generic/rows.inl"
#include "kernels/generic/lora_wgrad.inl"
#include "kernels/generic/adamw.inl"
// clang-format on

extern const KernelTable kTable;
constinit const KernelTable kTable = {
    .name = "avx512",
    .required = kAvx512Bf16,
    .element_bytes = sizeof(Element),
    .k_multiple = kDepthMultiple,
    .l2_bytes = 1 << 20,
    .quantised_rows_max = 6,
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

}  // namespace kt::kernels::avx512
