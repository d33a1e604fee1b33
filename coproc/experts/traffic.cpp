// The stages' shares of traffic.h: one function per phase, beside whose code it is called.
#include "coproc/experts/traffic.h"

#include "coproc/experts/layer_state.h"

namespace kt::coproc {
namespace {

using kernels::kPanelRows;
using shm::AdapterTensor;

constexpr std::int64_t kFloatBytes = sizeof(float);

template <class AnyPanels>
std::int64_t bytes_of(const AnyPanels& w) {
  return w.num_panels * w.stride;
}

}  // namespace

std::int64_t ExpertCompute::State::touched_bytes(std::int64_t bytes_per_expert) const {
  return static_cast<std::int64_t>(routes.experts.size()) * bytes_per_expert;
}

// f32 values and their rounded copy: the first are read by the gradients only.
std::int64_t ExpertCompute::State::written_bytes(const Projection& projection) const {
  return routes.num_rows * projection.rank * (kFloatBytes + eb);
}

std::int64_t ExpertCompute::State::panel_pass_bytes(const PanelPass& pass) const {
  if (panel_tasks.empty()) return 0;
  const auto num_tasks = static_cast<std::int64_t>(panel_tasks.size() / routes.experts.size());  // Of each expert.
  const std::int64_t num_passes = pass.num_passes > 0 ? pass.num_passes : num_tasks;
  const std::int64_t columns = pass.num_passes > 0 ? kPanelRows : panel_tasks[0].end * kPanelRows;
  const std::int64_t weight_bytes = columns / kPanelRows * pass.panel_bytes;
  std::int64_t bytes = 0;
  for (const std::int32_t expert : routes.experts) {
    const std::int64_t num_rows = routes.rows_of(expert);
    const bool stays = num_rows * (pass.row_bytes + columns * kFloatBytes) + weight_bytes <= kL2Bytes;
    const std::int64_t num_reads = stays ? std::min<std::int64_t>(pool.num_workers(), num_tasks) : num_passes;
    bytes += num_rows * pass.row_bytes * num_reads;
  }
  return bytes;
}

std::int64_t ExpertCompute::State::row_pass_bytes(std::int64_t row_bytes, std::int64_t matrix_bytes) const {
  std::int64_t bytes = 0;
  for (const RowTask& task : row_tasks) {
    const std::int64_t task_bytes = (task.end - task.begin) * row_bytes;
    if (task_bytes + matrix_bytes > kL2Bytes) bytes += task_bytes;
  }
  return bytes;
}

// Rows gathered from the items' arrays, and what is projected from them by `part`.
Traffic::Stage ExpertCompute::State::gathered(std::string_view name, const LoraLayer* lora, LoraLayer::Part part,
                                              const Projection& projected) const {
  Traffic::Stage stage{.name = name, .activation_bytes = routes.num_rows * (h + hp) * eb};
  if (projected.rank == 0) return stage;
  const std::int64_t matrix_bytes = bytes_of(lora->packed(part, 0));
  const std::int64_t num_passes = part == LoraLayer::kDownB ? projected.rank / kPanelRows : 1;  // Transposed: by panel.
  stage.activation_bytes += num_passes * row_pass_bytes(hp * eb, matrix_bytes / num_passes) + written_bytes(projected);
  stage.lora_bytes = static_cast<std::int64_t>(row_tasks.size()) * matrix_bytes;
  return stage;
}

void ExpertCompute::State::count_gather_x(const LoraLayer* lora) {
  traffic.stages.push_back(gathered("gather x", lora, LoraLayer::kGateUpA, xa));
}

void ExpertCompute::State::count_gather_dy(const LoraLayer* lora) {
  traffic.stages.push_back(gathered("gather dy", lora, LoraLayer::kDownB, yb));
}

void ExpertCompute::State::count_gate_up(std::uint32_t moe_index, const LoraLayer* lora,
                                         std::span<const ForwardItem> items) {
  Traffic::Stage stage{.name = "gate, up", .weight_bytes = touched_bytes(bytes_of(weights.gate_up(moe_index, 0)))};
  stage.activation_bytes =
      panel_pass_bytes({.row_bytes = (hp + xa.rank) * eb, .panel_bytes = kernels::panel_stride_bytes(hp, eb)});
  stage.activation_bytes += routes.num_rows * ip * eb;
  std::int64_t num_kept = items.empty() ? routes.num_rows : 0;
  for (std::int64_t row = 0; row < routes.num_rows && !items.empty(); ++row) {
    const auto item = static_cast<std::size_t>(routes.item[static_cast<std::size_t>(row)]);
    num_kept += items[item].save_gate_up != nullptr ? 1 : 0;
  }
  stage.activation_bytes += num_kept * 2 * ip * eb;
  if (xa.rank > 0) stage.lora_bytes = touched_bytes(bytes_of(lora->packed(LoraLayer::kGateUpB, 0)));
  traffic.stages.push_back(stage);
}

void ExpertCompute::State::count_project_z(const LoraLayer* lora) {
  traffic.stages.push_back(
      {.name = "z to rank",
       .activation_bytes = routes.num_rows * ip * eb + written_bytes(za),
       .lora_bytes = static_cast<std::int64_t>(row_tasks.size()) * bytes_of(lora->packed(LoraLayer::kDownA, 0))});
}

void ExpertCompute::State::count_down(std::uint32_t moe_index, const LoraLayer* lora) {
  Traffic::Stage stage{.name = "down", .weight_bytes = touched_bytes(bytes_of(weights.down(moe_index, 0)))};
  stage.activation_bytes =
      panel_pass_bytes({.row_bytes = (ip + za.rank) * eb, .panel_bytes = kernels::panel_stride_bytes(ip, eb)});
  stage.activation_bytes += routes.num_rows * hp * eb;
  if (za.rank > 0) stage.lora_bytes = touched_bytes(bytes_of(lora->packed(LoraLayer::kDownB, 0)));
  traffic.stages.push_back(stage);
}

void ExpertCompute::State::count_sum() {
  std::int64_t num_tokens = 0;
  for (const RoutesOfItem& item : batch) num_tokens += item.num_tokens;
  traffic.stages.push_back({.name = "sum", .activation_bytes = (routes.num_rows * hp + num_tokens * h) * eb});
}

void ExpertCompute::State::count_p(std::uint32_t moe_index, const LoraLayer* lora) {
  Traffic::Stage stage{.name = "p", .weight_bytes = touched_bytes(bytes_of(weights.down(moe_index, 0)))};
  stage.activation_bytes = panel_pass_bytes(
      {.row_bytes = (hp + yb.rank) * eb, .panel_bytes = hp * kPanelRows * eb, .num_passes = ip / kPanelRows});
  stage.activation_bytes += routes.num_rows * ip * kFloatBytes;
  if (yb.rank > 0) stage.lora_bytes = touched_bytes(bytes_of(lora->packed(LoraLayer::kDownA, 0)));
  traffic.stages.push_back(stage);
}

void ExpertCompute::State::count_differentiate(const LoraLayer* lora, bool keep_z) {
  // G and U, and P, in; dG and dU out.
  Traffic::Stage stage{.name = "differentiate", .activation_bytes = routes.num_rows * (4 * ip * eb + ip * kFloatBytes)};
  const auto num_tasks = static_cast<std::int64_t>(row_tasks.size());
  if (keep_z) {
    const std::int64_t matrix_bytes = bytes_of(lora->packed(LoraLayer::kDownA, 0));
    stage.activation_bytes += routes.num_rows * ip * eb + row_pass_bytes(ip * eb, matrix_bytes) + written_bytes(za);
    stage.lora_bytes += num_tasks * matrix_bytes;
  }
  if (gb.rank > 0) {
    const std::int64_t matrix_bytes = bytes_of(lora->packed(LoraLayer::kGateUpB, 0));
    const std::int64_t panel_bytes = 2 * ip * kPanelRows * eb;  // Transposed, one at a time.
    stage.activation_bytes += gb.rank / kPanelRows * row_pass_bytes(2 * ip * eb, panel_bytes) + written_bytes(gb);
    stage.lora_bytes += num_tasks * matrix_bytes;
  }
  traffic.stages.push_back(stage);
}

void ExpertCompute::State::count_dx(std::uint32_t moe_index, const LoraLayer* lora) {
  Traffic::Stage stage{.name = "dx", .weight_bytes = touched_bytes(bytes_of(weights.gate_up(moe_index, 0)))};
  stage.activation_bytes = panel_pass_bytes(
      {.row_bytes = (2 * ip + gb.rank) * eb, .panel_bytes = 2 * ip * kPanelRows * eb, .num_passes = hp / kPanelRows});
  stage.activation_bytes += routes.num_rows * hp * eb;
  if (gb.rank > 0) stage.lora_bytes = touched_bytes(bytes_of(lora->packed(LoraLayer::kGateUpA, 0)));
  traffic.stages.push_back(stage);
}

void ExpertCompute::State::count_gradients(const LoraLayer& lora) {
  Traffic::Stage stage{.name = "lora gradients"};
  const auto add = [&](AdapterTensor which, std::int64_t right_elements, std::int64_t rank) {
    if (lora.tensor(which).shape.rows == 0) return;
    stage.activation_bytes += routes.num_rows * (right_elements * eb + rank * kFloatBytes);
    stage.lora_bytes += touched_bytes(2 * lora.tensor(which).expert_size() * kFloatBytes);
  };
  add(AdapterTensor::kGateA, hp, gb.rank);
  add(AdapterTensor::kUpA, hp, gb.rank);
  add(AdapterTensor::kGateB, ip, xa.rank);
  add(AdapterTensor::kUpB, ip, xa.rank);
  add(AdapterTensor::kDownA, ip, yb.rank);
  add(AdapterTensor::kDownB, hp, za.rank);
  traffic.stages.push_back(stage);
}

}  // namespace kt::coproc
