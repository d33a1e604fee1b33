// A pass walks the list of its direction's stages: one worker walks it for each of its whole experts, all workers walk
// it together for the shared ones, phase by phase.
#include "coproc/experts/expert_compute.h"

#include <algorithm>
#include <utility>

#include "coproc/experts/products.h"
#include "coproc/experts/route_sum.h"
#include "coproc/experts/schedule.h"
#include "coproc/experts/stages_backward.h"
#include "coproc/experts/stages_forward.h"

namespace kt::coproc {

struct ExpertCompute::State {
  struct Node {
    ExpertPlan plan;
    std::vector<Block> blocks;  // Of the shared experts; more than there are now keep their memory.
    std::vector<SharedTask> tasks;
    Scratch out;  // [rows of this node, Hp].
  };

  State(ExpertDims dims_in, const kernels::KernelTable& table_in, const ExpertWeights& weights_in, WorkerPool& pool)
      : dims(std::move(dims_in)),
        table(table_in),
        weights(weights_in),
        crew(pool),
        nodes(static_cast<std::size_t>(pool.num_nodes())) {
    KT_CHECK(table.element_bytes == dims.element_bytes);
    KT_CHECK(dims.top_k > 0);
  }

  Pass pass_of(std::uint32_t layer, const LoraLayer* lora) const {
    Pass pass(dims, table, weights, routes, lora);
    const std::int32_t moe_index = dims.moe_index(layer);
    KT_CHECK(moe_index >= 0);
    pass.moe_index = static_cast<std::uint32_t>(moe_index);
    return pass;
  }
  void group(const Pass& pass);
  void run(const Pass& pass, const StageList& stages);
  void plan_phase(const Pass& pass, const StageList& stages, const std::vector<int>& phases, int phase);
  void run_whole(const Pass& pass, const StageList& stages, std::size_t node, std::size_t index, Worker& worker);
  kernels::Fetch read_next(const Pass& pass, const StageList& stages, std::size_t stage, const Block& block,
                           std::int32_t next_expert) const;
  void account(const Pass& pass, const StageList& stages);

  std::byte* out_of(const Pass& pass, std::size_t node, std::int64_t row) const {
    return nodes[node].out.data() + (row - routes.node_begin[node]) * pass.hidden_padded * pass.element_bytes;
  }

