#include "coproc/experts/weights.h"

#include <algorithm>
#include <utility>

#include "coproc/machine/memory_room.h"

namespace kt::coproc {

using kernels::kPanelRows;

kernels::Panels WeightMatrix::elements(const kernels::KernelTable& table, std::int64_t begin, std::int64_t count,
                                       Scratch& scratch) const {
  if (quantised == nullptr) return {data + begin * stride, stride, count, k};
  const std::int64_t to_stride = kernels::panel_stride_bytes(k, table.element_bytes);
  std::byte* to = scratch.ensure(count * to_stride);
  quantised->dequantise(codes(begin, count), 0, k, to, to_stride);
  return {to, to_stride, count, k};
}

kernels::Panels WeightMatrix::transpose(const kernels::KernelTable& table, const Piece& piece,
                                        const kernels::Panels& more, Scratch& transposed, Scratch& scratch,
                                        const kernels::Fetch& next) const {
  const std::int64_t block_bytes = kPanelRows * kPanelRows * table.element_bytes;
  const std::int64_t to_stride =
      kernels::panel_stride_bytes((piece.num_panels + more.num_panels) * kPanelRows, table.element_bytes);
  std::byte* to = transposed.ensure(piece.count * to_stride);
  const std::byte* from = data + piece.first * stride;
  kernels::Panels source = {from, stride, piece.num_panels, k};
  std::int64_t q = piece.q;
  if (quantised != nullptr) {
    const std::int64_t columns = piece.count * kPanelRows;
    const std::int64_t from_stride = piece.count * block_bytes;
    std::byte* blocks = scratch.ensure(piece.num_panels * from_stride);
    quantised->dequantise(codes(piece.first, piece.num_panels), q * kPanelRows, columns, blocks, from_stride);
    source = {blocks, from_stride, piece.num_panels, columns};
    q = 0;
  }
  table.transpose_panels(source, q, piece.count, to, to_stride, next);
  if (more.num_panels > 0) {
    table.transpose_panels(more, piece.q, piece.count, to + piece.num_panels * block_bytes, to_stride, {});
  }
  return {to, to_stride, piece.count, piece.num_panels * kPanelRows};
}

kernels::Fetch WeightMatrix::fetch(const Piece& piece, std::int64_t element_bytes) const {
  if (quantised == nullptr) {
    const std::int64_t block_bytes = kPanelRows * kPanelRows * element_bytes;
    return {data + piece.first * stride + piece.q * block_bytes, piece.count * block_bytes, stride, piece.num_panels};
  }
  // Each group begins with its scales; those of the first one come along only if it begins here.
  const std::int64_t begin = quantised->layout.offset(piece.q * kPanelRows);
  const std::int64_t end = quantised->layout.offset((piece.q + piece.count) * kPanelRows);
  return {data + piece.first * stride + begin, end - begin, stride, piece.num_panels};
}

// A mapping for each node: its experts one after the other, layer after layer; gate_up panels, then down panels.
struct ExpertWeights::State {
  State(ExpertDims dims_in, const kernels::KernelTable& table_in, const kernels::QuantKernels* quantised_in)
      : dims(std::move(dims_in)),
        table(table_in),
        quantised(quantised_in),
        gate_up_stride(stride(dims.hidden_padded())),
        down_stride(stride(dims.intermediate_padded())),
        gate_up_panels(2 * dims.intermediate_padded() / kernels::kPanelRows),
        down_panels(dims.hidden_padded() / kernels::kPanelRows),
        expert_bytes(gate_up_panels * gate_up_stride + down_panels * down_stride) {}

  std::int64_t stride(std::int64_t k) const {
    return quantised != nullptr ? quantised->layout.panel_stride(k)
                                : kernels::panel_stride_bytes(k, table.element_bytes);
  }
  // rows[n, k] into num_panels panels, panel_stride bytes apart.
  void pack(const void* rows, std::int64_t n, std::int64_t k, std::int64_t k_padded, std::int64_t num_panels,
            std::byte* panels, std::int64_t panel_stride) const {
    const kernels::PackArgs args = {rows, k, n, k, k_padded, num_panels, panels, panel_stride};
    quantised != nullptr ? quantised->quantise(args, quantised->layout) : table.pack(args);
  }
  std::byte* expert(std::uint32_t moe_index, std::uint32_t expert_idx) const {
    KT_DCHECK(moe_index < dims.moe_layers.size() && expert_idx < dims.num_experts);
    const auto num_nodes = static_cast<std::uint32_t>(memory.size());
    const std::int64_t index = moe_index * experts_of(expert_idx % num_nodes) + expert_idx / num_nodes;
    return memory[expert_idx % num_nodes].data() + index * expert_bytes;
  }
  // How many experts of a layer a node has.
  std::int64_t experts_of(std::size_t node) const {
    const std::size_t num_nodes = memory.size();
    return static_cast<std::int64_t>((dims.num_experts + num_nodes - 1 - node) / num_nodes);
  }
  std::uint64_t bytes() const {
    return static_cast<std::uint64_t>(expert_bytes) * dims.num_experts * dims.moe_layers.size();
  }

