#include "tests/support/checkpoint_writer.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <numbers>
#include <utility>

namespace kt::testing {
namespace {

// splitmix64 and Box-Muller: the same values with every compiler and C++ library.
class Normal {
 public:
  explicit Normal(std::uint64_t seed) : state_(seed) {}
  float operator()() {
    const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform()));
    return static_cast<float>(radius * std::cos(2.0 * std::numbers::pi * uniform()));
  }

 private:
  double uniform() {
    state_ += 0x9e3779b97f4a7c15U;
    std::uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
    z ^= z >> 31;
    return static_cast<double>(z >> 11) * 0x1p-53;
  }
  std::uint64_t state_;
};

// Rounds to `bits` significant bits, ties to even, in double arithmetic; `exponent_min` is the exponent of the last
// place of the format's denormals.
float round_significand(float value, int bits, int exponent_min) {
  if (value == 0.0F || !std::isfinite(value)) return value;
  int exponent = 0;
  std::frexp(value, &exponent);
  const double place = std::ldexp(1.0, std::max(exponent - bits, exponent_min));
  return static_cast<float>(std::nearbyint(static_cast<double>(value) / place) * place);
}

std::uint16_t f16_bits(float rounded) {
  const auto sign = static_cast<std::uint16_t>(std::signbit(rounded) ? 0x8000 : 0);
  const float magnitude = std::fabs(rounded);
  if (magnitude < 0x1p-14F) return static_cast<std::uint16_t>(sign | static_cast<int>(magnitude * 0x1p24F));
  int exponent = 0;
  const float fraction = std::frexp(magnitude, &exponent);  // [0.5, 1)
  const int mantissa = static_cast<int>(fraction * 2048.0F) - 1024;
  return static_cast<std::uint16_t>(sign | ((exponent + 14) << 10) | mantissa);
}

template <class T>
void append(std::string& bytes, T value) {
  const auto raw = std::bit_cast<std::array<char, sizeof(T)>>(value);
  bytes.append(raw.data(), raw.size());
}

std::string dtype_spelling(WeightDType dtype) {
  return dtype == WeightDType::kBf16 ? "BF16" : dtype == WeightDType::kF16 ? "F16" : "F32";
}

std::vector<float> random_matrix(Normal& normal, std::uint32_t rows, std::uint32_t cols, WeightDType dtype) {
  std::vector<float> values(std::size_t{rows} * cols);
  const float scale = 1.0F / std::sqrt(static_cast<float>(cols));
  for (float& value : values) value = round_to(normal() * scale, dtype);
  return values;
}

nlohmann::json config_json(const CheckpointSpec& spec) {
  nlohmann::json config = {
      {"architectures", {spec.architecture}},
      {"model_type", spec.model_type},
      {"num_hidden_layers", spec.num_layers},
      {"num_experts", spec.num_experts},
      {"num_experts_per_tok", spec.top_k},
      {"hidden_size", spec.hidden_size},
      {"intermediate_size", 2 * spec.hidden_size},
      {"moe_intermediate_size", spec.intermediate_size},
      {"hidden_act", "silu"},
      {"mlp_only_layers", spec.mlp_only_layers},
      {"decoder_sparse_step", spec.decoder_sparse_step},
      {"vocab_size", 32},
      {"num_attention_heads", 4},
      {"num_key_value_heads", 2},
  };
  if (spec.model_type == "qwen2_moe") config["shared_expert_intermediate_size"] = spec.intermediate_size;
  return config;
}

void add_experts(std::vector<RawTensor>& tensors, const CheckpointSpec& spec, const WrittenCheckpoint& written,
                 std::uint32_t moe_index) {
  const std::uint64_t hidden = spec.hidden_size;
  const std::uint64_t intermediate = spec.intermediate_size;
  const std::string dtype = dtype_spelling(spec.dtype);
  const std::string module = spec.prefix + "layers." + std::to_string(written.moe_layers[moe_index]) + ".mlp.experts.";
  RawTensor gate_up{module + "gate_up_proj", dtype, {spec.num_experts, 2 * intermediate, hidden}, ""};
  RawTensor down{module + "down_proj", dtype, {spec.num_experts, hidden, intermediate}, ""};
  for (std::uint32_t expert = 0; expert < spec.num_experts; ++expert) {
    const ExpertValues& values = written.expert(moe_index, expert);
    const std::string gate_bytes = encode(values.gate, spec.dtype);
    const std::string up_bytes = encode(values.up, spec.dtype);
    const std::string down_bytes = encode(values.down, spec.dtype);
    if (spec.layout == Layout::kFused) {
      gate_up.data += gate_bytes + up_bytes;
      down.data += down_bytes;
      continue;
    }
    const std::string name = module + std::to_string(expert);
    tensors.push_back({name + ".down_proj.weight", dtype, {hidden, intermediate}, down_bytes});
    tensors.push_back({name + ".gate_proj.weight", dtype, {intermediate, hidden}, gate_bytes});
    tensors.push_back({name + ".up_proj.weight", dtype, {intermediate, hidden}, up_bytes});
  }
  if (spec.layout == Layout::kFused) {
    tensors.push_back(std::move(down));
    tensors.push_back(std::move(gate_up));
  }
}

