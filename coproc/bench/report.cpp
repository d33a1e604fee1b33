#include "coproc/bench/report.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <fstream>

#include "coproc/machine/memory_room.h"

namespace kt::coproc {
namespace {

using nlohmann::json;

constexpr int kSchema = 1;

std::string flops_key(const BenchMachine& machine) { return machine.element_bytes == 2 ? "bf16_flops" : "fp32_flops"; }

std::string name_of(const LayerRow& row) {
  return std::string(row.is_backward ? "backward" : "forward") + (row.has_lora ? " lora" : "");
}

// What bounds the row.
bool is_bound_by_dram(const LayerRow& row) { return row.share_of_dram > row.share_of_peak; }

double bytes_per_route(const LayerRow& row, std::int64_t bytes) {
  return row.traffic.num_routes == 0 ? 0 : static_cast<double>(bytes) / static_cast<double>(row.traffic.num_routes);
}

// Calls visit(name, stage) for the stages that ran.
template <class Visit>
void for_each_stage(const Traffic& traffic, const Visit& visit) {
  for (std::size_t n = 0; n < kNumStages; ++n) {
    const Traffic::Stage& stage = traffic.stages[n];
    if (stage.bytes() > 0) visit(stage_name(static_cast<StageId>(n)), stage);
  }
}

json stages_json(const Traffic& traffic) {
  json out = json::array();
  for_each_stage(traffic, [&](std::string_view name, const Traffic::Stage& stage) {
    out.push_back({{"name", name},
                   {"weight_bytes", stage.weight_bytes},
                   {"activation_bytes", stage.activation_bytes},
                   {"lora_bytes", stage.lora_bytes},
                   {"worker_seconds", stage.seconds}});
  });
  return out;
}

json row_json(const BenchMachine& machine, const LayerReport& report, const LayerRow& row,
              const std::optional<Peaks>& declared) {
  const Traffic::Stage total = row.traffic.total();
  json out = {{"name", name_of(row)},
              {"tokens", row.num_tokens},
              {"seconds", row.seconds},
              {"ratio", std::max(row.share_of_peak, row.share_of_dram)},
              {"of", is_bound_by_dram(row) ? "dram_bytes_per_second" : flops_key(machine)},
              {"seconds_median", row.seconds_median},
              {"flops", row.flops},
              {"bytes", row.bytes},
              {"flops_per_second", row.flops / row.seconds},
              {"bytes_per_second", row.bytes / row.seconds},
              {"ratio_of_peak", row.share_of_peak},
              {"ratio_of_dram", row.share_of_dram},
              {"roofline_seconds", row.roofline_seconds(report.peaks)},
              {"routes", row.traffic.num_routes},
              {"activation_bytes_per_route", bytes_per_route(row, total.activation_bytes)},
              {"calls_per_sample", row.num_calls},
              {"samples", row.num_samples},
              {"samples_discarded", row.num_discarded},
              {"disturbed", row.is_disturbed},
              {"barriers", row.traffic.num_barriers},
              {"stages", stages_json(row.traffic)}};
  if (row.over_frozen > 0) out["ratio_to_frozen"] = row.over_frozen;
  if (declared.has_value()) out["predicted_seconds"] = row.roofline_seconds(*declared);
  return out;
}

std::string row_line(const LayerReport& report, const LayerRow& row, const std::optional<Peaks>& declared) {
  const Traffic::Stage total = row.traffic.total();
  std::string line =
      fmt::format("{:<14} {:>6} {:>10.2f} {:>8.1f} {:>5.0f} % {:>8.1f} {:>5.0f} % {:>9.1f} {:>9.1f} {:>10.2f}",
                  name_of(row), row.num_tokens, row.seconds * 1e3, row.flops / row.seconds * 1e-9,
                  row.share_of_peak * 100, row.bytes / row.seconds * 1e-9, row.share_of_dram * 100, row.flops * 1e-9,
                  bytes_per_route(row, total.activation_bytes) * 1e-3, row.roofline_seconds(report.peaks) * 1e3);
  if (declared.has_value()) line += fmt::format(" {:>10.3f}", row.roofline_seconds(*declared) * 1e3);
  line += fmt::format(" {:>4}", row.num_samples);
  if (row.over_frozen > 0) line += fmt::format("  {:.3f} x frozen", row.over_frozen);
  if (row.num_discarded > 0) line += fmt::format("  {} discarded", row.num_discarded);
  if (row.is_disturbed) line += "  all disturbed by other processes";
  return line + "\n";
}

// The account by stage, of forward and backward with the most tokens.
std::string traffic_lines(const LayerRow& row) {
  const Traffic::Stage total = row.traffic.total();
  std::string text = fmt::format(
      "\n{}, {} tokens, {} routes, {} barriers: bytes beyond L2, and time of the last call\n"
      "{:<16} {:>12} {:>20} {:>10} {:>10} {:>7}\n",
      name_of(row), row.num_tokens, row.traffic.num_routes, row.traffic.num_barriers, "stage", "weights",
      "activations/route", "LoRA", "worker ms", "share");
  const auto line = [&](std::string_view name, const Traffic::Stage& stage) {
    text += fmt::format("{:<16} {:>12} {:>20.0f} {:>10} {:>10.2f} {:>5.1f} %\n", name,
                        bytes_text(static_cast<std::uint64_t>(stage.weight_bytes)),
                        bytes_per_route(row, stage.activation_bytes),
                        bytes_text(static_cast<std::uint64_t>(stage.lora_bytes)), stage.seconds * 1e3,
                        100 * stage.seconds / total.seconds);
  };
  for_each_stage(row.traffic, line);
  line("total", total);
  return text;
}

}  // namespace

std::string BenchMachine::text() const {
  return fmt::format("{}, {} kernels, {} worker{}", processor, kernels, num_workers, num_workers == 1 ? "" : "s");
}

std::string processor_name() {
  std::ifstream file("/proc/cpuinfo");
  std::string line;
  while (std::getline(file, line)) {
    const std::size_t colon = line.find(": ");
    if (line.rfind("model name", 0) == 0 && colon != std::string::npos) return line.substr(colon + 2);
  }
  return "unknown processor";
}

json peaks_json(const BenchMachine& machine, const Peaks& peaks) {
  return {{"schema", kSchema},
          {"machine", machine.text()},
          {"kernels", machine.kernels},
          {"worker_threads", machine.num_workers},
          {"peaks", {{flops_key(machine), peaks.flops}, {"dram_bytes_per_second", peaks.dram_bytes_per_second}}},
          {"rows", json::array()}};
}

std::string peaks_table(const BenchMachine& machine, const Peaks& peaks) {
  return fmt::format("{}\npeak       {:.1f} GFLOP/s in {}\nbandwidth  {:.1f} GB/s read\n", machine.text(),
                     peaks.flops * 1e-9, machine.element_bytes == 2 ? "bf16" : "fp32",
                     peaks.dram_bytes_per_second * 1e-9);
}

json layer_json(const BenchMachine& machine, const LayerReport& report, const std::optional<Peaks>& declared) {
  json out = peaks_json(machine, report.peaks);
  const LayerBenchOptions& options = report.options;
  out["layer"] = {{"hidden_size", options.hidden_size},
                  {"intermediate_size", options.intermediate_size},
                  {"num_experts", options.num_experts},
                  {"top_k", options.top_k},
                  {"weight_format", options.weight_format},
                  {"lora_rank", options.lora_rank},
                  {"skew", options.skew},
                  {"num_layers", report.num_layers},
                  {"weight_bytes", report.weight_bytes}};
  if (declared.has_value()) {
    out["declared"] = {{"flops", declared->flops}, {"dram_bytes_per_second", declared->dram_bytes_per_second}};
  }
  for (const LayerRow& row : report.rows) out["rows"].push_back(row_json(machine, report, row, declared));
  return out;
}

std::string layer_table(const BenchMachine& machine, const LayerReport& report, const std::optional<Peaks>& declared) {
  const LayerBenchOptions& options = report.options;
  std::string text = peaks_table(machine, report.peaks);
  text += fmt::format(
      "layer      hidden {}, intermediate {}, {} experts, top {}, {}, LoRA r={}; {} layers of {} in turn\n\n",
      options.hidden_size, options.intermediate_size, options.num_experts, options.top_k, options.weight_format,
      options.lora_rank, report.num_layers, bytes_text(report.weight_bytes / report.num_layers));
  text += fmt::format("{:<14} {:>6} {:>10} {:>8} {:>7} {:>8} {:>7} {:>9} {:>9} {:>10}", "", "tokens", "ms", "GFLOP/s",
                      "of peak", "GB/s", "of DRAM", "GFLOP", "KB/route", "roofline");
  text += declared.has_value() ? fmt::format(" {:>10} {:>4}\n", "predicted", "n") : fmt::format(" {:>4}\n", "n");
  for (const LayerRow& row : report.rows) text += row_line(report, row, declared);
  const std::size_t num_shown = options.lora_rank > 0 ? 4 : 2;
  for (std::size_t n = report.rows.size() - std::min(num_shown, report.rows.size()); n < report.rows.size(); ++n) {
    text += traffic_lines(report.rows[n]);
  }
  return text;
}

}  // namespace kt::coproc
