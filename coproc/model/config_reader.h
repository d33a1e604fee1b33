// config.json with its path: reads values by key, and names the file in every refusal.
#pragma once
#include <cstdint>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "shm/base/result.h"

namespace kt::coproc {

class ConfigReader {
 public:
  // `config` must outlive the reader.
  ConfigReader(const nlohmann::json& config, std::string path) : config_(config), path_(std::move(path)) {}

  // kBadModel. fix: what to do instead.
  Error refuse(std::string why, std::string fix = "use a checkpoint whose config.json is complete and unchanged") const;

  // nullptr when the key is absent or null, which transformers treats alike.
  const nlohmann::json* find(std::string_view key) const;

  Result<std::string> text(std::string_view key, const char* otherwise) const;

  // A whole number of 1…max under the first of the keys that is present; `otherwise` 0: the key is required.
  Result<std::uint32_t> count(std::span<const std::string_view> keys, std::uint32_t max,
                              std::uint32_t otherwise = 0) const;
  Result<std::uint32_t> count(std::string_view key, std::uint32_t max, std::uint32_t otherwise = 0) const {
    return count(std::span(&key, 1), max, otherwise);
  }

  // A finite number above zero.
  Result<float> positive(std::string_view key, float otherwise) const;

  // hidden_act must be silu, which transformers takes where it is absent.
  Status require_silu() const;

 private:
  const nlohmann::json& config_;
  std::string path_;
};

}  // namespace kt::coproc
