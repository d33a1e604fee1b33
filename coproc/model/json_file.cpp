#include "coproc/model/json_file.h"

#include <cstddef>
#include <string_view>

#include "coproc/model/input_file.h"

namespace kt::coproc {
namespace {

constexpr std::size_t kNestingMax = 64;

// Counts brackets outside strings; on malformed text any answer will do, the parser refuses it.
std::size_t nesting(std::string_view text) {
  std::size_t depth = 0;
  std::size_t deepest = 0;
  bool in_string = false;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '[' || c == '{') {
      deepest = std::max(deepest, ++depth);
    } else if ((c == ']' || c == '}') && depth > 0) {
      --depth;
    }
  }
  return deepest;
}

Error not_json(const std::string& path, std::string why) {
  return bad_model(path + " is not usable", std::move(why), "download or copy the file again");
}

}  // namespace

Result<nlohmann::json> read_json_object(const std::string& path, std::uint64_t bytes_max) {
  KT_TRY(const InputFile file, InputFile::open(path));
  if (file.size() > bytes_max) {
    return not_json(path, "it has " + std::to_string(file.size()) + " bytes, at most " + std::to_string(bytes_max) +
                              " are accepted");
  }
  std::string text(file.size(), '\0');
  KT_TRY_STATUS(file.read_at(0, text.data(), text.size()));
  if (nesting(text) > kNestingMax) {
    return not_json(path, "its values are nested deeper than " + std::to_string(kNestingMax));
  }
  try {
    nlohmann::json json = nlohmann::json::parse(text);
    if (!json.is_object()) return not_json(path, std::string("its top level is not an object but ") + json.type_name());
    return json;
  } catch (const nlohmann::json::exception& error) {
    return not_json(path, "it is not valid JSON: " + printable(error.what()));
  }
}

}  // namespace kt::coproc
