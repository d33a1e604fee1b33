// The options of `kt-coproc run`, checked. Precedence: flag > environment > config file > default.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "coproc/daemon/cli.h"
#include "coproc/machine/numa.h"
#include "shm/base/result.h"

namespace kt::coproc {

inline constexpr std::uint32_t kThreadsMax = 1024;
inline constexpr std::uint32_t kBatchTokensMax = 1 << 20;

struct RunOptions {
  std::string model;
  std::string socket_path;    // Absolute, at most 107 bytes.
  std::uint32_t threads = 0;  // 0: chosen from the machine.
  NumaChoice numa;
  std::string weight_format = "bf16";  // Of kernels::formats().
  std::string weight_cache;            // Directory for quantised weights; empty: none.
  std::string kernels = "auto";        // "auto" or the name of a table; whether the CPU has it is another question.
  bool deterministic = false;
  std::uint64_t activation_bytes_max = 0;  // 0: chosen from the machine.
  std::uint32_t batch_tokens_max = 16384;
};

// The settings of run as flags of `app`. Everything wrong is kUsage and names where the value came from. After
// kHelpShown the options are empty.
Result<Parsed> parse_run_options(CLI::App& app, const std::vector<std::string>& arguments, RunOptions& options);

}  // namespace kt::coproc
