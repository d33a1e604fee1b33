// One adapted layer as the compute functions see it: master tensors, their gradients, and packed copies.
//
// The packed copies make gate and up one matrix, whichever way their A's are shared:
//
//   shared A             gate_up_a = A [r, H]            gate_up_b = B [2I, r]
//   separate A's         gate_up_a = ⎡A_gate⎤ [2r, H]    gate_up_b = ⎡B_gate    0⎤ [2I, 2r]  (drawn without the
//                                    ⎣A_up  ⎦                        ⎣   0   B_up⎦            interleaving of panels)
//
// so that forward is G|U += (s·X·gate_up_aᵀ)·gate_up_bᵀ and backward uses the transposes of the same two. The zeros
// cost nothing for r ≤ 16, where both halves share one panel column of 32, and little beside H above.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "coproc/experts/adapter.h"
#include "coproc/experts/memory.h"
#include "kernels/kernel_table.h"

namespace kt::coproc {

// The rank of one half of LoRA's matrices: `width` columns as packed, a multiple of 32, of which gemm needs the first
// `depth`; the others are zero.
struct LoraRank {
  std::int64_t used_of_last_panel() const { return depth - (width - kernels::kPanelRows); }
  std::int64_t width = 0;  // 0: not adapted.
  std::int64_t depth = 0;
};

struct Adapter::Layer {
  // f32 [num_experts, rows, cols] each; rows = 0: the tensor does not exist.
  struct Tensor {
    std::int64_t expert_size() const { return shape.size(); }
    shm::TensorShape shape;
    float* p = nullptr;
    float* s = nullptr;
    float* m = nullptr;  // m and v are zero and take no memory until the first step or write.
    float* v = nullptr;
    bool has_moments = false;
    std::uint64_t t = 0;
  };
  // Packed elements of a matrix [rows, k] per expert.
  struct Packed {
    kernels::Panels of(std::int64_t expert) const {
      return {data + expert * num_panels * stride, stride, num_panels, k};
    }
    std::byte* data = nullptr;
    std::int64_t stride = 0;
    std::int64_t num_panels = 0;  // 0: not adapted.
    std::int64_t k = 0;           // Padded.
  };
  enum Part : std::uint8_t { kGateUpA, kGateUpB, kDownA, kDownB, kNumParts };
  static constexpr Part part_of(shm::AdapterTensor tensor) {
    switch (tensor) {
      case shm::AdapterTensor::kGateA:
      case shm::AdapterTensor::kUpA:
        return kGateUpA;
      case shm::AdapterTensor::kGateB:
      case shm::AdapterTensor::kUpB:
        return kGateUpB;
      case shm::AdapterTensor::kDownA:
        return kDownA;
      case shm::AdapterTensor::kDownB:
        break;
    }
    return kDownB;
  }

  Tensor& tensor(shm::AdapterTensor which) { return tensors[static_cast<std::size_t>(which)]; }
  const Tensor& tensor(shm::AdapterTensor which) const { return tensors[static_cast<std::size_t>(which)]; }
  kernels::Panels packed(Part part, std::int64_t expert) const { return parts[part].of(expert); }

  // Of X·gate_up_aᵀ and Z·down_aᵀ.
  LoraRank gate_up_rank(std::int64_t k_multiple) const {
    return rank_of(kGateUpB, up_column() + static_cast<std::int64_t>(spec.gate_up.r), k_multiple);
  }
  LoraRank down_rank(std::int64_t k_multiple) const {
    return rank_of(kDownB, static_cast<std::int64_t>(spec.down.r), k_multiple);
  }
  LoraRank rank_of(Part part, std::int64_t used, std::int64_t k_multiple) const {
    if (parts[part].k == 0) return {};
    return {parts[part].k, (used + k_multiple - 1) / k_multiple * k_multiple};
  }
  // Where up's columns begin in X·gate_up_aᵀ.
  std::int64_t up_column() const { return spec.shared_a ? 0 : static_cast<std::int64_t>(spec.gate_up.r); }

  // Rewrites one expert's packed copy of a part from the masters. `scratch`: pack_scratch_bytes().
  void pack(const kernels::KernelTable& table, Part part, std::int64_t expert, std::byte* scratch) const;
  std::int64_t pack_scratch_bytes(const kernels::KernelTable& table) const;

  AdapterLayerSpec spec;
  std::array<Tensor, shm::kNumAdapterTensors> tensors;
  std::array<Packed, kNumParts> parts;
  Memory memory;  // Holds everything above.
  std::uint64_t packed_bytes = 0;
  bool touched = false;  // A backward or write(kGrad) since the last step or discard.
};

struct Adapter::State {
  State(ExpertDims dims_in, const kernels::KernelTable& table_in)
      : dims(std::move(dims_in)), table(table_in), layers(dims.num_layers) {}

  // One layer of `num_layers` to come: refused unless there is memory for all of them.
  Result<std::unique_ptr<Layer>> make_layer(const AdapterLayerSpec& spec, std::size_t num_layers) const;
  // Visits (wire layer, layer) of those present, ascending.
  template <class Visit>
  void for_each_layer(const Visit& visit) const {
    for (std::size_t i = 0; i < layers.size(); ++i) {
      if (layers[i] != nullptr) visit(i, *layers[i]);
    }
  }

  ExpertDims dims;
  const kernels::KernelTable& table;
  std::vector<std::unique_ptr<Layer>> layers;  // By wire layer; null: not adapted.
  std::vector<Scratch> pack_scratch;           // By worker.
};

}  // namespace kt::coproc
