// The model families the co-process can serve. A family's row, in a file of families/, says how its config.json and its
// expert tensors are spelled, which layers have experts and what those compute. Another family is another such row, and
// its name in families.cpp.
#pragma once
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "coproc/model/config_reader.h"
#include "shm/base/activation.h"
#include "shm/base/result.h"
#include "shm/model_card.h"

namespace kt::coproc {

enum class Projection : std::uint8_t { kGate = 0, kUp = 1, kDown = 2 };

// Expert tensors are called  <prefix>layers.<layer>.<experts_path>.<rest>  where <rest> is, for one tensor per expert
// and projection, <expert>.<projection>.weight, and in the fused layout of transformers v5 <gate_up> [E, 2I, H], the
// gate's I rows before the up's, or <down> [E, H, I].
struct Family {
  std::string_view model_type;                      // "qwen3_moe"
  std::span<const std::string_view> architectures;  // What config.json's "architectures" may name.

  // Keys of config.json. The first one present of each list counts.
  std::span<const std::string_view> num_experts_keys;
  std::string_view top_k_key = "num_experts_per_tok";
  std::string_view intermediate_size_key = "moe_intermediate_size";

  // Layers with routed experts, ascending, at least one, of num_layers.
  Result<std::vector<std::uint32_t>> (*moe_layers)(const ConfigReader& config, std::uint32_t num_layers);
  // What an expert computes between its gate and up and its down projection.
  Result<Activation> (*activation)(const ConfigReader& config);

  std::span<const std::string_view> prefixes;  // "model." below a head, "" for a saved base model.
  std::string_view experts_path = "mlp.experts";
  std::string_view projections[3] = {"gate_proj", "up_proj", "down_proj"};  // By Projection.
  std::string_view fused_gate_up = "gate_up_proj";
  std::string_view fused_down = "down_proj";

  std::string per_expert_name(std::string_view prefix, std::uint32_t layer, std::uint32_t expert,
                              Projection projection) const;
  std::string fused_name(std::string_view prefix, std::uint32_t layer, bool down) const;
  shm::ExpertNames names() const;
};

std::span<const Family* const> families();

// What several families share. A row says only where it differs from the usual spelling.
Error no_layer_has_experts(const ConfigReader& config, std::uint32_t num_layers, const std::string& detail);
Result<Activation> plain_swiglu(const ConfigReader& config);  // hidden_act is silu.
// mlp_layer_types[layer] is "sparse" or "dense"; where that list is absent the first num_dense layers are dense.
Result<std::vector<std::uint32_t>> layers_by_type(const ConfigReader& config, std::uint32_t num_layers,
                                                  std::uint32_t num_dense);

// "Qwen3MoeForCausalLM, Qwen3MoeModel, …": every architecture of every row, for error messages.
std::string supported_architectures();

// The parts of a tensor name that lies under an experts module of this family.
struct ExpertTensorName {
  std::string_view prefix;  // One of family.prefixes.
  std::uint32_t layer = 0;
  std::string_view rest;  // "3.gate_proj.weight", "gate_up_proj", …; views the name.
};
// Empty for every other tensor of the model.
std::optional<ExpertTensorName> parse_expert_name(const Family& family, std::string_view name);

}  // namespace kt::coproc
