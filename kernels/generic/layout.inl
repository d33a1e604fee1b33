// pack and gather: moving elements without looking at them.
#pragma once
#include "kernels/generic/panel.inl"

namespace kt::kernels::KT_TABLE {
namespace {

// Units [unit, unit + count) of `rows` rows into their columns of the panel. Small blocks: both sides stay in L1.
void pack_block(const Element* in, std::int64_t ld, std::int64_t rows, std::int64_t unit, std::int64_t count,
                std::uint32_t* panel) {
  for (std::int64_t row = 0; row < rows; ++row) {
    const Element* from = in + row * ld + unit * kElementsPerUnit;
    for (std::int64_t u = 0; u < count; ++u) {
      std::uint32_t value;
      __builtin_memcpy(&value, from + u * kElementsPerUnit, sizeof value);
      panel[(unit + u) * kPanelRows + row] = value;
    }
  }
}

void pack_panel(const Element* in, std::int64_t ld, std::int64_t rows, std::int64_t k, std::int64_t k_padded,
                std::uint32_t* panel) {
  constexpr std::int64_t kBlock = 16;  // units: one cache line of each source row
  const std::int64_t whole_units = k / kElementsPerUnit;
  const std::int64_t filled_units = rows == kPanelRows ? whole_units : 0;
  __builtin_memset(panel + filled_units * kPanelRows, 0,
                   static_cast<std::size_t>(k_padded / kElementsPerUnit - filled_units) * kPanelRows * 4);
  for (std::int64_t unit = 0; unit < whole_units; unit += kBlock) {
    const std::int64_t left = whole_units - unit;
    pack_block(in, ld, rows, unit, left < kBlock ? left : kBlock, panel);
  }
  if (whole_units * kElementsPerUnit == k) return;
  for (std::int64_t row = 0; row < rows; ++row)  // an odd k leaves half a unit
    __builtin_memcpy(&panel[whole_units * kPanelRows + row], in + row * ld + k - 1, sizeof(Element));
}

void pack(const PackArgs& args) {
  const Element* in = static_cast<const Element*>(args.rows);
  std::byte* out = static_cast<std::byte*>(args.panels);
  for (std::int64_t panel = 0; panel < args.num_panels; ++panel) {
    const std::int64_t first = panel * kPanelRows;
    const std::int64_t left = first < args.n ? args.n - first : 0;
    pack_panel(in + (left > 0 ? first * args.ld : 0), args.ld, left < kPanelRows ? left : kPanelRows, args.k,
               args.k_padded, static_cast<std::uint32_t*>(static_cast<void*>(out + panel * args.stride)));
  }
}

void gather(const void* x, std::int64_t ldx, const std::int32_t* row, std::int64_t m, std::int64_t n,
            std::int64_t n_padded, void* out, std::int64_t ldo) {
  for (std::int64_t i = 0; i < m; ++i) {
    Element* to = static_cast<Element*>(out) + i * ldo;
    __builtin_memcpy(to, static_cast<const Element*>(x) + row[i] * ldx, static_cast<std::size_t>(n) * sizeof(Element));
    __builtin_memset(to + n, 0, static_cast<std::size_t>(n_padded - n) * sizeof(Element));
  }
}

}  // namespace
}  // namespace kt::kernels::KT_TABLE
