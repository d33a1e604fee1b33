// The table for AVX2 and FMA: 8 lanes, bf16 widened to fp32 in registers, products fused with their additions.
#define KT_TABLE avx2
#define KT_LANES 8
#define KT_GEMM "kernels/avx2/gemm.inl"
#include "kernels/cpu_features.h"
#include "kernels/generic/make_table.inl"

namespace kt::kernels::avx2 {

extern const KernelTable kTable;
constinit const KernelTable kTable = make_table({.name = "avx2", .required = kAvx2Fma, .l2_bytes = 512 << 10});

}  // namespace kt::kernels::avx2
