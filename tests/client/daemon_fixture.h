// A real kt-coproc with a small checkpoint, and ranks that train with it: all of them processes.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "client/session.h"
#include "tests/client/child_process.h"
#include "tests/client/client_test.h"
#include "tests/client/rank_process.h"
#include "tests/client/training_task.h"
#include "tests/support/checkpoint_writer.h"
#include "tests/support/temp_dir.h"

namespace kt::client::testing {

class DaemonFixture : public ::testing::Test {
 protected:
  // A daemon that serves the Task's sizes, and is ready.
  void start_daemon(bool bf16);
  std::string address() const { return "unix:" + directory_.file("kt.sock"); }
  // Whether the daemon takes a new session and serves it.
  bool daemon_serves();

  struct Rank {
    RankOrders orders;
    ChildProcess process;
  };
  // The ranks of a job, each in a process. pause_in_step: of rank `paused_rank`.
  std::vector<Rank> start_ranks(const Task& task, const std::string& job_id, std::int64_t pause_in_step = -1,
                                std::uint32_t paused_rank = 0);
  static void wait_paused(Rank& rank);
  static void resume(const Rank& rank);
  // What the rank wrote; a test failure with its log when it did not end with `expected_status`.
  static nlohmann::json report_of(Rank& rank, int expected_status);
  // Ranks that must all succeed.
  static std::vector<TrainingResult> results_of(std::vector<Rank>& ranks);

  const HangWatchdog watchdog_;
  kt::testing::TempDir directory_;
  kt::testing::WrittenCheckpoint checkpoint_;
  std::unique_ptr<ChildProcess> daemon_;
};

}  // namespace kt::client::testing
