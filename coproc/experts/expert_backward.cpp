#include <algorithm>

#include "coproc/experts/layer_state.h"

namespace kt::coproc {

using kernels::kPanelRows;
using shm::AdapterTensor;

// dY gathered and yb; X and xa where they are needed.
void ExpertCompute::State::prepare_backward(const LoraLayer* lora, std::span<const BackwardItem> items, bool need_x) {
  count_gather_dy(lora);
  if (need_x) count_gather_x(lora);
  run(row_tasks, [&](const RowTask& rows, int worker) {
    gather(rows.begin, rows.end, h, hp, dy.data(), [&](std::size_t item) { return items[item].dy; });
    if (yb.rank > 0) {
      project_transposed(rows, dy, hp, lora->packed(LoraLayer::kDownB, rows.expert), lora->spec.down.scaling, yb,
                         worker);
    }
    if (!need_x) return;
    gather(rows.begin, rows.end, h, hp, x.data(), [&](std::size_t item) { return items[item].act->x.data(); });
    project_x(rows, lora);
  });
}

// p = dY·Wd + (s·yb)·Ad, one transposed panel of 32 columns for all rows of an expert.
void ExpertCompute::State::compute_p(std::uint32_t moe_index, const LoraLayer* lora) {
  plan_transposed(ip / kPanelRows, hp);
  count_p(moe_index, lora);
  run(panel_tasks, [&](const PanelTask& task, int worker) {
    WorkerScratch& scratch = workers[static_cast<std::size_t>(worker)];
    const std::int64_t first = routes.first_row[static_cast<std::size_t>(task.expert)];
    const std::int64_t count = routes.rows_of(task.expert);
    const WeightMatrix w = weights.down(moe_index, static_cast<std::uint32_t>(task.expert));
    for (std::int64_t panel = task.begin; panel < task.end; ++panel) {
      float* to = p.floats() + first * ip + panel * kPanelRows;
      const kernels::Panels wt = w.transpose(table, panel, scratch.transposed, scratch.weights);
      table.gemm(dy.data() + first * hp * eb, hp, count, wt, to, ip, false, {});
      if (yb.rank == 0) continue;
      const kernels::Panels a = lora->packed(LoraLayer::kDownA, task.expert);
      table.gemm(yb.rounded.data() + first * yb.rank * eb, yb.rank, count, transpose(a, panel, scratch.lora), to, ip,
                 true, {});
    }
  });
}

// Through the activation: dgu, dw, and z where ∂/∂down_a needs it. `saved`: G and U of rows [begin, end).
void ExpertCompute::State::differentiate_rows(std::int64_t begin, std::int64_t end, const std::byte* saved, bool keep_z,
                                              std::span<const BackwardItem> items) {
  float* partial = dw.floats() + begin * (ip / kPanelRows);
  table.swiglu_backward(saved, 2 * ip, p.floats() + begin * ip, ip, routes.weight.data() + begin, end - begin, ip,
                        partial, keep_z ? z.data() + begin * ip * eb : nullptr, ip, dgu.data() + begin * 2 * ip * eb,
                        2 * ip);
  for (std::int64_t row = begin; row < end; ++row) {
    const auto index = static_cast<std::size_t>(row);
    float sum = 0;
    for (std::int64_t panel = 0; panel < ip / kPanelRows; ++panel) sum += partial[panel * (end - begin) + row - begin];
    items[static_cast<std::size_t>(routes.item[index])].dw[routes.route[index]] = sum;
  }
}

// Kept G and U lie by route in their activations: brought into row order a tile at a time.
void ExpertCompute::State::differentiate_kept(const RowTask& rows, bool keep_z, std::span<const BackwardItem> items,
                                              Scratch& tile) {
  const std::int64_t row_bytes = 2 * ip * eb;
  const std::int64_t rows_max = tile_rows(2 * ip);
  std::byte* saved = tile.ensure(rows_max * row_bytes);
  for_each_run(routes, rows.begin, rows.end, [&](std::size_t item, std::int64_t first, std::int64_t stop) {
    for (; first < stop; first += rows_max) {
      const std::int64_t count = std::min(rows_max, stop - first);
      table.gather(items[item].act->gate_up.data(), 2 * ip, routes.route.data() + first, count, 2 * ip, 2 * ip, saved,
                   2 * ip);
      differentiate_rows(first, first + count, saved, keep_z, items);
    }
  });
}

void ExpertCompute::State::differentiate(const LoraLayer* lora, std::span<const BackwardItem> items, bool recomputed,
                                         bool accumulate) {
  const bool keep_z = accumulate && za.rank > 0;
  count_differentiate(lora, keep_z);
  run(row_tasks, [&](const RowTask& rows, int worker) {
    if (recomputed) {
      differentiate_rows(rows.begin, rows.end, gate_up.data() + rows.begin * 2 * ip * eb, keep_z, items);
    } else {
      differentiate_kept(rows, keep_z, items, workers[static_cast<std::size_t>(worker)].tile);
    }
    if (keep_z) project(rows, z, ip, lora->packed(LoraLayer::kDownA, rows.expert), lora->spec.down.scaling, za);
    if (gb.rank == 0) return;
    project_transposed(rows, dgu, 2 * ip, lora->packed(LoraLayer::kGateUpB, rows.expert), lora->spec.gate_up.scaling,
                       gb, worker);
  });
}

// out = dG|dU·gate_up + (s·gb)·gate_up_a, rounded per route.
void ExpertCompute::State::compute_dx(std::uint32_t moe_index, const LoraLayer* lora) {
  plan_transposed(hp / kPanelRows, 2 * ip);
  count_dx(moe_index, lora);
  run(panel_tasks, [&](const PanelTask& task, int worker) {
    WorkerScratch& scratch = workers[static_cast<std::size_t>(worker)];
    const std::int64_t rows_max = tile_rows(kPanelRows);
    float* tile = scratch.tile.ensure_floats(rows_max * kPanelRows);
    const WeightMatrix w = weights.gate_up(moe_index, static_cast<std::uint32_t>(task.expert));
    const std::int64_t end = routes.first_row[static_cast<std::size_t>(task.expert) + 1];
    for (std::int64_t panel = task.begin; panel < task.end; ++panel) {
      const kernels::Panels wt = w.transpose(table, panel, scratch.transposed, scratch.weights);
      kernels::Panels at;
      if (gb.rank > 0) at = transpose(lora->packed(LoraLayer::kGateUpA, task.expert), panel, scratch.lora);
      for (std::int64_t row = end - routes.rows_of(task.expert); row < end; row += rows_max) {
        const std::int64_t count = std::min(rows_max, end - row);
        table.gemm(dgu.data() + row * 2 * ip * eb, 2 * ip, count, wt, tile, kPanelRows, false, {});
        if (gb.rank > 0) {
          table.gemm(gb.rounded.data() + row * gb.rank * eb, gb.rank, count, at, tile, kPanelRows, true, {});
        }
        table.round_rows(tile, kPanelRows, count, kPanelRows, 1.0f, out.data() + (row * hp + panel * kPanelRows) * eb,
                         hp);
      }
    }
  });
}

// S of one tensor of one expert, over all its rows in row order (DESIGN §6).
void ExpertCompute::State::accumulate_gradient(LoraLayer& lora, AdapterTensor which, std::int32_t expert) {
  const LoraLayer::Tensor& tensor = lora.tensor(which);
  const std::int64_t first = routes.first_row[static_cast<std::size_t>(expert)];
  const std::int64_t count = routes.rows_of(expert);
  float* grad = tensor.s + expert * tensor.expert_size();
  const float* w = routes.weight.data() + first;
  const bool is_up = which == AdapterTensor::kUpA || which == AdapterTensor::kUpB;
  const std::int64_t column = is_up ? lora.up_column() : 0;
  switch (which) {
    case AdapterTensor::kGateA:
    case AdapterTensor::kUpA:  // s·(dG·Bg)ᵀ·X
      return table.lora_wgrad(gb.values.floats() + first * gb.rank + column, gb.rank, x.data() + first * hp * eb, hp,
                              nullptr, count, tensor.shape.rows, h, static_cast<float>(lora.spec.gate_up.scaling), grad,
                              h, false);
    case AdapterTensor::kGateB:
    case AdapterTensor::kUpB:  // s·dGᵀ·(X·Agᵀ); a panel of dG at a time, because dG and dU are interleaved.
      for (std::int64_t row = 0; row < i; row += kPanelRows) {
        const std::int64_t r = tensor.shape.cols;
        table.lora_wgrad(xa.values.floats() + first * xa.rank + column, xa.rank,
                         dgu.data() + (first * 2 * ip + 2 * row + (is_up ? kPanelRows : 0)) * eb, 2 * ip, nullptr,
                         count, r, std::min(kPanelRows, i - row), static_cast<float>(lora.spec.gate_up.scaling),
                         grad + row * r, r, true);
      }
      return;
    case AdapterTensor::kDownA:  // s·(w·dY·Bd)ᵀ·Z
      return table.lora_wgrad(yb.values.floats() + first * yb.rank, yb.rank, z.data() + first * ip * eb, ip, w, count,
                              tensor.shape.rows, i, static_cast<float>(lora.spec.down.scaling), grad, i, false);
    case AdapterTensor::kDownB:  // s·(w·dY)ᵀ·(Z·Adᵀ)
      return table.lora_wgrad(za.values.floats() + first * za.rank, za.rank, dy.data() + first * hp * eb, hp, w, count,
                              tensor.shape.cols, h, static_cast<float>(lora.spec.down.scaling), grad, tensor.shape.cols,
                              true);
  }
}

void ExpertCompute::State::accumulate_gradients(LoraLayer& lora) {
  count_gradients(lora);
  constexpr auto kTensors = static_cast<std::int64_t>(shm::kNumAdapterTensors);
  pool.run(static_cast<std::int64_t>(routes.experts.size()) * kTensors, [&](std::int64_t task, int) {
    const auto which = static_cast<AdapterTensor>(task % kTensors);
    if (lora.tensor(which).shape.rows == 0) return;
    accumulate_gradient(lora, which, routes.experts[static_cast<std::size_t>(task / kTensors)]);
  });
}

void ExpertCompute::State::begin_backward(std::span<const BackwardItem> items) {
  batch.clear();
  for (const BackwardItem& item : items) {
    batch.push_back({item.act->ids.data(), item.act->weights.data(), item.act->num_tokens});
  }
  plan();
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
  const auto moe = static_cast<std::uint32_t>(moe_index);
  LoraLayer* lora = adapter == nullptr ? nullptr : adapter->layer(layer);
  accumulate = accumulate && lora != nullptr;
  // Recomputed bits equal kept ones, so a batch in which some were kept needs no third way.
  const bool recompute = std::any_of(items.begin(), items.end(), [](const BackwardItem& item) {
    return item.act->num_tokens > 0 && item.act->gate_up.empty();
  });
  s.begin_backward(items);

  const std::int64_t num_rows = s.routes.num_rows;
  const std::int64_t gate_up_rank = lora == nullptr ? 0 : lora->gate_up_rank();
  const std::int64_t down_rank = lora == nullptr ? 0 : lora->down_rank();
  const bool need_x = recompute || (accumulate && gate_up_rank > 0);
  s.dy.ensure(num_rows * s.hp * s.eb);
  if (need_x) s.x.ensure(num_rows * s.hp * s.eb);
  if (recompute) s.gate_up.ensure(num_rows * 2 * s.ip * s.eb);
  if (recompute || accumulate) s.z.ensure(num_rows * s.ip * s.eb);
  s.p.ensure_floats(num_rows * s.ip);
  s.dw.ensure_floats(num_rows * (s.ip / kPanelRows));
  s.dgu.ensure(num_rows * 2 * s.ip * s.eb);
  s.out.ensure(num_rows * s.hp * s.eb);
  s.xa.ensure(num_rows, gate_up_rank, s.eb);
  s.gb.ensure(num_rows, gate_up_rank, s.eb);
  s.za.ensure(num_rows, down_rank, s.eb);
  s.yb.ensure(num_rows, down_rank, s.eb);

  s.prepare_backward(lora, items, need_x);
  if (recompute) s.compute_gate_up(moe, lora, {});
  s.compute_p(moe, lora);
  s.differentiate(lora, items, recompute, accumulate);
  s.compute_dx(moe, lora);
  s.sum_routes(false, [&](std::size_t item) { return items[item].dx; });
  if (!accumulate) return;
  s.accumulate_gradients(*lora);
  lora->touched = true;
}

}  // namespace kt::coproc
