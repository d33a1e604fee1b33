// What a model is: the facts that the daemon reads from a checkpoint and tells its clients and monitors.
//
// The hello answer, the status page and Python's Client.model are made from the one list of facts in model_card.cpp.
// A new fact is a member here and a row there.
#pragma once
#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "shm/base/activation.h"
#include "shm/base/result.h"

namespace kt::shm {

// A limit on everything. They keep every payload size below 2^63 (payload.h), and layers within the 16 bits of a
// request. The largest published models stay a factor of 8 or more below each.
inline constexpr std::uint32_t kLayersMax = 65535;
inline constexpr std::uint32_t kExpertsMax = 1U << 16;
inline constexpr std::uint32_t kTopKMax = 1024;
inline constexpr std::uint32_t kHiddenSizeMax = 1U << 20;
inline constexpr std::uint32_t kIntermediateSizeMax = 1U << 20;

// How the checkpoint spells its expert tensors:  <prefix>layers.<layer>.<path>.<rest>  where <rest> is, for one tensor
// per expert and projection, <expert>.<projection>.weight, or a fused tensor's name.
struct ExpertNames {
  std::vector<std::string> prefixes;     // "model.", "", …
  std::string path;                      // "mlp.experts"
  std::vector<std::string> projections;  // Of gate, up, down.
  std::vector<std::string> fused;        // gate and up [E, 2I, H], down [E, H, I].

  friend bool operator==(const ExpertNames&, const ExpertNames&) = default;
};
inline constexpr std::size_t kExpertNameBytesMax = 128;  // Of each, and this many of a list:
inline constexpr std::size_t kExpertNamesMax = 8;

struct ModelCard {
  std::string path;           // The checkpoint's directory.
  std::string architecture;   // architectures[0] of config.json: "Qwen3MoeForCausalLM"
  std::string fingerprint;    // coproc/model/fingerprint.h
  std::string weight_format;  // How the daemon stores the weights: "bf16", …
  std::uint32_t num_layers = 0;
  std::uint32_t num_experts = 0;
  std::uint32_t top_k = 0;
  std::uint32_t hidden_size = 0;
  std::uint32_t intermediate_size = 0;    // Of one routed expert.
  std::vector<std::uint32_t> moe_layers;  // Layers with routed experts, ascending, at least one.
  Activation activation;
  ExpertNames expert_names = {};

  friend bool operator==(const ModelCard&, const ModelCard&) = default;
};

// One object with a key per member: "activation" is its name, "activation_limit" is there if it has one.
nlohmann::json to_json(const ModelCard& card);

// The way back. kVersionMismatch, naming the key: a missing fact, another type, a value out of range. Keys that are not
// known are passed over; without "activation" it is SwiGLU; "expert_names" may be missing, or empty, but not half
// there.
Result<ModelCard> parse_model_card(const nlohmann::json& object);

}  // namespace kt::shm
