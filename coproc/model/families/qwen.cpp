// Qwen2-MoE and Qwen3-MoE.
#include <algorithm>
#include <nlohmann/json.hpp>

#include "coproc/model/families.h"
#include "coproc/model/input_file.h"

namespace kt::coproc {
namespace {

using nlohmann::json;

constexpr std::string_view kQwen2MoeArchitectures[] = {
    "Qwen2MoeForCausalLM", "Qwen2MoeModel", "Qwen2MoeForSequenceClassification", "Qwen2MoeForTokenClassification",
    "Qwen2MoeForQuestionAnswering"};
constexpr std::string_view kQwen3MoeArchitectures[] = {
    "Qwen3MoeForCausalLM", "Qwen3MoeModel", "Qwen3MoeForSequenceClassification", "Qwen3MoeForTokenClassification",
    "Qwen3MoeForQuestionAnswering"};

// transformers 5 writes Qwen3-MoE's num_experts as num_local_experts (its attribute_map); everybody else, and every
// published Qwen3-MoE checkpoint, writes num_experts.
constexpr std::string_view kQwenNumExpertsKeys[] = {"num_experts", "num_local_experts"};

// "transformer.": ForQuestionAnswering kept the old name of its base model.
constexpr std::string_view kQwenPrefixes[] = {"model.", "", "transformer."};

// Every decoder_sparse_step-th layer that is not in mlp_only_layers.
Result<std::vector<std::uint32_t>> qwen_moe_layers(const ConfigReader& config, std::uint32_t num_layers) {
  KT_TRY(const std::uint32_t step, config.count("decoder_sparse_step", shm::kLayersMax, 1));
  std::vector<std::int64_t> dense;
  if (const json* only = config.find("mlp_only_layers"); only != nullptr) {
    const auto is_integer = [](const json& layer) { return layer.is_number_integer(); };
    if (!only->is_array() || !std::ranges::all_of(*only, is_integer)) {
      return config.refuse("mlp_only_layers is not a list of layer numbers but " + printable(only->dump()));
    }
    for (const json& layer : *only) dense.push_back(layer.get<std::int64_t>());
    std::ranges::sort(dense);
  }
  std::vector<std::uint32_t> layers;
  for (std::uint32_t layer = 0; layer < num_layers; ++layer) {
    const bool is_dense = std::ranges::binary_search(dense, std::int64_t{layer});
    if (!is_dense && (layer + 1) % step == 0) layers.push_back(layer);
  }
  if (!layers.empty()) return layers;
  return no_layer_has_experts(
      config, num_layers,
      "decoder_sparse_step " + std::to_string(step) + ", " + std::to_string(dense.size()) + " mlp_only_layers");
}

constexpr Family qwen_row(std::string_view model_type, std::span<const std::string_view> architectures) {
  return {.model_type = model_type,
          .architectures = architectures,
          .num_experts_keys = kQwenNumExpertsKeys,
          .moe_layers = qwen_moe_layers,
          .activation = plain_swiglu,
          .prefixes = kQwenPrefixes};
}

}  // namespace

extern const Family kQwen2Moe;
constinit const Family kQwen2Moe = qwen_row("qwen2_moe", kQwen2MoeArchitectures);
extern const Family kQwen3Moe;
constinit const Family kQwen3Moe = qwen_row("qwen3_moe", kQwen3MoeArchitectures);

}  // namespace kt::coproc
