// The recipe of a table: every kernel that its namespace has, and what is the table's own.
#pragma once
#include "kernels/generic/adamw.inl"
#include "kernels/generic/layout.inl"
#include "kernels/generic/lora_wgrad.inl"
#include "kernels/generic/rows.inl"
#include "kernels/kernel_table.h"
#include KT_GEMM
#if KT_ELEMENT_BYTES == 2
#include "kernels/formats/list.inl"
#include KT_QUANTISED_GEMM
#endif

namespace kt::kernels::KT_TABLE {
namespace {

#if KT_ELEMENT_BYTES == 2
template <std::size_t kCount>
struct QuantTable {
  QuantKernels formats[kCount] = {};
};

template <class Format>
constexpr void add_format(QuantKernels*& next) {
  if constexpr (Format::kRow.quantised) {
    *next++ = {.format = Format::kRow.name,
               .layout = *Format::kRow.quantised,
               .quantise = quantise<Format>,
               .dequantise = dequantise<Format>,
               .gemm = quantised_gemm<Format>,
               .gemm_rows_max = kQuantisedRowsMax};
  }
}

template <class... Format>
constexpr auto make_quant_table(FormatList<Format...>) {
  QuantTable<(std::size_t{Format::kRow.quantised.has_value()} + ...)> table;
  QuantKernels* next = table.formats;
  (add_format<Format>(next), ...);
  return table;
}
constexpr auto kQuantTable = make_quant_table(AllFormats{});
constexpr std::span<const QuantKernels> kQuantFormats = kQuantTable.formats;
#else
constexpr std::span<const QuantKernels> kQuantFormats = {};
#endif

// As in KernelTable.
struct TableFacts {
  std::string_view name;
  std::uint32_t required;
  std::int64_t l2_bytes;
};

constexpr KernelTable make_table(const TableFacts& facts) {
  return {
      .name = facts.name,
      .required = facts.required,
      .element_bytes = sizeof(Element),
      .k_multiple = kDepthMultiple,
      .l2_bytes = facts.l2_bytes,
      .formats = kQuantFormats,
      .pack = pack,
      .transpose_panels = transpose_panels,
      .gemm = gemm,
      .round_rows = round_rows,
      .gather = gather,
      .activate = activate,
      .activate_backward = activate_backward,
      .lora_wgrad = lora_wgrad,
      .sum_routes = sum_routes,
      .adamw = adamw,
  };
}

}  // namespace
}  // namespace kt::kernels::KT_TABLE
