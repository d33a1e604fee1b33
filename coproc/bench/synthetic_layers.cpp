#include "coproc/bench/synthetic_layers.h"

#include <random>
#include <utility>
#include <vector>

#include "coproc/bench/elements.h"
#include "kernels/formats.h"

namespace kt::coproc {
namespace {

constexpr double kScaling = 2;  // alpha = 2 r, as most people have it.

void fill_parameters(const ExpertDims& dims, Adapter& adapter) {
  std::mt19937 random(5);
  std::uniform_real_distribution<float> uniform(-0.02f, 0.02f);
  for (std::size_t n = 0; n < shm::kNumAdapterTensors; ++n) {
    const auto which = static_cast<shm::AdapterTensor>(n);
    const auto shape = adapter.shape(dims.moe_layers.front(), which);
    if (!shape.has_value()) continue;
    std::vector<float> values(static_cast<std::size_t>(shape->rows * shape->cols));
    for (float& value : values) value = uniform(random);
    for (const std::uint32_t layer : dims.moe_layers) {
      for (std::uint32_t expert = 0; expert < dims.num_experts; ++expert) {
        adapter.write(shm::TensorKind::kParam, layer, which, expert, 1, values.data());
      }
    }
  }
}

}  // namespace

Result<SyntheticLayers> make_synthetic_layers(const ExpertDims& dims, const std::string& weight_format,
                                              std::uint32_t rank, const kernels::KernelTable& table, WorkerPool& pool,
                                              std::span<const int> nodes) {
  SyntheticLayers layers;
  layers.dims = dims;
  KT_TRY(layers.weights, ExpertWeights::create(dims, table, kernels::find_format(weight_format), nodes));
  const std::int64_t count = static_cast<std::int64_t>(dims.hidden_size) * dims.intermediate_size;
  const std::vector<std::byte> gate = random_elements(count, table.element_bytes, 1);
  const std::vector<std::byte> up = random_elements(count, table.element_bytes, 2);
  const std::vector<std::byte> down = random_elements(count, table.element_bytes, 3);
  const std::int64_t num_experts = dims.num_experts;
  pool.run(static_cast<std::int64_t>(dims.moe_layers.size()) * num_experts, [&](std::int64_t task, int) {
    layers.weights->set_expert(static_cast<std::uint32_t>(task / num_experts),
                               static_cast<std::uint32_t>(task % num_experts), gate.data(), up.data(), down.data());
  });
  if (rank == 0) return layers;
  layers.adapter = std::make_unique<Adapter>(dims, table);
  const shm::HalfSpec half = {rank, kScaling};
  KT_TRY_STATUS(layers.adapter->add_layers(dims.moe_layers, {half, /*shared_a=*/true, half}));
  fill_parameters(dims, *layers.adapter);
  return layers;
}

}  // namespace kt::coproc
