#include "coproc/daemon/weight_loading.h"

#include <spdlog/spdlog.h>
#include <sys/resource.h>

#include <chrono>
#include <string>

#include "coproc/machine/memory_room.h"
#include "coproc/model/progress.h"
#include "kernels/formats.h"

namespace kt::coproc {
namespace {

// Less than the workers' share where there is no core to spare.
constexpr int kWriterNiceness = 10;

class WeightsSink : public ExpertSink {
 public:
  explicit WeightsSink(ExpertWeights& weights) : weights_(weights) {}
  void expert(std::uint32_t moe_index, std::uint32_t expert, const void* gate, const void* up,
              const void* down) override {
    weights_.set_expert(moe_index, expert, gate, up, down);
  }

 private:
  ExpertWeights& weights_;
};

// All that decides what the records hold, besides the checkpoint's weights. No kernel table: all of them quantise to
// the same bits.
std::string layout_text(const ExpertDims& dims, const kernels::StorageFormat& format, std::uint64_t record_bytes) {
  std::string text = "layout " + std::to_string(format.layout_version);
  const auto add = [&](const char* name, std::int64_t value) {
    text += std::string(" ") + name + std::to_string(value);
  };
  add("experts ", dims.num_experts);
  add("hidden ", dims.hidden_size);
  add("padded to ", dims.hidden_padded());
  add("intermediate ", dims.intermediate_size);
  add("padded to ", dims.intermediate_padded());
  add("record ", static_cast<std::int64_t>(record_bytes));
  text += " layers";
  for (const std::uint32_t layer : dims.moe_layers) add("", layer);
  return text;
}

void warn(const Error& error) { spdlog::warn("weight cache: {}: {}; {}", error.what, error.why, error.fix); }

class Timer {
 public:
  // "1.3 GB in 0.4 s (3.2 GB/s)"
  std::string text(std::uint64_t bytes) const {
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start_;
    return fmt::format("{} in {:.2f} s ({:.2f} GB/s)", bytes_text(bytes), seconds.count(),
                       static_cast<double>(bytes) * 1e-9 / seconds.count());
  }

 private:
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace

WeightLoading::WeightLoading(Prepared& prepared, const RunOptions& options, LoadProgress& progress)
    : prepared_(prepared), progress_(progress) {
  const kernels::StorageFormat& format = *kernels::find_format(options.weight_format);
  if (!format.quantised || options.weight_cache.empty()) return;
  ExpertWeights& weights = *prepared.weights;
  const std::uint64_t num_experts = prepared.dims.num_experts;
  const CacheRecords records = {.count = num_experts * prepared.dims.moe_layers.size(),
                                .bytes = weights.expert_data(0, 0).size(),
                                .place = [&weights, num_experts](std::uint64_t index) {
                                  return weights
                                      .expert_data(static_cast<std::uint32_t>(index / num_experts),
                                                   static_cast<std::uint32_t>(index % num_experts))
                                      .data();
                                }};
  WeightCacheKey key = make_weight_cache_key(prepared.checkpoint, prepared.card.fingerprint, options.weight_format,
                                             layout_text(prepared.dims, format, records.bytes));
  auto cache = WeightCache::open(options.weight_cache, std::move(key), records);
  if (cache.ok()) {
    cache_ = std::move(cache).value();
  } else {
    warn(cache.error());
  }
}

Status WeightLoading::load(std::uint32_t num_threads) {
  if (!cache_) return load_checkpoint(num_threads);
  const Timer timer;
  {
    ProgressPrinter printer(progress_);
    Status status = cache_->read(progress_, num_threads);
    if (status.ok()) {
      printer.finish();
      spdlog::info("weight cache: hit: {} from {}", timer.text(progress_.bytes_done.load()), cache_->path());
      cache_.reset();
      return status;
    }
    if (status.error().code == ErrorCode::kCoprocDied) return status;
    if (status.error().code == ErrorCode::kNotFound) {
      spdlog::info("weight cache: miss: no {}", cache_->path());
    } else {
      warn(status.error());
    }
  }
  progress_.bytes_done.store(0);
  return load_checkpoint(num_threads);
}

Status WeightLoading::load_checkpoint(std::uint32_t num_threads) {
  WeightsSink sink(*prepared_.weights);
  ProgressPrinter printer(progress_);
  Status status = load_experts(prepared_.checkpoint, prepared_.element, sink, progress_, num_threads);
  if (status.ok()) printer.finish();
  return status;
}

void WeightLoading::write_cache() {
  if (!cache_) return;
  // Of this thread only.
  static_cast<void>(::setpriority(PRIO_PROCESS, 0, kWriterNiceness));
  const Timer timer;
  const Status status = cache_->write(progress_.cancel);
  if (status.ok()) {
    spdlog::info("weight cache: wrote {} to {}", timer.text(cache_->file_bytes()), cache_->path());
  } else if (status.error().code == ErrorCode::kAlreadyRunning || status.error().code == ErrorCode::kCoprocDied) {
    spdlog::info("weight cache: not written: {}: {}", status.error().what, status.error().why);
  } else {
    warn(status.error());
  }
}

}  // namespace kt::coproc
