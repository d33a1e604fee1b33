// What forward and backward share: sizes, the grouped routes, the arrays of a block, and the stages both have.
//
// A block is some rows of one expert. Its arrays, a row per route in the order of Routes; Hp and Ip padded sizes, ra
// and rd the padded widths of the LoRA halves (adapter_layer.h), s their scaling:
//
//   x        [rows, Hp | ra]   gathered X | s·xa            xa   [rows, ra]  X·gate_up_aᵀ
//   z        [rows, Ip | rd]   silu(G)⊙U  | s·za            za   [rows, rd]  Z·down_aᵀ
//   dy       [rows, Hp | rd]   gathered dY | s·yb           yb   [rows, rd]  dY·down_b
//   gate_up  [rows, 2Ip | ra]  interleaved | s·gb           gb   [rows, ra]  dG|dU·gate_up_b
//   dw       [Ip/32, rows]     ⟨P, Z⟩ of each 32 columns
//
// The left ones are elements, the right ones and dw f32. gate_up holds G and U where backward recomputes them, then dG
// and dU. What LoRA adds to a product with W is the product of the columns behind | with its other matrix: k goes on.
// A whole expert's blocks use the arrays of the worker that computes it, one after the other; a shared expert has
// arrays of its own. What outlives the experts lies in `Node::out`: D of every route in forward, dX before the sum in
// backward.
#pragma once
#include <algorithm>
#include <array>
#include <chrono>

#include "coproc/experts/adapter_layer.h"
#include "coproc/experts/expert_layer.h"
#include "coproc/experts/memory.h"
#include "coproc/experts/plan.h"
#include "coproc/experts/routes.h"

namespace kt::coproc {

using LoraLayer = Adapter::Layer;

inline constexpr std::array<shm::AdapterTensor, shm::kNumAdapterTensors> kAdapterTensors = {
    shm::AdapterTensor::kGateA, shm::AdapterTensor::kGateB, shm::AdapterTensor::kUpA,
    shm::AdapterTensor::kUpB,   shm::AdapterTensor::kDownA, shm::AdapterTensor::kDownB};

// One of LoRA's packed matrices, of one expert. rank.width = 0: not adapted.
struct LoraMatrix {
  kernels::Panels panels;
  LoraRank rank;
};

struct Block {
  std::int64_t num_rows() const { return end - begin; }
  std::int32_t expert = 0;
  std::int64_t begin = 0;  // Rows of Routes.
  std::int64_t end = 0;
  Scratch x, dy, z, gate_up, dw;
  Scratch xa, za, yb, gb;
};

// Rows [begin, end) of a block, or panels [begin, end) of a matrix.
struct Range {
  std::int64_t count() const { return end - begin; }
  std::int64_t begin = 0;
  std::int64_t end = 0;
};

// Where rows of elements lie, and of f32 results.
struct Rows {
  std::byte* data = nullptr;
  std::int64_t ld = 0;  // Elements.
};
struct Tile {
  float* data = nullptr;
  std::int64_t ld = 0;
};

// The time of one worker, stage by stage.
class StageClock {
 public:
  void start() { last_ = Clock::now(); }
  void lap(StageId stage) {
    const auto now = Clock::now();
    seconds[static_cast<std::size_t>(stage)] += std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }
  std::array<double, kNumStages> seconds{};

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point last_;
};

struct alignas(128) Worker {
  Block block;         // Of the whole expert it computes.
  Scratch tile;        // f32 results on their way through what follows the product.
  Scratch weights;     // Quantised weights as elements.
  Scratch transposed;  // A piece of a transposed matrix.
  StageClock clock;
};

// One LoRA tensor of shared expert number `index`.
struct TensorTask {
  std::int32_t index;
  shm::AdapterTensor which;
};

struct Node {
  ExpertPlan plan;
  std::vector<Block> blocks;  // Of the shared experts; more than there are now keep their memory.
  std::vector<RowTask> row_tasks;
  std::vector<PanelTask> panel_tasks;
  std::vector<TensorTask> tensor_tasks;
  std::vector<std::int32_t> slots;  // Of every slot, its row of `out`; -1: a sentinel, or another node's.
  Scratch out;                      // [rows of this node, Hp].
  Scratch partial;                  // [tokens of the batch, H] f32: this node's part of the sums; with several nodes.
};

// What a forward or backward is about.
struct Pass {
  std::uint32_t moe_index = 0;
  const LoraLayer* lora = nullptr;         // Or null.
  std::span<const ForwardItem> forward;    // In forward.
  std::span<const BackwardItem> backward;  // In backward.
  bool recompute = false;                  // Backward computes G and U again.
  LoraLayer* accumulate_to = nullptr;      // Backward adds LoRA's gradients there.
};

struct ExpertCompute::State {
  State(ExpertDims dims_in, const kernels::KernelTable& table_in, const ExpertWeights& weights_in, WorkerPool& pool_in);

