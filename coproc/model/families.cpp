#include "coproc/model/families.h"

#include <charconv>
#include <nlohmann/json.hpp>
#include <system_error>

#include "coproc/model/input_file.h"

namespace kt::coproc {

extern const Family kQwen2Moe;  // families/qwen.cpp
extern const Family kQwen3Moe;
extern const Family kHyV4;  // families/hy_v4.cpp

namespace {

constexpr const Family* kFamilies[] = {&kQwen2Moe, &kQwen3Moe, &kHyV4};

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

shm::ExpertNames Family::names() const {
  return {.prefixes = {prefixes.begin(), prefixes.end()},
          .path = std::string(experts_path),
          .projections = {std::begin(projections), std::end(projections)},
          .fused = {std::string(fused_gate_up), std::string(fused_down)}};
}

std::span<const Family* const> families() { return kFamilies; }

std::string supported_architectures() {
  std::string list;
  for (const Family* family : kFamilies) {
    for (const std::string_view architecture : family->architectures) {
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

Error no_layer_has_experts(const ConfigReader& config, std::uint32_t num_layers, const std::string& detail) {
  return config.refuse("none of its " + std::to_string(num_layers) + " layers has routed experts (" + detail + ")",
                       "use a checkpoint with routed experts: there is nothing to serve in this one");
}

Result<Activation> plain_swiglu(const ConfigReader& config) {
  KT_TRY_STATUS(config.require_silu());
  return Activation{};
}

Result<std::vector<std::uint32_t>> layers_by_type(const ConfigReader& config, std::uint32_t num_layers,
                                                  std::uint32_t num_dense) {
  std::vector<std::uint32_t> layers;
  const nlohmann::json* types = config.find("mlp_layer_types");
  if (types != nullptr && (!types->is_array() || types->size() != num_layers)) {
    return config.refuse("mlp_layer_types is no list of " + std::to_string(num_layers) + " layers");
  }
  for (std::uint32_t layer = 0; layer < num_layers; ++layer) {
    if (types == nullptr ? layer < num_dense : (*types)[layer] == "dense") continue;
    if (types != nullptr && (*types)[layer] != "sparse") {
      return config.refuse("mlp_layer_types has " + printable((*types)[layer].dump()) +
                           "; the co-process knows \"sparse\" and \"dense\"");
    }
    layers.push_back(layer);
  }
  if (layers.empty()) return no_layer_has_experts(config, num_layers, "mlp_layer_types");
  return layers;
}

}  // namespace kt::coproc
