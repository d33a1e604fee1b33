// The table for AVX512_BF16: 16 lanes, products in bf16 with fp32 accumulation.
#define KT_TABLE avx512
#define KT_LANES 16
#define KT_GEMM "kernels/avx512/gemm.inl"
#define KT_QUANTISED_GEMM "kernels/avx512/quantised_gemm.inl"
#include "kernels/cpu_features.h"
#include "kernels/generic/make_table.inl"

namespace kt::kernels::avx512 {

extern const KernelTable kTable;
constinit const KernelTable kTable = make_table({.name = "avx512", .required = kAvx512Bf16, .l2_bytes = 1 << 20});

}  // namespace kt::kernels::avx512