  // Groups the routes of `batch`, and plans who computes what; sets the widths of the projections.
  void plan(const LoraLayer* lora);
  // Tasks of the shared experts by panels of `w`, or by 32 of its `columns`, of `depth` elements each.
  void plan_shared_panels(const WeightMatrix& w);
  void plan_shared_columns(std::int64_t columns, std::int64_t depth);

  // A phase: body(task, block, worker) for the tasks of all nodes' shared experts.
  template <class Task, class Body>
  void run_shared(std::vector<Task> Node::*tasks, const Body& body) {
    run_phase([&](const Node& node) { return (node.*tasks).size(); },
              [&](Node& node, std::size_t index, Worker& worker) {
                const Task& task = (node.*tasks)[index];
                worker.clock.start();
                body(task, node.blocks[static_cast<std::size_t>(task.index)], worker);
              });
  }
  // A phase: whole(node, index in its plan, worker) for the whole experts, shared(task, block, worker) for the tasks of
  // panels.
  template <class Whole, class Shared>
  void run_experts(const Whole& whole, const Shared& shared) {
    run_phase([](const Node& node) { return node.plan.whole.size() + node.panel_tasks.size(); },
              [&](Node& node, std::size_t index, Worker& worker) {
                worker.clock.start();
                if (index < node.plan.whole.size()) return whole(node, index, worker);
                const PanelTask& task = node.panel_tasks[index - node.plan.whole.size()];
                shared(task, node.blocks[static_cast<std::size_t>(task.index)], worker);
              });
  }
  template <class CountOf, class Body>
  void run_phase(const CountOf& count_of, const Body& body) {
    std::int64_t total = 0;
    for (std::size_t n = 0; n < nodes.size(); ++n)
      total += num_tasks[n] = static_cast<std::int64_t>(count_of(nodes[n]));
    if (total == 0) return;
    ++traffic.num_barriers;
    pool.run_on_nodes(num_tasks, [&](int node, std::int64_t index, int worker) {
      body(nodes[static_cast<std::size_t>(node)], static_cast<std::size_t>(index),
           workers[static_cast<std::size_t>(worker)]);
    });
  }
  // The blocks of a whole expert, one after the other, in the worker's arrays.
  template <class Body>
  void for_each_block(std::int32_t expert, Worker& worker, const Body& body) const {
    const RowBlocks blocks(routes.rows_of(expert), rows_max);
    Block& block = worker.block;
    block.expert = expert;
    for (std::int64_t b = 0; b < blocks.num_blocks; ++b) {
      block.begin = routes.begin_of(expert) + blocks.begin(b);
      block.end = routes.begin_of(expert) + blocks.begin(b + 1);
      body(block);
    }
  }

