#include "coproc/daemon/options.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>

#include "coproc/daemon/settings.h"
#include "kernels/formats.h"
#include "shm/control.h"

namespace kt::coproc {
namespace {

Error bad_value(const SettingValue& value, const std::string& name, std::string why, std::string fix) {
  return Error{ErrorCode::kUsage, "cannot use '" + value.text + "' for " + name + " (" + value.origin + ")",
               std::move(why), std::move(fix)};
}

// One setting at a time: its value if it was given, checked.
class Reader {
 public:
  explicit Reader(const SettingValues& values) : values_(values) {}

  const SettingValue* find(std::string_view name) const {
    const auto found = values_.find(name);
    return found == values_.end() ? nullptr : &found->second;
  }

  Status choice(const std::string& name, const std::vector<std::string_view>& choices, std::string& out) const {
    const SettingValue* const value = find(name);
    if (value == nullptr) return ok_status();
    if (std::find(choices.begin(), choices.end(), value->text) == choices.end()) {
      std::string list;
      for (const std::string_view choice : choices) list += (list.empty() ? "" : ", ") + std::string(choice);
      return bad_value(*value, name, "it has to be one of: " + list, "kt-coproc run --help shows what it takes");
    }
    out = value->text;
    return ok_status();
  }

  template <class Number>
  Status number(const std::string& name, std::uint64_t max, Number& out) const {
    const SettingValue* const value = find(name);
    if (value == nullptr) return ok_status();
    std::uint64_t number = 0;
    const char* const end = value->text.data() + value->text.size();
    const auto [stop, error] = std::from_chars(value->text.data(), end, number);
    if (error != std::errc() || stop != end || number < 1 || number > max) {
      return bad_value(*value, name, "it has to be a whole number from 1 to " + std::to_string(max),
                       "leave it out for the default, or give such a number");
    }
    out = static_cast<Number>(number);
    return ok_status();
  }

  Status flag(const std::string& name, bool& out) const {
    const SettingValue* const value = find(name);
    if (value == nullptr) return ok_status();
    if (value->text == "true" || value->text == "1") {
      out = true;
    } else if (value->text == "false" || value->text == "0") {
      out = false;
    } else {
      return bad_value(*value, name, "it has to be true or false (or 1 or 0)", "correct it");
    }
    return ok_status();
  }

