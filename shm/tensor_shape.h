// The shape of an adapter tensor, which both ends and Python derive from the same sizes.
#pragma once
#include <cstdint>

#include "shm/protocol.h"

namespace kt::shm {

// LoRA of one half of a layer's experts: gate and up, or down.
struct HalfSpec {
  std::uint32_t r = 0;  // 0: not adapted; else 1…256.
  double scaling = 0;   // alpha / r.
  friend bool operator==(const HalfSpec&, const HalfSpec&) = default;
};

// What the LoRA tensors of a layer are made for. r = 0: that half is not adapted.
struct LoraSizes {
  std::uint32_t hidden_size = 0;
  std::uint32_t intermediate_size = 0;
  std::uint32_t gate_up_r = 0;
  bool shared_a = false;  // One A for gate and up: up_a does not exist.
  std::uint32_t down_r = 0;
};

// Of one expert's matrix; 0 x 0 where the tensor does not exist.
struct TensorShape {
  std::int64_t rows = 0;
  std::int64_t cols = 0;

  constexpr std::int64_t size() const { return rows * cols; }
  friend constexpr bool operator==(const TensorShape&, const TensorShape&) = default;
};

constexpr TensorShape tensor_shape(const LoraSizes& sizes, AdapterTensor tensor) {
  TensorShape shape;
  switch (tensor) {
    case AdapterTensor::kGateA:
      shape = {sizes.gate_up_r, sizes.hidden_size};
      break;
    case AdapterTensor::kUpA:
      shape = {sizes.shared_a ? 0 : sizes.gate_up_r, sizes.hidden_size};
      break;
    case AdapterTensor::kGateB:
    case AdapterTensor::kUpB:
      shape = {sizes.intermediate_size, sizes.gate_up_r};
      break;
    case AdapterTensor::kDownA:
      shape = {sizes.down_r, sizes.intermediate_size};
      break;
    case AdapterTensor::kDownB:
      shape = {sizes.hidden_size, sizes.down_r};
      break;
  }
  return shape.size() == 0 ? TensorShape{} : shape;
}

}  // namespace kt::shm
