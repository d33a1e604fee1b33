#include "coproc/experts/stage.h"

#include <algorithm>

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

}  // namespace

Pass::Pass(const ExpertDims& dims, const kernels::KernelTable& table_in, const ExpertWeights& weights_in,
           const Routes& routes_in, const LoraLayer* lora_in)
    : table(table_in),
      weights(weights_in),
      routes(routes_in),
      lora(lora_in),
      hidden(dims.hidden_size),
      hidden_padded(dims.hidden_padded()),
      intermediate(dims.intermediate_size),
      intermediate_padded(dims.intermediate_padded()),
      element_bytes(dims.element_bytes),
      top_k(dims.top_k),
      activation(dims.activation),
      gate_up_rank(lora == nullptr ? LoraRank{} : lora->gate_up_rank(table.k_multiple)),
      down_rank(lora == nullptr ? LoraRank{} : lora->down_rank(table.k_multiple)),
      rows_max(choose_rows_max(table.l2_bytes, hidden_padded * element_bytes)) {}

std::int64_t Pass::leading_dimension(Operand array) const {
  if (array == kZ) return row_elements(intermediate_padded + down_rank.width, element_bytes);
  if (array == kGateUp) return row_elements(2 * intermediate_padded + gate_up_rank.width, element_bytes);
  return row_elements(hidden_padded + std::max(gate_up_rank.width, down_rank.width), element_bytes);
}

std::int64_t Pass::row_bytes(Operand array) const {
  if (array == kXa || array == kGb) return gate_up_rank.width * kFloatBytes;
  if (array == kYb || array == kZa) return down_rank.width * kFloatBytes;
  if (array == kDw) return intermediate_padded / kPanelRows * kFloatBytes;
  return leading_dimension(array) * element_bytes;
}

std::int64_t division_size(const Pass& pass, const Stage& stage, const Block& block) {
  switch (stage.division) {
    case Division::kRows:
      return block.num_rows();
    case Division::kPanels:
      return stage.w(pass, block.expert).num_panels;
    case Division::kTransposed:
      return stage.w(pass, block.expert).k / kPanelRows;
    case Division::kTensors:
      break;
  }
  return (stage.writes & kGateUpSums) != 0 ? 4 : 2;
}

std::vector<int> phases_of(const StageList& stages) {
  std::vector<int> phases(stages.size(), 0);
  for (std::size_t later = 0; later < stages.size(); ++later) {
    for (std::size_t earlier = 0; earlier < later; ++earlier) {
      const Stage& a = stages[earlier];
      const Stage& b = stages[later];
      const bool waits = (a.writes & b.operands()) != 0 || (a.reads & b.writes) != 0;
      if (waits) phases[later] = std::max(phases[later], phases[earlier] + 1);
    }
  }
  return phases;
}

void ensure_arrays(const Pass& pass, const StageList& stages, Block& block) {
  Operands used = 0;
  for (const Stage& stage : stages) used |= stage.operands();
  for_each_operand(used & kArrays,
                   [&](Operand array) { block[array].ensure(block.num_rows() * pass.row_bytes(array)); });
}

}  // namespace kt::coproc
