// Forward and backward of one MoE layer, weights cold, with and without LoRA.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "coproc/bench/peaks.h"
#include "coproc/experts/traffic.h"
#include "coproc/machine/topology.h"
#include "kernels/kernel_table.h"
#include "shm/base/result.h"

namespace kt::coproc {

struct LayerBenchOptions {
  std::uint32_t hidden_size = 2048;  // The default sizes are Qwen3-30B-A3B's.
  std::uint32_t intermediate_size = 768;
  std::uint32_t num_experts = 128;
  std::uint32_t top_k = 8;
  std::vector<std::uint32_t> num_tokens = {1, 32, 512, 2048};
  std::string weight_format = "bf16";  // As --weight-format; the table has the elements it needs.
  std::uint32_t lora_rank = 8;         // 0: without LoRA only.
  double skew = 0;                     // See Router.
  std::uint32_t num_samples = 5;
};

// A direction at a number of tokens.
struct LayerRow {
  // FLOPs and bytes are of one call.
  double flops = 0;
  double bytes = 0;
  double roofline_seconds(const Peaks& peaks) const;

  bool is_backward = false;
  bool has_lora = false;
  std::uint32_t num_tokens = 0;
  double seconds = 0;         // Of one call, best sample;
  double seconds_median = 0;  // and the median.
  double share_of_peak = 0;   // Medians of the samples' shares of what the probes beside them gave.
  double share_of_dram = 0;
  double over_frozen = 0;       // Median of seconds / seconds without LoRA in the same round; 0: unknown, or no LoRA.
  std::uint32_t num_calls = 0;  // In a sample.
  std::uint32_t num_samples = 0;
  std::uint32_t num_discarded = 0;  // Other processes disturbed them.
  bool is_disturbed = false;        // There were no other samples, so these ones count.
  Traffic traffic;                  // Of the last call.
};

struct LayerReport {
  LayerBenchOptions options;
  std::uint32_t num_layers = 0;  // Whose weights take turns.
  std::uint64_t weight_bytes = 0;
  Peaks peaks;  // The best of all probes.
  std::vector<LayerRow> rows;
};

using Progress = std::function<void(const std::string& line)>;

// nodes: of the pool's groups, as for ExpertWeights::create. kNoResources where not even one layer's weights fit.
Result<LayerReport> bench_layer(const LayerBenchOptions& options, const kernels::KernelTable& table, WorkerPool& pool,
                                std::span<const int> nodes, const Progress& progress);

}  // namespace kt::coproc
