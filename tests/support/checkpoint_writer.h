// Writes small random checkpoints in the real format, for tests: config.json and safetensors files with or without
// index, as transformers writes them. Shares no code with what reads them.
#pragma once
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace kt::testing {

enum class WeightDType { kBf16, kF16, kF32 };
enum class Layout { kPerExpert, kFused };

struct CheckpointSpec {
  std::string model_type = "qwen3_moe";              // or "qwen2_moe"
  std::string architecture = "Qwen3MoeForCausalLM";  // or "Qwen2MoeForCausalLM", …
  std::uint32_t num_layers = 2;
  std::uint32_t num_experts = 4;
  std::uint32_t top_k = 2;
  std::uint32_t hidden_size = 64;
  std::uint32_t intermediate_size = 32;
  std::vector<std::uint32_t> mlp_only_layers = {};
  std::uint32_t decoder_sparse_step = 1;
  WeightDType dtype = WeightDType::kBf16;
  Layout layout = Layout::kPerExpert;
  std::uint32_t num_shards = 1;  // More than 1: model-0000i-of-0000n.safetensors and an index.
  std::string prefix = "model.";
  std::uint64_t seed = 1;  // The same seed and sizes give the same values in every layout, prefix and sharding.
};

// One routed expert's weights as they are in the file: rounded to the dtype, then widened to float. Row-major.
struct ExpertValues {
  std::vector<float> gate, up;  // [I, H], N(0, 1/H)
  std::vector<float> down;      // [H, I], N(0, 1/I)
};

struct WrittenCheckpoint {
  std::string path;
  std::vector<std::uint32_t> moe_layers;
  std::uint32_t num_experts = 0;
  std::vector<ExpertValues> experts;  // [moe_index · num_experts + expert]

  const ExpertValues& expert(std::uint32_t moe_index, std::uint32_t expert) const {
    return experts.at(std::size_t{moe_index} * num_experts + expert);
  }
};

// Fills an existing or new directory. Besides the experts it holds model.embed_tokens.weight, a router per MoE layer
// and lm_head.weight. Aborts when a file cannot be written.
WrittenCheckpoint write_checkpoint(const std::filesystem::path& directory, const CheckpointSpec& spec);

// The parts, for tests that make files no library would write.

struct RawTensor {
  std::string name;
  std::string dtype;  // "BF16"
  std::vector<std::uint64_t> shape;
  std::string data;
};

// The bytes of a file with these tensors, in this order, headers padded to 8 bytes as the safetensors library does.
std::string safetensors_bytes(const std::vector<RawTensor>& tensors);
// The bytes of a file with any text as header.
std::string safetensors_bytes(const std::string& header, const std::string& data);
std::string read_file(const std::filesystem::path& path);
void write_file(const std::filesystem::path& path, const std::string& bytes);

// `values` as bytes of a tensor, rounded to nearest even.
std::string encode(const std::vector<float>& values, WeightDType dtype);
// What encode() keeps of a value.
float round_to(float value, WeightDType dtype);

}  // namespace kt::testing
