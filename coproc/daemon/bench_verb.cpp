// kt-coproc bench: measures, without a daemon.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>

#include "coproc/bench/cache_size.h"
#include "coproc/bench/layer_bench.h"
#include "coproc/bench/peaks.h"
#include "coproc/bench/report.h"
#include "coproc/daemon/cli.h"
#include "coproc/daemon/options.h"
#include "coproc/daemon/verbs.h"
#include "coproc/machine/cgroup.h"
#include "coproc/machine/topology.h"
#include "kernels/formats.h"

namespace kt::coproc {
namespace {

constexpr std::uint32_t kSizeMax = 65536;
constexpr std::uint32_t kExpertsMax = 4096;
constexpr std::uint32_t kLoraRankMax = 256;
constexpr std::uint32_t kSamplesMax = 1000;
constexpr double kSkewMax = 10;

struct BenchOptions {
  bool json = false;
  std::uint32_t threads = 0;  // 0: chosen from the machine.
  std::string kernels = "auto";
  std::string numa = "auto";
  LayerBenchOptions layer;
  std::vector<double> machine;  // --machine as it was given.
};

void add_common_options(CLI::App& app, BenchOptions& options) {
  app.add_flag("--json", options.json, "one JSON object instead of the table");
  app.add_option("--threads", options.threads, "compute workers (default: as kt-coproc run would have)")
      ->type_name("N")
      ->check(CLI::Range(1u, kThreadsMax));
  app.add_option("--kernels", options.kernels, "auto, amx, avx512, avx2 or scalar")
      ->type_name("NAME")
      ->check(CLI::IsMember({"auto", "amx", "avx512", "avx2", "scalar"}));
  app.add_option("--numa", options.numa, "auto, off, or pools of CPUs as kt-coproc run takes them")->type_name("POOLS");
  app.add_option("--weight-format", options.layer.weight_format, kernels::format_names(", "))
      ->type_name("FORMAT")
      ->check([](const std::string& name) {
        return kernels::find_format(name) != nullptr ? "" : name + " is not one of: " + kernels::format_names(", ");
      });
}

void add_layer_options(CLI::App& app, BenchOptions& options) {
  LayerBenchOptions& layer = options.layer;
  const auto number = [&](const char* flag, std::uint32_t& value, const char* help, std::uint32_t min,
                          std::uint32_t max) {
    app.add_option(flag, value, help)->type_name("N")->capture_default_str()->check(CLI::Range(min, max));
  };
  number("--hidden", layer.hidden_size, "hidden size", 1, kSizeMax);
  number("--intermediate", layer.intermediate_size, "intermediate size of an expert", 1, kSizeMax);
  number("--experts", layer.num_experts, "number of experts", 1, kExpertsMax);
  number("--top-k", layer.top_k, "experts of a token", 1, kExpertsMax);
  number("--rank", layer.lora_rank, "LoRA's r; 0: only without LoRA", 0, kLoraRankMax);
  number("--samples", layer.num_samples, "samples of each row", 1, kSamplesMax);
  app.add_option("--tokens", layer.num_tokens, "numbers of tokens (default: 1,32,512,2048)")
      ->type_name("T,T,…")
      ->delimiter(',')
      ->check(CLI::Range(1u, kBatchTokensMax));
  app.add_option("--skew", layer.skew, "Zipf exponent of the experts' popularity; 0: all equally often")
      ->type_name("ZIPF")
      ->check(CLI::Range(0.0, kSkewMax));
  app.add_option("--machine", options.machine, "predict times for a machine of that peak and memory bandwidth")
      ->type_name("FLOPS,BYTES")
      ->delimiter(',');
}

Status check(const BenchOptions& options, const std::string& name) {
  const auto refuse = [&](std::string why, std::string fix) {
    return Error{ErrorCode::kUsage, "cannot use these arguments of " + name, std::move(why), std::move(fix)};
  };
  if (options.layer.top_k > options.layer.num_experts) {
    return refuse("--top-k " + std::to_string(options.layer.top_k) + " is more than the number of experts, " +
                      std::to_string(options.layer.num_experts),
                  "choose a smaller --top-k, or more --experts");
  }
  const auto is_positive = [](double value) { return std::isfinite(value) && value > 0; };
  if (!options.machine.empty() &&
      (options.machine.size() != 2 || !std::all_of(options.machine.begin(), options.machine.end(), is_positive))) {
    return refuse("--machine takes two numbers above zero: FLOP/s and bytes/s", "for example --machine 229e12,500e9");
  }
  const std::string& format = options.layer.weight_format;
  const std::string why = kernels::why_not_on(*kernels::find_format(format), options.kernels);
  if (!why.empty()) {
    return refuse(why, "use --kernels auto with --weight-format " + format + ", or --weight-format " +
                           std::string(kernels::formats().front().name));
  }
  return ok_status();
}

// What both benchmarks need first.
struct BenchSetup {
  const kernels::KernelTable* table = nullptr;
  std::unique_ptr<WorkerPool> pool;
  std::vector<int> nodes;  // Of the pool's groups.
  BenchMachine machine;
};

Result<BenchSetup> prepare_bench(const BenchOptions& options) {
  BenchSetup setup;
  const std::int64_t element_bytes = kernels::find_format(options.layer.weight_format)->element_bytes;
  std::string why;
  setup.table = kernels::find_table(options.kernels, element_bytes, &why);
  if (setup.table == nullptr) {
    return Error{ErrorCode::kNoResources, "cannot use the kernels '" + options.kernels + "'", why,
                 "leave --kernels out: the best this CPU can run are chosen"};
  }
  KT_TRY(const NumaChoice numa, parse_numa(options.numa));
  KT_TRY(const WorkerPlan plan, plan_workers(inspect_machine(read_cgroup_limits().cpus), options.threads, numa));
  std::fprintf(stderr, "%s\n", plan.summary.c_str());
  if (!plan.warning.empty()) std::fprintf(stderr, "warning: %s\n", plan.warning.c_str());
  setup.machine = {processor_name(), std::string(setup.table->name), plan.num_workers(),
                   static_cast<std::uint32_t>(plan.pools.size()), element_bytes};
  setup.pool = std::make_unique<WorkerPool>(plan.pools);
  setup.nodes = plan.nodes;
  return setup;
}

void print(const std::string& table, const nlohmann::json& json, bool as_json) {
  std::fputs(as_json ? (json.dump(2) + "\n").c_str() : table.c_str(), stdout);
}

Status run_peaks(const BenchOptions& options) {
  constexpr int kMeasurements = 20;
  KT_TRY(const BenchSetup setup, prepare_bench(options));
  KT_TRY(const auto probe, PeakProbe::create(*setup.table, *setup.pool, last_level_cache_bytes()));
  Peaks best;
  for (int i = 0; i < kMeasurements; ++i) {
    const Peaks peaks = probe->measure();
    best.flops = std::max(best.flops, peaks.flops);
    best.dram_bytes_per_second = std::max(best.dram_bytes_per_second, peaks.dram_bytes_per_second);
  }
  print(peaks_table(setup.machine, best), peaks_json(setup.machine, best), options.json);
  return ok_status();
}

Status run_layer(const BenchOptions& options) {
  std::optional<Peaks> declared;
  if (!options.machine.empty()) declared = Peaks{options.machine[0], options.machine[1]};
  KT_TRY(const BenchSetup setup, prepare_bench(options));
  const auto progress = [](const std::string& line) { std::fprintf(stderr, "%s\n", line.c_str()); };
  KT_TRY(const LayerReport report, bench_layer(options.layer, *setup.table, *setup.pool, setup.nodes, progress));
  print(layer_table(setup.machine, report, declared), layer_json(setup.machine, report, declared), options.json);
  return ok_status();
}

}  // namespace

int bench_verb(const Arguments& arguments) {
  CLI::App app("Measures without a daemon. Only ratios within one run are worth comparing.", "kt-coproc bench");
  BenchOptions options;
  app.require_subcommand(1);
  CLI::App* const peaks = app.add_subcommand("peaks", "FLOP/s of the kernels, and the memory's bandwidth");
  add_common_options(*peaks, options);
  CLI::App* const layer = app.add_subcommand("layer", "forward and backward of one MoE layer, weights cold");
  add_common_options(*layer, options);
  add_layer_options(*layer, options);
  if (!arguments.empty() && arguments[0].rfind('-', 0) != 0 && arguments[0] != "peaks" && arguments[0] != "layer") {
    return report(Error{ErrorCode::kUsage, "kt-coproc bench cannot measure '" + arguments[0] + "'",
                        "it measures: peaks, layer", "kt-coproc bench --help"});
  }
  const auto parsed = parse_arguments(app, arguments);
  if (!parsed.ok()) return report(parsed.error());
  if (parsed.value() == Parsed::kHelpShown) return kExitOk;

  if (const Status checked = check(options, app.get_name()); !checked.ok()) return report(checked.error());
  const Status status = peaks->parsed() ? run_peaks(options) : run_layer(options);
  return status.ok() ? kExitOk : report(status.error());
}

}  // namespace kt::coproc