 private:
  const SettingValues& values_;
};

Result<Parsed> settings_from_flags(CLI::App& app, const std::vector<std::string>& arguments, SettingValues& values) {
  app.footer(
      "Every flag --x-y is also read from the environment variable KT_COPROC_X_Y and from the config file\n"
      "(key x-y). A flag comes before the environment, the environment before the file.");
  std::map<std::string, std::string> texts;
  std::map<std::string, bool> flags;
  for (const Setting& setting : all_settings()) {
    const std::string flag = std::string("--") + setting.name;
    if (setting.kind == SettingKind::kFlag) {
      app.add_flag(flag, flags[setting.name], setting.help);
    } else {
      app.add_option(flag, texts[setting.name], setting.help)->type_name(setting.placeholder);
    }
  }
  KT_TRY(const Parsed parsed, parse_arguments(app, arguments));
  for (const Setting& setting : all_settings()) {
    const std::string flag = std::string("--") + setting.name;
    if (app.count(flag) == 0) continue;
    const bool is_flag = setting.kind == SettingKind::kFlag;
    values[setting.name] = {is_flag ? (flags[setting.name] ? "true" : "false") : texts[setting.name], flag};
  }
  return parsed;
}

// run's own place, not the search of its clients: another daemon further down the list is none of its business.
std::string default_socket_address() {
  const char* const runtime = std::getenv("XDG_RUNTIME_DIR");
  const std::string base = runtime != nullptr && runtime[0] == '/' ? runtime : "/run";
  return "unix:" + base + "/kt-coproc/kt.sock";
}

Status read_socket(const Reader& reader, RunOptions& options) {
  const SettingValue* const socket = reader.find("socket");
  std::string address = default_socket_address();
  if (socket != nullptr && socket->text != "auto") {
    KT_TRY(address, socket_address(socket->text));
  }
  KT_TRY(options.socket_path, shm::resolve_socket_path(address));
  return ok_status();
}

Status read_numa(const Reader& reader, RunOptions& options) {
  const SettingValue* const value = reader.find("numa");
  if (value == nullptr) return ok_status();
  Result<NumaChoice> parsed = parse_numa(value->text);
  if (!parsed.ok()) return bad_value(*value, "numa", parsed.error().why, parsed.error().fix);
  options.numa = std::move(parsed).value();
  return ok_status();
}

Status read_formats(const Reader& reader, RunOptions& options) {
  std::vector<std::string_view> names;
  for (const kernels::StorageFormat& format : kernels::formats()) names.push_back(format.name);
  KT_TRY_STATUS(reader.choice("weight-format", names, options.weight_format));
  KT_TRY_STATUS(reader.choice("kernels", {"auto", "amx", "avx512", "avx2", "scalar"}, options.kernels));
  const std::string why = kernels::why_not_on(*kernels::find_format(options.weight_format), options.kernels);
  if (!why.empty()) {
    return bad_value(*reader.find("kernels"), "kernels", why,
                     "use --kernels auto with --weight-format " + options.weight_format + ", or --weight-format " +
                         std::string(kernels::formats().front().name));
  }
  return ok_status();
}

// Empty: this user has no place for caches.
std::string default_weight_cache() {
  const char* const cache = std::getenv("XDG_CACHE_HOME");
  if (cache != nullptr && cache[0] == '/') return std::string(cache) + "/kt-coproc";
  const char* const home = std::getenv("HOME");
  if (home != nullptr && home[0] == '/') return std::string(home) + "/.cache/kt-coproc";
  return "";
}

Status read_weight_cache(const Reader& reader, RunOptions& options) {
  const SettingValue* const value = reader.find("weight-cache");
  options.weight_cache = value == nullptr ? default_weight_cache() : value->text;
  if (value != nullptr && value->text.empty()) {
    return bad_value(*value, "weight-cache", "it has to be a directory or off", "--weight-cache off turns it off");
  }
  if (options.weight_cache == "off") options.weight_cache.clear();
  return ok_status();
}

Status check(const SettingValues& values, RunOptions& options) {
  const Reader reader(values);
  const SettingValue* const model = reader.find("model");
  if (model == nullptr || model->text.empty()) {
    return Error{ErrorCode::kUsage, "no model to serve",
                 "neither --model nor KT_COPROC_MODEL nor the config file names a checkpoint directory",
                 "kt-coproc run --model DIR"};
  }
  options.model = model->text;
  KT_TRY_STATUS(read_socket(reader, options));
  KT_TRY_STATUS(reader.number("threads", kThreadsMax, options.threads));
  KT_TRY_STATUS(read_numa(reader, options));
  KT_TRY_STATUS(read_formats(reader, options));
  KT_TRY_STATUS(read_weight_cache(reader, options));
  KT_TRY_STATUS(reader.flag("deterministic", options.deterministic));
  KT_TRY_STATUS(reader.number("activation-bytes-max", INT64_MAX, options.activation_bytes_max));
  return reader.number("batch-tokens-max", kBatchTokensMax, options.batch_tokens_max);
}

}  // namespace

Result<Parsed> parse_run_options(CLI::App& app, const std::vector<std::string>& arguments, RunOptions& options) {
  SettingValues values;
  KT_TRY(const Parsed parsed, settings_from_flags(app, arguments, values));
  if (parsed == Parsed::kHelpShown) return parsed;
  values.merge(settings_from_environment());
  if (const auto config = values.find("config"); config != values.end()) {
    KT_TRY(SettingValues from_file, settings_from_file(config->second.text));
    values.merge(from_file);
  }
  KT_TRY_STATUS(check(values, options));
  return parsed;
}

}  // namespace kt::coproc
