// Small JSON files of a checkpoint: config.json and the index.
#pragma once
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

#include "shm/base/result.h"

namespace kt::coproc {

// Reads and parses a JSON file whose top level is an object. Of equal keys the last one counts, as in Python. Refuses
// files above bytes_max and values nested deeper than 64: a small hostile file must not become gigabytes of memory.
Result<nlohmann::json> read_json_object(const std::string& path, std::uint64_t bytes_max);

}  // namespace kt::coproc
