#include "coproc/bench/layer_bench.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <optional>
#include <utility>

#include "coproc/bench/cache_size.h"
#include "coproc/bench/elements.h"
#include "coproc/bench/other_load.h"
#include "coproc/bench/routing.h"
#include "coproc/bench/synthetic_layers.h"
#include "coproc/experts/expert_compute.h"
#include "coproc/machine/memory_room.h"
#include "kernels/formats.h"

namespace kt::coproc {
namespace {

using Clock = std::chrono::steady_clock;

constexpr double kSampleSeconds = 0.05;  // Long enough that a tick of /proc/stat, 10 ms, is not everything.
constexpr std::uint32_t kCallsMax = 16;
constexpr std::uint32_t kRoundsPerSample = 3;  // Disturbed samples are tried again, up to this many rounds in all.
constexpr std::uint64_t kCachesOfWeights = 4;
constexpr std::uint32_t kLayersMin = 2;

// One forward and its backward.
struct Call {
  SavedActivation activation;
  std::vector<std::byte> y;
  std::vector<std::byte> dy;
  std::vector<std::byte> dx;
  std::vector<float> dw;
};

struct Sample {
  std::size_t round = 0;
  double seconds = 0;  // Of one call.
  double share_of_peak = 0;
  double share_of_dram = 0;
};

// A number of tokens with or without LoRA, both directions.
struct Configuration {
  std::uint32_t num_tokens = 0;
  bool has_lora = false;
  std::uint32_t num_calls = 1;
  struct Direction {
    double flops = 0;
    double bytes = 0;
    std::vector<Sample> samples;
    std::vector<Sample> disturbed;
    Traffic traffic;
  };
  std::array<Direction, 2> directions;
};

double median(std::vector<double> values) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const std::size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

template <class Get>
double median_of(const std::vector<Sample>& samples, const Get& get) {
  std::vector<double> values;
  for (const Sample& sample : samples) values.push_back(get(sample));
  return median(std::move(values));
}

ExpertDims dims_of(const LayerBenchOptions& options, std::int64_t element_bytes, std::uint32_t num_layers) {
  ExpertDims dims;
  dims.num_layers = num_layers;
  for (std::uint32_t layer = 0; layer < num_layers; ++layer) dims.moe_layers.push_back(layer);
  dims.num_experts = options.num_experts;
  dims.top_k = options.top_k;
  dims.hidden_size = options.hidden_size;
  dims.intermediate_size = options.intermediate_size;
  dims.element_bytes = static_cast<std::uint32_t>(element_bytes);
  return dims;
}

// So many that all weights together are over four times the caches, at least two where there is memory for them.
std::uint32_t choose_num_layers(const ExpertDims& dims, const std::string& weight_format, std::uint64_t cache_bytes) {
  constexpr std::uint64_t kLayersMax = 64;
  const kernels::StorageFormat& format = *kernels::find_format(weight_format);
  const std::int64_t hidden = dims.hidden_padded();
  const std::int64_t intermediate = dims.intermediate_padded();
  const std::int64_t expert_bytes =
      (2 * intermediate * format.panel_stride(hidden) + hidden * format.panel_stride(intermediate)) /
      kernels::kPanelRows;
  const auto layer_bytes = static_cast<std::uint64_t>(expert_bytes) * dims.num_experts;
  const std::uint64_t wanted =
      std::clamp<std::uint64_t>(kCachesOfWeights * cache_bytes / layer_bytes + 1, kLayersMin, kLayersMax);
  // Half of what is free: adapters, activations and the probe's buffer need some too.
  const std::uint64_t fitting = read_memory_room(read_cgroup_limits()).bytes / 2 / layer_bytes;
  return static_cast<std::uint32_t>(std::clamp<std::uint64_t>(fitting, 1, wanted));
}

class LayerBench {
 public:
  LayerBench(const LayerBenchOptions& options, const kernels::KernelTable& table, WorkerPool& pool,
             SyntheticLayers layers, std::unique_ptr<PeakProbe> probe)
      : options_(options),
        layers_(std::move(layers)),
        probe_(std::move(probe)),
        compute_(layers_.dims, table, *layers_.weights, pool),
        router_(options.num_experts, options.top_k, options.skew, 7) {
    make_configurations(table.element_bytes);
  }

