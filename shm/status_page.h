// The status page: what monitors see. Written by the daemon only, mapped read-only by everybody else.
//
// Invariants
//   P1  A page of zeros is valid: a daemon that knows nothing yet. What is zero, empty or not finite is unknown.
//   P2  Counters only grow: a reader never sees one go back.
//   P3  Rows of ranks and jobs hold text, so each has a version: odd while it is written, +2 when done (RowWriter). A
//       reader copies the row and keeps the copy only when the version was even and stayed the same.
//   P4  A reader trusts no text to end, and no number to be in range.
// Ordering pairs (without fences: every store between the two V stores is a release, every load an acquire)
//   V0 version odd, before the row's stores  ↔ V3 version load after the row's loads: a copy that saw one of the new
//      values sees the odd version
//   V1 version even, after the row's stores  ↔ V2 version load-acquire before the row's loads
#pragma once
#include <array>
#include <atomic>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "shm/base/result.h"
#include "shm/model_card.h"
#include "shm/segment.h"

namespace kt::shm {

inline constexpr std::uint64_t kStatusMagic = 0x0001'7375'7461'7473ULL;
inline constexpr std::uint32_t kStatusSchema = 1;
inline constexpr std::uint32_t kNumRankRowsMax = 256;
inline constexpr std::uint32_t kNumJobRowsMax = 64;
inline constexpr std::uint32_t kNumLatencyBuckets = 256;  // Eight per octave from 1 µs: 1e3 ns · 2^(i/8).

enum class DaemonState : std::uint32_t { kLoading = 0, kServing = 1, kDraining = 2, kStalled = 3 };
const char* daemon_state_name(DaemonState state);  // "loading", …

using Counter = std::atomic<std::uint64_t>;
using Gauge = std::atomic<double>;

struct Totals {
  Counter forward_requests, backward_requests, fetch_requests, forward_layer_tokens, backward_layer_tokens, steps,
      batches, errors, sessions_attached, sessions_rejected;
};

// Latency of requests (published → replied) by bucket, see kNumLatencyBuckets.
struct LatencyHistogram {
  std::array<Counter, kNumLatencyBuckets> counts;
};
static_assert(std::atomic<double>::is_always_lock_free);
void record_latency(LatencyHistogram& histogram, std::uint64_t latency_ns);
// The middle of the bucket that holds the quantile (0…1), within 5 % of the sample. NaN when empty.
double latency_quantile_seconds(const LatencyHistogram& histogram, double quantile);

struct RankRow {
  std::atomic<std::uint32_t> version;
  std::atomic<std::uint32_t> used;                   // 0: free row.
  std::atomic<std::uint32_t> rank, pid, session_id;  // Guarded by version (P3), like the texts.
  char job_id[64];
  std::atomic<std::uint32_t> state;      // RankState.
  std::atomic<std::uint32_t> in_flight;  // Requests received and not answered.
  Gauge waiting_ratio;                   // Share of the last second in which it had a request in flight.
  Totals totals;                         // steps, batches and sessions_* stay 0 here and are not shown.
  LatencyHistogram latency;
};
enum class RankState : std::uint32_t { kIdle = 0, kForward = 1, kBackward = 2, kCollective = 3, kOther = 4 };
const char* rank_state_name(RankState state);

struct JobRow {
  std::atomic<std::uint32_t> version;
  std::atomic<std::uint32_t> used;
  std::atomic<std::uint32_t> world_size;
  std::atomic<std::uint32_t> num_members;
  char job_id[64];
  char name[64];
  char members[256];                  // Ranks, "0,1,2".
  std::atomic<std::uint32_t> failed;  // 0: OK, 1: FAILED.
  Counter step;
};

struct StatusPage {
  std::uint64_t magic;
  std::uint32_t schema;
  std::uint32_t layout_bytes;  // sizeof(StatusPage): a reader of another build refuses.
  // Written before the page is handed out.
  char version[32];
  char daemon_id[40];
  std::uint32_t pid;
  std::uint32_t numa_nodes, worker_threads;
  char kernels[16];
  char model[4096];          // A ModelCard as JSON: set_model.
  std::uint64_t started_ns;  // CLOCK_MONOTONIC.
  // Live.
  std::atomic<DaemonState> state;
  Counter load_bytes_done, load_bytes_total;
  Gauge load_seconds;
  Counter bytes_weights, bytes_adapters, bytes_gradients, bytes_optimizer, bytes_activations, bytes_arenas;
  Gauge forward_tokens_per_second, backward_tokens_per_second, worker_busy_ratio, tokens_per_batch;
  Totals totals;
  JobRow jobs[kNumJobRowsMax];
  RankRow ranks[kNumRankRowsMax];
};

// A path that does not fit is cut: half a JSON text would hide all other facts.
void set_model(StatusPage& page, ModelCard card);

// The object of `status --json`, `kt-top --once --json` and kt_coproc.stats(): numbers are numbers, units are in key
// names, what is unknown is absent. Serialises to valid UTF-8 whatever the page holds.
nlohmann::json status_json(const StatusPage& page);

// Daemon: creates the page; `fd` is read-only for whoever maps it later.
class StatusPageOwner {
 public:
  static Result<StatusPageOwner> create();
  StatusPage& page() const { return *static_cast<StatusPage*>(region_.get_address()); }
  int fd() const { return memfd_.fd(); }

 private:
  StatusPageOwner(Memfd memfd, boost::interprocess::mapped_region region)
      : memfd_(std::move(memfd)), region_(std::move(region)) {}
  Memfd memfd_;
  boost::interprocess::mapped_region region_;
};

// Monitor: maps a received descriptor read-only; refuses another layout.
class StatusPageView {
 public:
  static Result<StatusPageView> attach(UniqueFd fd);
  const StatusPage& page() const { return *static_cast<const StatusPage*>(region_.get_address()); }

 private:
  explicit StatusPageView(boost::interprocess::mapped_region region) : region_(std::move(region)) {}
  boost::interprocess::mapped_region region_;
};

// Daemon: while it lives, the row's guarded fields may be stored. One writer thread per row. Texts go through
// set_text, numbers are atomics.
//     RowWriter writer(row.version);
//     row.rank = 3;
//     set_text(row.job_id, sizeof row.job_id, job_id);
class RowWriter {
 public:
  explicit RowWriter(std::atomic<std::uint32_t>& version);
  ~RowWriter();
  RowWriter(const RowWriter&) = delete;
  RowWriter& operator=(const RowWriter&) = delete;

 private:
  std::atomic<std::uint32_t>& version_;
};

// Copies text into a fixed field, cut at a UTF-8 boundary, always NUL-terminated.
void set_text(char* field, std::size_t field_bytes, std::string_view text);
// The text of a fixed field that another process may be writing: ends at the first NUL or at the field's end.
std::string get_text(const char* field, std::size_t field_bytes);

}  // namespace kt::shm
