// What the kernels are compiled for. A table.cpp defines it before it includes anything:
//
//   KT_TABLE           the table's namespace in kt::kernels
//   KT_LANES           floats in a vector: 16, AVX-512; 8, AVX2; 4, any processor
//   KT_GEMM            the file that has gemm, transpose_panels and kDepthMultiple
//   KT_QUANTISED_GEMM  the file that has quantised_gemm, if it is not generic/quantised_gemm.inl
//   KT_ELEMENT_BYTES   4 for fp32, if it is not 2 for bf16
//
// Where none does, as in an editor, a file is compiled for what the compiler's flags allow.
#pragma once

#ifndef KT_TABLE
#define KT_TABLE alone
#if defined(__AVX512BF16__)
#define KT_LANES 16
#define KT_GEMM "kernels/avx512/gemm.inl"
#elif defined(__AVX2__)
#define KT_LANES 8
#define KT_GEMM "kernels/avx2/gemm.inl"
#else
#define KT_LANES 4
#define KT_GEMM "kernels/scalar/gemm.inl"
#endif
#endif

#ifndef KT_QUANTISED_GEMM
#define KT_QUANTISED_GEMM "kernels/generic/quantised_gemm.inl"
#endif
#ifndef KT_ELEMENT_BYTES
#define KT_ELEMENT_BYTES 2
#endif
