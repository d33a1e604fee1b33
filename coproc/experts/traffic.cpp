#include "coproc/experts/traffic.h"

#include <algorithm>

#include "coproc/experts/products.h"
#include "coproc/experts/schedule.h"
#include "coproc/experts/stage.h"

namespace kt::coproc {
namespace {

using kernels::kPanelRows;

constexpr std::int64_t kPieceBytes = 65536;  // Of a transposed matrix, two of 32 KiB: the one at work and the next.

// Of a row of an operand that is rows, without what pads an array's rows. Those of LoRA's rank, and dw, are left out.
std::int64_t row_bytes(const Pass& pass, Operands operand) {
  if ((operand & (kInput | kGradOutput)) != 0) return pass.hidden * pass.element_bytes;
  if ((operand & (kX | kDy | kOut)) != 0) return pass.hidden_padded * pass.element_bytes;
  if ((operand & kZ) != 0) return pass.intermediate_padded * pass.element_bytes;
  if ((operand & (kGateUp | kKept)) != 0) return 2 * pass.intermediate_padded * pass.element_bytes;
  return 0;
}

// Whether the stage reads what an earlier one wrote, not what it has just written itself.
bool reads_earlier(const Stage& stage, Operands array) {
  return (stage.reads & array) != 0 && (stage.division != Division::kRows || (stage.writes & array) == 0);
}

std::int64_t sums_bytes(const Pass& pass, std::size_t first, std::size_t end) {
  std::int64_t floats = 0;
  for (std::size_t n = first; n < end; ++n) floats += pass.accumulate_to->tensors[n].expert_size();
  return 2 * floats * kFloatBytes;
}

}  // namespace

std::string_view stage_name(StageId stage) {
  constexpr std::array<std::string_view, kNumStages> kNames = {
      "gather x",      "gate, up",  "z to rank", "down",           "gather dy",
      "p, activation", "dw, ranks", "dx",        "lora gradients", "sum"};
  return kNames[static_cast<std::size_t>(stage)];
}

Account::Account(const Pass& pass, const std::vector<Stage>& stages, Traffic& traffic)
    : pass_(pass), stages_(stages), traffic_(traffic), live_bytes_(stages.size(), 0) {
  for (std::size_t writer = 0; writer < stages.size(); ++writer) {
    for_each_operand(stages[writer].writes & kArrays, [&](Operand array) { add_value(writer, array); });
  }
}

// The life of what stage `writer` writes to an array.
void Account::add_value(std::size_t writer, std::uint32_t array) {
  if (row_bytes(pass_, array) == 0) return;
  std::size_t last = writer;
  std::size_t end = writer + 1;  // Of those that may read it.
  while (end < stages_.size()) {
    if (reads_earlier(stages_[end], array)) last = end;
    if ((stages_[end++].writes & array) != 0) break;
  }
  accesses_.push_back({writer, array, true, writer, last});
  for (std::size_t reader = writer; reader < end; ++reader) {
    const bool reads = reader == writer ? (stages_[reader].reads & array) != 0 && !reads_earlier(stages_[reader], array)
                                        : reads_earlier(stages_[reader], array);
    if (reads) accesses_.push_back({reader, array, false, writer, last});
  }
  for (std::size_t stage = writer; stage <= last; ++stage) {
    const bool counted_by_next = stage == last && stage > writer && (stages_[stage].writes & array) != 0;
    if (!counted_by_next) live_bytes_[stage] += row_bytes(pass_, array);
  }
}

std::int64_t Account::bytes_of(const Access& access, const Share& share) const {
  const std::int64_t l2_bytes = pass_.table.l2_bytes;
  const Stage& stage = stages_[access.stage];
  const std::int64_t row = row_bytes(pass_, access.array);
  const std::int64_t bytes = share.num_rows * row;
  const bool is_whole = share.num_sharing == 0;
  if (!access.is_write && access.stage == access.first) {  // What this stage has just written.
    const std::int64_t task_rows = is_whole ? share.num_rows : std::min(share.num_rows, kRowsPerTask);
    return task_rows * row <= l2_bytes ? 0 : bytes;
  }
  bool stays = is_whole;
  for (std::size_t n = access.first; n <= access.last; ++n) {
    const std::int64_t pieces = stages_[n].division == Division::kTransposed ? kPieceBytes : 0;
    stays = stays && share.num_rows * live_bytes_[n] + pieces <= l2_bytes;
  }
  if (access.is_write || !stage.is_product() || (stage.writes & access.array) != 0) return stays ? 0 : bytes;
  const bool transposed = stage.division == Division::kTransposed;
  const WeightMatrix w = stage.w(pass_, share.expert);
  const std::int64_t panels = transposed ? w.k / kPanelRows : w.num_panels;
  const std::int64_t group = panels_of_group(transposed, share.num_rows);
  const std::int64_t num_groups = (panels + group - 1) / group;
  const std::int64_t at_work = transposed ? kPieceBytes : kPair * kernels::panel_stride_bytes(w.k, pass_.element_bytes);
  if (bytes + at_work > l2_bytes) return bytes * num_groups;
  if (is_whole) return stays ? 0 : bytes;
  return bytes * std::min<std::int64_t>(share.num_sharing, num_groups);
}

void Account::add_outside(const Stage& stage, const Share& share) {
  Traffic::Stage& to = traffic_[stage.id];
  if ((stage.reads & (kGateUpW | kDownW)) != 0) {
    const WeightMatrix w = stage.w(pass_, share.expert);
    to.weight_bytes += w.num_panels * (w.stride - kernels::kPanelPadBytes);
  }
  for_each_operand(stage.reads & ~kArrays, [&](Operand operand) {
    to.activation_bytes += share.num_rows * row_bytes(pass_, operand);
    const int part = std::countr_zero<Operands>(operand) - std::countr_zero<Operands>(kGateUpLoraA);
    if (part < 0) return;
    const LoraMatrix lora = lora_matrix(pass_, static_cast<LoraLayer::Part>(part), share.expert);
    // Behind the weights, gemm reads only the columns that are not zero.
    const std::int64_t k = stage.division == Division::kPanels ? lora.rank.depth : lora.panels.k;
    to.lora_bytes += lora.panels.num_panels * kPanelRows * k * pass_.element_bytes;
  });
  const std::int64_t num_blocks = RowBlocks(share.num_rows, pass_.rows_max).num_blocks;  // Each is added to the sums.
  for_each_operand(stage.writes & ~kArrays, [&](Operand operand) {
    if (operand == kGateUpSums) to.lora_bytes += num_blocks * sums_bytes(pass_, 0, 4);
    if (operand == kDownSums) to.lora_bytes += num_blocks * sums_bytes(pass_, 4, shm::kNumAdapterTensors);
    to.activation_bytes += (operand == kKept ? share.num_kept : share.num_rows) * row_bytes(pass_, operand);
  });
}

void Account::add(const Share& share) {
  for (const Stage& stage : stages_) add_outside(stage, share);
  for (const Access& access : accesses_) {
    traffic_[stages_[access.stage].id].activation_bytes += bytes_of(access, share);
  }
}

void Account::add_sum(std::int64_t num_rows, std::int64_t num_tokens, std::int64_t num_nodes) {
  Traffic::Stage& sum = traffic_[StageId::kSum];
  sum.activation_bytes += (num_rows + num_tokens) * pass_.hidden * pass_.element_bytes;
  if (num_nodes > 1) {
    const std::int64_t partial_bytes = num_tokens * pass_.hidden * kFloatBytes;
    sum.activation_bytes += 2 * num_nodes * partial_bytes;
    traffic_.link_bytes = (num_nodes - 1) * partial_bytes;
  }
}

}  // namespace kt::coproc