  ExpertDims dims;
  const kernels::KernelTable& table;
  const kernels::QuantKernels* quantised;
  std::int64_t gate_up_stride;
  std::int64_t down_stride;
  std::int64_t gate_up_panels;
  std::int64_t down_panels;
  std::int64_t expert_bytes;
  std::vector<Memory> memory;
};

ExpertWeights::ExpertWeights(std::unique_ptr<State> state) : state_(std::move(state)) {}
ExpertWeights::~ExpertWeights() = default;

Result<std::unique_ptr<ExpertWeights>> ExpertWeights::create(const ExpertDims& dims, const kernels::KernelTable& table,
                                                             const kernels::StorageFormat* format,
                                                             std::span<const int> nodes) {
  KT_CHECK(dims.element_bytes == table.element_bytes);
  const auto* quantised = format != nullptr ? kernels::find_kernels(table, format->name) : nullptr;
  KT_CHECK(format == nullptr || format->quantised.has_value() == (quantised != nullptr));
  auto state = std::make_unique<State>(dims, table, quantised);
  const std::string purpose = "the expert weights of " + std::to_string(dims.moe_layers.size()) + " layers × " +
                              std::to_string(dims.num_experts) + " experts";
  const std::string fix =
      "stop other processes on this machine, raise the container's memory limit, or serve a smaller model";
  KT_TRY_STATUS(require_memory(read_memory_room(read_cgroup_limits()), state->bytes(), purpose, fix));
  state->memory.resize(std::max<std::size_t>(nodes.size(), 1));
  for (std::size_t node = 0; node < state->memory.size(); ++node) {
    const auto bytes = static_cast<std::uint64_t>(state->experts_of(node) * state->expert_bytes);
    KT_TRY(state->memory[node],
           Memory::map(bytes * dims.moe_layers.size(), purpose, fix, nodes.empty() ? -1 : nodes[node]));
  }
  return std::unique_ptr<ExpertWeights>(new ExpertWeights(std::move(state)));
}

void ExpertWeights::set_expert(std::uint32_t moe_index, std::uint32_t expert, const void* gate, const void* up,
                               const void* down) {
  const State& s = *state_;
  const std::int64_t hidden = s.dims.hidden_size;
  const std::int64_t intermediate = s.dims.intermediate_size;
  std::byte* to = s.expert(moe_index, expert);
  // Panels of gate and up alternate.
  s.pack(gate, intermediate, hidden, s.dims.hidden_padded(), s.gate_up_panels / 2, to, 2 * s.gate_up_stride);
  s.pack(up, intermediate, hidden, s.dims.hidden_padded(), s.gate_up_panels / 2, to + s.gate_up_stride,
         2 * s.gate_up_stride);
  s.pack(down, hidden, intermediate, s.dims.intermediate_padded(), s.down_panels,
         to + s.gate_up_panels * s.gate_up_stride, s.down_stride);
}

std::span<std::byte> ExpertWeights::expert_data(std::uint32_t moe_index, std::uint32_t expert) {
  return {state_->expert(moe_index, expert), static_cast<std::size_t>(state_->expert_bytes)};
}

WeightMatrix ExpertWeights::gate_up(std::uint32_t moe_index, std::uint32_t expert) const {
  const State& s = *state_;
  return {s.expert(moe_index, expert), s.gate_up_stride, s.gate_up_panels, s.dims.hidden_padded(), s.quantised};
}

WeightMatrix ExpertWeights::down(std::uint32_t moe_index, std::uint32_t expert) const {
  const State& s = *state_;
  return {s.expert(moe_index, expert) + s.gate_up_panels * s.gate_up_stride, s.down_stride, s.down_panels,
          s.dims.intermediate_padded(), s.quantised};
}

std::uint64_t ExpertWeights::bytes() const { return state_->bytes(); }

}  // namespace kt::coproc
