#include "coproc/daemon/settings.h"

#include <cstdlib>

namespace kt::coproc {
namespace {

constexpr Setting kSettings[] = {
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
    {"weight-format", SettingKind::kText, "bf16|int8|int4|fp32",
     "int8 and int4 take half and a quarter of the memory; fp32 is slow and exact (default: bf16)", true},
    {"weight-cache", SettingKind::kText, "DIR|off",
     "where quantised weights (int8, int4) are kept for the next start; off: nowhere (default: "
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
