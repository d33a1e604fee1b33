#include "coproc/experts/weights.h"

#include <utility>

#include "coproc/experts/memory.h"

namespace kt::coproc {

// One mapping, expert after expert, layer after layer: gate_up panels, then down panels.
struct ExpertWeights::State {
  State(ExpertDims dims_in, const kernels::KernelTable& table_in)
      : dims(std::move(dims_in)),
        table(table_in),
        gate_up_stride(kernels::panel_stride_bytes(dims.hidden_padded(), table.element_bytes)),
        down_stride(kernels::panel_stride_bytes(dims.intermediate_padded(), table.element_bytes)),
        gate_up_panels(2 * dims.intermediate_padded() / kernels::kPanelRows),
        down_panels(dims.hidden_padded() / kernels::kPanelRows),
        expert_bytes(gate_up_panels * gate_up_stride + down_panels * down_stride) {}

  std::byte* expert(std::uint32_t moe_index, std::uint32_t expert_idx) const {
    KT_DCHECK(moe_index < dims.moe_layers.size() && expert_idx < dims.num_experts);
    const std::int64_t index = static_cast<std::int64_t>(moe_index) * dims.num_experts + expert_idx;
    return memory.data() + index * expert_bytes;
  }
  std::uint64_t bytes() const {
    return static_cast<std::uint64_t>(expert_bytes) * dims.num_experts * dims.moe_layers.size();
  }

  ExpertDims dims;
  const kernels::KernelTable& table;
  std::int64_t gate_up_stride;
  std::int64_t down_stride;
  std::int64_t gate_up_panels;
  std::int64_t down_panels;
  std::int64_t expert_bytes;
  Memory memory;
};

ExpertWeights::ExpertWeights(const ExpertDims& dims, const kernels::KernelTable& table)
    : state_(std::make_unique<State>(dims, table)) {}
ExpertWeights::~ExpertWeights() = default;

Result<std::unique_ptr<ExpertWeights>> ExpertWeights::create(const ExpertDims& dims,
                                                             const kernels::KernelTable& table) {
  KT_CHECK(dims.element_bytes == table.element_bytes);
  std::unique_ptr<ExpertWeights> weights(new ExpertWeights(dims, table));
  KT_TRY(weights->state_->memory,
         Memory::map(weights->bytes(),
                     "the expert weights of " + std::to_string(dims.moe_layers.size()) + " layers × " +
                         std::to_string(dims.num_experts) + " experts",
                     "stop other processes on this machine, raise the container's memory limit, or serve a smaller "
                     "model"));
  return weights;
}

void ExpertWeights::set_expert(std::uint32_t moe_index, std::uint32_t expert, const void* gate, const void* up,
                               const void* down) {
  const State& s = *state_;
  const std::int64_t hidden = s.dims.hidden_size;
  const std::int64_t intermediate = s.dims.intermediate_size;
  std::byte* to = s.expert(moe_index, expert);
  const auto pack_half = [&](const void* rows, std::byte* first_panel) {
    s.table.pack(rows, hidden, intermediate, hidden, s.dims.hidden_padded(), s.gate_up_panels / 2, first_panel,
                 2 * s.gate_up_stride);
  };
  pack_half(gate, to);
  pack_half(up, to + s.gate_up_stride);
  s.table.pack(down, intermediate, hidden, intermediate, s.dims.intermediate_padded(), s.down_panels,
               to + s.gate_up_panels * s.gate_up_stride, s.down_stride);
}

kernels::Panels ExpertWeights::gate_up(std::uint32_t moe_index, std::uint32_t expert) const {
  const State& s = *state_;
  return {s.expert(moe_index, expert), s.gate_up_stride, s.gate_up_panels, s.dims.hidden_padded()};
}

kernels::Panels ExpertWeights::down(std::uint32_t moe_index, std::uint32_t expert) const {
  const State& s = *state_;
  return {s.expert(moe_index, expert) + s.gate_up_panels * s.gate_up_stride, s.down_stride, s.down_panels,
          s.dims.intermediate_padded()};
}

std::uint64_t ExpertWeights::bytes() const { return state_->bytes(); }

}  // namespace kt::coproc
