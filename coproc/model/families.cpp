#include "coproc/model/families.h"

#include <charconv>
#include <system_error>

namespace kt::coproc {
namespace {

constexpr std::string_view kQwen2MoeArchitectures[] = {
    "Qwen2MoeForCausalLM", "Qwen2MoeModel", "Qwen2MoeForSequenceClassification", "Qwen2MoeForTokenClassification",
    "Qwen2MoeForQuestionAnswering"};
constexpr std::string_view kQwen3MoeArchitectures[] = {
    "Qwen3MoeForCausalLM", "Qwen3MoeModel", "Qwen3MoeForSequenceClassification", "Qwen3MoeForTokenClassification",
    "Qwen3MoeForQuestionAnswering"};

// transformers 5 writes Qwen3-MoE's num_experts as num_local_experts (its attribute_map); everybody else, and every
// published Qwen3-MoE checkpoint, writes num_experts.
constexpr std::string_view kNumExpertsKeys[] = {"num_experts", "num_local_experts"};

// "transformer.": ForQuestionAnswering kept the old name of its base model.
constexpr std::string_view kPrefixes[] = {"model.", "", "transformer."};

constexpr Family qwen_row(std::string_view model_type, std::span<const std::string_view> architectures) {
  return Family{.model_type = model_type,
                .architectures = architectures,
                .num_experts_keys = kNumExpertsKeys,
                .top_k_key = "num_experts_per_tok",
                .intermediate_size_key = "moe_intermediate_size",
                .prefixes = kPrefixes,
                .experts_path = "mlp.experts",
                .projections = {"gate_proj", "up_proj", "down_proj"},
                .fused_gate_up = "gate_up_proj",
                .fused_down = "down_proj"};
}

constexpr Family kFamilies[] = {
    qwen_row("qwen2_moe", kQwen2MoeArchitectures),
    qwen_row("qwen3_moe", kQwen3MoeArchitectures),
};

bool consume(std::string_view& text, std::string_view start) {
  if (!text.starts_with(start)) return false;
  text.remove_prefix(start.size());
  return true;
}

std::string experts_module(const Family& family, std::string_view prefix, std::uint32_t layer) {
  std::string name(prefix);
  name += "layers." + std::to_string(layer) + ".";
  name += family.experts_path;
  return name + ".";
}

}  // namespace

std::string Family::per_expert_name(std::string_view prefix, std::uint32_t layer, std::uint32_t expert,
                                    Projection projection) const {
  std::string name = experts_module(*this, prefix, layer) + std::to_string(expert) + ".";
  name += projections[static_cast<std::size_t>(projection)];
  return name + ".weight";
}

std::string Family::fused_name(std::string_view prefix, std::uint32_t layer, bool down) const {
  return experts_module(*this, prefix, layer) + std::string(down ? fused_down : fused_gate_up);
}

std::span<const Family> families() { return kFamilies; }

std::string supported_architectures() {
  std::string list;
  for (const Family& family : kFamilies) {
    for (const std::string_view architecture : family.architectures) {
      if (!list.empty()) list += ", ";
      list += architecture;
    }
  }
  return list;
}

std::optional<ExpertTensorName> parse_expert_name(const Family& family, std::string_view name) {
  for (const std::string_view prefix : family.prefixes) {
    std::string_view left = name;
    if (!consume(left, prefix) || !consume(left, "layers.")) continue;
    ExpertTensorName parts{.prefix = prefix, .layer = 0, .rest = {}};
    const auto [end, error] = std::from_chars(left.data(), left.data() + left.size(), parts.layer);
    if (error != std::errc{}) continue;
    left.remove_prefix(static_cast<std::size_t>(end - left.data()));
    if (!consume(left, ".") || !consume(left, family.experts_path) || !consume(left, ".")) continue;
    parts.rest = left;
    return parts;
  }
  return std::nullopt;
}

}  // namespace kt::coproc
