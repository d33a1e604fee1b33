// config.json of a checkpoint: what the co-process needs to know about the model.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "coproc/model/families.h"
#include "shm/base/result.h"

namespace kt::coproc {

// A limit on everything. The largest published models stay a factor of 8 or more below each.
inline constexpr std::uint32_t kLayersMax = 65535;
inline constexpr std::uint32_t kExpertsMax = 1U << 16;
inline constexpr std::uint32_t kTopKMax = 1024;
inline constexpr std::uint32_t kHiddenSizeMax = 1U << 20;
inline constexpr std::uint32_t kIntermediateSizeMax = 1U << 20;

struct ModelConfig {
  std::string path;          // Absolute path of the checkpoint's directory.
  std::string architecture;  // architectures[0]: "Qwen3MoeForCausalLM"
  std::string model_type;    // "qwen3_moe"
  std::uint32_t num_layers = 0;
  std::vector<std::uint32_t> moe_layers;  // Layers with routed experts, ascending, at least one.
  std::uint32_t num_experts = 0;
  std::uint32_t top_k = 0;
  std::uint32_t hidden_size = 0;
  std::uint32_t intermediate_size = 0;  // Of one routed expert.
  std::string weights_file;             // config.json's transformers_weights, mostly "".
  const Family* family = nullptr;       // Never null after read_config.
};

// Reads and validates <directory>/config.json. Refused with kBadModel: what is not a checkpoint directory, unknown
// architectures, activations other than silu, quantised checkpoints, missing keys, values outside the limits above.
Result<ModelConfig> read_config(const std::string& directory);

}  // namespace kt::coproc
