#include "tools/kt_top/view.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>

namespace kt::top {
namespace {

using nlohmann::json;

__attribute__((format(printf, 1, 2))) std::string print(const char* format, ...) {
  std::array<char, 512> text{};
  va_list args;
  va_start(args, format);
  std::vsnprintf(text.data(), text.size(), format, args);
  va_end(args);
  return text.data();
}

// Three significant digits below 1000, none of them behind a point that is not there.
std::string three_digits(double value) {
  if (value >= 99.95) return print("%.0f", value);
  if (value >= 9.995) return print("%.1f", value);
  return print("%.2f", value);
}

std::string text_of(const json& object, const char* key) {
  const auto it = object.find(key);
  if (it == object.end()) return "-";
  if (it->is_string()) return it->get<std::string>();
  return it->dump();
}

double number_of(const json& object, const char* key) {
  const auto it = object.find(key);
  return it != object.end() && it->is_number() ? it->get<double>() : 0.0;
}

const json& part(const json& status, const char* key) {
  static const json kEmpty = json::object();
  const auto it = status.find(key);
  return it == status.end() ? kEmpty : *it;
}

// Characters on the screen, not bytes: continuation bytes of UTF-8 take no room.
int width_of(const std::string& text) {
  return static_cast<int>(
      std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xc0U) != 0x80U; }));
}

std::string cut(const std::string& text, int columns) {
  std::string out;
  int width = 0;
  for (const char c : text) {
    if ((static_cast<unsigned char>(c) & 0xc0U) != 0x80U && ++width > columns) break;
    out += c;
  }
  return out;
}

// Left-justified in `columns`; a longer text keeps its end (paths, job ids) behind "…".
std::string field(const std::string& text, int columns) {
  const int width = width_of(text);
  if (width <= columns) return text + std::string(static_cast<std::size_t>(columns - width), ' ');
  std::string tail = text;
  int drop = width - columns + 1;
  while (!tail.empty() && (drop > 0 || (static_cast<unsigned char>(tail.front()) & 0xc0U) == 0x80U)) {
    if ((static_cast<unsigned char>(tail.front()) & 0xc0U) != 0x80U) --drop;
    tail.erase(tail.begin());
  }
  return "…" + tail;
}

std::string right(const std::string& text, int columns) {
  const int pad = std::max(0, columns - width_of(text));
  return std::string(static_cast<std::size_t>(pad), ' ') + text;
}

std::string bar(double share, int columns) {
  const double clamped = std::clamp(share, 0.0, 1.0);
  const auto full = static_cast<std::size_t>(std::lround(clamped * columns));
  return "[" + std::string(full, '#') + std::string(static_cast<std::size_t>(columns) - full, '.') + "]";
}

std::string percent(double ratio) { return print("%.0f %%", 100.0 * ratio); }

void add_head(const json& status, int columns, std::vector<std::string>& lines) {
  const json& model = part(status, "model");
  const std::string state = text_of(status, "state");
  lines.push_back("kt-top   " + field(state, 10) + "up " +
                  field(format_uptime(number_of(status, "uptime_seconds")), 14) + "pid " +
                  field(text_of(status, "pid"), 9) + "version " + text_of(status, "version"));
  lines.push_back("model    " + field(text_of(model, "path"), columns - 9));
  lines.push_back(print("         %s, %s layers × %s experts, top %s", text_of(model, "architecture").c_str(),
                        text_of(model, "num_layers").c_str(), text_of(model, "num_experts").c_str(),
                        text_of(model, "top_k").c_str()));
  lines.push_back(print("         hidden %s, intermediate %s, weights %s, kernels %s, workers %s, NUMA nodes %s",
                        text_of(model, "hidden_size").c_str(), text_of(model, "intermediate_size").c_str(),
                        text_of(model, "weight_format").c_str(), text_of(status, "kernels").c_str(),
                        text_of(status, "worker_threads").c_str(), text_of(status, "numa_nodes").c_str()));
  if (state == "loading") {
    const json& load = part(status, "load");
    const double done = number_of(load, "bytes_done");
    const double total = number_of(load, "bytes_total");
    const double seconds = number_of(load, "seconds");
    const double share = total > 0 ? done / total : 0;
    lines.push_back("loading  " + bar(share, 30) + " " + percent(share) + "  " + format_bytes(done) + " of " +
                    format_bytes(total) + (seconds > 0 ? ", " + format_bytes(done / seconds) + "/s" : ""));
  }
  lines.emplace_back();
}

void add_rates(const json& status, std::vector<std::string>& lines) {
  const json& rates = part(status, "rates");
  const json& totals = part(status, "totals");
  const json& memory = part(status, "memory_bytes");
  const double busy = number_of(rates, "worker_busy_ratio");
  lines.push_back("forward  " + right(format_count(number_of(rates, "forward_tokens_per_second")), 7) + " tokens/s   " +
                  "backward " + right(format_count(number_of(rates, "backward_tokens_per_second")), 7) +
                  " tokens/s   " + format_count(number_of(rates, "tokens_per_batch")) + " tokens/batch");
  lines.push_back("workers  " + bar(busy, 30) + " " + percent(busy) + " busy");
  lines.push_back("totals   " + format_count(number_of(totals, "forward_requests")) + " forward, " +
                  format_count(number_of(totals, "backward_requests")) + " backward requests, " +
                  format_count(number_of(totals, "steps")) + " steps, " + format_count(number_of(totals, "errors")) +
                  " errors");
  lines.push_back("memory   weights " + format_bytes(number_of(memory, "weights")) + "  adapters " +
                  format_bytes(number_of(memory, "adapters")) + "  gradients " +
                  format_bytes(number_of(memory, "gradients")));
  lines.push_back("         optimizer " + format_bytes(number_of(memory, "optimizer")) + "  activations " +
                  format_bytes(number_of(memory, "activations")) + "  arenas " +
                  format_bytes(number_of(memory, "arenas")));
  lines.emplace_back();
}

