// Forward and backward of one MoE layer's experts over a batch of requests: the formulas of ARCHITECTURE.md.
//
//   routes grouped by expert → the stages of forward or backward (stages_forward.h, stages_backward.h) → sum per token
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "coproc/experts/adapter.h"
#include "coproc/experts/dims.h"
#include "coproc/experts/traffic.h"
#include "coproc/experts/weights.h"
#include "coproc/experts/worker_pool.h"

namespace kt::coproc {

// What a FORWARD with act_id keeps until its BACKWARD. Rows of routes are indexed t·top_k + j.
struct SavedActivation {
  std::uint32_t layer = 0;
  std::uint32_t adapter_id = 0;
  std::uint64_t step = 0;
  std::uint32_t num_tokens = 0;
  std::vector<std::byte> x;        // [T, H] elements.
  std::vector<std::int32_t> ids;   // [T, top_k], 0…E.
  std::vector<float> weights;      // [T, top_k].
  std::vector<std::byte> gate_up;  // [T·top_k, 2·I_padded] elements, interleaved; empty: recomputed in backward.
  std::vector<std::byte> y;        // [T, H] elements; only with KEEP_Y.
  std::uint64_t bytes() const { return x.size() + ids.size() * 4 + weights.size() * 4 + gate_up.size() + y.size(); }
};

struct ForwardItem {
  const void* x = nullptr;            // [T, H] elements; may lie in a client's arena.
  const std::int32_t* ids = nullptr;  // [T, top_k] private and validated: 0…E, E contributes zero.
  const float* weights = nullptr;     // [T, top_k].
  std::uint32_t num_tokens = 0;
  void* y = nullptr;             // [T, H] elements out.
  void* save_gate_up = nullptr;  // SavedActivation::gate_up's memory, or nullptr.
};

struct BackwardItem {
  const void* dy = nullptr;  // [T, H] elements.
  const SavedActivation* act = nullptr;
  void* dx = nullptr;   // [T, H] elements out.
  float* dw = nullptr;  // [T, top_k] out; sentinel routes get 0.
};

// Owns the scratch memory of the layer functions. One thread calls (worker 0).
class ExpertCompute {
 public:
  ExpertCompute(const ExpertDims& dims, const kernels::KernelTable& table, const ExpertWeights& weights,
                WorkerPool& pool);
  ~ExpertCompute();

  // adapter: nullptr = base only. Items in rank order.
  void forward(std::uint32_t layer, const Adapter* adapter, std::span<const ForwardItem> items);
  // accumulate: adds the LoRA gradients to adapter->S and marks the layer touched.
  void backward(std::uint32_t layer, Adapter* adapter, std::span<const BackwardItem> items, bool accumulate);

  // What the last forward or backward moved.
  const Traffic& traffic() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kt::coproc
