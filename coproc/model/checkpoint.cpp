#include "coproc/model/checkpoint.h"

#include <algorithm>
#include <optional>
#include <string_view>
#include <utility>

#include "coproc/model/shards.h"

namespace kt::coproc {
namespace {

constexpr std::string_view kDownloadAgain = "the checkpoint is incomplete or damaged: download or copy it again";

std::string tensor_in(std::string_view tensor, const std::string& file) {
  return "tensor " + printable(tensor) + " in " + file;
}

// Every tensor the index names must be in the shard it names.
Status check_index(const ShardList& shards, const std::vector<std::vector<TensorInfo>>& headers) {
  std::vector<std::vector<std::string_view>> names(headers.size());
  for (std::size_t shard = 0; shard < headers.size(); ++shard) {
    for (const TensorInfo& tensor : headers[shard]) names[shard].push_back(tensor.name);
    std::ranges::sort(names[shard]);
  }
  for (const ShardList::IndexEntry& entry : shards.index) {
    if (std::ranges::binary_search(names[entry.shard], std::string_view(entry.tensor))) continue;
    return bad_model(
        "no tensor " + printable(entry.tensor) + " in " + shards.paths[entry.shard],
        shards.index_path + " says it is one of the " + std::to_string(names[entry.shard].size()) + " tensors there",
        std::string(kDownloadAgain));
  }
  return ok_status();
}

struct Naming {
  std::string_view prefix;
  ExpertLayout layout = ExpertLayout::kPerExpert;
};

// The layout and prefix that all routed tensors share. Names that fit no layout are left to Resolver::refuse_unused.
Result<Naming> find_naming(const ModelConfig& config, const std::vector<InputFile>& files,
                           const std::vector<RoutedTensor>& routed) {
  const Family& family = *config.family;
  std::optional<Naming> naming;
  const RoutedTensor* first = nullptr;
  for (const RoutedTensor& tensor : routed) {
    const ExpertTensorName parts = *parse_expert_name(family, tensor.name);
    const bool fused = parts.rest == family.fused_gate_up || parts.rest == family.fused_down;
    const bool per_expert = parts.rest.ends_with(".weight");
    if (!fused && !per_expert) continue;
    const Naming here{parts.prefix, fused ? ExpertLayout::kFused : ExpertLayout::kPerExpert};
    if (!naming) {
      naming = here;
      first = &tensor;
    } else if (here.prefix != naming->prefix || here.layout != naming->layout) {
      return bad_model("mixed names of expert tensors in " + config.path,
                       "it has both " + tensor_in(first->name, files[first->file].path()) + " and " +
                           tensor_in(tensor.name, files[tensor.file].path()),
                       "save the model again with transformers' save_pretrained into an empty directory");
    }
  }
  if (naming) return *naming;
  const std::uint32_t layer = config.moe_layers[0];
  return bad_model("no routed experts in " + config.path,
                   "none of its " + std::to_string(files.size()) + " files has a tensor like " +
                       printable(family.per_expert_name(family.prefixes[0], layer, 0, Projection::kGate)) + " or " +
                       printable(family.fused_name(family.prefixes[0], layer, false)),
                   "use a complete checkpoint of the model that config.json describes");
}

// Finds expected tensors among the sorted routed ones, and says what is wrong with them.
class Resolver {
 public:
  Resolver(const ModelConfig& config, const std::vector<InputFile>& files, const std::vector<RoutedTensor>& routed)
      : config_(config), files_(files), routed_(routed), used_(routed.size(), false) {}

  // The number in routed_ of a tensor that must have this shape.
  Result<std::uint32_t> require(const std::string& name, const std::vector<std::uint64_t>& shape) {
    const auto found = std::ranges::lower_bound(routed_, name, {}, &RoutedTensor::name);
    if (found == routed_.end() || found->name != name) {
      return bad_model("no tensor " + printable(name) + " in " + config_.path,
                       "the " + std::to_string(files_.size()) + " files hold " + std::to_string(routed_.size()) +
                           " routed-expert tensors; config.json asks for " + std::to_string(config_.num_experts) +
                           " experts in each of " + std::to_string(config_.moe_layers.size()) + " layers",
                       std::string(kDownloadAgain));
    }
    const std::string subject = tensor_in(name, files_[found->file].path());
    const DType dtype = found->info.dtype;
    if (dtype != DType::kBf16 && dtype != DType::kF16 && dtype != DType::kF32) {
      return bad_model("cannot use " + subject,
                       "its dtype is " + std::string(dtype_name(dtype)) + "; expert weights may be BF16, F16 or F32",
                       "use the unquantised checkpoint");
    }
    if (found->info.shape != shape) {
      return bad_model(subject + " does not fit config.json",
                       "its shape is " + shape_text(found->info.shape) + "; hidden_size " +
                           std::to_string(config_.hidden_size) + ", expert intermediate size " +
                           std::to_string(config_.intermediate_size) + " and " + std::to_string(config_.num_experts) +
                           " experts ask for " + shape_text(shape),
                       "use the config.json that belongs to these weights");
    }
    const auto number = static_cast<std::uint32_t>(found - routed_.begin());
    used_[number] = true;
    return number;
  }

  // Every tensor below an experts module must be one that was asked for: an expert too many, a bias or a scale of a
  // quantised checkpoint would mean another model than the one computed.
  Status refuse_unused() const {
    const auto unused = std::ranges::find(used_, false);
    if (unused == used_.end()) return ok_status();
    const RoutedTensor& tensor = routed_[static_cast<std::size_t>(unused - used_.begin())];
    return bad_model("unknown " + tensor_in(tensor.name, files_[tensor.file].path()),
                     "it lies in an experts module but is none of the weights of experts 0 to " +
                         std::to_string(config_.num_experts - 1) + " (shape " + shape_text(tensor.info.shape) + ", " +
                         std::string(dtype_name(tensor.info.dtype)) + ")",
                     "use an unquantised checkpoint without biases whose config.json belongs to its weights");
  }

