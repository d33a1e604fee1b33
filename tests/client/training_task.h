// The training both sides do: a rank through the daemon (rank_process.cpp), and the fp64 reference
// (reference_training.h). Everything is drawn from the seed, so neither tells the other anything.
//
//   h ← x;   per MoE layer: h ← h + experts(h; ids, weights);   loss = ½ Σ (h - target)² / (T · micro-batches per step)
//
// Gradients are averaged over ranks, clipped by their norm, and go into AdamW with two groups: A and B tensors.
#pragma once
#include <array>
#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <ostream>
#include <string>
#include <vector>

#include "client/session.h"
#include "shm/protocol.h"

namespace kt::client::testing {

struct TaskSizes {
  std::uint32_t num_layers = 3;
  std::vector<std::uint32_t> dense_layers = {1};
  std::vector<std::uint32_t> moe_layers = {0, 2};
  std::uint32_t num_experts = 6, top_k = 2, hidden_size = 64, intermediate_size = 32;
};

struct Task {
  unsigned seed = 1;
  std::uint32_t world_size = 1;
  std::uint32_t num_steps = 20;
  bool bf16 = false;     // Weight format, and what the wire carries.
  bool shared_a = true;  // PEFT's fused layout.
  double max_norm = 40;  // Of clipping.

  static constexpr std::uint32_t kMicroBatches = 2;  // Per step.
  static constexpr std::uint32_t kAdapter = 1;
  const TaskSizes sizes = {};

  AdapterSpec adapter() const;
  // Rows and columns per expert; no rows: the tensor does not exist.
  std::array<std::uint64_t, 2> tensor_shape(shm::AdapterTensor tensor) const;
  // f32[E, rows, cols], values that bf16 holds exactly.
  std::vector<float> initial_values(std::uint32_t layer, shm::AdapterTensor tensor) const;
  std::vector<shm::StepGroup> groups(std::uint32_t step) const;  // A linear schedule.
  // A tensors 0, B tensors 1; down_b of the last layer and layers without experts are frozen.
  std::vector<std::uint8_t> group_of() const;
  // torch.nn.utils.clip_grad_norm_'s coefficient over the number of ranks, from the norm of the averaged gradients.
  double scale(double norm) const;
};
inline void PrintTo(const Task& task, std::ostream* out) {
  *out << task.world_size << " ranks, " << task.num_steps << " steps, seed " << task.seed;
}
inline constexpr std::array kTensors = {shm::AdapterTensor::kGateA, shm::AdapterTensor::kGateB,
                                        shm::AdapterTensor::kUpA,   shm::AdapterTensor::kUpB,
                                        shm::AdapterTensor::kDownA, shm::AdapterTensor::kDownB};

// What one rank sees in one micro-batch. Values that bf16 holds exactly. Ranks have unequal numbers of tokens, the last
// one often none; some ids are the sentinel.
struct MicroBatch {
  MicroBatch(const Task& task, std::uint32_t step, std::uint32_t micro, std::uint32_t rank);

  std::uint32_t num_tokens = 0;
  std::vector<float> x, target;                // [T, H]
  std::vector<std::vector<std::int32_t>> ids;  // Per MoE layer: [T, top_k].
  std::vector<std::vector<float>> weights;     // Per MoE layer: [T, top_k], each token's sum is 1.
};

float round_bf16(float value);

// "layer.tensor", the key of a tensor in results.
std::string tensor_key(std::uint32_t layer, shm::AdapterTensor tensor);

// What a training leaves behind: one rank's, or the reference's for all ranks.
struct TrainingResult {
  std::vector<double> losses;                         // Per step and micro-batch of this rank.
  std::vector<double> norms;                          // Per step, of the averaged gradients, before clipping.
  std::map<std::string, std::vector<double>> first;   // Of step 0: "dx", "dw.<layer>" of micro-batch 0, gradient sums.
  std::map<std::string, std::vector<double>> params;  // At the end, by tensor_key.
  NLOHMANN_DEFINE_TYPE_INTRUSIVE(TrainingResult, losses, norms, first, params)
};

}  // namespace kt::client::testing
