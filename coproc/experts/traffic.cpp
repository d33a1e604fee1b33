// The stages' shares of traffic.h.
#include "coproc/experts/traffic.h"

#include "coproc/experts/layer_state.h"

namespace kt::coproc {
namespace {

using kernels::kPanelRows;
using shm::AdapterTensor;

constexpr std::int64_t kFloatBytes = sizeof(float);

template <class AnyPanels>
std::int64_t bytes_of(const AnyPanels& w) {
  return w.num_panels * w.stride;
}

}  // namespace

std::string_view stage_name(StageId stage) {
  constexpr std::array<std::string_view, kNumStages> kNames = {
      "gather x",      "gate, up",  "z to rank", "down",           "gather dy",
      "p, activation", "dw, ranks", "dx",        "lora gradients", "sum"};
  return kNames[static_cast<std::size_t>(stage)];
}

// The account of one expert, or of one block of one that a worker computes whole.
class ExpertCompute::Account {
 public:
  Account(State& state, const Pass& pass, std::int32_t expert, std::int64_t num_rows, int num_sharing)
      : s_(state),
        pass_(pass),
        expert_(expert),
        rows_(num_rows),
        num_sharing_(num_sharing),
        hidden_(num_rows * s_.hp * s_.eb),
        intermediate_(num_rows * s_.ip * s_.eb),
        gate_up_(2 * intermediate_) {}

  void forward(std::int64_t num_kept) const;
  void backward() const;

 private:
  bool is_whole() const { return num_sharing_ == 0; }
  Traffic::Stage& at(StageId stage) const { return s_.traffic[stage]; }
  bool fits(std::int64_t bytes) const { return bytes <= s_.table.l2_bytes; }
  // Bytes of rows that a stage of products reads: nothing if they are in L2 already and stay there, once if they fit
  // there, once per pair of panels otherwise.
  std::int64_t rows_read(std::int64_t bytes, bool are_there, std::int64_t panels, std::int64_t pair_bytes) const {
    if (!fits(bytes + pair_bytes)) return bytes * (panels / State::kPair);
    if (is_whole()) return are_there ? 0 : bytes;
    return bytes * std::min<std::int64_t>(num_sharing_, panels / State::kPair);
  }
  std::int64_t unless(bool stays, std::int64_t bytes) const { return is_whole() && stays ? 0 : bytes; }
  std::int64_t pair_bytes(std::int64_t k) const { return State::kPair * kernels::panel_stride_bytes(k, s_.eb); }
  std::int64_t lora_bytes(LoraLayer::Part part) const {
    return pass_.lora == nullptr ? 0 : bytes_of(pass_.lora->packed(part, expert_));
  }
  void gather(StageId stage, const LoraRank& rank, LoraLayer::Part part) const;
  void gate_up(std::int64_t num_kept) const;
  void gradients() const;