  ExpertDims dims;
  const kernels::KernelTable& table;
  const ExpertWeights& weights;
  Crew crew;
  std::vector<RoutesOfItem> batch;
  std::vector<std::byte*> targets;  // Of the items.
  Routes routes;
  std::vector<Node> nodes;
  RouteSum route_sum;
  Traffic traffic;
};

// Groups the routes of `batch`, and plans which experts are computed whole.
void ExpertCompute::State::group(const Pass& pass) {
  crew.begin();
  const auto num_nodes = static_cast<std::int64_t>(nodes.size());
  routes.group(batch, dims.num_experts, pass.top_k, num_nodes);
  for (std::size_t n = 0; n < nodes.size(); ++n) {
    Node& node = nodes[n];
    plan_experts(routes, static_cast<std::int64_t>(n), num_nodes, crew.num_workers_of(n), node.plan);
    node.out.ensure((routes.node_begin[n + 1] - routes.node_begin[n]) * pass.hidden_padded * pass.element_bytes);
    if (node.blocks.size() < node.plan.shared.size()) node.blocks.resize(node.plan.shared.size());
    for (std::size_t index = 0; index < node.plan.shared.size(); ++index) {
      Block& block = node.blocks[index];
      block.expert = node.plan.shared[index];
      block.begin = routes.begin_of(block.expert);
      block.end = block.begin + routes.rows_of(block.expert);
      block.out = out_of(pass, n, block.begin);
    }
  }
}

// The stages, then the sum over each token's routes into `targets`.
void ExpertCompute::State::run(const Pass& pass, const StageList& stages) {
  for (std::size_t n = 0; n < nodes.size(); ++n) {
    for (std::size_t index = 0; index < nodes[n].plan.shared.size(); ++index) {
      ensure_arrays(pass, stages, nodes[n].blocks[index]);
    }
  }
  const std::vector<int> phases = phases_of(stages);
  // The whole experts go with the first products of the shared ones, whose small tasks then level out the workers.
  const auto first_product =
      std::find_if(stages.begin(), stages.end(), [](const Stage& stage) { return stage.is_product(); });
  const int whole_phase = phases[static_cast<std::size_t>(first_product - stages.begin())];
  std::vector<std::int64_t> num_whole(nodes.size(), 0);
  std::vector<std::int64_t> num_tasks(nodes.size(), 0);
  for (int phase = 0; phase <= *std::max_element(phases.begin(), phases.end()); ++phase) {
    plan_phase(pass, stages, phases, phase);
    for (std::size_t n = 0; n < nodes.size(); ++n) {
      num_whole[n] = phase == whole_phase ? static_cast<std::int64_t>(nodes[n].plan.whole.size()) : 0;
      num_tasks[n] = num_whole[n] + static_cast<std::int64_t>(nodes[n].tasks.size());
    }
    crew.run_on_nodes(num_tasks, [&](std::size_t n, std::size_t index, Worker& worker) {
      const auto whole = static_cast<std::size_t>(num_whole[n]);
      if (index < whole) return run_whole(pass, stages, n, index, worker);
      const SharedTask& task = nodes[n].tasks[index - whole];
      Block& block = nodes[n].blocks[static_cast<std::size_t>(task.index)];
      stages[task.stage].run(pass, block, {task.begin, task.end}, worker, {});
      worker.clock.lap(stages[task.stage].id);
    });
  }
  std::vector<const std::byte*> results;
  for (const Node& node : nodes) results.push_back(node.out.data());
  route_sum.run(pass, {batch, targets, results, pass.is_forward()}, crew);
  account(pass, stages);
}

// The tasks of the shared experts in one phase.
void ExpertCompute::State::plan_phase(const Pass& pass, const StageList& stages, const std::vector<int>& phases,
                                      int phase) {
  for (std::size_t n = 0; n < nodes.size(); ++n) {
    std::vector<SharedTask>& tasks = nodes[n].tasks;
    tasks.clear();
    const std::vector<std::int32_t>& shared = nodes[n].plan.shared;
    if (shared.empty()) continue;
    for (std::size_t s = 0; s < stages.size(); ++s) {
      if (phases[s] != phase) continue;
      const Stage& stage = stages[s];
      const std::size_t first = tasks.size();
      const std::int64_t size = division_size(pass, stage, nodes[n].blocks[0]);
      if (stage.division == Division::kRows) {
        plan_rows(routes, shared, tasks);
      } else if (stage.division == Division::kTensors) {
        plan_tensors(shared, size, tasks);
      } else {
        const WeightMatrix w = stage.w(pass, shared[0]);
        const std::int64_t depth = stage.division == Division::kPanels ? w.k : w.num_panels * kernels::kPanelRows;
        plan_panels(shared, size, kernels::panel_stride_bytes(depth, pass.element_bytes), crew.num_workers_of(n),
                    tasks);
      }
      for (std::size_t task = first; task < tasks.size(); ++task) tasks[task].stage = s;
    }
  }
}

// What the product of `stage` fetches as it ends: the beginning of the next product of this expert, or of the next one.
kernels::Fetch ExpertCompute::State::read_next(const Pass& pass, const StageList& stages, std::size_t stage,
                                               const Block& block, std::int32_t next_expert) const {
  std::int32_t expert = block.expert;
  std::int64_t num_rows = block.num_rows();
  for (std::size_t n = stage + 1;; ++n) {
    if (n == stages.size()) {
      if (next_expert < 0) return {};
      expert = next_expert;
      num_rows = routes.rows_of(next_expert);
      next_expert = -1;
      n = 0;
    }
    if (!stages[n].is_product()) continue;
    const bool transposed = stages[n].division == Division::kTransposed;
    const WeightMatrix w = stages[n].w(pass, expert);
    return first_of(pass, w, transposed, {0, transposed ? w.k / kernels::kPanelRows : w.num_panels}, num_rows);
  }
}

// Whole expert number `index` of a node, in blocks of rows that use the worker's arrays one after the other.
void ExpertCompute::State::run_whole(const Pass& pass, const StageList& stages, std::size_t node, std::size_t index,
                                     Worker& worker) {
  const std::vector<std::int32_t>& experts = nodes[node].plan.whole;
  // Its successor on the same worker, if all workers are equally fast.
  const std::size_t following = index + static_cast<std::size_t>(crew.num_workers_of(node));
  const std::int32_t next_expert = following < experts.size() ? experts[following] : -1;
  Block& block = worker.block;
  block.expert = experts[index];
  const RowBlocks blocks(routes.rows_of(block.expert), pass.rows_max);
  for (std::int64_t b = 0; b < blocks.num_blocks; ++b) {
    block.begin = routes.begin_of(block.expert) + blocks.begin(b);
    block.end = routes.begin_of(block.expert) + blocks.begin(b + 1);
    block.out = out_of(pass, node, block.begin);
    ensure_arrays(pass, stages, block);
    for (std::size_t s = 0; s < stages.size(); ++s) {
      const Stage& stage = stages[s];
      const kernels::Fetch next =
          stage.is_product() ? read_next(pass, stages, s, block, next_expert) : kernels::Fetch{};
      stage.run(pass, block, {0, division_size(pass, stage, block)}, worker, next);
      worker.clock.lap(stage.id);
    }
  }
}

void ExpertCompute::State::account(const Pass& pass, const StageList& stages) {
  traffic = {};
  traffic.num_routes = routes.num_rows;
  traffic.num_barriers = crew.num_phases();
  Account account(pass, stages, traffic);
  const auto add = [&](std::int32_t expert, std::int64_t begin, std::int64_t end, int num_sharing) {
    std::int64_t num_kept = 0;
    for (std::int64_t row = routes.begin_of(expert) + begin; row < routes.begin_of(expert) + end; ++row) {
      const auto item = static_cast<std::size_t>(routes.item[static_cast<std::size_t>(row)]);
      if (pass.is_forward() && pass.forward_items[item].save_gate_up != nullptr) ++num_kept;
    }
    account.add({expert, end - begin, num_kept, num_sharing});
  };
  for (std::size_t n = 0; n < nodes.size(); ++n) {
    for (const std::int32_t expert : nodes[n].plan.whole) {
      const RowBlocks blocks(routes.rows_of(expert), pass.rows_max);
      for (std::int64_t b = 0; b < blocks.num_blocks; ++b) add(expert, blocks.begin(b), blocks.begin(b + 1), 0);
    }
    for (const std::int32_t expert : nodes[n].plan.shared) {
      add(expert, 0, routes.rows_of(expert), crew.num_workers_of(n));
    }
  }
  std::int64_t num_tokens = 0;
  for (const RoutesOfItem& item : batch) num_tokens += item.num_tokens;
  account.add_sum(routes.num_rows, num_tokens, static_cast<std::int64_t>(nodes.size()));
  for (const Worker& worker : crew.workers()) {
    for (std::size_t n = 0; n < kNumStages; ++n) traffic.stages[n].seconds += worker.clock.seconds[n];
  }
}

ExpertCompute::ExpertCompute(const ExpertDims& dims, const kernels::KernelTable& table, const ExpertWeights& weights,
                             WorkerPool& pool)
    : state_(std::make_unique<State>(dims, table, weights, pool)) {}
ExpertCompute::~ExpertCompute() = default;

const Traffic& ExpertCompute::traffic() const { return state_->traffic; }

void ExpertCompute::forward(std::uint32_t layer, const Adapter* adapter, std::span<const ForwardItem> items) {
  State& s = *state_;
  Pass pass = s.pass_of(layer, adapter == nullptr ? nullptr : adapter->layer(layer));
  pass.forward_items = items;
  s.batch.clear();
  s.targets.clear();
  for (const ForwardItem& item : items) {
    s.batch.push_back({item.ids, item.weights, item.num_tokens});
    s.targets.push_back(static_cast<std::byte*>(item.y));
  }
  s.group(pass);
  s.run(pass, forward_stages(pass));
}

void ExpertCompute::backward(std::uint32_t layer, Adapter* adapter, std::span<const BackwardItem> items,
                             bool accumulate) {
  State& s = *state_;
  LoraLayer* lora = adapter == nullptr ? nullptr : adapter->layer(layer);
  Pass pass = s.pass_of(layer, lora);
  pass.backward_items = items;
  pass.accumulate_to = accumulate ? lora : nullptr;
  s.batch.clear();
  s.targets.clear();
  for (const BackwardItem& item : items) {
    // Recomputed bits equal kept ones, so a batch in which some were kept needs no third way.
    pass.recompute = pass.recompute || (item.act->num_tokens > 0 && item.act->gate_up.empty());
    s.batch.push_back({item.act->ids.data(), item.act->weights.data(), item.act->num_tokens});
    s.targets.push_back(static_cast<std::byte*>(item.dx));
  }
  s.group(pass);
  // Sentinels have no row that would set theirs.
  for (std::size_t item = 0; item < items.size(); ++item) {
    const std::int64_t num_slots = s.batch[item].num_tokens * pass.top_k;
    for (std::int64_t slot = 0; slot < num_slots; ++slot) {
      if (s.routes.row[static_cast<std::size_t>(s.routes.first_slot[item] + slot)] < 0) items[item].dw[slot] = 0;
    }
  }
  s.run(pass, backward_stages(pass));
  if (pass.accumulate_to != nullptr) lora->touched = true;
}

}  // namespace kt::coproc
