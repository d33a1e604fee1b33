// Which files hold the weights of a checkpoint.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "coproc/model/config.h"
#include "shm/base/result.h"

namespace kt::coproc {

struct ShardList {
  std::vector<std::string> paths;  // Sorted; whether they exist is not known yet.
  // What the index says, empty without one: tensor → number in paths.
  struct IndexEntry {
    std::string tensor;
    std::uint32_t shard = 0;
  };
  std::string index_path;
  std::vector<IndexEntry> index;
};

// In the order of transformers, so that both ends read the same files: config.json's transformers_weights if it has
// one; model.safetensors; model.safetensors.index.json; and, for directories transformers would refuse, every
// *.safetensors file in it. File names that lead out of the directory (absolute, with "..") are refused.
Result<ShardList> find_shards(const ModelConfig& model);

}  // namespace kt::coproc
