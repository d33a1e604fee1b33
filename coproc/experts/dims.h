// The sizes every part of the co-process agrees on.
#pragma once
#include <cstdint>
#include <vector>

#include "kernels/kernel_table.h"
#include "shm/base/activation.h"
#include "shm/base/align.h"

namespace kt::coproc {

struct ExpertDims {
  std::uint32_t num_layers = 0;           // Hidden layers of the model: layer numbers on the wire are below this.
  std::vector<std::uint32_t> moe_layers;  // Those with routed experts, ascending.
  std::uint32_t num_experts = 0;
  std::uint32_t top_k = 0;
  std::uint32_t hidden_size = 0;
  std::uint32_t intermediate_size = 0;
  std::uint32_t element_bytes = 2;  // 2: bf16; 4: --weight-format fp32.
  Activation activation = {};       // Between gate and up and down: kernels/generic/activation.inl computes it.

  // Kernels want multiples of 32; the padding is zero everywhere and adds exact zeros.
  std::int64_t hidden_padded() const { return static_cast<std::int64_t>(round_up(hidden_size, kernels::kPanelRows)); }
  std::int64_t intermediate_padded() const {
    return static_cast<std::int64_t>(round_up(intermediate_size, kernels::kPanelRows));
  }
  // Index of a wire layer among moe_layers, or -1.
  std::int32_t moe_index(std::uint32_t layer) const {
    for (std::size_t i = 0; i < moe_layers.size(); ++i) {
      if (moe_layers[i] == layer) return static_cast<std::int32_t>(i);
    }
    return -1;
  }
};

}  // namespace kt::coproc
