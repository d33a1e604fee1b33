// The command line of test_rank_process: one JSON object. It trains a Task as one rank and writes its TrainingResult,
// or the Error it got, as JSON.
#pragma once
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

namespace kt::client::testing {

struct RankOrders {
  std::string address;  // Of the daemon.
  std::string output;   // File of the result; written whole, at the end.
  std::string job_id;   // For more than one rank.
  unsigned seed = 1;
  std::uint32_t rank = 0, world_size = 1, num_steps = 20;
  bool bf16 = false, shared_a = true;
  double max_norm = 0;
  // In this step, after the first micro-batch: creates paused_file() and waits for resume_file(). -1: never.
  std::int64_t pause_in_step = -1;
  NLOHMANN_DEFINE_TYPE_INTRUSIVE(RankOrders, address, output, job_id, seed, rank, world_size, num_steps, bf16, shared_a,
                                 max_norm, pause_in_step)

  std::string paused_file() const { return output + ".paused"; }
  std::string resume_file() const { return output + ".resume"; }
};

}  // namespace kt::client::testing
