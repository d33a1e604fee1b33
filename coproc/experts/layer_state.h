// What forward and backward share: sizes, the grouped routes, the scratch arrays and the phases both run.
//
// Every array has one row per route, in the order of Routes. R routes, Hp and Ip padded sizes, ra and rd the padded
// widths of the LoRA halves (adapter_layer.h), s their scaling:
//
//   x        [R, Hp]   gathered X                      dy    [R, Hp]   gathered dY
//   xa       [R, ra]   X·gate_up_aᵀ in f32, and s· in elements
//   gate_up  [R, 2Ip]  rounded G and U, interleaved; only when backward recomputes them
//   z        [R, Ip]   silu(G)⊙U
//   za       [R, rd]   Z·down_aᵀ, f32 and s· elements
//   out      [R, Hp]   D in forward, dX before the sum in backward
//   p        [R, Ip]   dY·Wd (+LoRA), f32              dw    [R]       ⟨P, Z⟩
//   yb       [R, rd]   dY·down_b, f32 and s· elements
//   dgu      [R, 2Ip]  dG and dU, interleaved
//   gb       [R, ra]   dG|dU·gate_up_b, f32 and s· elements
//
// A phase is one WorkerPool::run; its tasks write disjoint parts, and no element's value depends on the cut.
#pragma once
#include <algorithm>

#include "coproc/experts/adapter_layer.h"
#include "coproc/experts/expert_layer.h"
#include "coproc/experts/memory.h"
#include "coproc/experts/routes.h"

namespace kt::coproc {

using LoraLayer = Adapter::Layer;

// A narrow product of LoRA: as computed, and scaled and rounded for the next gemm.
struct Projection {
  void ensure(std::int64_t num_rows, std::int64_t rank_in, std::int64_t element_bytes) {
    rank = rank_in;
    values.ensure_floats(num_rows * rank);
    rounded.ensure(num_rows * rank * element_bytes);
  }
  std::int64_t rank = 0;
  Scratch values;
  Scratch rounded;
};

struct WorkerScratch {
  Scratch tile;        // f32 results of a task for some rows.
  Scratch weights;     // Quantised weights as elements: a task's panels, or blocks on their way to `transposed`.
  Scratch transposed;  // One panel of a transposed weight matrix.
  Scratch lora;        // One panel of a transposed LoRA matrix.
};

struct ExpertCompute::State {
  State(ExpertDims dims_in, const kernels::KernelTable& table_in, const ExpertWeights& weights_in, WorkerPool& pool_in);

  // Groups the routes of `batch` and plans the tasks by rows and by tokens.
  void plan();
  void plan_weights(std::int64_t num_panels, std::int64_t k);
  void plan_transposed(std::int64_t num_panels, std::int64_t k);
  template <class Task, class Body>
  void run(const std::vector<Task>& tasks, const Body& body) {
    pool.run(static_cast<std::int64_t>(tasks.size()),
             [&](std::int64_t task, int worker) { body(tasks[static_cast<std::size_t>(task)], worker); });
  }

  // Rows [begin, end) of routes from the items' [T, n] arrays. source_of(item) is the array.
  template <class SourceOf>
  void gather(std::int64_t begin, std::int64_t end, std::int64_t n, std::int64_t n_padded, std::byte* to,
              const SourceOf& source_of) const {
    for_each_run(routes, begin, end, [&](std::size_t item, std::int64_t first, std::int64_t stop) {
      table.gather(source_of(item), n, routes.token.data() + first, stop - first, n, n_padded,
                   to + first * n_padded * eb, n_padded);
    });
  }

  // to[rows] = A·Wᵀ for rows [begin, end) of `a`, all of w's panels; rounded with `scale`.
  void project(const RowTask& rows, const Scratch& a, std::int64_t lda, const kernels::Panels& w, double scale,
               Projection& to) const;
  // The same with W transposed: to.rank columns of w, one transposed panel at a time.
  void project_transposed(const RowTask& rows, const Scratch& a, std::int64_t lda, const kernels::Panels& w,
                          double scale, Projection& to, int worker);
  kernels::Panels transpose(const kernels::Panels& w, std::int64_t panel, Scratch& scratch) const;

