// Planning a pass, and its last phase: from the experts' rows to the tokens' results.
#include "coproc/experts/layer_state.h"

#include <utility>

namespace kt::coproc {
namespace {

using kernels::kPanelRows;

// The blocks' rows are an odd number of cache lines apart: a multiple of 4 KiB would put all into the same sets of L1.
std::int64_t row_elements(std::int64_t elements, std::int64_t element_bytes) {
  const std::int64_t of_line = 64 / element_bytes;
  return ((elements + of_line - 1) / of_line | 1) * of_line;
}

// X of a block takes five eighths of L2: beside it go a pair of panels, the next one, and a tile. No fewer rows than
// amortise the reading of the weights.
std::int64_t choose_rows_max(std::int64_t l2_bytes, std::int64_t row_bytes) {
  constexpr std::int64_t kRowsMin = 32;
  return std::max(kRowsMin, l2_bytes * 5 / 8 / row_bytes / kRowsMin * kRowsMin);
}

constexpr std::int64_t kSumTokens = 4;  // Whose f32 sums stay in L1.

}  // namespace

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
      rows_max(choose_rows_max(table.l2_bytes, hp * eb)),
      nodes(static_cast<std::size_t>(pool.num_nodes())),
      num_tasks(nodes.size()),
      workers(static_cast<std::size_t>(pool.num_workers())) {
  KT_CHECK(table.element_bytes == eb);
  KT_CHECK(top_k > 0);
}

void ExpertCompute::State::plan(const LoraLayer* lora) {
  rank_a = lora == nullptr ? LoraRank{} : lora->gate_up_rank(table.k_multiple);
  rank_d = lora == nullptr ? LoraRank{} : lora->down_rank(table.k_multiple);
  ld_hidden = row_elements(hp + std::max(rank_a.width, rank_d.width), eb);
  ld_intermediate = row_elements(ip + rank_d.width, eb);
  ld_gate_up = row_elements(2 * ip + rank_a.width, eb);
  const auto num_nodes = static_cast<std::int64_t>(nodes.size());
  routes.group(batch, dims.num_experts, top_k, num_nodes);
  plan_tokens(batch, token_tasks);
  for (std::int64_t n = 0; n < num_nodes; ++n) {
    Node& node = nodes[static_cast<std::size_t>(n)];
    plan_experts(routes, n, num_nodes, pool.num_workers_of(static_cast<int>(n)), node.plan);
    plan_rows(routes, node.plan.shared, node.row_tasks);
    if (node.blocks.size() < node.plan.shared.size()) node.blocks.resize(node.plan.shared.size());
    for (std::size_t index = 0; index < node.plan.shared.size(); ++index) {
      Block& block = node.blocks[index];
      block.expert = node.plan.shared[index];
      block.begin = routes.begin_of(block.expert);
      block.end = block.begin + routes.rows_of(block.expert);
    }
    const auto at = static_cast<std::size_t>(n);
    node.out.ensure((routes.node_begin[at + 1] - routes.node_begin[at]) * hp * eb);
  }
  for (Worker& worker : workers) worker.clock.seconds.fill(0);
  traffic = {};
  traffic.num_routes = routes.num_rows;
}

void ExpertCompute::State::plan_shared_panels(const WeightMatrix& w) {
  for (std::size_t n = 0; n < nodes.size(); ++n) {
    plan_panels(nodes[n].plan.shared, w.num_panels, kernels::panel_stride_bytes(w.k, eb),
                pool.num_workers_of(static_cast<int>(n)), nodes[n].panel_tasks);
  }
}

void ExpertCompute::State::plan_shared_columns(std::int64_t columns, std::int64_t depth) {
  for (std::size_t n = 0; n < nodes.size(); ++n) {
    plan_panels(nodes[n].plan.shared, columns / kPanelRows, kernels::panel_stride_bytes(depth, eb),
                pool.num_workers_of(static_cast<int>(n)), nodes[n].panel_tasks);
  }
}

std::int32_t ExpertCompute::State::expert_after(const Node& node, std::size_t index) const {
  const auto node_idx = static_cast<int>(&node - nodes.data());
  index += static_cast<std::size_t>(pool.num_workers_of(node_idx));
  return index < node.plan.whole.size() ? node.plan.whole[index] : -1;
}

// Where the rows of every slot lie in the nodes' `out`.
void ExpertCompute::State::find_slots() {
  for (std::size_t n = 0; n < nodes.size(); ++n) {
    const std::int64_t begin = routes.node_begin[n];
    const std::int64_t end = routes.node_begin[n + 1];
    nodes[n].slots.resize(routes.row.size());
    for (std::size_t slot = 0; slot < routes.row.size(); ++slot) {
      const std::int64_t row = routes.row[slot];
      nodes[n].slots[slot] = row >= begin && row < end ? static_cast<std::int32_t>(row - begin) : -1;
    }
  }
}

// sum[tokens of the task, H] f32 over the routes of one node.
void ExpertCompute::State::sum_task(const Node& node, const TokenTask& task, bool weighted, float* sum) const {
  const auto item = static_cast<std::size_t>(task.item);
  const std::int64_t first = task.begin * top_k;
  table.sum_routes(node.out.data(), hp, node.slots.data() + routes.first_slot[item] + first,
                   weighted ? batch[item].weights + first : nullptr, task.end - task.begin, top_k, h, sum, h);
}

// With several nodes each sums the routes of its own experts, and the sums are added in the order of the nodes: only
// they cross from one node to another.
void ExpertCompute::State::sum_routes(bool weighted) {
  find_slots();
  const auto num_token_tasks = static_cast<std::int64_t>(token_tasks.size());
  const auto partial_row = [&](const Node& node, const TokenTask& task) {
    const std::int64_t token = routes.first_slot[static_cast<std::size_t>(task.item)] / top_k + task.begin;
    return node.partial.floats() + token * h;
  };
  if (nodes.size() > 1) {
    for (Node& node : nodes) node.partial.ensure_floats(static_cast<std::int64_t>(routes.row.size()) / top_k * h);
    run_phase([&](const Node&) { return num_token_tasks; },
              [&](Node& node, std::size_t index, Worker& worker) {
                worker.clock.start();
                sum_task(node, token_tasks[index], weighted, partial_row(node, token_tasks[index]));
                worker.clock.lap(StageId::kSum);
              });
  }
  if (num_token_tasks > 0) ++traffic.num_barriers;
  pool.run(num_token_tasks, [&](std::int64_t index, int worker_idx) {
    Worker& worker = workers[static_cast<std::size_t>(worker_idx)];
    worker.clock.start();
    float* sum = worker.tile.ensure_floats(std::max(kTileFloats, kSumTokens * h));
    TokenTask part = token_tasks[static_cast<std::size_t>(index)];
    for (const std::int64_t end = part.end; part.begin < end; part.begin = part.end) {
      part.end = std::min(part.begin + kSumTokens, end);
      const std::int64_t count = part.end - part.begin;
      if (nodes.size() == 1) {
        sum_task(nodes[0], part, weighted, sum);
      } else {
        std::copy_n(partial_row(nodes[0], part), count * h, sum);
        for (std::size_t n = 1; n < nodes.size(); ++n) {
          const float* more = partial_row(nodes[n], part);
          for (std::int64_t at = 0; at < count * h; ++at) sum[at] += more[at];
        }
      }
      table.round_rows(sum, h, count, h, 1.0f, targets[static_cast<std::size_t>(part.item)] + part.begin * h * eb, h);
    }
    worker.clock.lap(StageId::kSum);
  });
}

ExpertCompute::ExpertCompute(const ExpertDims& dims, const kernels::KernelTable& table, const ExpertWeights& weights,
                             WorkerPool& pool)
    : state_(std::make_unique<State>(dims, table, weights, pool)) {}
ExpertCompute::~ExpertCompute() = default;

const Traffic& ExpertCompute::traffic() const { return state_->traffic; }

}  // namespace kt::coproc
