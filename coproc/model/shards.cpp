#include "coproc/model/shards.h"

#include <algorithm>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <string_view>
#include <system_error>

#include "coproc/model/input_file.h"
#include "coproc/model/json_file.h"

namespace kt::coproc {
namespace {

namespace fs = std::filesystem;

// 70,000 expert tensors of 100 bytes are 7 MB.
constexpr std::uint64_t kIndexBytesMax = std::uint64_t{64} << 20;
constexpr std::string_view kSingleFile = "model.safetensors";
constexpr std::string_view kIndexFile = "model.safetensors.index.json";

// Symbolic links may lead anywhere (the Hugging Face cache consists of them); names may not.
bool leads_outside(std::string_view name) {
  const fs::path path(name);
  return name.empty() || name.find('\0') != std::string_view::npos || !path.has_filename() || path.is_absolute() ||
         std::ranges::find(path, fs::path("..")) != path.end();
}

Error outside(const std::string& file, std::string_view subject, std::string_view name) {
  return bad_model(
      "cannot use " + file,
      std::string(subject) + " is in file " + printable(name) + ", which is outside the checkpoint's directory",
      "use a checkpoint whose file names are plain names within its own directory");
}

Result<ShardList> read_index(const std::string& directory, const std::string& index_name) {
  ShardList shards;
  shards.index_path = (fs::path(directory) / index_name).string();
  KT_TRY(const nlohmann::json index, read_json_object(shards.index_path, kIndexBytesMax));
  const auto map = index.find("weight_map");
  if (map == index.end() || !map->is_object() || map->empty()) {
    return bad_model("cannot use " + shards.index_path, "it has no weight_map from tensors to files",
                     "download or copy the file again");
  }
  std::map<std::string, std::uint32_t> numbers;  // File name → number, first in any order.
  for (const auto& [tensor, file] : map->items()) {
    if (!file.is_string()) {
      return bad_model("cannot use " + shards.index_path,
                       "its weight_map gives no file name for tensor " + printable(tensor),
                       "download or copy the file again");
    }
    const auto name = file.get<std::string>();
    if (leads_outside(name)) return outside(shards.index_path, "tensor " + printable(tensor), name);
    numbers.emplace(name, 0);
  }
  for (auto& [name, number] : numbers) {
    number = static_cast<std::uint32_t>(shards.paths.size());
    shards.paths.push_back((fs::path(directory) / name).string());
  }
  for (const auto& [tensor, file] : map->items()) {
    shards.index.push_back({tensor, numbers.at(file.get_ref<const std::string&>())});
  }
  return shards;
}

Result<ShardList> list_directory(const std::string& directory) {
  ShardList shards;
  std::error_code error;
  for (fs::directory_iterator entry(directory, error), end; !error && entry != end; entry.increment(error)) {
    if (entry->path().extension() == ".safetensors") shards.paths.push_back(entry->path().string());
  }
  if (error) {
    return bad_model("cannot list " + directory, error.message(), "check the permissions of the directory");
  }
  if (shards.paths.empty()) {
    return bad_model(
        "no weights in " + directory,
        "it has neither " + std::string(kSingleFile) + " nor " + std::string(kIndexFile) +
            " nor any other *.safetensors file",
        "download the safetensors files too, or convert the checkpoint with transformers' save_pretrained");
  }
  std::ranges::sort(shards.paths);
  return shards;
}

}  // namespace

Result<ShardList> find_shards(const ModelConfig& model) {
  const auto exists = [&](std::string_view name) {
    std::error_code error;
    // A dangling link exists for us: opening it says what is wrong.
    return fs::symlink_status(fs::path(model.path) / name, error).type() != fs::file_type::not_found;
  };
  std::string name = model.weights_file;
  if (!name.empty()) {
    if (leads_outside(name)) {
      return outside((fs::path(model.path) / "config.json").string(), "what transformers_weights names", name);
    }
  } else if (exists(kSingleFile)) {
    name = kSingleFile;
  } else if (exists(kIndexFile)) {
    name = kIndexFile;
  } else {
    return list_directory(model.path);
  }
  if (name.ends_with(".index.json")) return read_index(model.path, name);
  return ShardList{.paths = {(fs::path(model.path) / name).string()}, .index_path = "", .index = {}};
}

}  // namespace kt::coproc
