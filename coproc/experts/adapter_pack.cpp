// Masters → packed copies, one panel of 32 rows at a time.
#include <algorithm>
#include <cstring>

#include "coproc/experts/adapter_layer.h"

namespace kt::coproc {
namespace {

using shm::AdapterTensor;

// One row of the matrix to pack: where it comes from and at which column it begins. cols = 0: a row of zeros.
struct SourceRow {
  const float* from = nullptr;
  std::int64_t cols = 0;
  std::int64_t column = 0;
};

SourceRow row_of(const Adapter::Layer::Tensor& tensor, std::int64_t expert, std::int64_t row, std::int64_t column) {
  if (row >= tensor.shape.rows) return {};
  return {tensor.p + expert * tensor.expert_size() + row * tensor.shape.cols, tensor.shape.cols, column};
}

// Row `row` of panel `panel` of a part.
SourceRow source_row(const Adapter::Layer& layer, Adapter::Layer::Part part, std::int64_t expert, std::int64_t panel,
                     std::int64_t row) {
  const std::int64_t flat = panel * kernels::kPanelRows + row;
  switch (part) {
    case Adapter::Layer::kGateUpA: {
      const std::int64_t r = layer.spec.gate_up.r;
      const bool is_up = !layer.spec.shared_a && flat >= r;
      return is_up ? row_of(layer.tensor(AdapterTensor::kUpA), expert, flat - r, 0)
                   : row_of(layer.tensor(AdapterTensor::kGateA), expert, flat, 0);
    }
    case Adapter::Layer::kGateUpB: {
      const std::int64_t of_half = panel / 2 * kernels::kPanelRows + row;
      return panel % 2 == 1 ? row_of(layer.tensor(AdapterTensor::kUpB), expert, of_half, layer.up_column())
                            : row_of(layer.tensor(AdapterTensor::kGateB), expert, of_half, 0);
    }
    case Adapter::Layer::kDownA:
      return row_of(layer.tensor(AdapterTensor::kDownA), expert, flat, 0);
    default:
      return row_of(layer.tensor(AdapterTensor::kDownB), expert, flat, 0);
  }
}

}  // namespace

std::int64_t Adapter::Layer::pack_scratch_bytes(const kernels::KernelTable& table) const {
  std::int64_t k = 0;
  for (const Packed& part : parts) k = std::max(k, part.k);
  return kernels::kPanelRows * k * table.element_bytes;
}

void Adapter::Layer::pack(const kernels::KernelTable& table, Part part, std::int64_t expert, std::byte* scratch) const {
  const Packed& to = parts[part];
  const std::int64_t row_bytes = to.k * table.element_bytes;
  const kernels::Panels panels = to.of(expert);
  for (std::int64_t panel = 0; panel < to.num_panels; ++panel) {
    std::memset(scratch, 0, static_cast<std::size_t>(kernels::kPanelRows * row_bytes));
    for (std::int64_t row = 0; row < kernels::kPanelRows; ++row) {
      const SourceRow source = source_row(*this, part, expert, panel, row);
      table.round_rows(source.from, source.cols, source.cols > 0 ? 1 : 0, source.cols, 1.0f,
                       scratch + row * row_bytes + source.column * table.element_bytes, to.k);
    }
    std::byte* data = to.data + (panels.data - to.data) + panel * to.stride;
    table.pack({scratch, to.k, kernels::kPanelRows, to.k, to.k, 1, data, to.stride});
  }
}

}  // namespace kt::coproc
