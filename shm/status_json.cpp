// status_json: the status page as the one JSON object that every tool shows.
#include <cmath>
#include <optional>
#include <string>

#include "shm/doorbell.h"
#include "shm/status_page.h"
#include "shm/text.h"

namespace kt::shm {
namespace {

using nlohmann::json;

// A row that stays odd belongs to a writer that was preempted or died: leave it out rather than wait.
constexpr int kRowReadsMax = 1000;

void put_text(json& object, const char* key, const std::string& text) {
  if (!text.empty()) object[key] = valid_utf8(text);
}
template <std::size_t N>
void put_text(json& object, const char* key, const char (&field)[N]) {
  put_text(object, key, get_text(field, N));
}
void put_known(json& object, const char* key, std::uint64_t value) {
  if (value != 0) object[key] = value;
}
void put_finite(json& object, const char* key, double value) {
  if (std::isfinite(value)) object[key] = value;
}

// The guarded fields of a row, as one consistent copy (P3), or nullopt: a free row, or one that could not be read.
template <class Row, class Copy>
auto read_row(const Row& row, const Copy& copy) -> std::optional<decltype(copy(row))> {
  for (int i = 0; i < kRowReadsMax; ++i) {
    const std::uint32_t before = row.version.load(std::memory_order_acquire);  // V2 ↔ V1
    if (before % 2 == 0) {
      const bool used = row.used.load(std::memory_order_acquire) != 0;  // V3 ↔ V0
      auto fields = copy(row);
      if (row.version.load(std::memory_order_relaxed) == before) {  // V3 ↔ V0
        if (!used) return std::nullopt;
        return fields;
      }
    }
    cpu_relax();
  }
  return std::nullopt;
}

struct JobFields {
  std::uint32_t world_size, num_members;
  std::string job_id, name, members;
};
struct RankFields {
  std::uint32_t rank, pid;
  std::string job_id;
};

// "0,1,2" as numbers. A list that fills its field was cut: its last number may be half a number.
json member_list(std::string text, std::uint32_t num_members, std::size_t field_bytes) {
  if (text.size() + 1 >= field_bytes) text.resize(text.rfind(',') == std::string::npos ? 0 : text.rfind(','));
  json members = json::array();
  for (std::size_t start = 0; start < text.size() && members.size() < num_members;) {
    const std::size_t end = std::min(text.find(',', start), text.size());
    std::uint64_t rank = 0;
    bool is_number = end > start && end - start <= 9;
    for (std::size_t i = start; is_number && i < end; ++i) {
      is_number = text[i] >= '0' && text[i] <= '9';
      rank = rank * 10 + static_cast<std::uint64_t>(text[i] - '0');
    }
    if (is_number) members.push_back(rank);
    start = end + 1;
  }
  return members;
}

json jobs_json(const StatusPage& page) {
  json jobs = json::array();
  for (const JobRow& row : page.jobs) {
    const auto fields = read_row(row, [](const JobRow& from) {
      return JobFields{from.world_size.load(std::memory_order_acquire),
                       from.num_members.load(std::memory_order_acquire), get_text(from.job_id, sizeof from.job_id),
                       get_text(from.name, sizeof from.name), get_text(from.members, sizeof from.members)};
    });
    if (!fields) continue;
    json job;
    put_text(job, "job_id", fields->job_id);
    put_text(job, "name", fields->name);
    job["state"] = row.failed.load(std::memory_order_relaxed) != 0 ? "failed" : "ok";
    job["world_size"] = fields->world_size;
    job["members"] = member_list(fields->members, fields->num_members, sizeof row.members);
    job["step"] = row.step.load(std::memory_order_relaxed);
    jobs.push_back(std::move(job));
  }
  return jobs;
}

// The totals that make sense for one rank and for the daemon alike.
json shared_totals_json(const Totals& totals) {
  return {{"forward_requests", totals.forward_requests.load(std::memory_order_relaxed)},
          {"backward_requests", totals.backward_requests.load(std::memory_order_relaxed)},
          {"fetch_requests", totals.fetch_requests.load(std::memory_order_relaxed)},
          {"forward_layer_tokens", totals.forward_layer_tokens.load(std::memory_order_relaxed)},
          {"backward_layer_tokens", totals.backward_layer_tokens.load(std::memory_order_relaxed)},
          {"errors", totals.errors.load(std::memory_order_relaxed)}};
}

json totals_json(const Totals& totals) {
  json object = shared_totals_json(totals);
  object["steps"] = totals.steps.load(std::memory_order_relaxed);
  object["batches"] = totals.batches.load(std::memory_order_relaxed);
  object["sessions_attached"] = totals.sessions_attached.load(std::memory_order_relaxed);
  object["sessions_rejected"] = totals.sessions_rejected.load(std::memory_order_relaxed);
  return object;
}

json ranks_json(const StatusPage& page) {
  json ranks = json::array();
  for (const RankRow& row : page.ranks) {
    const auto fields = read_row(row, [](const RankRow& from) {
      return RankFields{from.rank.load(std::memory_order_acquire), from.pid.load(std::memory_order_acquire),
                        get_text(from.job_id, sizeof from.job_id)};
    });
    if (!fields) continue;
    json rank;
    rank["rank"] = fields->rank;
    put_known(rank, "pid", fields->pid);
    put_text(rank, "job_id", fields->job_id);
    rank["state"] = rank_state_name(static_cast<RankState>(row.state.load(std::memory_order_relaxed)));
    rank["in_flight"] = row.in_flight.load(std::memory_order_relaxed);
    rank["totals"] = shared_totals_json(row.totals);
    put_finite(rank, "latency_p50_seconds", latency_quantile_seconds(row.latency, 0.50));
    put_finite(rank, "latency_p99_seconds", latency_quantile_seconds(row.latency, 0.99));
    put_finite(rank, "waiting_ratio", row.waiting_ratio.load(std::memory_order_relaxed));
    ranks.push_back(std::move(rank));
  }
  return ranks;
}

// Empty unless the page holds a whole card (P4).
json model_json(const StatusPage& page) {
  constexpr bool kAllowExceptions = false;
  const auto card = parse_model_card(json::parse(get_text(page.model, sizeof page.model), nullptr, kAllowExceptions));
  if (!card.ok()) return json::object();
  json model = to_json(card.value());
  for (const char* for_ranks_only : {"moe_layers", "expert_names"}) model.erase(for_ranks_only);
  return model;
}

json memory_json(const StatusPage& page) {
  return {{"weights", page.bytes_weights.load(std::memory_order_relaxed)},
          {"adapters", page.bytes_adapters.load(std::memory_order_relaxed)},
          {"gradients", page.bytes_gradients.load(std::memory_order_relaxed)},
          {"optimizer", page.bytes_optimizer.load(std::memory_order_relaxed)},
          {"activations", page.bytes_activations.load(std::memory_order_relaxed)},
          {"arenas", page.bytes_arenas.load(std::memory_order_relaxed)}};
}

json load_json(const StatusPage& page) {
  json load = {{"bytes_done", page.load_bytes_done.load(std::memory_order_relaxed)}};
  put_known(load, "bytes_total", page.load_bytes_total.load(std::memory_order_relaxed));
  put_finite(load, "seconds", page.load_seconds.load(std::memory_order_relaxed));
  return load;
}

json rates_json(const StatusPage& page) {
  json rates = json::object();
  put_finite(rates, "forward_tokens_per_second", page.forward_tokens_per_second.load(std::memory_order_relaxed));
  put_finite(rates, "backward_tokens_per_second", page.backward_tokens_per_second.load(std::memory_order_relaxed));
  put_finite(rates, "worker_busy_ratio", page.worker_busy_ratio.load(std::memory_order_relaxed));
  put_finite(rates, "tokens_per_batch", page.tokens_per_batch.load(std::memory_order_relaxed));
  return rates;
}

}  // namespace

json status_json(const StatusPage& page) {
  json status = {{"schema", kStatusSchema}};
  put_text(status, "version", page.version);
  put_known(status, "pid", page.pid);
  put_text(status, "daemon_id", page.daemon_id);
  status["state"] = daemon_state_name(page.state.load(std::memory_order_relaxed));
  const std::uint64_t started_ns = page.started_ns;
  const std::uint64_t now = now_ns();
  if (started_ns != 0 && started_ns <= now) status["uptime_seconds"] = static_cast<double>(now - started_ns) * 1e-9;
  status["load"] = load_json(page);
  status["model"] = model_json(page);
  put_text(status, "kernels", page.kernels);
  put_known(status, "numa_nodes", page.numa_nodes);
  put_known(status, "worker_threads", page.worker_threads);
  status["memory_bytes"] = memory_json(page);
  status["jobs"] = jobs_json(page);
  status["ranks"] = ranks_json(page);
  status["rates"] = rates_json(page);
  status["totals"] = totals_json(page.totals);
  return status;
}

}  // namespace kt::shm
