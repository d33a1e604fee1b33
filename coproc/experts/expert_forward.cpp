#include <algorithm>
#include <utility>

#include "coproc/experts/layer_state.h"

namespace kt::coproc {

using kernels::kPanelRows;

ExpertCompute::State::State(ExpertDims dims_in, const kernels::KernelTable& table_in, const ExpertWeights& weights_in,
                            WorkerPool& pool_in)
    : dims(std::move(dims_in)),
      table(table_in),
      weights(weights_in),
      pool(pool_in),
      h(dims.hidden_size),
      hp(dims.hidden_padded()),
      i(dims.intermediate_size),
      ip(dims.intermediate_padded()),
      eb(dims.element_bytes),
      top_k(dims.top_k),
      workers(static_cast<std::size_t>(pool.num_workers())) {
  KT_CHECK(table.element_bytes == eb);
  KT_CHECK(top_k > 0);
}

void ExpertCompute::State::plan() {
  routes.group(batch, dims.num_experts, top_k);
  plan_rows(routes, row_tasks);
  plan_tokens(batch, token_tasks);
  traffic.stages.clear();
  traffic.num_routes = routes.num_rows;
}

void ExpertCompute::State::plan_weights(std::int64_t num_panels, std::int64_t k) {
  const std::int64_t group = num_panels % 2 == 0 ? 2 : 1;  // A gate panel and its up panel stay together.
  plan_panels(routes, num_panels, kernels::panel_stride_bytes(k, eb), group, pool.num_workers(), panel_tasks);
}

void ExpertCompute::State::plan_transposed(std::int64_t num_panels, std::int64_t k) {
  plan_panels(routes, num_panels, kernels::panel_stride_bytes(k, eb), 1, pool.num_workers(), panel_tasks);
}

void ExpertCompute::State::project(const RowTask& rows, const Scratch& a, std::int64_t lda, const kernels::Panels& w,
                                   double scale, Projection& to) const {
  const std::int64_t num_rows = rows.end - rows.begin;
  float* values = to.values.floats() + rows.begin * to.rank;
  table.gemm(a.data() + rows.begin * lda * eb, lda, num_rows, w, values, to.rank, false, {});
  table.round_rows(values, to.rank, num_rows, to.rank, static_cast<float>(scale),
                   to.rounded.data() + rows.begin * to.rank * eb, to.rank);
}

kernels::Panels ExpertCompute::State::transpose(const kernels::Panels& w, std::int64_t panel, Scratch& scratch) const {
  const std::int64_t k = w.num_panels * kPanelRows;
  std::byte* to = scratch.ensure(k * kPanelRows * eb);
  table.transpose_panels(w, panel, 1, to, 0, {});
  return {to, kernels::panel_stride_bytes(k, eb), 1, k};
}

void ExpertCompute::State::project_transposed(const RowTask& rows, const Scratch& a, std::int64_t lda,
                                              const kernels::Panels& w, double scale, Projection& to, int worker) {
  const std::int64_t num_rows = rows.end - rows.begin;
  float* values = to.values.floats() + rows.begin * to.rank;
  for (std::int64_t panel = 0; panel < to.rank / kPanelRows; ++panel) {
    const kernels::Panels wt = transpose(w, panel, workers[static_cast<std::size_t>(worker)].transposed);
    table.gemm(a.data() + rows.begin * lda * eb, lda, num_rows, wt, values + panel * kPanelRows, to.rank, false, {});
  }
  table.round_rows(values, to.rank, num_rows, to.rank, static_cast<float>(scale),
                   to.rounded.data() + rows.begin * to.rank * eb, to.rank);
}

void ExpertCompute::State::project_x(const RowTask& rows, const LoraLayer* lora) {
  if (xa.rank > 0) {
    project(rows, x, hp, lora->packed(LoraLayer::kGateUpA, rows.expert), lora->spec.gate_up.scaling, xa);
  }
}

// The interleaved columns of a task's panels, rows [begin, begin + count): activation, and G and U where they are kept.
void ExpertCompute::State::activate(std::int64_t begin, std::int64_t count, const PanelTask& task, const float* tile,
                                    std::span<const ForwardItem> items) {
  const std::int64_t columns = (task.end - task.begin) * kPanelRows;
  const std::int64_t first_column = task.begin * kPanelRows;
  const auto swiglu = [&](std::int64_t first, std::int64_t rows, std::byte* saved_row) {
    table.swiglu(tile + (first - begin) * columns, columns, rows, columns / 2,
                 saved_row == nullptr ? nullptr : saved_row + first_column * eb, 2 * ip,
                 z.data() + (first * ip + first_column / 2) * eb, ip);
  };
  if (items.empty()) return swiglu(begin, count, gate_up.data() + begin * 2 * ip * eb);
  for_each_run(routes, begin, begin + count, [&](std::size_t item, std::int64_t first, std::int64_t stop) {
    auto* saved = static_cast<std::byte*>(items[item].save_gate_up);
    if (saved == nullptr) return swiglu(first, stop - first, nullptr);
    for (std::int64_t row = first; row < stop; ++row) {
      const std::int64_t route = routes.route[static_cast<std::size_t>(row)];
      swiglu(row, 1, saved + route * 2 * ip * eb);
    }
  });
}

void ExpertCompute::State::compute_gate_up(std::uint32_t moe_index, const LoraLayer* lora,
                                           std::span<const ForwardItem> items) {
  plan_weights(2 * ip / kPanelRows, hp);
  count_gate_up(moe_index, lora, items);
  run(panel_tasks, [&](const PanelTask& task, int worker) {
    const std::int64_t num_panels = task.end - task.begin;
    const std::int64_t columns = num_panels * kPanelRows;
    const std::int64_t rows_max = tile_rows(columns);
    WorkerScratch& scratch = workers[static_cast<std::size_t>(worker)];
    float* tile = scratch.tile.ensure_floats(rows_max * columns);
    const kernels::Panels w = weights.gate_up(moe_index, static_cast<std::uint32_t>(task.expert))
                                  .elements(table, task.begin, num_panels, scratch.weights);
    const std::int64_t end = routes.first_row[static_cast<std::size_t>(task.expert) + 1];
    for (std::int64_t row = end - routes.rows_of(task.expert); row < end; row += rows_max) {
      const std::int64_t count = std::min(rows_max, end - row);
      table.gemm(x.data() + row * hp * eb, hp, count, w, tile, columns, false, {});
      if (xa.rank > 0) {
        table.gemm(xa.rounded.data() + row * xa.rank * eb, xa.rank, count,
                   slice(lora->packed(LoraLayer::kGateUpB, task.expert), task.begin, num_panels), tile, columns, true,
                   {});
      }
      activate(row, count, task, tile, items);
    }
  });
}

void ExpertCompute::State::compute_down(std::uint32_t moe_index, const LoraLayer* lora) {
  plan_weights(hp / kPanelRows, ip);
  count_down(moe_index, lora);
  run(panel_tasks, [&](const PanelTask& task, int worker) {
    const std::int64_t num_panels = task.end - task.begin;
    const std::int64_t columns = num_panels * kPanelRows;
    const std::int64_t rows_max = tile_rows(columns);
    WorkerScratch& scratch = workers[static_cast<std::size_t>(worker)];
    float* tile = scratch.tile.ensure_floats(rows_max * columns);
    const kernels::Panels w = weights.down(moe_index, static_cast<std::uint32_t>(task.expert))
                                  .elements(table, task.begin, num_panels, scratch.weights);
    const std::int64_t end = routes.first_row[static_cast<std::size_t>(task.expert) + 1];
    for (std::int64_t row = end - routes.rows_of(task.expert); row < end; row += rows_max) {
      const std::int64_t count = std::min(rows_max, end - row);
      table.gemm(z.data() + row * ip * eb, ip, count, w, tile, columns, false, {});
      if (za.rank > 0) {
        table.gemm(za.rounded.data() + row * za.rank * eb, za.rank, count,
                   slice(lora->packed(LoraLayer::kDownB, task.expert), task.begin, num_panels), tile, columns, true,
                   {});
      }
      table.round_rows(tile, columns, count, columns, 1.0f, out.data() + (row * hp + task.begin * kPanelRows) * eb, hp);
    }
  });
}

ExpertCompute::ExpertCompute(const ExpertDims& dims, const kernels::KernelTable& table, const ExpertWeights& weights,
                             WorkerPool& pool)
    : state_(std::make_unique<State>(dims, table, weights, pool)) {}
ExpertCompute::~ExpertCompute() = default;

const Traffic& ExpertCompute::traffic() const { return state_->traffic; }

void ExpertCompute::forward(std::uint32_t layer, const Adapter* adapter, std::span<const ForwardItem> items) {
  State& s = *state_;
  const std::int32_t moe_index = s.dims.moe_index(layer);
  KT_CHECK(moe_index >= 0);
  const auto moe = static_cast<std::uint32_t>(moe_index);
  const LoraLayer* lora = adapter == nullptr ? nullptr : adapter->layer(layer);
  s.batch.clear();
  for (const ForwardItem& item : items) s.batch.push_back({item.ids, item.weights, item.num_tokens});
  s.plan();
  const std::int64_t num_rows = s.routes.num_rows;
  s.x.ensure(num_rows * s.hp * s.eb);
  s.z.ensure(num_rows * s.ip * s.eb);
  s.out.ensure(num_rows * s.hp * s.eb);
  s.xa.ensure(num_rows, lora == nullptr ? 0 : lora->gate_up_rank(), s.eb);
  s.za.ensure(num_rows, lora == nullptr ? 0 : lora->down_rank(), s.eb);

  s.count_gather_x(lora);
  s.run(s.row_tasks, [&](const RowTask& rows, int) {
    s.gather(rows.begin, rows.end, s.h, s.hp, s.x.data(), [&](std::size_t item) { return items[item].x; });
    s.project_x(rows, lora);
  });
  s.compute_gate_up(moe, lora, items);
  if (s.za.rank > 0) {
    s.count_project_z(lora);
    s.run(s.row_tasks, [&](const RowTask& rows, int) {
      s.project(rows, s.z, s.ip, lora->packed(LoraLayer::kDownA, rows.expert), lora->spec.down.scaling, s.za);
    });
  }
  s.compute_down(moe, lora);
  s.sum_routes(true, [&](std::size_t item) { return items[item].y; });
}

}  // namespace kt::coproc
