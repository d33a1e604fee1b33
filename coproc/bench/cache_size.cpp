#include "coproc/bench/cache_size.h"

#include <filesystem>
#include <fstream>
#include <map>
#include <system_error>

namespace kt::coproc {
namespace {

namespace fs = std::filesystem;

constexpr std::uint64_t kUnknownBytes = std::uint64_t{32} << 20;

std::string first_line(const fs::path& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// "32768K", "1M", "512"; 0: something else.
std::uint64_t parse_size(const std::string& text) {
  std::uint64_t bytes = 0;
  std::size_t at = 0;
  for (; at < text.size() && text[at] >= '0' && text[at] <= '9'; ++at) {
    bytes = bytes * 10 + static_cast<std::uint64_t>(text[at] - '0');
  }
  if (at == 0) return 0;
  if (at == text.size()) return bytes;
  return text.substr(at) == "K" ? bytes << 10 : text.substr(at) == "M" ? bytes << 20 : 0;
}

}  // namespace

std::uint64_t last_level_cache_bytes(const std::string& root) {
  // Level, then which CPUs share it: one entry per cache.
  std::map<std::string, std::map<std::string, std::uint64_t>> levels;
  std::error_code error;
  for (const auto& cpu : fs::directory_iterator(root + "/sys/devices/system/cpu", error)) {
    for (const auto& index : fs::directory_iterator(cpu.path() / "cache", error)) {
      const std::uint64_t bytes = parse_size(first_line(index.path() / "size"));
      if (bytes > 0) levels[first_line(index.path() / "level")][first_line(index.path() / "shared_cpu_list")] = bytes;
    }
  }
  std::uint64_t sum = 0;
  if (!levels.empty()) {
    for (const auto& [cpus, bytes] : levels.rbegin()->second) sum += bytes;
  }
  return sum > 0 ? sum : kUnknownBytes;
}

}  // namespace kt::coproc
