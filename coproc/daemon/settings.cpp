#include "coproc/daemon/settings.h"

#include <cstdlib>

#include "kernels/formats.h"

namespace kt::coproc {
namespace {

const char* weight_formats() {
  static const std::string names = kernels::format_names("|");
  return names.c_str();
}

// "bf16: …; int8: half the memory; … (default: bf16)"
const char* weight_formats_help() {
  static const std::string help = [] {
    std::string text;
    for (const kernels::StorageFormat& format : kernels::formats()) {
      text += (text.empty() ? "" : "; ") + std::string(format.name) + ": " + std::string(format.help);
    }
    return text + " (default: " + std::string(kernels::formats().front().name) + ")";
  }();
  return help.c_str();
}

const Setting kSettings[] = {
    {"model", SettingKind::kText, "DIR", "checkpoint directory: config.json and *.safetensors", true},
    {"config", SettingKind::kText, "FILE.toml", "file of settings; flags and environment variables come before it",
     false},
    {"socket", SettingKind::kText, "PATH",
     "socket to listen on (default: $XDG_RUNTIME_DIR/kt-coproc/kt.sock, else /run/kt-coproc/kt.sock)", true},
    {"threads", SettingKind::kNumber, "N",
     "compute workers in total (default: physical cores we may use, minus 2 above 8)", true},
    {"numa", SettingKind::kText, "auto|off|'0-55;56-111'",
     "a pool of workers with its own experts per NUMA node, one for all, or one per list of CPUs (default: auto)",
     true},
    {"weight-format", SettingKind::kText, weight_formats(), weight_formats_help(), true},
    {"weight-cache", SettingKind::kText, "DIR|off",
     "where quantised weights are kept for the next start; off: nowhere (default: "
     "$XDG_CACHE_HOME/kt-coproc, else ~/.cache/kt-coproc)",
     true},
    {"kernels", SettingKind::kText, "auto|amx|avx512|avx2|scalar", "instruction set (default: auto, the best)", true},
    {"deterministic", SettingKind::kFlag, "", "add the gradients of several ranks in rank order", true},
    {"activation-bytes-max", SettingKind::kNumber, "BYTES",
     "memory for saved activations (default: a quarter of the memory left free by the weights)", true},
    {"batch-tokens-max", SettingKind::kNumber, "N", "most tokens computed at once (default: 16384)", true},
};

}  // namespace

std::span<const Setting> all_settings() { return kSettings; }

const Setting* find_setting(std::string_view name) {
  for (const Setting& setting : kSettings) {
    if (name == setting.name) return &setting;
  }
  return nullptr;
}

std::string environment_name(std::string_view setting) {
  std::string name = "KT_COPROC_";
  for (const char c : setting) name += c == '-' ? '_' : static_cast<char>(c >= 'a' && c <= 'z' ? c - 'a' + 'A' : c);
  return name;
}

SettingValues settings_from_environment() {
  SettingValues values;
  for (const Setting& setting : kSettings) {
    const std::string name = environment_name(setting.name);
    const char* const value = std::getenv(name.c_str());
    if (value != nullptr && *value != '\0') values[setting.name] = {value, name};
  }
  return values;
}

}  // namespace kt::coproc
