// The portable table, bf16. Four lanes: a register of every processor we know.
#define KT_TABLE scalar
#define KT_LANES 4
#define KT_GEMM "kernels/scalar/gemm.inl"
#include "kernels/cpu_features.h"
#include "kernels/generic/make_table.inl"

namespace kt::kernels::scalar {

extern const KernelTable kTable;
constinit const KernelTable kTable = make_table({.name = "scalar", .required = 0, .l2_bytes = 512 << 10});

}  // namespace kt::kernels::scalar