  // xa of gathered rows of X.
  void project_x(const RowTask& rows, const LoraLayer* lora);
  // Phase: z; G and U go to the items' save_gate_up where it is given, or, with no items, all to `gate_up`.
  void compute_gate_up(std::uint32_t moe_index, const LoraLayer* lora, std::span<const ForwardItem> items);
  void activate(std::int64_t begin, std::int64_t count, const PanelTask& task, const float* tile,
                std::span<const ForwardItem> items);
  // Phase: out = D.
  void compute_down(std::uint32_t moe_index, const LoraLayer* lora);
  // Phase: the items' [T, H] results from `out`; weighted or not.
  template <class TargetOf>
  void sum_routes(bool weighted, const TargetOf& target_of) {
    run(token_tasks, [&](const TokenTask& task, int) {
      const auto item = static_cast<std::size_t>(task.item);
      const std::int64_t first = task.begin * top_k;
      auto* target = static_cast<std::byte*>(target_of(item));
      table.sum_routes(out.data(), hp, routes.row.data() + routes.first_slot[item] + first,
                       weighted ? batch[item].weights + first : nullptr, task.end - task.begin, top_k, h,
                       target + task.begin * h * eb, h);
    });
    count_sum();
  }

  // Backward's phases and their parts (expert_backward.cpp).
  void begin_backward(std::span<const BackwardItem> items);
  void prepare_backward(const LoraLayer* lora, std::span<const BackwardItem> items, bool need_x);
  void compute_p(std::uint32_t moe_index, const LoraLayer* lora);
  void differentiate(const LoraLayer* lora, std::span<const BackwardItem> items, bool recomputed, bool accumulate);
  void differentiate_kept(const RowTask& rows, bool keep_z, std::span<const BackwardItem> items, Scratch& tile);
  void differentiate_rows(std::int64_t begin, std::int64_t end, const std::byte* saved, bool keep_z,
                          std::span<const BackwardItem> items);
  void compute_dx(std::uint32_t moe_index, const LoraLayer* lora);
  void accumulate_gradients(LoraLayer& lora);
  void accumulate_gradient(LoraLayer& lora, shm::AdapterTensor which, std::int32_t expert);

  // The phases' entries in `traffic` (traffic.cpp). Those of panels come after their plan.
  void count_gather_x(const LoraLayer* lora);
  void count_gate_up(std::uint32_t moe_index, const LoraLayer* lora, std::span<const ForwardItem> items);
  void count_project_z(const LoraLayer* lora);
  void count_down(std::uint32_t moe_index, const LoraLayer* lora);
  void count_sum();
  void count_gather_dy(const LoraLayer* lora);
  void count_p(std::uint32_t moe_index, const LoraLayer* lora);
  void count_differentiate(const LoraLayer* lora, bool keep_z);
  void count_dx(std::uint32_t moe_index, const LoraLayer* lora);
  void count_gradients(const LoraLayer& lora);

  // What a phase of panels reads of its rows, by rule T3. num_passes 0: one pass per task.
  struct PanelPass {
    std::int64_t row_bytes = 0;
    std::int64_t panel_bytes = 0;
    std::int64_t num_passes = 0;
  };
  std::int64_t panel_pass_bytes(const PanelPass& pass) const;
  // What tasks by rows read again of rows just written, multiplying by a matrix of that size (T4).
  std::int64_t row_pass_bytes(std::int64_t row_bytes, std::int64_t matrix_bytes) const;
  std::int64_t touched_bytes(std::int64_t bytes_per_expert) const;
  std::int64_t written_bytes(const Projection& projection) const;
  Traffic::Stage gathered(std::string_view name, const LoraLayer* lora, LoraLayer::Part part,
                          const Projection& projected) const;

  // Rows of `columns` f32 that fit a worker's tile; also few enough that the rows of A pass through L2 beside it.
  static std::int64_t tile_rows(std::int64_t columns) {
    return std::clamp<std::int64_t>(kTileFloats / columns, 1, kTileRowsMax);
  }
  // 256 KiB: half of the smallest L2 these tables run on (512 KiB per core on Zen 3; 2 MiB where AMX is).
  static constexpr std::int64_t kTileFloats = 65536;
  static constexpr std::int64_t kTileRowsMax = 256;

  ExpertDims dims;
  const kernels::KernelTable& table;
  const ExpertWeights& weights;
  WorkerPool& pool;
  std::int64_t h, hp, i, ip, eb, top_k;

  std::vector<RoutesOfItem> batch;
  Routes routes;
  std::vector<RowTask> row_tasks;
  std::vector<PanelTask> panel_tasks;
  std::vector<TokenTask> token_tasks;
  Scratch x, dy, gate_up, z, out, p, dw, dgu;
  Projection xa, za, yb, gb;
  std::vector<WorkerScratch> workers;
  Traffic traffic;
};

// Panels [begin, begin + count) of w.
inline kernels::Panels slice(const kernels::Panels& w, std::int64_t begin, std::int64_t count) {
  return {w.data + begin * w.stride, w.stride, count, w.k};
}

}  // namespace kt::coproc
