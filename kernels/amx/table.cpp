// The table for AMX_BF16: products in tiles, everything else in 16 lanes like avx512.
#define KT_TABLE amx
#define KT_LANES 16
#define KT_GEMM "kernels/amx/gemm.inl"
#include "kernels/cpu_features.h"
#include "kernels/generic/make_table.inl"

namespace kt::kernels::amx {

extern const KernelTable kTable;
constinit const KernelTable kTable =
    make_table({.name = "amx", .required = kAmxBf16 | kAvx512Bf16, .l2_bytes = 2 << 20});

}  // namespace kt::kernels::amx
