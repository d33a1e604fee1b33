// Settings from a TOML file (declared in settings.h).
#include <toml++/toml.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <sstream>

#include "coproc/daemon/settings.h"

namespace kt::coproc {
namespace {

constexpr std::size_t kFileBytesMax = 1 << 20;

std::string place(const std::string& path, const toml::source_region& source) {
  return path + ":" + std::to_string(source.begin.line) + ":" + std::to_string(source.begin.column);
}

Error bad_file(std::string what, std::string why, std::string fix) {
  return Error{ErrorCode::kUsage, std::move(what), std::move(why), std::move(fix)};
}

std::string known_keys() {
  std::string keys;
  for (const Setting& setting : all_settings()) {
    if (setting.in_file) keys += (keys.empty() ? "" : ", ") + std::string(setting.name);
  }
  return keys;
}

const char* kind_name(SettingKind kind) {
  switch (kind) {
    case SettingKind::kText:
      return "a string, in quotes";
    case SettingKind::kNumber:
      return "a whole number";
    case SettingKind::kFlag:
      return "true or false";
  }
  return "";
}

const char* type_name(toml::node_type type) {
  switch (type) {
    case toml::node_type::string:
      return "a string";
    case toml::node_type::integer:
      return "a whole number";
    case toml::node_type::floating_point:
      return "a number with a fraction";
    case toml::node_type::boolean:
      return "true or false";
    case toml::node_type::array:
      return "a list";
    case toml::node_type::table:
      return "a table";
    default:
      return "a date or time";
  }
}

Result<SettingValue> read_value(const Setting& setting, const toml::node& node, const std::string& path) {
  const std::string origin = place(path, node.source());
  if (setting.kind == SettingKind::kText && node.is_string()) {
    return SettingValue{node.as_string()->get(), origin};
  }
  if (setting.kind == SettingKind::kNumber && node.is_integer()) {
    return SettingValue{std::to_string(node.as_integer()->get()), origin};
  }
  if (setting.kind == SettingKind::kFlag && node.is_boolean()) {
    return SettingValue{node.as_boolean()->get() ? "true" : "false", origin};
  }
  return bad_file(origin + ": " + setting.name + " has the wrong type",
                  std::string("it is ") + type_name(node.type()) + ", and has to be " + kind_name(setting.kind),
                  "change that line");
}

Result<std::string> read_text(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string text(kFileBytesMax + 1, '\0');
  if (file) file.read(text.data(), static_cast<std::streamsize>(text.size()));
  if (!file.is_open() || file.bad()) {
    return bad_file("cannot read the config file " + path, "it is not there, or not readable",
                    "give --config the path of a TOML file");
  }
  text.resize(static_cast<std::size_t>(file.gcount()));
  if (text.size() > kFileBytesMax) {
    return bad_file("cannot read the config file " + path, "it has more than 1 MiB: no file of settings is that long",
                    "give --config the path of a TOML file");
  }
  return text;
}

}  // namespace

Result<SettingValues> settings_from_file(const std::string& path) {
  KT_TRY(const std::string text, read_text(path));
  SettingValues values;
  try {
    const toml::table table = toml::parse(std::string_view(text), std::string_view(path));
    for (const auto& [key, node] : table) {
      std::string name(key.str());
      std::replace(name.begin(), name.end(), '_', '-');
      const Setting* const setting = find_setting(name);
      if (setting == nullptr || !setting->in_file) {
        return bad_file(place(path, key.source()) + ": unknown key '" + std::string(key.str()) + "'",
                        "a config file may have: " + known_keys(), "remove or correct that line");
      }
      if (values.contains(name)) {
        return bad_file(place(path, key.source()) + ": '" + std::string(key.str()) + "' is there twice",
                        "x-y and x_y are the same key", "remove one of them");
      }
      KT_TRY(values[name], read_value(*setting, node, path));
    }
  } catch (const toml::parse_error& error) {
    return bad_file(place(path, error.source()) + ": not TOML", std::string(error.description()), "correct that line");
  }
  return values;
}

}  // namespace kt::coproc
