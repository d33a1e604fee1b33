// The portable table, fp32, for --weight-format fp32. Four lanes: a register of every processor we know.
#define KT_TABLE scalar_fp32
#define KT_LANES 4
#define KT_GEMM "kernels/scalar/gemm.inl"
#define KT_ELEMENT_BYTES 4
#include "kernels/cpu_features.h"
#include "kernels/generic/make_table.inl"

namespace kt::kernels::scalar_fp32 {

extern const KernelTable kTable;
constinit const KernelTable kTable = make_table({.name = "scalar", .required = 0, .l2_bytes = 512 << 10});

}  // namespace kt::kernels::scalar_fp32