  // `rows` of a block's array [block rows, Hp] from the items' [T, H] arrays. source_of(item) is the array.
  template <class SourceOf>
  void gather(const Block& block, Range rows, std::byte* to, const SourceOf& source_of) const {
    for_each_run(routes, block.begin + rows.begin, block.begin + rows.end,
                 [&](std::size_t item, std::int64_t first, std::int64_t stop) {
                   table.gather(source_of(item), h, routes.token.data() + first, stop - first, h, hp,
                                to + (first - block.begin) * ld_hidden * eb, ld_hidden);
                 });
  }

  LoraMatrix lora_matrix(const Pass& pass, LoraLayer::Part part, std::int32_t expert) const;
  // C[m, 32·panels] = A[m, k | rank] · (W | LoRA's B)ᵀ, of their `panels`.
  void multiply(const WeightMatrix& w, const LoraMatrix& lora, Range panels, const Rows& a, std::int64_t m,
                const Tile& c, Worker& worker, const kernels::Fetch& next) const;
  // C[m, 32·panels] = A[m, N | rank] · (W over LoRA's A), of their columns 32·panels: pieces of Wᵀ are made in scratch,
  // 32 KiB at a time. last_rows: of the last panel's columns, those that are not zero.
  void multiply_transposed(const WeightMatrix& w, const LoraMatrix& lora, Range panels, const Rows& a, std::int64_t m,
                           const Tile& c, Worker& worker, const kernels::Fetch& next,
                           std::int64_t last_rows = kernels::kPanelRows) const;
  // values[m, rank] = A·LoRAᵀ (A·LoRA); the same rounded with `scale` goes behind A's columns.
  void project(const LoraMatrix& lora, double scale, const Rows& a, std::int64_t m, float* values) const;
  void project_transposed(const LoraMatrix& lora, double scale, const Rows& a, std::int64_t m, float* values,
                          Worker& worker) const;

  // Stages of forward, for a part of a block.
  void gather_x(const Pass& pass, Block& block, Range rows) const;
  void gate_up(const Pass& pass, Block& block, Range panels, Worker& worker, const kernels::Fetch& next) const;
  void activate(const Pass& pass, Block& block, Range rows, Range panels, const float* tile) const;
  void project_z(const Pass& pass, Block& block, Range rows) const;
  void down(const Pass& pass, Block& block, Range panels, Worker& worker, const kernels::Fetch& next);

  // Stages of backward.
  void gather_dy(const Pass& pass, Block& block, Range rows, Worker& worker) const;
  void differentiate(const Pass& pass, Block& block, Range panels, Worker& worker, const kernels::Fetch& next) const;
  void differentiate_rows(const Pass& pass, Block& block, Range rows, Range panels, const float* p) const;
  void finish_rows(const Pass& pass, Block& block, Range rows, Worker& worker) const;
  void grad_x(const Pass& pass, Block& block, Range panels, Worker& worker, const kernels::Fetch& next);
  void accumulate(const Pass& pass, const Block& block, Range rows, shm::AdapterTensor which) const;

  template <class Body>
  static void for_each_group(Range panels, std::int64_t count, const Body& body) {
    for (std::int64_t first = panels.begin; first < panels.end; first += count) {
      body(Range{first, std::min(first + count, panels.end)});
    }
  }
  template <class Body>
  static void for_each_pair(Range panels, const Body& body) {
    for_each_group(panels, kPair, body);
  }
  // How many panels of Wᵀ are made at a time. With few rows reading W is all that counts, and memory gives 8 KiB of
  // each panel of W faster than 4 KiB.
  static std::int64_t transposed_group(std::int64_t num_rows) { return num_rows <= kFewRows ? 2 * kPair : kPair; }
  // Panels of W in the piece of a group of `count` panels of Wᵀ that begins with panel `first`: 32 KiB of bf16, which
  // the product finds in L1 or L2; with few rows 8 KiB, so that all is in L1 together with what is fetched meanwhile.
  static std::int64_t piece_panels(const WeightMatrix& w, std::int64_t count, std::int64_t first) {
    return std::min<std::int64_t>(count > kPair ? 1 : 8, w.num_panels - first);
  }
  // All rows of a block, as many at a time as fit the worker's tile.
  template <class Body>
  static void for_each_tile(const Block& block, const Body& body) {
    for (std::int64_t first = 0; first < block.num_rows(); first += kTileRows) {
      body(Range{first, std::min(first + kTileRows, block.num_rows())});
    }
  }
  // The pair of panels after `pair`, or what comes after `end`.
  static kernels::Fetch next_pair(const WeightMatrix& w, Range pair, std::int64_t end, const kernels::Fetch& after);
  // The same of a group of `count` panels of the transpose.
  kernels::Fetch next_transposed(const WeightMatrix& w, Range group, std::int64_t count, std::int64_t end,
                                 const kernels::Fetch& after) const;
  Rows rows_of(const Scratch& array, std::int64_t row, std::int64_t ld) const {
    return {array.data() + row * ld * eb, ld};
  }

