// The recipe of a table: every kernel that its namespace has, and what is the table's own.
#pragma once
#include "kernels/generic/adamw.inl"
#include "kernels/generic/layout.inl"
#include "kernels/generic/lora_wgrad.inl"
#include "kernels/generic/rows.inl"
#include "kernels/kernel_table.h"
#include KT_GEMM
#if KT_ELEMENT_BYTES == 2
#include KT_QUANTISED_GEMM
#include "kernels/generic/quantised.inl"
#endif

namespace kt::kernels::KT_TABLE {
namespace {

// As in KernelTable.
struct TableFacts {
  std::string_view name;
  std::uint32_t required;
  std::int64_t l2_bytes;
  std::int64_t quantised_rows_max;
};

constexpr KernelTable make_table(const TableFacts& facts) {
  return {
    .name = facts.name, .required = facts.required, .element_bytes = sizeof(Element), .k_multiple = kDepthMultiple,
    .l2_bytes = facts.l2_bytes, .quantised_rows_max = facts.quantised_rows_max, .pack = pack,
#if KT_ELEMENT_BYTES == 2
    .quantise = quantise, .dequantise = dequantise,
#else
    .quantise = nullptr, .dequantise = nullptr,
#endif
    .transpose_panels = transpose_panels, .gemm = gemm,
#if KT_ELEMENT_BYTES == 2
    .quantised_gemm = quantised_gemm,
#else
    .quantised_gemm = nullptr,
#endif
    .round_rows = round_rows, .gather = gather, .activate = activate, .activate_backward = activate_backward,
    .lora_wgrad = lora_wgrad, .sum_routes = sum_routes, .adamw = adamw,
  };
}

}  // namespace
}  // namespace kt::kernels::KT_TABLE
