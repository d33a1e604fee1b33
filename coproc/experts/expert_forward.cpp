#include <algorithm>

#include "coproc/experts/layer_state.h"

namespace kt::coproc {

using kernels::Fetch;
using kernels::kPanelRows;

void ExpertCompute::State::ensure_forward(Block& block) const {
  const std::int64_t rows = block.num_rows();
  block.x.ensure(rows * ld_hidden * eb);
  block.z.ensure(rows * ld_intermediate * eb);
  block.xa.ensure_floats(rows * rank_a.width);
  block.za.ensure_floats(rows * rank_d.width);
}

// Gathered X, and xa.
void ExpertCompute::State::gather_x(const Pass& pass, Block& block, Range rows) const {
  gather(block, rows, block.x.data(), [&](std::size_t item) -> const void* {
    return pass.forward.empty() ? pass.backward[item].act->x.data() : pass.forward[item].x;
  });
  if (rank_a.width == 0) return;
  project(lora_matrix(pass, LoraLayer::kGateUpA, block.expert), pass.lora->spec.gate_up.scaling,
          rows_of(block.x, rows.begin, ld_hidden), rows.count(), block.xa.floats() + rows.begin * rank_a.width);
}

// A pair's columns of G and U through the activation; kept where forward is asked to, or backward needs them.
void ExpertCompute::State::activate(const Pass& pass, Block& block, Range rows, Range panels, const float* tile) const {
  const std::int64_t columns = panels.count() * kPanelRows;
  const std::int64_t first_column = panels.begin * kPanelRows;
  const auto swiglu = [&](std::int64_t row, std::int64_t count, std::byte* saved, std::int64_t ld_saved) {
    table.swiglu(tile + (row - rows.begin) * columns, columns, count, columns / 2,
                 saved == nullptr ? nullptr : saved + first_column * eb, ld_saved,
                 block.z.data() + (row * ld_intermediate + first_column / 2) * eb, ld_intermediate);
  };
  if (pass.forward.empty()) {
    return swiglu(rows.begin, rows.count(), block.gate_up.data() + rows.begin * ld_gate_up * eb, ld_gate_up);
  }
  for_each_run(routes, block.begin + rows.begin, block.begin + rows.end,
               [&](std::size_t item, std::int64_t first, std::int64_t stop) {
                 auto* saved = static_cast<std::byte*>(pass.forward[item].save_gate_up);
                 if (saved == nullptr) return swiglu(first - block.begin, stop - first, nullptr, 0);
                 for (std::int64_t row = first; row < stop; ++row) {
                   const std::int64_t route = routes.route[static_cast<std::size_t>(row)];
                   swiglu(row - block.begin, 1, saved + route * 2 * ip * eb, 2 * ip);
                 }
               });
}

// z of all rows, from panels of gate and up.
void ExpertCompute::State::gate_up(const Pass& pass, Block& block, Range panels, Worker& worker,
                                   const Fetch& after) const {
  const WeightMatrix w = weights.gate_up(pass.moe_index, static_cast<std::uint32_t>(block.expert));
  const LoraMatrix lora = lora_matrix(pass, LoraLayer::kGateUpB, block.expert);
  float* tile = worker.tile.ensure_floats(kTileFloats);
  for_each_pair(panels, [&](Range pair) {
    const Tile c = {tile, pair.count() * kPanelRows};
    for_each_tile(block, [&](Range rows) {
      const Fetch next = rows.begin == 0 ? next_pair(w, pair, panels.end, after) : Fetch{};
      multiply(w, lora, pair, rows_of(block.x, rows.begin, ld_hidden), rows.count(), c, worker, next);
      activate(pass, block, rows, pair, tile);
    });
  });
}

void ExpertCompute::State::project_z(const Pass& pass, Block& block, Range rows) const {
  if (rank_d.width == 0) return;
  project(lora_matrix(pass, LoraLayer::kDownA, block.expert), pass.lora->spec.down.scaling,
          rows_of(block.z, rows.begin, ld_intermediate), rows.count(), block.za.floats() + rows.begin * rank_d.width);
}

// D of all rows, rounded, in the node's `out`.
void ExpertCompute::State::down(const Pass& pass, Block& block, Range panels, Worker& worker, const Fetch& after) {
  const WeightMatrix w = weights.down(pass.moe_index, static_cast<std::uint32_t>(block.expert));
  const LoraMatrix lora = lora_matrix(pass, LoraLayer::kDownB, block.expert);
  float* tile = worker.tile.ensure_floats(kTileFloats);
  std::byte* out = out_row(block.begin);
  for_each_pair(panels, [&](Range pair) {
    const Tile c = {tile, pair.count() * kPanelRows};
    for_each_tile(block, [&](Range rows) {
      const Fetch next = rows.begin == 0 ? next_pair(w, pair, panels.end, after) : Fetch{};
      multiply(w, lora, pair, rows_of(block.z, rows.begin, ld_intermediate), rows.count(), c, worker, next);
      table.round_rows(tile, c.ld, rows.count(), c.ld, 1.0f, out + (rows.begin * hp + pair.begin * kPanelRows) * eb,
                       hp);
    });
  });
}

void ExpertCompute::State::forward_whole(const Pass& pass, std::int32_t expert, const Fetch& after, Worker& worker) {
  const WeightMatrix down_w = weights.down(pass.moe_index, static_cast<std::uint32_t>(expert));
  for_each_block(expert, worker, [&](Block& block) {
    ensure_forward(block);
    const Range rows = {0, block.num_rows()};
    gather_x(pass, block, rows);
    worker.clock.lap(StageId::kGatherX);
    gate_up(pass, block, {0, 2 * ip / kPanelRows}, worker, down_w.fetch(0, std::min(kPair, down_w.num_panels)));
    worker.clock.lap(StageId::kGateUp);
    project_z(pass, block, rows);
    worker.clock.lap(StageId::kProjectZ);
    down(pass, block, {0, hp / kPanelRows}, worker, after);
    worker.clock.lap(StageId::kDown);
  });
}

void ExpertCompute::State::run_forward(const Pass& pass) {
  for (Node& node : nodes) {
    for (std::size_t n = 0; n < node.plan.shared.size(); ++n) ensure_forward(node.blocks[n]);
  }
  run_shared(&Node::row_tasks, [&](const RowTask& task, Block& block, Worker& worker) {
    gather_x(pass, block, {task.begin, task.end});
    worker.clock.lap(StageId::kGatherX);
  });
  plan_shared_panels(weights.gate_up(pass.moe_index, 0));
  run_experts(
      [&](const Node& node, std::size_t index, Worker& worker) {
        const std::int32_t next = expert_after(node, index);
        const Fetch after =
            next < 0 ? Fetch{} : weights.gate_up(pass.moe_index, static_cast<std::uint32_t>(next)).fetch(0, kPair);
        forward_whole(pass, node.plan.whole[index], after, worker);
      },
      [&](const PanelTask& task, Block& block, Worker& worker) {
        gate_up(pass, block, {task.begin, task.end}, worker, {});
        worker.clock.lap(StageId::kGateUp);
      });
  if (rank_d.width > 0) {
    run_shared(&Node::row_tasks, [&](const RowTask& task, Block& block, Worker& worker) {
      project_z(pass, block, {task.begin, task.end});
      worker.clock.lap(StageId::kProjectZ);
    });
  }
  plan_shared_panels(weights.down(pass.moe_index, 0));
  run_shared(&Node::panel_tasks, [&](const PanelTask& task, Block& block, Worker& worker) {
    down(pass, block, {task.begin, task.end}, worker, {});
    worker.clock.lap(StageId::kDown);
  });
}

void ExpertCompute::forward(std::uint32_t layer, const Adapter* adapter, std::span<const ForwardItem> items) {
  State& s = *state_;
  const std::int32_t moe_index = s.dims.moe_index(layer);
  KT_CHECK(moe_index >= 0);
  Pass pass;
  pass.moe_index = static_cast<std::uint32_t>(moe_index);
  pass.lora = adapter == nullptr ? nullptr : adapter->layer(layer);
  pass.forward = items;
  s.batch.clear();
  s.targets.clear();
  for (const ForwardItem& item : items) {
    s.batch.push_back({item.ids, item.weights, item.num_tokens});
    s.targets.push_back(static_cast<std::byte*>(item.y));
  }
  s.plan(pass.lora);
  if (s.routes.num_rows > 0) s.run_forward(pass);
  s.sum_routes(true);
  s.account_forward(pass);
}

}  // namespace kt::coproc