// Equal numbers of tensors per shard, in order, so that an expert's matrices may lie in two files.
void write_shards(const std::filesystem::path& directory, std::vector<RawTensor> tensors, std::uint32_t num_shards) {
  nlohmann::json index = {{"metadata", {{"total_size", 0}}}, {"weight_map", nlohmann::json::object()}};
  for (std::uint32_t shard = 0; shard < num_shards; ++shard) {
    const auto begin = static_cast<std::ptrdiff_t>(tensors.size() * shard / num_shards);
    const auto end = static_cast<std::ptrdiff_t>(tensors.size() * (shard + 1) / num_shards);
    const std::vector<RawTensor> part(tensors.begin() + begin, tensors.begin() + end);
    char name[64];
    std::snprintf(name, sizeof(name), "model-%05u-of-%05u.safetensors", shard + 1, num_shards);
    for (const RawTensor& tensor : part) {
      index["weight_map"][tensor.name] = name;
      index["metadata"]["total_size"] = index["metadata"]["total_size"].get<std::uint64_t>() + tensor.data.size();
    }
    write_file(directory / name, safetensors_bytes(part));
  }
  write_file(directory / "model.safetensors.index.json", index.dump(2) + "\n");
}

}  // namespace

WrittenCheckpoint write_checkpoint(const std::filesystem::path& directory, const CheckpointSpec& spec) {
  std::filesystem::create_directories(directory);
  WrittenCheckpoint written;
  written.path = directory.string();
  written.num_experts = spec.num_experts;
  Normal normal(spec.seed);
  const auto other = [&](const std::string& name, std::uint32_t rows) {
    const std::vector<float> values = random_matrix(normal, rows, spec.hidden_size, spec.dtype);
    return RawTensor{name, dtype_spelling(spec.dtype), {rows, spec.hidden_size}, encode(values, spec.dtype)};
  };
  std::vector<RawTensor> tensors;
  tensors.push_back(other(spec.prefix + "embed_tokens.weight", 32));
  for (std::uint32_t layer = 0; layer < spec.num_layers; ++layer) {
    const bool dense = std::ranges::find(spec.mlp_only_layers, layer) != spec.mlp_only_layers.end();
    if (dense || (layer + 1) % spec.decoder_sparse_step != 0) continue;
    written.moe_layers.push_back(layer);
    for (std::uint32_t expert = 0; expert < spec.num_experts; ++expert) {
      ExpertValues values;
      values.gate = random_matrix(normal, spec.intermediate_size, spec.hidden_size, spec.dtype);
      values.up = random_matrix(normal, spec.intermediate_size, spec.hidden_size, spec.dtype);
      values.down = random_matrix(normal, spec.hidden_size, spec.intermediate_size, spec.dtype);
      written.experts.push_back(std::move(values));
    }
    add_experts(tensors, spec, written, static_cast<std::uint32_t>(written.moe_layers.size() - 1));
    tensors.push_back(other(spec.prefix + "layers." + std::to_string(layer) + ".mlp.gate.weight", spec.num_experts));
  }
  tensors.push_back(other("lm_head.weight", 32));

  write_file(directory / "config.json", config_json(spec).dump(2) + "\n");
  if (spec.num_shards == 1) {
    write_file(directory / "model.safetensors", safetensors_bytes(tensors));
  } else {
    write_shards(directory, std::move(tensors), spec.num_shards);
  }
  return written;
}

std::string safetensors_bytes(const std::vector<RawTensor>& tensors) {
  nlohmann::ordered_json header = {{"__metadata__", {{"format", "pt"}}}};
  std::string data;
  for (const RawTensor& tensor : tensors) {
    const std::uint64_t begin = data.size();
    data += tensor.data;
    header[tensor.name] = {{"dtype", tensor.dtype}, {"shape", tensor.shape}, {"data_offsets", {begin, data.size()}}};
  }
  std::string text = header.dump();
  text.append((8 - text.size() % 8) % 8, ' ');
  return safetensors_bytes(text, data);
}

std::string safetensors_bytes(const std::string& header, const std::string& data) {
  std::string bytes;
  append(bytes, std::uint64_t{header.size()});
  return bytes + header + data;
}

std::string read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    std::fprintf(stderr, "cannot read %s\n", path.c_str());
    std::abort();
  }
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

void write_file(const std::filesystem::path& path, const std::string& bytes) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  file.close();
  if (!file) {
    std::fprintf(stderr, "cannot write %s\n", path.c_str());
    std::abort();
  }
}

float round_to(float value, WeightDType dtype) {
  switch (dtype) {
    case WeightDType::kBf16:
      return round_significand(value, 8, -133);
    case WeightDType::kF16:
      return round_significand(value, 11, -24);
    case WeightDType::kF32:
      break;
  }
  return value;
}

std::string encode(const std::vector<float>& values, WeightDType dtype) {
  std::string bytes;
  for (const float value : values) {
    const float rounded = round_to(value, dtype);
    if (dtype == WeightDType::kF32) {
      append(bytes, rounded);
    } else if (dtype == WeightDType::kF16) {
      append(bytes, f16_bits(rounded));
    } else {
      append(bytes, static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(rounded) >> 16));
    }
  }
  return bytes;
}

}  // namespace kt::testing
