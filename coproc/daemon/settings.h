// The settings of `kt-coproc run`, one table: a setting `x-y` is the flag --x-y, the environment variable KT_COPROC_X_Y
// and the key x-y (or x_y) of the config file.
#pragma once
#include <map>
#include <span>
#include <string>
#include <string_view>

#include "shm/base/result.h"

namespace kt::coproc {

enum class SettingKind { kText, kNumber, kFlag };

struct Setting {
  const char* name;
  SettingKind kind;
  const char* placeholder;  // "DIR" of --model DIR; "" for a flag.
  const char* help;
  bool in_file;  // May stand in the config file.
};
std::span<const Setting> all_settings();
const Setting* find_setting(std::string_view name);  // nullptr: there is none of that name.

// A value with the place it came from, for messages: "--threads", "KT_COPROC_THREADS", "kt.toml:3:11".
struct SettingValue {
  std::string text;  // Numbers in decimal, flags as "true" or "false".
  std::string origin;
};
using SettingValues = std::map<std::string, SettingValue, std::less<>>;

// "weight-format" -> "KT_COPROC_WEIGHT_FORMAT"
std::string environment_name(std::string_view setting);
// The settings given by environment variables; an empty variable counts as unset.
SettingValues settings_from_environment();

// Reads a TOML file of settings. kUsage with file:line:column for syntax, unknown keys and wrong types.
Result<SettingValues> settings_from_file(const std::string& path);

}  // namespace kt::coproc
