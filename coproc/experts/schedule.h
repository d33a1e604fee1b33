// How a batch is divided over the workers.
//
// Most experts are computed whole by one worker: its rows stay in that worker's L2 from the gather to the result, and
// nothing waits for anybody. An expert that would make a worker finish late is shared: all workers of its node compute
// it stage by stage. No value depends on the division.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "coproc/experts/routes.h"

namespace kt::coproc {

inline constexpr std::int64_t kRowsPerTask = 128;

// The experts of a node that have rows; most rows first.
struct ExpertPlan {
  std::vector<std::int32_t> whole;
  std::vector<std::int32_t> shared;
};
void plan_experts(const Routes& routes, std::int64_t node, std::int64_t num_nodes, int num_workers, ExpertPlan& plan);

// A part of one stage of shared expert number `index`: rows, panels of its weights, or LoRA tensors [begin, end).
struct SharedTask {
  std::int32_t index;
  std::int64_t begin;
  std::int64_t end;
  std::size_t stage = 0;  // In the pass's list.
};
// Some tokens of one item.
struct TokenTask {
  std::int32_t item;
  std::int64_t begin;
  std::int64_t end;
};

void plan_tokens(std::span<const RoutesOfItem> items, std::vector<TokenTask>& tasks);
// These append.
void plan_rows(const Routes& routes, std::span<const std::int32_t> shared, std::vector<SharedTask>& tasks);
// Tasks of min(256 KB of weights, 1/8 of a worker's share), in whole pairs of panels (num_panels may be odd).
void plan_panels(std::span<const std::int32_t> shared, std::int64_t num_panels, std::int64_t panel_bytes,
                 int num_workers, std::vector<SharedTask>& tasks);
void plan_tensors(std::span<const std::int32_t> shared, std::int64_t num_tensors, std::vector<SharedTask>& tasks);

// The rows of an expert in blocks, as equal as can be. They depend on nothing but the number of rows: LoRA's gradients
// are summed block by block.
struct RowBlocks {
  RowBlocks(std::int64_t num_rows_in, std::int64_t rows_max)
      : num_rows(num_rows_in), num_blocks((num_rows_in + rows_max - 1) / rows_max) {}
  std::int64_t begin(std::int64_t block) const { return num_rows * block / num_blocks; }
  std::int64_t num_rows;
  std::int64_t num_blocks;
};

}  // namespace kt::coproc