 private:
  const ModelConfig& config_;
  const std::vector<InputFile>& files_;
  const std::vector<RoutedTensor>& routed_;
  std::vector<bool> used_;
};

}  // namespace

Result<Checkpoint> Checkpoint::open(const std::string& directory) {
  Checkpoint checkpoint;
  KT_TRY(checkpoint.config_, read_config(directory));
  KT_TRY_STATUS(checkpoint.read_headers());
  KT_TRY_STATUS(checkpoint.resolve_experts());
  return checkpoint;
}

Status Checkpoint::read_headers() {
  KT_TRY(const ShardList shards, find_shards(config_));
  std::vector<std::vector<TensorInfo>> headers;
  for (const std::string& path : shards.paths) {
    KT_TRY(InputFile file, InputFile::open(path));
    KT_TRY(std::vector<TensorInfo> tensors, read_safetensors_header(file));
    files_.push_back(std::move(file));
    headers.push_back(std::move(tensors));
  }
  KT_TRY_STATUS(check_index(shards, headers));

  for (std::size_t file = 0; file < headers.size(); ++file) {
    for (TensorInfo& tensor : headers[file]) {
      const std::optional<ExpertTensorName> parts = parse_expert_name(*config_.family, tensor.name);
      if (!parts || !std::ranges::binary_search(config_.moe_layers, parts->layer)) continue;
      std::string name = std::exchange(tensor.name, "");
      routed_.push_back({std::move(name), static_cast<std::uint32_t>(file), std::move(tensor)});
    }
  }
  std::ranges::sort(routed_, {}, [](const RoutedTensor& tensor) {
    return std::pair<std::string_view, std::uint32_t>(tensor.name, tensor.file);
  });
  const auto twice = std::ranges::adjacent_find(routed_, {}, &RoutedTensor::name);
  if (twice != routed_.end()) {
    return bad_model(tensor_in(twice->name, files_[twice->file].path()) + " is there twice",
                     "it is also in " + files_[(twice + 1)->file].path(),
                     "keep one set of weights in the directory, with one index");
  }
  return ok_status();
}

Status Checkpoint::resolve_experts() {
  KT_TRY(const Naming naming, find_naming(config_, files_, routed_));
  layout_ = naming.layout;
  const Family& family = *config_.family;
  const std::uint64_t experts = config_.num_experts;
  const std::uint64_t hidden = config_.hidden_size;
  const std::uint64_t intermediate = config_.intermediate_size;
  Resolver resolver(config_, files_, routed_);
  const auto add = [&](const std::string& name, const std::vector<std::uint64_t>& shape) -> Status {
    KT_TRY(const std::uint32_t number, resolver.require(name, shape));
    order_.push_back(number);
    return ok_status();
  };
  for (const std::uint32_t layer : config_.moe_layers) {
    if (layout_ == ExpertLayout::kFused) {
      KT_TRY_STATUS(add(family.fused_name(naming.prefix, layer, false), {experts, 2 * intermediate, hidden}));
      KT_TRY_STATUS(add(family.fused_name(naming.prefix, layer, true), {experts, hidden, intermediate}));
      continue;
    }
    for (std::uint32_t expert = 0; expert < config_.num_experts; ++expert) {
      const auto name = [&](Projection projection) {
        return family.per_expert_name(naming.prefix, layer, expert, projection);
      };
      KT_TRY_STATUS(add(name(Projection::kGate), {intermediate, hidden}));
      KT_TRY_STATUS(add(name(Projection::kUp), {intermediate, hidden}));
      KT_TRY_STATUS(add(name(Projection::kDown), {hidden, intermediate}));
    }
  }
  return resolver.refuse_unused();
}

std::uint64_t Checkpoint::expert_bytes() const {
  std::uint64_t bytes = 0;
  for (const RoutedTensor& tensor : routed_) bytes += tensor.info.bytes;
  return bytes;
}

ExpertSource Checkpoint::expert(std::uint32_t moe_index, std::uint32_t expert) const {
  KT_CHECK(moe_index < config_.moe_layers.size() && expert < config_.num_experts);
  const std::uint32_t hidden = config_.hidden_size;
  const std::uint32_t intermediate = config_.intermediate_size;
  // The `slice`-th [rows, cols] matrix of a tensor.
  const auto matrix = [&](std::size_t order, std::uint32_t rows, std::uint32_t cols, std::uint64_t slice) {
    const RoutedTensor& tensor = routed_[order_[order]];
    MatrixSource source{tensor.file, tensor.info.dtype, rows, cols, tensor.info.offset};
    source.offset += slice * source.bytes();
    return source;
  };
  if (layout_ == ExpertLayout::kFused) {
    const std::size_t order = std::size_t{moe_index} * 2;
    return {matrix(order, intermediate, hidden, std::uint64_t{expert} * 2),
            matrix(order, intermediate, hidden, std::uint64_t{expert} * 2 + 1),
            matrix(order + 1, hidden, intermediate, expert)};
  }
  const std::size_t order = (std::size_t{moe_index} * config_.num_experts + expert) * 3;
  return {matrix(order, intermediate, hidden, 0), matrix(order + 1, intermediate, hidden, 0),
          matrix(order + 2, hidden, intermediate, 0)};
}

}  // namespace kt::coproc
