#include "coproc/model/fingerprint.h"

#include <openssl/evp.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

namespace kt::coproc {
namespace {

constexpr std::uint64_t kSampleBytes = 4096;

class Sha256 {
 public:
  Sha256() { KT_CHECK(context_ != nullptr && EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) == 1); }
  void add(std::string_view bytes) { KT_CHECK(EVP_DigestUpdate(context_.get(), bytes.data(), bytes.size()) == 1); }

  std::string hex() {
    unsigned char digest[EVP_MAX_MD_SIZE];
    unsigned int size = 0;
    KT_CHECK(EVP_DigestFinal_ex(context_.get(), digest, &size) == 1);
    constexpr char kDigits[] = "0123456789abcdef";
    std::string text;
    for (unsigned int i = 0; i < size; ++i) {
      text += kDigits[digest[i] >> 4];
      text += kDigits[digest[i] & 15];
    }
    return text;
  }

 private:
  struct Free {
    void operator()(EVP_MD_CTX* context) const { EVP_MD_CTX_free(context); }
  };
  std::unique_ptr<EVP_MD_CTX, Free> context_{EVP_MD_CTX_new()};
};

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
  return hash.hex();
}

}  // namespace kt::coproc