  State& s_;
  const Pass& pass_;
  std::int32_t expert_;
  std::int64_t rows_;
  int num_sharing_;  // Workers that share the expert; 0: one computes it whole.
  std::int64_t hidden_;
  std::int64_t intermediate_;
  std::int64_t gate_up_;
};

void ExpertCompute::Account::gather(StageId stage, const LoraRank& rank, LoraLayer::Part part) const {
  at(stage).activation_bytes += rows_ * s_.h * s_.eb + unless(fits(hidden_), hidden_);
  if (rank.width > 0) at(stage).lora_bytes += lora_bytes(part);
}

void ExpertCompute::Account::gate_up(std::int64_t num_kept) const {
  const WeightMatrix w = s_.weights.gate_up(pass_.moe_index, static_cast<std::uint32_t>(expert_));
  Traffic::Stage& stage = at(StageId::kGateUp);
  stage.weight_bytes += bytes_of(w);
  stage.activation_bytes += rows_read(hidden_, true, w.num_panels, pair_bytes(s_.hp)) +
                            unless(fits(hidden_ + intermediate_), intermediate_) + num_kept * 2 * s_.ip * s_.eb;
  if (s_.rank_a.width > 0) stage.lora_bytes += lora_bytes(LoraLayer::kGateUpB);
}

void ExpertCompute::Account::forward(std::int64_t num_kept) const {
  gather(StageId::kGatherX, s_.rank_a, LoraLayer::kGateUpA);
  gate_up(num_kept);
  const bool z_stays = fits(hidden_ + intermediate_);
  if (s_.rank_d.width > 0) {
    at(StageId::kProjectZ).activation_bytes += unless(z_stays, intermediate_);
    at(StageId::kProjectZ).lora_bytes += lora_bytes(LoraLayer::kDownA);
    at(StageId::kDown).lora_bytes += lora_bytes(LoraLayer::kDownB);
  }
  const WeightMatrix w = s_.weights.down(pass_.moe_index, static_cast<std::uint32_t>(expert_));
  at(StageId::kDown).weight_bytes += bytes_of(w);
  at(StageId::kDown).activation_bytes +=
      rows_read(intermediate_, z_stays || s_.rank_d.width > 0, w.num_panels, pair_bytes(s_.ip)) + hidden_;
}

void ExpertCompute::Account::backward() const {
  const bool adapts = pass_.accumulate_to != nullptr;
  if (pass_.recompute) {
    gather(StageId::kGatherX, s_.rank_a, LoraLayer::kGateUpA);
    gate_up(rows_);
  }
  const std::int64_t piece_bytes = 65536;  // Two of 32 KiB: the one at work and the next.
  gather(StageId::kGatherDy, s_.rank_d, LoraLayer::kDownB);
  const WeightMatrix down = s_.weights.down(pass_.moe_index, static_cast<std::uint32_t>(expert_));
  const bool all_stays = fits(hidden_ + gate_up_ + (adapts ? intermediate_ : 0) + piece_bytes);
  Traffic::Stage& p = at(StageId::kDifferentiate);
  p.weight_bytes += bytes_of(down);
  p.activation_bytes += rows_read(hidden_, true, s_.ip / kPanelRows, piece_bytes) + gate_up_ +
                        unless(all_stays, gate_up_ + (adapts ? intermediate_ : 0));
  if (s_.rank_d.width > 0) p.lora_bytes += lora_bytes(LoraLayer::kDownA);
  Traffic::Stage& finish = at(StageId::kFinishRows);
  if (adapts && s_.rank_d.width > 0) {
    finish.activation_bytes += unless(all_stays, intermediate_);
    finish.lora_bytes += lora_bytes(LoraLayer::kDownA);
  }
  if (s_.rank_a.width > 0) {
    finish.activation_bytes += unless(all_stays, gate_up_);
    finish.lora_bytes += lora_bytes(LoraLayer::kGateUpB);
  }
  const WeightMatrix w = s_.weights.gate_up(pass_.moe_index, static_cast<std::uint32_t>(expert_));
  Traffic::Stage& dx = at(StageId::kGradX);
  dx.weight_bytes += bytes_of(w);
  dx.activation_bytes +=
      rows_read(gate_up_, all_stays || s_.rank_a.width > 0, s_.hp / kPanelRows, piece_bytes) + hidden_;
  if (s_.rank_a.width > 0) dx.lora_bytes += lora_bytes(LoraLayer::kGateUpA);
  if (adapts) gradients();
}

void ExpertCompute::Account::gradients() const {
  const LoraLayer& lora = *pass_.accumulate_to;
  Traffic::Stage& stage = at(StageId::kLoraGradients);
  const bool all_stays = fits(2 * hidden_ + gate_up_ + intermediate_);
  if (s_.rank_a.width > 0) {
    stage.activation_bytes += pass_.recompute ? unless(all_stays, hidden_) : rows_ * s_.h * s_.eb;
    stage.activation_bytes += unless(fits(hidden_ + gate_up_), gate_up_);
    if (!pass_.recompute) stage.lora_bytes += lora_bytes(LoraLayer::kGateUpA);
  }
  if (s_.rank_d.width > 0) stage.activation_bytes += unless(all_stays, hidden_ + intermediate_);
  for (const AdapterTensor which : kAdapterTensors) {
    if (lora.tensor(which).shape.rows > 0) stage.lora_bytes += 2 * lora.tensor(which).expert_size() * kFloatBytes;
  }
}

// Calls visit(expert, rows, sharing workers) for every block of the whole experts and every shared expert.
template <class Visit>
void ExpertCompute::State::for_each_account(const Visit& visit) const {
  for (std::size_t n = 0; n < nodes.size(); ++n) {
    for (const std::int32_t expert : nodes[n].plan.whole) {
      const RowBlocks blocks(routes.rows_of(expert), rows_max);
      for (std::int64_t b = 0; b < blocks.num_blocks; ++b) visit(expert, blocks.begin(b), blocks.begin(b + 1), 0);
    }
    for (const std::int32_t expert : nodes[n].plan.shared) {
      visit(expert, 0, routes.rows_of(expert), pool.num_workers_of(static_cast<int>(n)));
    }
  }
}

void ExpertCompute::State::finish_account() {
  std::int64_t num_tokens = 0;
  for (const RoutesOfItem& item : batch) num_tokens += item.num_tokens;
  Traffic::Stage& sum = traffic[StageId::kSum];
  sum.activation_bytes += (routes.num_rows * hp + num_tokens * h) * eb;
  if (nodes.size() > 1) {
    const std::int64_t partial_bytes = num_tokens * h * kFloatBytes;
    sum.activation_bytes += 2 * static_cast<std::int64_t>(nodes.size()) * partial_bytes;
    traffic.link_bytes = static_cast<std::int64_t>(nodes.size() - 1) * partial_bytes;
  }
  for (const Worker& worker : workers) {
    for (std::size_t stage = 0; stage < kNumStages; ++stage)
      traffic.stages[stage].seconds += worker.clock.seconds[stage];
  }
}

void ExpertCompute::State::account_forward(const Pass& pass) {
  for_each_account([&](std::int32_t expert, std::int64_t begin, std::int64_t end, int num_sharing) {
    std::int64_t num_kept = 0;
    for (std::int64_t row = routes.begin_of(expert) + begin; row < routes.begin_of(expert) + end; ++row) {
      const auto item = static_cast<std::size_t>(routes.item[static_cast<std::size_t>(row)]);
      num_kept += pass.forward[item].save_gate_up != nullptr ? 1 : 0;
    }
    Account(*this, pass, expert, end - begin, num_sharing).forward(num_kept);
  });
  finish_account();
}

void ExpertCompute::State::account_backward(const Pass& pass) {
  for_each_account([&](std::int32_t expert, std::int64_t begin, std::int64_t end, int num_sharing) {
    Account(*this, pass, expert, end - begin, num_sharing).backward();
  });
  finish_account();
}

}  // namespace kt::coproc
