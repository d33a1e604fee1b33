#include "coproc/daemon/status_table.h"

#include <spdlog/fmt/fmt.h>

#include "coproc/machine/memory_room.h"

namespace kt::coproc {
namespace {

using nlohmann::json;

template <class T>
T get(const json& object, const char* key, T otherwise) {
  return object.value(key, otherwise);
}
std::string text(const json& object, const char* key) { return get<std::string>(object, key, "?"); }
std::uint64_t count(const json& object, const char* key) { return get<std::uint64_t>(object, key, 0); }
double number(const json& object, const char* key) { return get<double>(object, key, 0.0); }

std::string duration(double seconds) {
  const auto whole = static_cast<std::uint64_t>(seconds);
  if (whole < 60) return fmt::format("{:.1f} s", seconds);
  if (whole < 3600) return fmt::format("{} min {} s", whole / 60, whole % 60);
  return fmt::format("{} h {} min", whole / 3600, whole / 60 % 60);
}

std::string latency(const json& rank, const char* key) {
  return rank.contains(key) ? fmt::format("{:.2f} ms", number(rank, key) * 1e3) : "-";
}

std::string load_line(const json& load) {
  const std::uint64_t done = count(load, "bytes_done");
  const std::uint64_t total = count(load, "bytes_total");
  const double share = total == 0 ? 0 : 100 * static_cast<double>(done) / static_cast<double>(total);
  return fmt::format("load     {} of {} ({:.0f} %) in {}\n", bytes_text(done), bytes_text(total), share,
                     duration(number(load, "seconds")));
}

std::string model_lines(const json& status) {
  const json model = get(status, "model", json::object());
  return fmt::format(
      "model    {}\n         {}, {} layers, {} experts, top {}, hidden {}, intermediate {}, {}\n"
      "         fingerprint {}\n",
      text(model, "path"), text(model, "architecture"), count(model, "num_layers"), count(model, "num_experts"),
      count(model, "top_k"), count(model, "hidden_size"), count(model, "intermediate_size"),
      text(model, "weight_format"), text(model, "fingerprint").substr(0, 16));
}

std::string memory_line(const json& memory) {
  std::string line = "memory  ";
  for (const char* key : {"weights", "adapters", "gradients", "optimizer", "activations", "arenas"}) {
    line += fmt::format(" {} {}", key, bytes_text(count(memory, key)));
    if (std::string_view(key) != "arenas") line += ",";
  }
  return line + "\n";
}

std::string work_lines(const json& status) {
  const json rates = get(status, "rates", json::object());
  const json totals = get(status, "totals", json::object());
  return fmt::format(
      "tokens/s {:.0f} forward, {:.0f} backward; workers {:.0f} % busy\n"
      "totals   {} forward, {} backward, {} steps, {} errors; sessions {} attached, {} rejected\n",
      number(rates, "forward_tokens_per_second"), number(rates, "backward_tokens_per_second"),
      100 * number(rates, "worker_busy_ratio"), count(totals, "forward_requests"), count(totals, "backward_requests"),
      count(totals, "steps"), count(totals, "errors"), count(totals, "sessions_attached"),
      count(totals, "sessions_rejected"));
}

std::string job_lines(const json& status) {
  std::string lines;
  for (const json& job : get(status, "jobs", json::array())) {
    lines += fmt::format("job      {} {}: {}, ranks {} of {}, step {}\n", text(job, "job_id").substr(0, 16),
                         get<std::string>(job, "name", ""), text(job, "state"),
                         get(job, "members", json::array()).dump(), count(job, "world_size"), count(job, "step"));
  }
  for (const json& rank : get(status, "ranks", json::array())) {
    lines += fmt::format("rank     {} pid {}: {}, {} in flight, p50 {}, p99 {}, waiting {:.0f} %\n",
                         count(rank, "rank"), count(rank, "pid"), text(rank, "state"), count(rank, "in_flight"),
                         latency(rank, "latency_p50_seconds"), latency(rank, "latency_p99_seconds"),
                         100 * number(rank, "waiting_ratio"));
  }
  return lines;
}

}  // namespace

std::string status_table(const json& status) {
  const std::string state = text(status, "state");
  std::string table = fmt::format("state    {} (kt-coproc {}, pid {}, up {})\n", state, text(status, "version"),
                                  count(status, "pid"), duration(number(status, "uptime_seconds")));
  if (state == "loading") table += load_line(get(status, "load", json::object()));
  table += model_lines(status);
  table += fmt::format("workers  {} threads, kernels {}, {} NUMA {}\n", count(status, "worker_threads"),
                       text(status, "kernels"), count(status, "numa_nodes"),
                       count(status, "numa_nodes") == 1 ? "node" : "nodes");
  table += memory_line(get(status, "memory_bytes", json::object()));
  if (state != "loading") table += work_lines(status) + job_lines(status);
  return table;
}

}  // namespace kt::coproc