  LayerReport run(const Progress& progress);

 private:
  void make_configurations(std::int64_t element_bytes);
  void prepare_calls(const Configuration& configuration);
  // Seconds of all its calls.
  double forward(Configuration& configuration);
  double backward(Configuration& configuration);
  void account(Configuration::Direction& direction, bool is_first);
  Peaks measure_peaks();
  void warm_up(Configuration& configuration);
  void sample(Configuration& configuration, std::size_t round);
  bool needs_samples(std::uint32_t num_tokens) const;
  LayerRow row_of(const Configuration& configuration, std::size_t direction) const;
  double over_frozen(const Configuration& configuration, std::size_t direction) const;
  Adapter* adapter_of(const Configuration& c) { return c.has_lora ? layers_.adapter.get() : nullptr; }

  LayerBenchOptions options_;
  SyntheticLayers layers_;
  std::unique_ptr<PeakProbe> probe_;
  ExpertCompute compute_;
  Router router_;
  std::vector<Configuration> configurations_;
  std::vector<Call> calls_;
  std::vector<std::byte> x_;  // [largest number of tokens, hidden]
  std::uint32_t next_layer_ = 0;
  Peaks best_;
};

void LayerBench::make_configurations(std::int64_t element_bytes) {
  for (const std::uint32_t num_tokens : options_.num_tokens) {
    configurations_.push_back({.num_tokens = num_tokens, .has_lora = false, .num_calls = 1, .directions = {}});
    if (layers_.adapter == nullptr) continue;
    configurations_.push_back({.num_tokens = num_tokens, .has_lora = true, .num_calls = 1, .directions = {}});
  }
  const std::int64_t tokens_max = *std::max_element(options_.num_tokens.begin(), options_.num_tokens.end());
  x_ = random_elements(tokens_max * options_.hidden_size, element_bytes, 11);
}

// Routing of its own and the next layer for every call.
void LayerBench::prepare_calls(const Configuration& configuration) {
  const std::size_t num_slots = std::size_t{configuration.num_tokens} * options_.top_k;
  const std::size_t eb = layers_.dims.element_bytes;
  const std::size_t x_bytes = std::size_t{configuration.num_tokens} * options_.hidden_size * eb;
  calls_.resize(configuration.num_calls);
  for (Call& call : calls_) {
    SavedActivation& activation = call.activation;
    activation.layer = next_layer_++ % layers_.dims.num_layers;
    activation.num_tokens = configuration.num_tokens;
    activation.x.assign(x_.begin(), x_.begin() + static_cast<std::ptrdiff_t>(x_bytes));
    activation.ids = router_.route(configuration.num_tokens);
    activation.weights.assign(num_slots, 1.0f / static_cast<float>(options_.top_k));
    activation.gate_up.resize(num_slots * 2 * static_cast<std::size_t>(layers_.dims.intermediate_padded()) * eb);
    call.dy.assign(x_.end() - static_cast<std::ptrdiff_t>(x_bytes), x_.end());
    call.y.resize(x_bytes);
    call.dx.resize(x_bytes);
    call.dw.resize(num_slots);
  }
}

void LayerBench::account(Configuration::Direction& direction, bool is_first) {
  const Traffic& traffic = compute_.traffic();
  if (is_first) direction.flops = direction.bytes = 0;
  direction.flops += 6.0 * options_.hidden_size * options_.intermediate_size * static_cast<double>(traffic.num_routes);
  direction.bytes += static_cast<double>(traffic.total().bytes());
  direction.traffic = traffic;
}

double LayerBench::forward(Configuration& configuration) {
  double seconds = 0;
  for (Call& call : calls_) {
    SavedActivation& activation = call.activation;
    const ForwardItem item = {activation.x.data(),   activation.ids.data(), activation.weights.data(),
                              activation.num_tokens, call.y.data(),         activation.gate_up.data()};
    const auto begin = Clock::now();
    compute_.forward(activation.layer, adapter_of(configuration), {&item, 1});
    seconds += std::chrono::duration<double>(Clock::now() - begin).count();
    account(configuration.directions[0], &call == calls_.data());
  }
  return seconds;
}

double LayerBench::backward(Configuration& configuration) {
  double seconds = 0;
  for (Call& call : calls_) {
    const BackwardItem item = {call.dy.data(), &call.activation, call.dx.data(), call.dw.data()};
    const auto begin = Clock::now();
    compute_.backward(call.activation.layer, adapter_of(configuration), {&item, 1}, configuration.has_lora);
    seconds += std::chrono::duration<double>(Clock::now() - begin).count();
    account(configuration.directions[1], &call == calls_.data());
  }
  return seconds;
}

Peaks LayerBench::measure_peaks() {
  const Peaks peaks = probe_->measure();
  best_.flops = std::max(best_.flops, peaks.flops);
  best_.dram_bytes_per_second = std::max(best_.dram_bytes_per_second, peaks.dram_bytes_per_second);
  return peaks;
}

// The first calls also make scratch memory grow.
void LayerBench::warm_up(Configuration& configuration) {
  configuration.num_calls = 1;
  prepare_calls(configuration);
  const double seconds = std::min(forward(configuration), backward(configuration));
  configuration.num_calls =
      static_cast<std::uint32_t>(std::clamp(kSampleSeconds / seconds, 1.0, static_cast<double>(kCallsMax)));
}

void LayerBench::sample(Configuration& configuration, std::size_t round) {
  prepare_calls(configuration);
  const auto calls = static_cast<double>(configuration.num_calls);
  Peaks before;
  for (std::size_t n = 0; n < configuration.directions.size(); ++n) {
    Configuration::Direction& direction = configuration.directions[n];
    const OtherLoad others;
    if (n == 0) before = measure_peaks();
    const double seconds = n == 0 ? forward(configuration) : backward(configuration);
    const Peaks after = measure_peaks();
    const double flops_peak = (before.flops + after.flops) / 2;
    const double dram_peak = (before.dram_bytes_per_second + after.dram_bytes_per_second) / 2;
    const Sample sample = {round, seconds / calls, direction.flops / seconds / flops_peak,
                           direction.bytes / seconds / dram_peak};
    (others.is_disturbed() ? direction.disturbed : direction.samples).push_back(sample);
    direction.flops /= calls;
    direction.bytes /= calls;
    before = after;
  }
}

// With and without LoRA go on together: their ratio needs both in one round.
bool LayerBench::needs_samples(std::uint32_t num_tokens) const {
  for (const Configuration& configuration : configurations_) {
    if (configuration.num_tokens != num_tokens) continue;
    for (const auto& direction : configuration.directions) {
      if (direction.samples.size() < options_.num_samples) return true;
    }
  }
  return false;
}

double LayerBench::over_frozen(const Configuration& configuration, std::size_t direction) const {
  const auto frozen = std::find_if(configurations_.begin(), configurations_.end(), [&](const Configuration& other) {
    return other.num_tokens == configuration.num_tokens && !other.has_lora;
  });
  std::vector<double> ratios;
  for (const Sample& sample : configuration.directions[direction].samples) {
    for (const Sample& other : frozen->directions[direction].samples) {
      if (other.round == sample.round) ratios.push_back(sample.seconds / other.seconds);
    }
  }
  return median(std::move(ratios));
}

LayerRow LayerBench::row_of(const Configuration& configuration, std::size_t n) const {
  const Configuration::Direction& direction = configuration.directions[n];
  LayerRow row;
  row.is_backward = n == 1;
  row.has_lora = configuration.has_lora;
  row.num_tokens = configuration.num_tokens;
  row.num_calls = configuration.num_calls;
  row.flops = direction.flops;
  row.bytes = direction.bytes;
  row.traffic = direction.traffic;
  row.is_disturbed = direction.samples.empty();
  const std::vector<Sample>& samples = row.is_disturbed ? direction.disturbed : direction.samples;
  row.num_samples = static_cast<std::uint32_t>(samples.size());
  row.num_discarded = row.is_disturbed ? 0 : static_cast<std::uint32_t>(direction.disturbed.size());
  row.seconds = std::min_element(samples.begin(), samples.end(), [](const Sample& a, const Sample& b) {
                  return a.seconds < b.seconds;
                })->seconds;
  row.seconds_median = median_of(samples, [](const Sample& sample) { return sample.seconds; });
  row.share_of_peak = median_of(samples, [](const Sample& sample) { return sample.share_of_peak; });
  row.share_of_dram = median_of(samples, [](const Sample& sample) { return sample.share_of_dram; });
  if (row.has_lora) row.over_frozen = over_frozen(configuration, n);
  return row;
}

LayerReport LayerBench::run(const Progress& progress) {
  // Largest first: scratch then grows once.
  std::vector<Configuration*> by_size;
  for (Configuration& configuration : configurations_) by_size.push_back(&configuration);
  std::stable_sort(by_size.begin(), by_size.end(),
                   [](const auto* a, const auto* b) { return a->num_tokens > b->num_tokens; });
  for (Configuration* configuration : by_size) {
    progress("warming up: " + std::to_string(configuration->num_tokens) + " tokens" +
             (configuration->has_lora ? " with LoRA" : ""));
    warm_up(*configuration);
  }
  const std::size_t rounds_max = std::size_t{options_.num_samples} * kRoundsPerSample;
  for (std::size_t round = 0; round < rounds_max; ++round) {
    std::string sizes;
    for (Configuration& configuration : configurations_) {
      if (round >= options_.num_samples && !needs_samples(configuration.num_tokens)) continue;
      sample(configuration, round);
      if (!configuration.has_lora) sizes += " " + std::to_string(configuration.num_tokens);
    }
    if (sizes.empty()) break;
    progress("round " + std::to_string(round + 1) + (round < options_.num_samples ? "" : ", again for lack of quiet") +
             ": sampled" + sizes + " tokens");
  }
  LayerReport report;
  report.options = options_;
  report.num_layers = layers_.dims.num_layers;
  report.weight_bytes = layers_.weights->bytes();
  report.peaks = best_;
  for (const Configuration& configuration : configurations_) {
    for (std::size_t n = 0; n < configuration.directions.size(); ++n) report.rows.push_back(row_of(configuration, n));
  }
  return report;
}

}  // namespace

double LayerRow::roofline_seconds(const Peaks& peaks) const {
  return std::max(flops / peaks.flops, bytes / peaks.dram_bytes_per_second);
}

Result<LayerReport> bench_layer(const LayerBenchOptions& options, const kernels::KernelTable& table, WorkerPool& pool,
                                std::span<const int> nodes, const Progress& progress) {
  const std::uint64_t cache_bytes = last_level_cache_bytes();
  const std::uint32_t num_layers =
      choose_num_layers(dims_of(options, table.element_bytes, 1), options.weight_format, cache_bytes);
  progress("filling " + std::to_string(num_layers) + " layers for caches of " + bytes_text(cache_bytes));
  KT_TRY(SyntheticLayers layers, make_synthetic_layers(dims_of(options, table.element_bytes, num_layers),
                                                       options.weight_format, options.lora_rank, table, pool, nodes));
  KT_TRY(std::unique_ptr<PeakProbe> probe, PeakProbe::create(table, pool, cache_bytes));
  LayerBench bench(options, table, pool, std::move(layers), std::move(probe));
  return bench.run(progress);
}

}  // namespace kt::coproc
