// What the benchmarks found, for people and as the JSON of `--json`.
#pragma once
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "coproc/bench/layer_bench.h"

namespace kt::coproc {

// Who measured: the processor, the kernel table, the workers.
struct BenchMachine {
  std::string text() const;
  std::string processor;
  std::string kernels;
  std::uint32_t num_workers = 0;
  std::uint32_t num_pools = 1;
  std::int64_t element_bytes = 2;
};
// The processor's name as /proc/cpuinfo has it.
std::string processor_name();

// {schema, machine, peaks{bf16_flops, dram_bytes_per_second}, rows[]}; fp32_flops with 4-byte elements.
nlohmann::json peaks_json(const BenchMachine& machine, const Peaks& peaks);
std::string peaks_table(const BenchMachine& machine, const Peaks& peaks);

// `declared`: another machine, to predict its times.
nlohmann::json layer_json(const BenchMachine& machine, const LayerReport& report, const std::optional<Peaks>& declared);
std::string layer_table(const BenchMachine& machine, const LayerReport& report, const std::optional<Peaks>& declared);

}  // namespace kt::coproc
