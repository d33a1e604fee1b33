#include <algorithm>

#include "coproc/experts/layer_state.h"

namespace kt::coproc {

using kernels::Fetch;
using kernels::kPanelRows;
using shm::AdapterTensor;

void ExpertCompute::State::ensure_backward(const Pass& pass, Block& block) const {
  const std::int64_t rows = block.num_rows();
  block.dy.ensure(rows * ld_hidden * eb);
  block.gate_up.ensure(rows * ld_gate_up * eb);
  block.dw.ensure_floats(rows * (ip / kPanelRows));
  block.yb.ensure_floats(rows * rank_d.width);
  block.gb.ensure_floats(rows * rank_a.width);
  if (!pass.recompute && pass.accumulate_to == nullptr) return;
  block.x.ensure(rows * ld_hidden * eb);
  block.z.ensure(rows * ld_intermediate * eb);
  block.xa.ensure_floats(rows * rank_a.width);
  block.za.ensure_floats(rows * rank_d.width);
}

// Gathered dY, and yb.
void ExpertCompute::State::gather_dy(const Pass& pass, Block& block, Range rows, Worker& worker) const {
  gather(block, rows, block.dy.data(), [&](std::size_t item) { return pass.backward[item].dy; });
  if (rank_d.width == 0) return;
  project_transposed(lora_matrix(pass, LoraLayer::kDownB, block.expert), pass.lora->spec.down.scaling,
                     rows_of(block.dy, rows.begin, ld_hidden), rows.count(),
                     block.yb.floats() + rows.begin * rank_d.width, worker);
}

// Through the activation, for a pair's columns of P: dG and dU, the parts of dw, and z where ∂/∂down_a needs it. Kept G
// and U lie by route in their activations.
void ExpertCompute::State::differentiate_rows(const Pass& pass, Block& block, Range rows, Range panels,
                                              const float* p) const {
  const std::int64_t columns = panels.count() * kPanelRows;
  const std::int64_t column = panels.begin * kPanelRows;
  const bool keep_z = pass.accumulate_to != nullptr && rank_d.width > 0;
  const auto differentiate_run = [&](const void* saved, std::int64_t ld_saved, const std::int32_t* saved_row,
                                     std::int64_t row, std::int64_t count) {
    table.swiglu_backward(static_cast<const std::byte*>(saved) + 2 * column * eb, ld_saved, saved_row,
                          p + (row - rows.begin) * columns, columns, routes.weight.data() + block.begin + row, count,
                          columns, block.dw.floats() + panels.begin * block.num_rows() + row, block.num_rows(),
                          keep_z ? block.z.data() + (row * ld_intermediate + column) * eb : nullptr, ld_intermediate,
                          block.gate_up.data() + (row * ld_gate_up + 2 * column) * eb, ld_gate_up);
  };
  if (pass.recompute) {
    return differentiate_run(block.gate_up.data() + rows.begin * ld_gate_up * eb, ld_gate_up, nullptr, rows.begin,
                             rows.count());
  }
  for_each_run(routes, block.begin + rows.begin, block.begin + rows.end,
               [&](std::size_t item, std::int64_t first, std::int64_t stop) {
                 differentiate_run(pass.backward[item].act->gate_up.data(), 2 * ip, routes.route.data() + first,
                                   first - block.begin, stop - first);
               });
}

// P = dY·Wd + (s·yb)·Ad, a group of panels of 32 columns at a time, and through the activation.
void ExpertCompute::State::differentiate(const Pass& pass, Block& block, Range panels, Worker& worker,
                                         const Fetch& after) const {
  const WeightMatrix w = weights.down(pass.moe_index, static_cast<std::uint32_t>(block.expert));
  const LoraMatrix lora = lora_matrix(pass, LoraLayer::kDownA, block.expert);
  float* tile = worker.tile.ensure_floats(kTileFloats);
  const std::int64_t count = transposed_group(block.num_rows());
  for_each_group(panels, count, [&](Range group) {
    const Tile c = {tile, group.count() * kPanelRows};
    for_each_tile(block, [&](Range rows) {
      multiply_transposed(w, lora, group, rows_of(block.dy, rows.begin, ld_hidden), rows.count(), c, worker,
                          next_transposed(w, group, count, panels.end, after));
      differentiate_rows(pass, block, rows, group, tile);
    });
  });
}

// What needs all columns: dw, za and gb.
void ExpertCompute::State::finish_rows(const Pass& pass, Block& block, Range rows, Worker& worker) const {
  const std::int64_t num_parts = ip / kPanelRows;
  for (std::int64_t row = rows.begin; row < rows.end; ++row) {
    float sum = 0;
    for (std::int64_t part = 0; part < num_parts; ++part) sum += block.dw.floats()[part * block.num_rows() + row];
    const auto index = static_cast<std::size_t>(block.begin + row);
    pass.backward[static_cast<std::size_t>(routes.item[index])].dw[routes.route[index]] = sum;
  }
  if (pass.accumulate_to != nullptr) project_z(pass, block, rows);
  if (rank_a.width == 0) return;
  project_transposed(lora_matrix(pass, LoraLayer::kGateUpB, block.expert), pass.lora->spec.gate_up.scaling,
                     rows_of(block.gate_up, rows.begin, ld_gate_up), rows.count(),
                     block.gb.floats() + rows.begin * rank_a.width, worker);
}

// dG|dU·gate_up + (s·gb)·gate_up_a, rounded per route, in the node's `out`.
void ExpertCompute::State::grad_x(const Pass& pass, Block& block, Range panels, Worker& worker, const Fetch& after) {
  const WeightMatrix w = weights.gate_up(pass.moe_index, static_cast<std::uint32_t>(block.expert));
  const LoraMatrix lora = lora_matrix(pass, LoraLayer::kGateUpA, block.expert);
  float* tile = worker.tile.ensure_floats(kTileFloats);
  std::byte* out = out_row(block.begin);
  const std::int64_t count = transposed_group(block.num_rows());
  for_each_group(panels, count, [&](Range group) {
    const Tile c = {tile, group.count() * kPanelRows};
    for_each_tile(block, [&](Range rows) {
      multiply_transposed(w, lora, group, rows_of(block.gate_up, rows.begin, ld_gate_up), rows.count(), c, worker,
                          next_transposed(w, group, count, panels.end, after));
      table.round_rows(tile, c.ld, rows.count(), c.ld, 1.0f, out + (rows.begin * hp + group.begin * kPanelRows) * eb,
                       hp);
    });
  });
}

// S of one tensor of one expert, over rows of a block: ARCHITECTURE.md, dA and dB.
void ExpertCompute::State::accumulate(const Pass& pass, const Block& block, Range rows, AdapterTensor which) const {
  LoraLayer& lora = *pass.accumulate_to;
  const LoraLayer::Tensor& tensor = lora.tensor(which);
  if (tensor.shape.rows == 0) return;
  const std::int64_t first = rows.begin;
  float* grad = tensor.s + block.expert * tensor.expert_size();
  const float* w = routes.weight.data() + block.begin + first;
  const bool is_up = which == AdapterTensor::kUpA || which == AdapterTensor::kUpB;
  const std::int64_t column = is_up ? lora.up_column() : 0;
  const auto gate_up_scale = static_cast<float>(lora.spec.gate_up.scaling);
  const auto down_scale = static_cast<float>(lora.spec.down.scaling);
  const auto row_of = [&](const Scratch& array, std::int64_t ld) { return array.data() + first * ld * eb; };
  // Panels of dG and dU alternate.
  const std::byte* half = row_of(block.gate_up, ld_gate_up) + (is_up ? kPanelRows : 0) * eb;
  switch (which) {
    case AdapterTensor::kGateA:
    case AdapterTensor::kUpA:  // s·(dG·Bg)ᵀ·X
      return table.lora_wgrad(block.gb.floats() + first * rank_a.width + column, rank_a.width,
                              row_of(block.x, ld_hidden), ld_hidden, kPanelRows, nullptr, rows.count(),
                              tensor.shape.rows, h, gate_up_scale, grad, h, false);
    case AdapterTensor::kGateB:
    case AdapterTensor::kUpB:  // s·dGᵀ·(X·Agᵀ)
      return table.lora_wgrad(block.xa.floats() + first * rank_a.width + column, rank_a.width, half, ld_gate_up,
                              2 * kPanelRows, nullptr, rows.count(), tensor.shape.cols, i, gate_up_scale, grad,
                              tensor.shape.cols, true);
    case AdapterTensor::kDownA:  // s·(w·dY·Bd)ᵀ·Z
      return table.lora_wgrad(block.yb.floats() + first * rank_d.width, rank_d.width, row_of(block.z, ld_intermediate),
                              ld_intermediate, kPanelRows, w, rows.count(), tensor.shape.rows, i, down_scale, grad, i,
                              false);
    case AdapterTensor::kDownB:  // s·(w·dY)ᵀ·(Z·Adᵀ)
      return table.lora_wgrad(block.za.floats() + first * rank_d.width, rank_d.width, row_of(block.dy, ld_hidden),
                              ld_hidden, kPanelRows, w, rows.count(), tensor.shape.cols, h, down_scale, grad,
                              tensor.shape.cols, true);
  }
}

void ExpertCompute::State::backward_whole(const Pass& pass, std::int32_t expert, const Fetch& after, Worker& worker) {
  const auto e = static_cast<std::uint32_t>(expert);
  for_each_block(expert, worker, [&](Block& block) {
    const Fetch gate_up_next = next_transposed(weights.gate_up(pass.moe_index, e), {0, 0},
                                               transposed_group(block.num_rows()), hp / kPanelRows, {});
    ensure_backward(pass, block);
    const Range rows = {0, block.num_rows()};
    if (pass.recompute) {
      gather_x(pass, block, rows);
      worker.clock.lap(StageId::kGatherX);
      gate_up(pass, block, {0, 2 * ip / kPanelRows}, worker, {});
      worker.clock.lap(StageId::kGateUp);
    }
    gather_dy(pass, block, rows, worker);
    worker.clock.lap(StageId::kGatherDy);
    differentiate(pass, block, {0, ip / kPanelRows}, worker, gate_up_next);
    worker.clock.lap(StageId::kDifferentiate);
    finish_rows(pass, block, rows, worker);
    worker.clock.lap(StageId::kFinishRows);
    grad_x(pass, block, {0, hp / kPanelRows}, worker, after);
    worker.clock.lap(StageId::kGradX);
    if (pass.accumulate_to == nullptr) return;
    if (!pass.recompute && rank_a.width > 0) gather_x(pass, block, rows);
    for (const AdapterTensor which : kAdapterTensors) accumulate(pass, block, rows, which);
    worker.clock.lap(StageId::kLoraGradients);
  });
}

// The tensors of the shared experts, each by one worker, block by block.
void ExpertCompute::State::accumulate_shared(const Pass& pass) {
  for (Node& node : nodes) node.tensor_tasks.clear();
  for (Node& node : nodes) {
    for (std::size_t n = 0; n < node.plan.shared.size(); ++n) {
      for (const AdapterTensor which : kAdapterTensors) {
        node.tensor_tasks.push_back({static_cast<std::int32_t>(n), which});
      }
    }
  }
  run_shared(&Node::tensor_tasks, [&](const TensorTask& task, Block& block, Worker& worker) {
    const RowBlocks blocks(block.num_rows(), rows_max);
    for (std::int64_t b = 0; b < blocks.num_blocks; ++b) {
      accumulate(pass, block, {blocks.begin(b), blocks.begin(b + 1)}, task.which);
    }
    worker.clock.lap(StageId::kLoraGradients);
  });
}

void ExpertCompute::State::run_backward(const Pass& pass) {
  for (Node& node : nodes) {
    for (std::size_t n = 0; n < node.plan.shared.size(); ++n) ensure_backward(pass, node.blocks[n]);
  }
  const bool need_x = pass.recompute || (pass.accumulate_to != nullptr && rank_a.width > 0);
  run_shared(&Node::row_tasks, [&](const RowTask& task, Block& block, Worker& worker) {
    gather_dy(pass, block, {task.begin, task.end}, worker);
    worker.clock.lap(StageId::kGatherDy);
    if (need_x) gather_x(pass, block, {task.begin, task.end});
    worker.clock.lap(StageId::kGatherX);
  });
  if (pass.recompute) {
    plan_shared_panels(weights.gate_up(pass.moe_index, 0));
    run_shared(&Node::panel_tasks, [&](const PanelTask& task, Block& block, Worker& worker) {
      gate_up(pass, block, {task.begin, task.end}, worker, {});
      worker.clock.lap(StageId::kGateUp);
    });
  }
  plan_shared_columns(ip, hp);
  run_experts(
      [&](const Node& node, std::size_t index, Worker& worker) {
        const std::int32_t next = expert_after(node, index);
        const Fetch after = next < 0
                                ? Fetch{}
                                : next_transposed(weights.down(pass.moe_index, static_cast<std::uint32_t>(next)),
                                                  {0, 0}, transposed_group(routes.rows_of(next)), ip / kPanelRows, {});
        backward_whole(pass, node.plan.whole[index], after, worker);
      },
      [&](const PanelTask& task, Block& block, Worker& worker) {
        differentiate(pass, block, {task.begin, task.end}, worker, {});
        worker.clock.lap(StageId::kDifferentiate);
      });
  run_shared(&Node::row_tasks, [&](const RowTask& task, Block& block, Worker& worker) {
    finish_rows(pass, block, {task.begin, task.end}, worker);
    worker.clock.lap(StageId::kFinishRows);
  });
  plan_shared_columns(hp, 2 * ip);
  run_shared(&Node::panel_tasks, [&](const PanelTask& task, Block& block, Worker& worker) {
    grad_x(pass, block, {task.begin, task.end}, worker, {});
    worker.clock.lap(StageId::kGradX);
  });
  if (pass.accumulate_to != nullptr) accumulate_shared(pass);
}

void ExpertCompute::State::begin_backward(std::span<const BackwardItem> items) {
  batch.clear();
  targets.clear();
  for (const BackwardItem& item : items) {
    batch.push_back({item.act->ids.data(), item.act->weights.data(), item.act->num_tokens});
    targets.push_back(static_cast<std::byte*>(item.dx));
  }
}

// Sentinels have no row that would set it.
void ExpertCompute::State::clear_sentinels(std::span<const BackwardItem> items) const {
  for (std::size_t item = 0; item < items.size(); ++item) {
    const std::int64_t num_slots = batch[item].num_tokens * top_k;
    for (std::int64_t slot = 0; slot < num_slots; ++slot) {
      if (routes.row[static_cast<std::size_t>(routes.first_slot[item] + slot)] < 0) items[item].dw[slot] = 0;
    }
  }
}

void ExpertCompute::backward(std::uint32_t layer, Adapter* adapter, std::span<const BackwardItem> items,
                             bool accumulate) {
  State& s = *state_;
  const std::int32_t moe_index = s.dims.moe_index(layer);
  KT_CHECK(moe_index >= 0);
  LoraLayer* lora = adapter == nullptr ? nullptr : adapter->layer(layer);
  Pass pass;
  pass.moe_index = static_cast<std::uint32_t>(moe_index);
  pass.lora = lora;
  pass.backward = items;
  pass.accumulate_to = accumulate ? lora : nullptr;
  // Recomputed bits equal kept ones, so a batch in which some were kept needs no third way.
  pass.recompute = std::any_of(items.begin(), items.end(), [](const BackwardItem& item) {
    return item.act->num_tokens > 0 && item.act->gate_up.empty();
  });
  s.begin_backward(items);
  s.plan(lora);
  s.clear_sentinels(items);
  if (s.routes.num_rows > 0) s.run_backward(pass);
  s.sum_routes(false);
  s.account_backward(pass);
  if (pass.accumulate_to != nullptr) lora->touched = true;
}

}  // namespace kt::coproc
