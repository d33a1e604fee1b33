// A checkpoint on disk: where every routed expert's weights lie. Everything is validated from the files' headers
// before a byte of data is read, so that a bad checkpoint is refused at once and nothing is half-started.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "coproc/model/config.h"
#include "coproc/model/input_file.h"
#include "coproc/model/safetensors.h"
#include "shm/base/result.h"

namespace kt::coproc {

// One row-major matrix in a file.
struct MatrixSource {
  std::uint32_t file = 0;      // Number in Checkpoint::files().
  DType dtype = DType::kBf16;  // kBf16, kF16 or kF32.
  std::uint32_t rows = 0;
  std::uint32_t cols = 0;
  std::uint64_t offset = 0;  // From the start of the file; offset + bytes() lies within it.

  std::uint64_t elements() const { return std::uint64_t{rows} * cols; }
  std::uint64_t bytes() const { return elements() * dtype_bits(dtype) / 8; }
};

struct ExpertSource {
  MatrixSource gate, up;  // [I, H]
  MatrixSource down;      // [H, I]
};

enum class ExpertLayout : std::uint8_t { kPerExpert, kFused };

// A tensor that holds routed experts of a layer in config().moe_layers.
struct RoutedTensor {
  std::string name;
  std::uint32_t file = 0;
  TensorInfo info;  // Its name is empty: it is the one above.
};

class Checkpoint {
 public:
  // Reads config.json, the index and the header of every shard. kBadModel naming file, tensor and numbers for: files
  // that are missing, damaged or lie; an index that disagrees with its shards; expert tensors that are missing,
  // unknown, there twice, of another shape than config.json says, or neither BF16, F16 nor F32; layouts or name
  // prefixes that are mixed. Tensors of other layers and other modules are not looked at.
  static Result<Checkpoint> open(const std::string& directory);

  const ModelConfig& config() const { return config_; }
  ExpertLayout layout() const { return layout_; }
  const std::vector<InputFile>& files() const { return files_; }
  // Sorted by name, byte by byte.
  const std::vector<RoutedTensor>& routed_tensors() const { return routed_; }
  // Bytes of all routed experts on disk.
  std::uint64_t expert_bytes() const;

  // Where expert `expert` of layer config().moe_layers[moe_index] lies.
  ExpertSource expert(std::uint32_t moe_index, std::uint32_t expert) const;

 private:
  Checkpoint() = default;
  Status read_headers();
  Status resolve_experts();

  ModelConfig config_;
  ExpertLayout layout_ = ExpertLayout::kPerExpert;
  std::vector<InputFile> files_;
  std::vector<RoutedTensor> routed_;
  // Numbers in routed_. Per expert: gate, up, down of every expert of every MoE layer. Fused: gate_up, down of every
  // MoE layer.
  std::vector<std::uint32_t> order_;
};

}  // namespace kt::coproc
