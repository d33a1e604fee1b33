#include "coproc/model/config.h"

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string_view>
#include <system_error>

#include "coproc/model/input_file.h"
#include "coproc/model/json_file.h"

namespace kt::coproc {
namespace {

constexpr std::uint64_t kConfigBytesMax = std::uint64_t{4} << 20;  // Real ones have 1 to 200 KB.

using nlohmann::json;

// config.json with its path, so that every message names the file.
class ConfigReader {
 public:
  ConfigReader(const json& config, std::string path) : config_(config), path_(std::move(path)) {}

  Error refuse(std::string why,
               std::string fix = "use a checkpoint whose config.json is complete and unchanged") const {
    return bad_model("cannot serve the model of " + path_, std::move(why), std::move(fix));
  }

  // nullptr when the key is absent or null, which transformers treats alike.
  const json* find(std::string_view key) const {
    const auto found = config_.find(key);
    return found == config_.end() || found->is_null() ? nullptr : &*found;
  }

  Result<std::string> text(std::string_view key, const char* otherwise) const {
    const json* value = find(key);
    if (value == nullptr) return std::string(otherwise);
    if (!value->is_string()) return refuse(std::string(key) + " is not a string but " + printable(value->dump()));
    return value->get<std::string>();
  }

  // A whole number of 1…max under the first of the keys that is present; `otherwise` 0: the key is required.
  Result<std::uint32_t> count(std::span<const std::string_view> keys, std::uint32_t max,
                              std::uint32_t otherwise = 0) const {
    for (const std::string_view key : keys) {
      const json* value = find(key);
      if (value == nullptr) continue;
      if (!value->is_number_unsigned() || value->get<std::uint64_t>() < 1 || value->get<std::uint64_t>() > max) {
        return refuse(std::string(key) + " is " + printable(value->dump()) + ", a whole number from 1 to " +
                      std::to_string(max) + " is needed");
      }
      return static_cast<std::uint32_t>(value->get<std::uint64_t>());
    }
    if (otherwise != 0) return otherwise;
    return refuse("it has no " + std::string(keys.front()));
  }
  Result<std::uint32_t> count(std::string_view key, std::uint32_t max, std::uint32_t otherwise = 0) const {
    return count(std::span(&key, 1), max, otherwise);
  }

