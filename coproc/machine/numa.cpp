#include "coproc/machine/numa.h"

#include <numa.h>

#include <algorithm>
#include <charconv>
#include <set>
#include <string_view>
#include <system_error>
#include <utility>

namespace kt::coproc {
namespace {

constexpr int kCpuMax = 8191;
constexpr std::size_t kPoolsMax = 64;
constexpr std::size_t kWorkersMax = 1024;

Error bad_numa(std::string why) {
  return Error{ErrorCode::kUsage, "cannot read the pools of workers", std::move(why),
               "for example --numa auto, --numa off, or --numa '0-55;56-111'"};
}

// Calls visit(part) for what lies between separators; a trailing empty part counts.
template <class Visit>
Status split(std::string_view text, char separator, const Visit& visit) {
  while (true) {
    const std::size_t end = text.find(separator);
    KT_TRY_STATUS(visit(text.substr(0, end)));
    if (end == std::string_view::npos) return ok_status();
    text.remove_prefix(end + 1);
  }
}

Result<int> read_cpu(std::string_view text) {
  int cpu = 0;
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, cpu);
  if (error != std::errc() || stop != end || cpu < 0 || cpu > kCpuMax) {
    return bad_numa("'" + std::string(text) + "' is not the number of a CPU, 0 to " + std::to_string(kCpuMax));
  }
  return cpu;
}

// "7" or "0-55", added to `cpus`.
Status read_range(std::string_view text, std::vector<int>& cpus) {
  const std::size_t dash = text.find('-');
  KT_TRY(const int first, read_cpu(text.substr(0, dash)));
  int last = first;
  if (dash != std::string_view::npos) {
    KT_TRY(last, read_cpu(text.substr(dash + 1)));
  }
  if (last < first) return bad_numa("the range " + std::string(text) + " ends before it begins");
  for (int cpu = first; cpu <= last; ++cpu) cpus.push_back(cpu);
  return ok_status();
}

Result<std::vector<int>> read_pool(std::string_view text) {
  std::vector<int> cpus;
  KT_TRY_STATUS(split(text, ',', [&](std::string_view range) { return read_range(range, cpus); }));
  return cpus;
}

}  // namespace

Result<NumaChoice> parse_numa(const std::string& text) {
  NumaChoice choice;
  if (text == "auto") return choice;
  if (text == "off") {
    choice.mode = NumaChoice::Mode::kOff;
    return choice;
  }
  if (text.empty() || text.find_first_not_of("0123456789-,;") != std::string::npos) {
    return bad_numa("it has to be one of: auto, off, lists of CPUs");
  }
  choice.mode = NumaChoice::Mode::kDeclared;
  std::set<int> seen;
  const auto add_pool = [&](std::string_view pool) -> Status {
    if (pool.empty()) return bad_numa("pool " + std::to_string(choice.pools.size()) + " has no CPU");
    KT_TRY(std::vector<int> cpus, read_pool(pool));
    for (const int cpu : cpus) {
      if (!seen.insert(cpu).second) return bad_numa("CPU " + std::to_string(cpu) + " is named twice");
    }
    choice.pools.push_back(std::move(cpus));
    return ok_status();
  };
  KT_TRY_STATUS(split(text, ';', add_pool));
  if (choice.pools.size() > kPoolsMax || seen.size() > kWorkersMax) {
    return bad_numa(std::to_string(choice.pools.size()) + " pools with " + std::to_string(seen.size()) +
                    " CPUs are more than the limits, " + std::to_string(kPoolsMax) + " and " +
                    std::to_string(kWorkersMax));
  }
  return choice;
}

int node_of_cpu(int cpu) { return ::numa_available() < 0 ? 0 : std::max(0, ::numa_node_of_cpu(cpu)); }

void bind_memory(void* data, std::size_t bytes, int node) {
  if (node < 0 || bytes == 0 || ::numa_available() < 0) return;
  ::numa_tonode_memory(data, bytes, node);
}

}  // namespace kt::coproc
