#include "coproc/model/fingerprint.h"

#include <algorithm>
#include <cstdint>

#include "coproc/model/sha256.h"

namespace kt::coproc {
namespace {

constexpr std::uint64_t kSampleBytes = 4096;

}  // namespace

Result<std::string> fingerprint(const Checkpoint& checkpoint) {
  const ModelConfig& config = checkpoint.config();
  Sha256 hash;
  hash.add(config.architecture + "\n");
  for (const RoutedTensor& tensor : checkpoint.routed_tensors()) {
    hash.add(tensor.name + "\t" + std::string(dtype_name(tensor.info.dtype)) + "\t" + shape_text(tensor.info.shape) +
             "\n");
  }
  std::string sample;
  for (std::uint32_t moe_index = 0; moe_index < config.moe_layers.size(); ++moe_index) {
    const std::uint64_t expert = std::uint64_t{7} * config.moe_layers[moe_index] % config.num_experts;
    const ExpertSource source = checkpoint.expert(moe_index, static_cast<std::uint32_t>(expert));
    for (const MatrixSource* matrix : {&source.gate, &source.up, &source.down}) {
      sample.resize(std::min(kSampleBytes, matrix->bytes()));
      KT_TRY_STATUS(checkpoint.files()[matrix->file].read_at(matrix->offset, sample.data(), sample.size()));
      hash.add(sample);
    }
  }
  return hexadecimal(hash.digest());
}

}  // namespace kt::coproc
