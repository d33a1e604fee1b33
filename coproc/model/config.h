// config.json of a checkpoint: what the co-process needs to know about the model.
#pragma once
#include <string>

#include "coproc/model/families.h"
#include "shm/base/result.h"
#include "shm/model_card.h"

namespace kt::coproc {

// The card's fingerprint and weight format are not config.json's: empty here.
struct ModelConfig : shm::ModelCard {
  std::string model_type;          // "qwen3_moe"
  std::string weights_file;        // config.json's transformers_weights, mostly "".
  const Family* family = nullptr;  // Never null after read_config.
};

// Reads and validates <directory>/config.json. Refused with kBadModel: what is not a checkpoint directory, unknown
// architectures, what the family's rules refuse, quantised checkpoints, missing keys, values outside the limits above.
Result<ModelConfig> read_config(const std::string& directory);

}  // namespace kt::coproc
