#include "tests/client/daemon_fixture.h"

#include <filesystem>
#include <fstream>

namespace kt::client::testing {

void DaemonFixture::start_daemon(bool bf16) {
  const TaskSizes sizes;
  kt::testing::CheckpointSpec spec;
  spec.num_layers = sizes.num_layers;
  spec.mlp_only_layers = sizes.dense_layers;
  spec.num_experts = sizes.num_experts;
  spec.top_k = sizes.top_k;
  spec.hidden_size = sizes.hidden_size;
  spec.intermediate_size = sizes.intermediate_size;
  spec.dtype = bf16 ? kt::testing::WeightDType::kBf16 : kt::testing::WeightDType::kF32;
  checkpoint_ = kt::testing::write_checkpoint(directory_.path() / "model", spec);
  ASSERT_EQ(checkpoint_.moe_layers, sizes.moe_layers);
  const std::vector<std::string> command = {KT_COPROC_PATH,    "run",
                                            "--model",         checkpoint_.path,
                                            "--socket",        directory_.file("kt.sock"),
                                            "--weight-format", bf16 ? "bf16" : "fp32",
                                            "--threads",       "2"};
  daemon_ = std::make_unique<ChildProcess>(command, directory_.file("daemon.log"));
  wait_until([&] { return daemon_serves() || !daemon_->is_running(); });
  ASSERT_TRUE(daemon_->is_running()) << daemon_->log();
}

bool DaemonFixture::daemon_serves() {
  ConnectOptions options;
  options.address = address();
  options.arena_bytes = shm::kArenaBytesMin;
  const auto session = Session::connect(options);
  return session.ok() && session.value()->barrier(0).ok();
}

std::vector<DaemonFixture::Rank> DaemonFixture::start_ranks(const Task& task, const std::string& job_id,
                                                            std::int64_t pause_in_step, std::uint32_t paused_rank) {
  std::vector<Rank> ranks;
  for (std::uint32_t rank = 0; rank < task.world_size; ++rank) {
    RankOrders orders;
    orders.address = address();
    orders.output = directory_.file(job_id + "." + std::to_string(rank));
    orders.job_id = job_id;
    orders.seed = task.seed;
    orders.rank = rank;
    orders.world_size = task.world_size;
    orders.num_steps = task.num_steps;
    orders.bf16 = task.bf16;
    orders.shared_a = task.shared_a;
    orders.max_norm = task.max_norm;
    orders.pause_in_step = rank == paused_rank ? pause_in_step : -1;
    ranks.push_back(
        {orders, ChildProcess({KT_RANK_PROCESS_PATH, nlohmann::json(orders).dump()}, orders.output + ".log")});
  }
  return ranks;
}

void DaemonFixture::wait_paused(Rank& rank) {
  wait_until([&] { return std::filesystem::exists(rank.orders.paused_file()) || !rank.process.is_running(); });
  ASSERT_TRUE(rank.process.is_running()) << rank.process.log();
}

void DaemonFixture::resume(const Rank& rank) { std::ofstream(rank.orders.resume_file()).flush(); }

nlohmann::json DaemonFixture::report_of(Rank& rank, int expected_status) {
  const auto status = rank.process.wait();
  std::ifstream file(rank.orders.output);
  nlohmann::json report = nlohmann::json::parse(file, nullptr, /*allow_exceptions=*/false);
  EXPECT_TRUE(status.has_value()) << "rank " << rank.orders.rank << " hangs";
  if (status) {
    EXPECT_EQ(*status, expected_status) << "rank " << rank.orders.rank << ": " << rank.process.log() << report.dump();
  }
  return report;
}

std::vector<TrainingResult> DaemonFixture::results_of(std::vector<Rank>& ranks) {
  std::vector<TrainingResult> results;
  for (Rank& rank : ranks) {
    const nlohmann::json report = report_of(rank, 0);
    results.push_back(report.contains("params") ? report.get<TrainingResult>() : TrainingResult{});
  }
  return results;
}

}  // namespace kt::client::testing
