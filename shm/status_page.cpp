#include "shm/status_page.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "shm/text.h"

namespace kt::shm {
namespace bip = boost::interprocess;
namespace {

// P1: a fresh memfd is a page without any constructor having run.
static_assert(std::is_standard_layout_v<StatusPage> && std::is_trivially_destructible_v<StatusPage>);

constexpr double kFirstBucketNs = 1e3;
constexpr double kBucketsPerOctave = 8;

Error bad_page(ErrorCode code, std::string why) {
  return Error{code, "the daemon's status page cannot be read", std::move(why),
               "run kt-coproc and kt-top of the same release"};
}

}  // namespace

const char* daemon_state_name(DaemonState state) {
  switch (state) {
    case DaemonState::kLoading:
      return "loading";
    case DaemonState::kServing:
      return "serving";
    case DaemonState::kDraining:
      return "draining";
    case DaemonState::kStalled:
      return "stalled";
  }
  return "unknown";
}

const char* rank_state_name(RankState state) {
  switch (state) {
    case RankState::kIdle:
      return "idle";
    case RankState::kForward:
      return "forward";
    case RankState::kBackward:
      return "backward";
    case RankState::kCollective:
      return "collective";
    case RankState::kOther:
      return "other";
  }
  return "unknown";
}

void record_latency(LatencyHistogram& histogram, std::uint64_t latency_ns) {
  const double octaves = std::log2(std::max(static_cast<double>(latency_ns), kFirstBucketNs) / kFirstBucketNs);
  const auto bucket = static_cast<std::size_t>(octaves * kBucketsPerOctave);
  histogram.counts[std::min<std::size_t>(bucket, kNumLatencyBuckets - 1)].fetch_add(1, std::memory_order_relaxed);
}

double latency_quantile_seconds(const LatencyHistogram& histogram, double quantile) {
  std::array<std::uint64_t, kNumLatencyBuckets> counts{};
  double num_samples = 0;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    counts[i] = histogram.counts[i].load(std::memory_order_relaxed);
    num_samples += static_cast<double>(counts[i]);
  }
  if (num_samples == 0) return std::numeric_limits<double>::quiet_NaN();
  const double position = std::max(1.0, std::ceil(std::clamp(quantile, 0.0, 1.0) * num_samples));
  double num_below = 0;
  std::size_t bucket = 0;
  for (std::size_t i = 0; i < counts.size() && num_below < position; ++i) {
    if (counts[i] == 0) continue;
    num_below += static_cast<double>(counts[i]);
    bucket = i;
  }
  return kFirstBucketNs * std::exp2((static_cast<double>(bucket) + 0.5) / kBucketsPerOctave) * 1e-9;
}

Result<StatusPageOwner> StatusPageOwner::create() {
  KT_TRY(Memfd memfd, Memfd::create("kt-coproc-status", sizeof(StatusPage), /*huge_pages=*/false));
  try {
    // Mapped before it is sealed: only this mapping can write.
    bip::mapped_region region(memfd, bip::read_write, 0, sizeof(StatusPage));
    KT_TRY_STATUS(memfd.seal(/*read_only=*/true));
    StatusPageOwner owner(std::move(memfd), std::move(region));
    owner.page().magic = kStatusMagic;
    owner.page().schema = kStatusSchema;
    owner.page().layout_bytes = sizeof(StatusPage);
    return owner;
  } catch (const bip::interprocess_exception& failure) {
    return Error{ErrorCode::kOs, "mmap of the status page failed", failure.what(),
                 "free memory; see `free -m` and the container's memory limit"};
  }
}

Result<StatusPageView> StatusPageView::attach(UniqueFd fd) {
  const Memfd memfd(std::move(fd));
  if (!memfd.is_sealed())
    return bad_page(ErrorCode::kInvalidArgument, "it can still be truncated: its seals are missing");
  KT_TRY(const std::uint64_t bytes, memfd.size());
  if (bytes != sizeof(StatusPage)) {
    return bad_page(ErrorCode::kVersionMismatch, "it has " + std::to_string(bytes) + " bytes, this program's layout " +
                                                     std::to_string(sizeof(StatusPage)));
  }
  try {
    StatusPageView view(bip::mapped_region(memfd, bip::read_only, 0, sizeof(StatusPage)));
    const StatusPage& page = view.page();
    if (page.magic != kStatusMagic || page.schema != kStatusSchema || page.layout_bytes != sizeof(StatusPage)) {
      return bad_page(ErrorCode::kVersionMismatch, "its magic number, schema or layout is not this program's");
    }
    return view;
  } catch (const bip::interprocess_exception& failure) {
    return bad_page(ErrorCode::kOs, std::string("mmap failed: ") + failure.what());
  }
}

RowWriter::RowWriter(std::atomic<std::uint32_t>& version) : version_(version) {
  version_.store(version_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);  // V0 ↔ V3
}

RowWriter::~RowWriter() {
  version_.store(version_.load(std::memory_order_relaxed) + 1, std::memory_order_release);  // V1 ↔ V2
}

void set_model(StatusPage& page, ModelCard card) {
  std::string text = to_json(card).dump();
  while (text.size() >= sizeof page.model && !card.path.empty()) {
    card.path = cut_utf8(card.path, card.path.size() / 2);
    text = to_json(card).dump();
  }
  set_text(page.model, sizeof page.model, text);
}

void set_text(char* field, std::size_t field_bytes, std::string_view text) {
  if (field_bytes == 0) return;
  const std::string_view kept = cut_utf8(text, field_bytes - 1);
  for (std::size_t i = 0; i < field_bytes; ++i) {
    std::atomic_ref(field[i]).store(i < kept.size() ? kept[i] : '\0', std::memory_order_release);  // V0 ↔ V3
  }
}

std::string get_text(const char* field, std::size_t field_bytes) {
  std::string text;
  for (std::size_t i = 0; i < field_bytes; ++i) {
    // atomic_ref takes no const object before C++26; a load does not write.
    const char byte = std::atomic_ref(const_cast<char&>(field[i])).load(std::memory_order_acquire);  // V3 ↔ V0
    if (byte == '\0') break;
    text += byte;
  }
  return text;
}

}  // namespace kt::shm
