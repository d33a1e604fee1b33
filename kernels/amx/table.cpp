// The table for AMX_BF16: products in tiles, everything else in 16 lanes like avx512.
#include <immintrin.h>

#include "kernels/cpu_features.h"
#include "kernels/kernel_table.h"

namespace kt::kernels::amx {
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
#include "kernels/amx/nest.inl"
#include "kernels/amx/gemm.inl"
#include "kernels/generic/continued_gemm.inl"
#include "kernels/generic/quantised_gemm.inl"
#include "kernels/generic/rows.inl"
#include "kernels/generic/lora_wgrad.inl"
#include "kernels/generic/adamw.inl"
// clang-format on

extern const KernelTable kTable;
constinit const KernelTable kTable = {
    .name = "amx",
    .required = kAmxBf16 | kAvx512Bf16,
    .element_bytes = sizeof(Element),
    .k_multiple = kDepthMultiple,
    .l2_bytes = 2 << 20,
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

}  // namespace kt::kernels::amx
