// A stage: one step of forward or backward, as a value. stages_forward.h and stages_backward.h have the list of each
// direction; ExpertCompute runs that list for whole and shared experts, and the account of bytes (traffic.h) reads it.
#pragma once
#include <chrono>
#include <span>
#include <vector>

#include "coproc/experts/adapter_layer.h"
#include "coproc/experts/block.h"
#include "coproc/experts/expert_compute.h"
#include "coproc/experts/routes.h"

namespace kt::coproc {

using LoraLayer = Adapter::Layer;

inline constexpr std::int64_t kFloatBytes = sizeof(float);

// One forward or backward: its sizes, and what all its stages read.
struct Pass {
  Pass(const ExpertDims& dims, const kernels::KernelTable& table_in, const ExpertWeights& weights_in,
       const Routes& routes_in, const LoraLayer* lora_in);

  bool is_forward() const { return backward_items.empty(); }
  bool adapts_gate_up() const { return gate_up_rank.width > 0; }
  bool adapts_down() const { return down_rank.width > 0; }
  std::int64_t leading_dimension(Operand array) const;  // Elements from row to row of kX, kDy, kZ or kGateUp.
  std::int64_t row_bytes(Operand array) const;          // Of a row of any array of a block.
  WeightMatrix gate_up_w(std::int32_t expert) const {
    return weights.gate_up(moe_index, static_cast<std::uint32_t>(expert));
  }
  WeightMatrix down_w(std::int32_t expert) const { return weights.down(moe_index, static_cast<std::uint32_t>(expert)); }

  const kernels::KernelTable& table;
  const ExpertWeights& weights;
  const Routes& routes;
  const LoraLayer* lora;  // Or null.
  std::int64_t hidden, hidden_padded, intermediate, intermediate_padded, element_bytes, top_k;
  Activation activation;
  LoraRank gate_up_rank, down_rank;  // ra and rd of block.h.
  std::int64_t rows_max;             // Of a whole expert's block.
  std::uint32_t moe_index = 0;
  std::span<const ForwardItem> forward_items;    // In forward.
  std::span<const BackwardItem> backward_items;  // In backward.
  bool recompute = false;                        // Backward computes G and U again.
  LoraLayer* accumulate_to = nullptr;            // Backward adds LoRA's gradients there.
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

// How a stage of one block can be divided: by its rows, by panels of its weights or of their transpose (all rows of the
// block), or by the LoRA tensors of its half (all rows).
enum class Division : std::uint8_t { kRows, kPanels, kTransposed, kTensors };

struct Stage {
  // `range` of the division. A product fetches `next` as it ends.
  using Run = void (*)(const Pass& pass, Block& block, Range range, Worker& worker, const kernels::Fetch& next);

  bool is_product() const { return division == Division::kPanels || division == Division::kTransposed; }
  Operands operands() const { return reads | writes; }
  WeightMatrix w(const Pass& pass, std::int32_t expert) const {
    return (reads & kGateUpW) != 0 ? pass.gate_up_w(expert) : pass.down_w(expert);
  }

  StageId id;
  Division division;
  Run run;
  Operands reads;  // A stage divided by rows may read what it has just written; others read what earlier ones wrote.
  Operands writes;
};
using StageList = std::vector<Stage>;  // In the order in which one worker runs them.

// How many rows, panels or tensors stage.division divides.
std::int64_t division_size(const Pass& pass, const Stage& stage, const Block& block);

// The phase of each stage where several workers share an expert: with a barrier before it that all earlier stages
// passed which write what it reads or writes, or read what it writes. Stages of one phase need not wait for each other.
std::vector<int> phases_of(const StageList& stages);

// The arrays that the stages use, with memory for the block's rows.
void ensure_arrays(const Pass& pass, const StageList& stages, Block& block);

}  // namespace kt::coproc
