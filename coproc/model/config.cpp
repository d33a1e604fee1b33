#include "coproc/model/config.h"

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string_view>
#include <system_error>

#include "coproc/model/config_reader.h"
#include "coproc/model/input_file.h"
#include "coproc/model/json_file.h"

namespace kt::coproc {
namespace {

constexpr std::uint64_t kConfigBytesMax = std::uint64_t{4} << 20;  // Real ones have 1 to 200 KB.

using nlohmann::json;

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
  for (const Family* family : families()) {
    if (std::ranges::find(family->architectures, model.architecture) == family->architectures.end()) continue;
    if (model.model_type != family->model_type) {
      return reader.refuse("its architecture " + model.architecture + " goes with model_type " +
                               printable(family->model_type) + ", but model_type is " + printable(model.model_type),
                           fix);
    }
    model.family = family;
    model.expert_names = family->names();
    return ok_status();
  }
  return reader.refuse("its architecture " + printable(model.architecture) + " (model_type " +
                           printable(model.model_type) + ") is not supported",
                       fix);
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
  KT_TRY(model.moe_layers, model.family->moe_layers(reader, model.num_layers));
  KT_TRY(model.activation, model.family->activation(reader));
  KT_TRY_STATUS(refuse_unsupported(reader));
  KT_TRY(model.weights_file, reader.text("transformers_weights", ""));
  return model;
}

}  // namespace kt::coproc