  void ensure_forward(Block& block) const;
  void ensure_backward(const Pass& pass, Block& block) const;
  void forward_whole(const Pass& pass, std::int32_t expert, const kernels::Fetch& after, Worker& worker);
  void backward_whole(const Pass& pass, std::int32_t expert, const kernels::Fetch& after, Worker& worker);
  void run_forward(const Pass& pass);
  void run_backward(const Pass& pass);
  // Whole expert number `index`'s successor on the same worker, if all workers are equally fast; -1: there is none.
  std::int32_t expert_after(const Node& node, std::size_t index) const;
  void begin_backward(std::span<const BackwardItem> items);
  void clear_sentinels(std::span<const BackwardItem> items) const;
  void accumulate_shared(const Pass& pass);

  // Phase: the items' [T, H] results, targets[item], from the nodes' `out`; weighted or not.
  void sum_routes(bool weighted);
  void find_slots();
  void sum_task(const Node& node, const TokenTask& task, bool weighted, float* sum) const;

  std::byte* out_row(std::int64_t row) {
    const std::size_t node = nodes.size() == 1 ? 0 : node_of_row(row);
    return nodes[node].out.data() + (row - routes.node_begin[node]) * hp * eb;
  }
  std::size_t node_of_row(std::int64_t row) const {
    return static_cast<std::size_t>(std::upper_bound(routes.node_begin.begin(), routes.node_begin.end(), row) -
                                    routes.node_begin.begin() - 1);
  }

  // traffic.cpp
  void account_forward(const Pass& pass);
  void account_backward(const Pass& pass);
  template <class Visit>
  void for_each_account(const Visit& visit) const;
  void finish_account();

  static constexpr std::int64_t kFewRows = 4;     // A product of so few is shorter than bringing its weights.
  static constexpr std::int64_t kPair = 2;        // Panels multiplied at a time: 64 columns.
  static constexpr std::int64_t kTileRows = 256;  // Rows of a tile: 64 KiB of f32.
  static constexpr std::int64_t kTileFloats = kTileRows * kPair * kernels::kPanelRows;

  ExpertDims dims;
  const kernels::KernelTable& table;
  const ExpertWeights& weights;
  WorkerPool& pool;
  std::int64_t h, hp, i, ip, eb, top_k;
  std::int64_t rows_max;       // Of a whole expert's block.
  LoraRank rank_a, rank_d;     // Of this pass: ra and rd.
  std::int64_t ld_hidden = 0;  // Of this pass, of the blocks' arrays.
  std::int64_t ld_intermediate = 0;
  std::int64_t ld_gate_up = 0;

  std::vector<RoutesOfItem> batch;
  Routes routes;
  std::vector<TokenTask> token_tasks;
  std::vector<std::byte*> targets;  // Of the items.
  std::vector<Node> nodes;
  std::vector<std::int64_t> num_tasks;
  std::vector<Worker> workers;
  Traffic traffic;
};

}  // namespace kt::coproc
