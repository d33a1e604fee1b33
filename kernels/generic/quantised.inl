// Quantised panels of any format: quantise once, at load, and dequantise into panels of bf16, for every product of both
// directions. What a group holds is the format's (kernels/formats/list.inl).
#pragma once
#include "kernels/generic/panel.inl"
#include "kernels/generic/vector.inl"

namespace kt::kernels::KT_TABLE {
namespace {

constexpr std::int64_t kQuantBlockBytes = kLineBytes;  // Codes are decoded a line at a time.

// Below it a group of weights is taken as zero, so that neither its scale nor the scale's reciprocal is subnormal.
constexpr float kSmallestWeight = 0x1p-100f;

// Steps of k in a block.
template <class Format>
constexpr std::int64_t kBlockSteps = kQuantBlockBytes / Format::kRow.quantised->k_bytes;

// The weights of one group, and where they go: up to Format::kScalePanels panels.
struct QuantGroup {
  const Element* in;  // [rows, columns], ld apart
  std::int64_t ld;
  std::int64_t rows;     // of 32·num_panels; the others are zero
  std::int64_t columns;  // that the matrix has; the others of the group are zero
  std::int64_t num_panels;
  std::byte* out;       // The group in the first panel: scales, which are to be written, and codes, which are zero.
  std::int64_t stride;  // Bytes to the group in the next panel.
};

template <class Format>
void quantise(const PackArgs& args, const QuantLayout& layout) {
  const Element* in = static_cast<const Element*>(args.rows);
  for (std::int64_t panel = 0; panel < args.num_panels; panel += Format::kScalePanels) {
    const std::int64_t first_row = panel * kPanelRows;
    const std::int64_t panels_left = args.num_panels - panel;
    const std::int64_t rows_left = first_row < args.n ? args.n - first_row : 0;
    const std::int64_t num_panels = panels_left < Format::kScalePanels ? panels_left : Format::kScalePanels;
    const std::int64_t rows = rows_left < num_panels * kPanelRows ? rows_left : num_panels * kPanelRows;
    std::byte* out = static_cast<std::byte*>(args.panels) + panel * args.stride;
    for (std::int64_t k = 0; k < args.k_padded; k += layout.group) {
      const std::int64_t padded = args.k_padded - k < layout.group ? args.k_padded - k : layout.group;
      const std::int64_t columns_left = k < args.k ? args.k - k : 0;
      const std::int64_t columns = columns_left < padded ? columns_left : padded;
      const std::int64_t bytes = layout.scale_bytes + padded * layout.k_bytes;
      for (std::int64_t p = 0; p < num_panels; ++p)
        __builtin_memset(out + p * args.stride, 0, static_cast<std::size_t>(bytes));
      const Element* weights = rows > 0 && columns > 0 ? in + first_row * args.ld + k : in;
      Format::quantise({weights, args.ld, rows, columns, num_panels, out, args.stride});
      out += bytes;
    }
  }
}

template <class Format>
void dequantise_panel(const std::byte* panel, const QuantLayout& layout, std::int64_t k_begin, std::int64_t k_count,
                      std::uint16_t* out) {
  const std::int64_t group_bytes = layout.scale_bytes + layout.group * layout.k_bytes;
  while (k_count > 0) {
    const std::int64_t in_group = k_begin % layout.group;
    const std::int64_t count = k_count < layout.group - in_group ? k_count : layout.group - in_group;
    const std::byte* data = panel + k_begin / layout.group * group_bytes;
    const typename Format::Scales scales(data);
    data += layout.scale_bytes + in_group * layout.k_bytes;
    for (std::int64_t k = 0; k < count; k += kBlockSteps<Format>)
      Format::decode(data + k / kBlockSteps<Format> * kQuantBlockBytes, scales, out + k * kPanelRows);
    out += count * kPanelRows;
    k_begin += count;
    k_count -= count;
  }
}

template <class Format>
void dequantise(const QuantPanels& w, std::int64_t k_begin, std::int64_t k_count, void* out, std::int64_t out_stride) {
  for (std::int64_t panel = 0; panel < w.num_panels; ++panel)
    dequantise_panel<Format>(
        w.data + panel * w.stride, w.layout, k_begin, k_count,
        static_cast<std::uint16_t*>(static_cast<void*>(static_cast<std::byte*>(out) + panel * out_stride)));
}

}  // namespace
}  // namespace kt::kernels::KT_TABLE
