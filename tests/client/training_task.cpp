#include "tests/client/training_task.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <random>

namespace kt::client::testing {
namespace {

bool is_a(shm::AdapterTensor tensor) {
  return tensor == shm::AdapterTensor::kGateA || tensor == shm::AdapterTensor::kUpA ||
         tensor == shm::AdapterTensor::kDownA;
}

std::vector<float> normal_values(std::size_t count, float deviation, std::mt19937& random) {
  std::normal_distribution<float> normal(0, deviation);
  std::vector<float> values(count);
  for (float& value : values) value = round_bf16(normal(random));
  return values;
}

std::uint32_t tokens_of(const Task& task, std::uint32_t step, std::uint32_t micro, std::uint32_t rank) {
  if (task.world_size > 1 && rank + 1 == task.world_size && (step + micro) % 3 == 0) return 0;
  return 3 + (7 * rank + 5 * step + 4 * micro) % 11;
}

}  // namespace

float round_bf16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);  // To nearest, ties to even; no NaN comes here.
  return std::bit_cast<float>(rounded & 0xFFFF0000u);
}

std::string tensor_key(std::uint32_t layer, shm::AdapterTensor tensor) {
  return std::to_string(layer) + "." + std::to_string(static_cast<unsigned>(tensor));
}

AdapterSpec Task::adapter() const { return {sizes.moe_layers, {4, 2.0}, shared_a, {3, 1.5}}; }

std::array<std::uint64_t, 2> Task::tensor_shape(shm::AdapterTensor tensor) const {
  const AdapterSpec spec = adapter();
  switch (tensor) {
    case shm::AdapterTensor::kGateA:
      return {spec.gate_up.r, sizes.hidden_size};
    case shm::AdapterTensor::kGateB:
    case shm::AdapterTensor::kUpB:
      return {sizes.intermediate_size, spec.gate_up.r};
    case shm::AdapterTensor::kUpA:
      return {shared_a ? 0 : spec.gate_up.r, sizes.hidden_size};
    case shm::AdapterTensor::kDownA:
      return {spec.down.r, sizes.intermediate_size};
    case shm::AdapterTensor::kDownB:
      return {sizes.hidden_size, spec.down.r};
  }
  return {0, 0};
}

std::vector<float> Task::initial_values(std::uint32_t layer, shm::AdapterTensor tensor) const {
  std::mt19937 random(seed * 1000 + layer * 10 + static_cast<unsigned>(tensor));
  const auto [rows, cols] = tensor_shape(tensor);
  return normal_values(sizes.num_experts * rows * cols, 0.3f / std::sqrt(static_cast<float>(cols)), random);
}

std::vector<shm::StepGroup> Task::groups(std::uint32_t step) const {
  const double decay = 1 - static_cast<double>(step) / 40;
  return {{4e-3 * decay, 0.9, 0.99, 1e-8, 0.1, 1}, {1e-3 * decay, 0.85, 0.999, 1e-7, 0.0, 1}};
}

std::vector<std::uint8_t> Task::group_of() const {
  std::vector<std::uint8_t> groups(std::size_t{sizes.num_layers} * shm::kNumAdapterTensors, shm::kFrozen);
  for (const std::uint32_t layer : sizes.moe_layers) {
    for (const shm::AdapterTensor tensor : kTensors) {
      const std::size_t index = std::size_t{layer} * shm::kNumAdapterTensors + static_cast<std::size_t>(tensor);
      if (tensor_shape(tensor)[0] != 0) groups[index] = is_a(tensor) ? 0 : 1;
    }
  }
  groups.back() = shm::kFrozen;
  return groups;
}

double Task::scale(double norm) const { return std::min(1.0, max_norm / (norm + 1e-6)) / world_size; }

MicroBatch::MicroBatch(const Task& task, std::uint32_t step, std::uint32_t micro, std::uint32_t rank)
    : num_tokens(tokens_of(task, step, micro, rank)) {
  const TaskSizes& sizes = task.sizes;
  std::mt19937 random(((task.seed * 101 + step) * 17 + micro) * 31 + rank);
  x = normal_values(std::size_t{num_tokens} * sizes.hidden_size, 1, random);
  target = normal_values(x.size(), 1, random);
  for (std::size_t layer = 0; layer < sizes.moe_layers.size(); ++layer) {
    std::vector<std::int32_t> layer_ids(std::size_t{num_tokens} * sizes.top_k);
    for (std::int32_t& id : layer_ids) {
      id = static_cast<std::int32_t>(random() % (10 * sizes.num_experts + 1));
      id = id == 0 ? static_cast<std::int32_t>(sizes.num_experts) : id % static_cast<std::int32_t>(sizes.num_experts);
    }
    std::vector<float> layer_weights(layer_ids.size());
    std::uniform_real_distribution<float> uniform(0.2f, 0.8f);
    for (std::size_t slot = 0; slot < layer_weights.size(); slot += 2) {
      layer_weights[slot] = uniform(random);
      layer_weights[slot + 1] = 1 - layer_weights[slot];
    }
    ids.push_back(std::move(layer_ids));
    weights.push_back(std::move(layer_weights));
  }
}

}  // namespace kt::client::testing
