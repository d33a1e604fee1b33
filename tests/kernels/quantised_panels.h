// Quantised weights with canaries in the pad of every panel, read as the format's reference reads them.
#pragma once
#include <algorithm>
#include <vector>

#include "tests/kernels/kernel_suite.h"
#include "tests/support/formats/format_reference.h"

namespace kt::test {

// The tables under test that have quantised formats.
inline std::vector<const kernels::KernelTable*> bf16_tables() {
  std::vector<const kernels::KernelTable*> tables = suite_config().tables;
  std::erase_if(tables, [](const kernels::KernelTable* table) { return table->element_bytes != 2; });
  return tables;
}

class QuantisedPanels {
 public:
  QuantisedPanels(const kernels::QuantKernels& kernels, const Matrix& rows, std::int64_t k_padded,
                  std::int64_t num_panels, std::int64_t group)
      : kernels_(kernels), layout_(kernels.layout), reference_(format_reference(kernels.format)) {
    layout_.group = group;
    stride_ = layout_.panel_stride(k_padded);
    num_panels_ = num_panels;
    k_ = k_padded;
    bytes_.assign(static_cast<std::size_t>(num_panels * stride_), kPoison);
    kernels.quantise(
        {rows.data(), rows.ld(), rows.num_rows(), rows.num_columns(), k_padded, num_panels, bytes_.data(), stride_},
        layout_);
  }

  const kernels::QuantKernels& kernels() const { return kernels_; }
  kernels::QuantPanels panels() const { return {bytes_.data(), stride_, num_panels_, k_, layout_}; }
  // The group that column k of a row is in.
  std::byte* group(std::int64_t row, std::int64_t k) {
    return bytes_.data() + row / kernels::kPanelRows * stride_ + layout_.offset(k / layout_.group * layout_.group);
  }
  float scale(std::int64_t row, std::int64_t k) const {
    return reference_.scale(const_cast<QuantisedPanels*>(this)->group(row, k), row % kernels::kPanelRows);
  }
  std::int32_t code(std::int64_t row, std::int64_t k) const {
    return reference_.code(const_cast<QuantisedPanels*>(this)->group(row, k), row % kernels::kPanelRows,
                           k % layout_.group);
  }

  bool pads_are_intact() const {
    for (std::int64_t panel = 0; panel < num_panels_; ++panel) {
      const auto end = bytes_.begin() + (panel + 1) * stride_;
      if (!std::all_of(end - kernels::kPanelPadBytes, end, [](std::byte b) { return b == kPoison; })) return false;
    }
    return true;
  }

 private:
  static constexpr std::byte kPoison{0xee};

  const kernels::QuantKernels& kernels_;
  kernels::QuantLayout layout_;
  const FormatReference& reference_;
  std::vector<std::byte> bytes_;
  std::int64_t stride_ = 0;
  std::int64_t num_panels_ = 0;
  std::int64_t k_ = 0;
};

}  // namespace kt::test
