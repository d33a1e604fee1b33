#include "coproc/model/config_reader.h"

#include <cmath>

#include "coproc/model/input_file.h"

namespace kt::coproc {

namespace {

using nlohmann::json;

}  // namespace

Error ConfigReader::refuse(std::string why, std::string fix) const {
  return bad_model("cannot serve the model of " + path_, std::move(why), std::move(fix));
}

const json* ConfigReader::find(std::string_view key) const {
  const auto found = config_.find(key);
  return found == config_.end() || found->is_null() ? nullptr : &*found;
}

Result<std::string> ConfigReader::text(std::string_view key, const char* otherwise) const {
  const json* value = find(key);
  if (value == nullptr) return std::string(otherwise);
  if (!value->is_string()) return refuse(std::string(key) + " is not a string but " + printable(value->dump()));
  return value->get<std::string>();
}

Result<std::uint32_t> ConfigReader::count(std::span<const std::string_view> keys, std::uint32_t max,
                                          std::uint32_t otherwise) const {
  for (const std::string_view key : keys) {
    const json* value = find(key);
    if (value == nullptr) continue;
    if (!value->is_number_unsigned() || value->get<std::uint64_t>() < 1 || value->get<std::uint64_t>() > max) {
      return refuse(std::string(key) + " is " + printable(value->dump()) + ", a whole number from 1 to " +
                    std::to_string(max) + " is needed");
    }
    return static_cast<std::uint32_t>(value->get<std::uint64_t>());
  }
  if (otherwise != 0) return otherwise;
  return refuse("it has no " + std::string(keys.front()));
}

Result<float> ConfigReader::positive(std::string_view key, float otherwise) const {
  const json* value = find(key);
  if (value == nullptr) return otherwise;
  const float number = value->is_number() ? value->get<float>() : 0;
  if (!std::isfinite(number) || number <= 0) {
    return refuse(std::string(key) + " is " + printable(value->dump()) + ", a number above zero is needed",
                  "use a checkpoint whose " + std::string(key) + " is above zero");
  }
  return number;
}

Status ConfigReader::require_silu() const {
  KT_TRY(const std::string activation, text("hidden_act", "silu"));
  if (activation == "silu") return ok_status();
  return refuse("hidden_act is " + printable(activation) + "; the expert kernels compute silu",
                "use a checkpoint with hidden_act silu");
}

}  // namespace kt::coproc