 private:
  const json& config_;
  std::string path_;
};

// architectures[0], model_type and their row of the table.
Status read_family(const ConfigReader& reader, ModelConfig& model) {
  const std::string fix = "use a checkpoint of one of: " + supported_architectures();
  const json* architectures = reader.find("architectures");
  if (architectures == nullptr || !architectures->is_array() || architectures->empty() ||
      !architectures->front().is_string()) {
    return reader.refuse("it names no architecture (key architectures)", fix);
  }
  model.architecture = architectures->front().get<std::string>();
  KT_TRY(model.model_type, reader.text("model_type", ""));
  for (const Family& family : families()) {
    if (std::ranges::find(family.architectures, model.architecture) == family.architectures.end()) continue;
    if (model.model_type != family.model_type) {
      return reader.refuse("its architecture " + model.architecture + " goes with model_type " +
                               printable(family.model_type) + ", but model_type is " + printable(model.model_type),
                           fix);
    }
    model.family = &family;
    return ok_status();
  }
  return reader.refuse("its architecture " + printable(model.architecture) + " (model_type " +
                           printable(model.model_type) + ") is not supported",
                       fix);
}

// The rule of Qwen2-MoE's and Qwen3-MoE's decoder layers: not in mlp_only_layers, and every decoder_sparse_step-th.
Status read_moe_layers(const ConfigReader& reader, ModelConfig& model) {
  KT_TRY(const std::uint32_t step, reader.count("decoder_sparse_step", shm::kLayersMax, 1));
  std::vector<std::int64_t> dense;
  if (const json* only = reader.find("mlp_only_layers"); only != nullptr) {
    const auto is_integer = [](const json& layer) { return layer.is_number_integer(); };
    if (!only->is_array() || !std::ranges::all_of(*only, is_integer)) {
      return reader.refuse("mlp_only_layers is not a list of layer numbers but " + printable(only->dump()));
    }
    for (const json& layer : *only) dense.push_back(layer.get<std::int64_t>());
    std::ranges::sort(dense);
  }
  for (std::uint32_t layer = 0; layer < model.num_layers; ++layer) {
    const bool is_dense = std::ranges::binary_search(dense, std::int64_t{layer});
    if (!is_dense && (layer + 1) % step == 0) model.moe_layers.push_back(layer);
  }
  if (model.moe_layers.empty()) {
    return reader.refuse("none of its " + std::to_string(model.num_layers) +
                             " layers has routed experts (decoder_sparse_step " + std::to_string(step) + ", " +
                             std::to_string(dense.size()) + " mlp_only_layers)",
                         "use a checkpoint with routed experts: there is nothing to serve in this one");
  }
  return ok_status();
}

Status read_sizes(const ConfigReader& reader, ModelConfig& model) {
  const Family& family = *model.family;
  KT_TRY(model.num_layers, reader.count("num_hidden_layers", shm::kLayersMax));
  KT_TRY(model.num_experts, reader.count(family.num_experts_keys, shm::kExpertsMax));
  KT_TRY(model.top_k, reader.count(family.top_k_key, shm::kTopKMax));
  KT_TRY(model.hidden_size, reader.count("hidden_size", shm::kHiddenSizeMax));
  KT_TRY(model.intermediate_size, reader.count(family.intermediate_size_key, shm::kIntermediateSizeMax));
  if (model.top_k > model.num_experts) {
    return reader.refuse(std::string(family.top_k_key) + " is " + std::to_string(model.top_k) +
                         ", more than the number of experts, " + std::to_string(model.num_experts));
  }
  return ok_status();
}

Status refuse_unsupported(const ConfigReader& reader) {
  KT_TRY(const std::string activation, reader.text("hidden_act", "silu"));
  if (activation != "silu") {
    return reader.refuse("hidden_act is " + printable(activation) + "; the expert kernels compute silu",
                         "use a checkpoint with hidden_act silu");
  }
  if (const json* quantization = reader.find("quantization_config"); quantization != nullptr) {
    const json* method = quantization->is_object() && quantization->contains("quant_method")
                             ? &(*quantization)["quant_method"]
                             : quantization;
    return reader.refuse("the checkpoint is quantised (quantization_config, " + printable(method->dump()) + ")",
                         "use the unquantised checkpoint: expert weights in BF16, F16 or F32");
  }
  return ok_status();
}

// Absolute, without a slash at the end, links kept: the path the user knows.
Result<std::string> checkpoint_directory(const std::string& directory) {
  const std::string fix = "give --model the directory that holds config.json and the *.safetensors files";
  if (directory.empty()) return bad_model("no model directory", "the path is empty", fix);
  std::error_code error;
  const std::filesystem::path absolute = std::filesystem::absolute(directory, error);
  if (error) return bad_model("cannot use " + directory, error.message(), fix);
  std::filesystem::path path = absolute.lexically_normal();
  if (!path.has_filename() && path.has_parent_path()) path = path.parent_path();
  const std::filesystem::file_status status = std::filesystem::status(path, error);
  if (error) return bad_model("cannot use " + path.string(), error.message(), fix);
  if (!std::filesystem::is_directory(status))
    return bad_model("cannot use " + path.string(), "it is no directory", fix);
  if (!std::filesystem::exists(path / "config.json", error)) {
    return bad_model("no checkpoint in " + path.string(), "the directory has no config.json", fix);
  }
  return path.string();
}

}  // namespace

Result<ModelConfig> read_config(const std::string& directory) {
  ModelConfig model;
  KT_TRY(model.path, checkpoint_directory(directory));
  const std::string file = (std::filesystem::path(model.path) / "config.json").string();
  KT_TRY(const json config, read_json_object(file, kConfigBytesMax));
  const ConfigReader reader(config, file);
  KT_TRY_STATUS(read_family(reader, model));
  KT_TRY_STATUS(read_sizes(reader, model));
  KT_TRY_STATUS(read_moe_layers(reader, model));
  KT_TRY_STATUS(refuse_unsupported(reader));
  KT_TRY(model.weights_file, reader.text("transformers_weights", ""));
  return model;
}

}  // namespace kt::coproc