std::string job_line(const json& job, int columns) {
  std::string members;
  for (const json& member : part(job, "members")) members += (members.empty() ? "" : ",") + member.dump();
  return cut("  " + field(text_of(job, "job_id"), 22) + " " + field(text_of(job, "name"), 18) + " " +
                 field(text_of(job, "state"), 7) + right(text_of(job, "world_size"), 6) + "  " + field(members, 12) +
                 right(text_of(job, "step"), 8),
             columns);
}

std::string rank_line(const json& rank, int columns) {
  const auto seconds = [&](const char* key) {
    return rank.contains(key) ? format_seconds(number_of(rank, key)) : std::string("-");
  };
  const json& totals = part(rank, "totals");
  return cut(right(text_of(rank, "rank"), 6) + right(text_of(rank, "pid"), 9) + "  " +
                 field(text_of(rank, "state"), 11) + right(text_of(rank, "in_flight"), 9) +
                 right(percent(number_of(rank, "waiting_ratio")), 9) + right(seconds("latency_p50_seconds"), 10) +
                 right(seconds("latency_p99_seconds"), 10) +
                 right(format_count(number_of(totals, "forward_layer_tokens")), 12),
             columns);
}

void add_table(const json& rows, std::string (*line)(const json&, int), const std::string& head, int columns,
               std::size_t rows_max, std::vector<std::string>& lines) {
  lines.push_back(head);
  const std::size_t shown = rows.size() <= rows_max ? rows.size() : rows_max - 1;
  for (std::size_t i = 0; i < shown; ++i) lines.push_back(line(rows[i], columns));
  if (shown < rows.size()) lines.push_back(print("  … %zu more", rows.size() - shown));
}

}  // namespace

std::string format_bytes(double bytes) {
  static constexpr std::array<const char*, 6> kUnits = {"B", "kB", "MB", "GB", "TB", "PB"};
  std::size_t unit = 0;
  while (bytes >= 999.5 && unit + 1 < kUnits.size()) {
    bytes /= 1000.0;
    ++unit;
  }
  return (unit == 0 ? print("%.0f", bytes) : three_digits(bytes)) + " " + kUnits.at(unit);
}

std::string format_count(double count) {
  static constexpr std::array<const char*, 5> kUnits = {"", "k", "M", "G", "T"};
  std::size_t unit = 0;
  while (count >= 999.5 && unit + 1 < kUnits.size()) {
    count /= 1000.0;
    ++unit;
  }
  const bool whole = unit == 0 && (count == std::floor(count) || count >= 99.95);
  return (whole ? print("%.0f", count) : three_digits(count)) + kUnits.at(unit);
}

std::string format_seconds(double seconds) {
  if (seconds < 999.5e-6) return print("%.0f µs", seconds * 1e6);
  if (seconds < 999.5e-3) return three_digits(seconds * 1e3) + " ms";
  return three_digits(seconds) + " s";
}

std::string format_uptime(double seconds) {
  const auto s = static_cast<std::int64_t>(seconds);
  if (s < 60) return print("%lld s", static_cast<long long>(s));
  if (s < 3600) return print("%lld min %02lld s", static_cast<long long>(s / 60), static_cast<long long>(s % 60));
  if (s < 86400) {
    return print("%lld h %02lld min", static_cast<long long>(s / 3600), static_cast<long long>(s / 60 % 60));
  }
  return print("%lld d %lld h", static_cast<long long>(s / 86400), static_cast<long long>(s / 3600 % 24));
}

std::vector<std::string> render(const json& status, int columns, int rows) {
  std::vector<std::string> lines;
  add_head(status, columns, lines);
  add_rates(status, lines);
  const json& jobs = part(status, "jobs");
  const json& ranks = part(status, "ranks");
  // Two heads and one blank line are spent on the tables; jobs get at most a third of what is left.
  const auto left = static_cast<std::size_t>(std::max(6, rows - static_cast<int>(lines.size()) - 3));
  const std::size_t job_rows = std::max<std::size_t>(2, std::min(jobs.size(), left / 3));
  add_table(jobs, job_line, "  JOB                    NAME               STATE    WORLD  MEMBERS         STEP", columns,
            job_rows, lines);
  lines.emplace_back();
  add_table(ranks, rank_line, "  RANK      PID  STATE      IN-FLIGHT  WAITING       P50       P99  FWD TOKENS", columns,
            left - std::min(left - 2, std::min(jobs.size(), job_rows)), lines);
  if (lines.size() > static_cast<std::size_t>(rows)) lines.resize(static_cast<std::size_t>(rows));
  for (std::string& line : lines) line = cut(line, columns);
  return lines;
}

}  // namespace kt::top
