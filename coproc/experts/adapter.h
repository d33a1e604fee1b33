// The LoRA adapter of a job: parameters, summed gradients and AdamW state of every adapted layer and expert.
//
//   P f32 master + packed element copies for the kernels, S f32 (sum of gradients), m, v f32, t per (layer, tensor)
//
// Invariants
//   I1  P changes only in step() and write(kParam); the packed copies follow at once.
//   I2  S changes only in ExpertCompute::backward, step(), discard() (zero) and write(kGrad) (replaces).
//   I7  step() leaves a tensor alone whose layer saw neither a backward nor write(kGrad) since the last step or
//       discard; of a layer that ran, all experts move.
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "coproc/experts/dims.h"
#include "coproc/experts/worker_pool.h"
#include "shm/base/result.h"
#include "shm/protocol.h"
#include "shm/tensor_shape.h"

namespace kt::coproc {

struct AdapterLayerSpec {
  shm::HalfSpec gate_up;
  bool shared_a = false;  // One A for gate and up (PEFT's fused layout).
  shm::HalfSpec down;
  friend bool operator==(const AdapterLayerSpec&, const AdapterLayerSpec&) = default;
};

class Adapter {
 public:
  Adapter(const ExpertDims& dims, const kernels::KernelTable& table);
  ~Adapter();

  // Adds zero-filled tensors for these wire layers. kInvalidArgument: not an MoE layer, already there, r out of range;
  // kNoResources with numbers.
  Status add_layers(std::span<const std::uint32_t> layers, const AdapterLayerSpec& spec);
  const AdapterLayerSpec* spec(std::uint32_t layer) const;  // nullptr: layer not adapted.
  bool same_specs(const Adapter& other) const;              // Layer by layer.

  // Per-expert shape of a tensor, nullopt when it does not exist (see AdapterTensor).
  std::optional<shm::TensorShape> shape(std::uint32_t layer, shm::AdapterTensor tensor) const;

  // values: f32[num_experts, rows, cols] (kT: one float). The caller has validated layer, tensor and range.
  void read(shm::TensorKind kind, std::uint32_t layer, shm::AdapterTensor tensor, std::uint32_t first_expert,
            std::uint32_t num_experts, float* values) const;
  void write(shm::TensorKind kind, std::uint32_t layer, shm::AdapterTensor tensor, std::uint32_t first_expert,
             std::uint32_t num_experts, const float* values);

  // ‖S‖² in double over the touched layers' tensors whose group_of[layer][tensor] is not kFrozen, in a fixed order.
  double squared_norm(std::span<const std::uint8_t> group_of, WorkerPool& pool) const;
  void discard(WorkerPool& pool);
  // torch.optim.AdamW / Adam on g = header.scale · S for every touched tensor with a group; then S = 0, untouched.
  void step(const shm::StepHeader& header, std::span<const std::uint8_t> group_of, WorkerPool& pool);

  bool has_gradients() const;  // A layer is touched: by write(kGrad), or by a backward (T = 0 counts).

  std::uint64_t parameter_bytes() const;  // P and the packed copies.
  std::uint64_t gradient_bytes() const;
  std::uint64_t optimizer_bytes() const;  // m and v; allocated with the first step or write of them.

  struct Layer;                                   // For ExpertCompute.
  const Layer* layer(std::uint32_t layer) const;  // nullptr: not adapted.
  Layer* layer(std::uint32_t layer);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kt::coproc
