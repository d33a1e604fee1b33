// C++ ranks, each a process, train an adapter through the real daemon, and match the whole training in double.
#include <algorithm>
#include <cmath>
#include <sstream>

#include "tests/client/daemon_fixture.h"
#include "tests/client/reference_training.h"
#include "tests/support/expert_reference.h"

namespace kt::client::testing {
namespace {

using kt::test::relative_l2;

// Names what differs most, so that a failure tells where to look.
void expect_close(const std::map<std::string, std::vector<double>>& got,
                  const std::map<std::string, std::vector<double>>& want, double tolerance, const char* what) {
  double worst = 0;
  for (const auto& [key, values] : want) {
    ASSERT_TRUE(got.contains(key)) << what << " " << key;
    const double error = relative_l2(got.at(key), values);
    EXPECT_LE(error, tolerance) << what << " " << key << ", " << values.size() << " values";
    worst = std::max(worst, error);
  }
  EXPECT_FALSE(want.empty());
  std::printf("  %s: worst rel-L2 %.2e of %.0e allowed\n", what, worst, tolerance);
}

void expect_close(const std::vector<double>& got, const std::vector<double>& want, double tolerance, const char* what) {
  ASSERT_EQ(got.size(), want.size()) << what;
  double worst = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double error = std::abs(got[i] - want[i]) / std::max(std::abs(want[i]), 1e-30);
    EXPECT_LE(error, want[i] == 0 ? 0 : tolerance) << what << " " << i << ": " << got[i] << " instead of " << want[i];
    worst = std::max(worst, error);
  }
  std::printf("  %s: worst relative error %.2e of %.0e allowed\n", what, worst, tolerance);
}

// Every tensor has moved far beyond the tolerances, and the frozen one not at all.
void expect_moved(const Task& task, const std::map<std::string, std::vector<double>>& params) {
  const auto group_of = task.group_of();
  for (const std::uint32_t layer : task.sizes.moe_layers) {
    for (const shm::AdapterTensor tensor : kTensors) {
      const std::vector<float> initial = task.initial_values(layer, tensor);
      if (initial.empty()) continue;
      const std::string key = tensor_key(layer, tensor);
      ASSERT_TRUE(params.contains(key)) << key;
      const double change = relative_l2(params.at(key), {initial.begin(), initial.end()});
      const bool frozen = group_of[layer * shm::kNumAdapterTensors + static_cast<std::size_t>(tensor)] == shm::kFrozen;
      EXPECT_TRUE(frozen ? change == 0 : change > 0.01) << key << " changed by " << change;
    }
  }
}

class Training : public DaemonFixture, public ::testing::WithParamInterface<Task> {};

TEST_P(Training, TwentyStepsInFp32EqualTheReferenceInDouble) {
  const Task& task = GetParam();
  SCOPED_TRACE(::testing::Message() << task.world_size << " ranks, seed " << task.seed);
  ASSERT_NO_FATAL_FAILURE(start_daemon(task.bf16));
  auto ranks = start_ranks(task, "job");
  const auto reference = train_in_double(task, checkpoint_);
  const auto results = results_of(ranks);

  // The task is what it claims to be: clipping acts in some steps and not in others, and the adapter moves.
  const auto [least, greatest] = std::minmax_element(reference[0].norms.begin(), reference[0].norms.end());
  std::printf("  norms of the averaged gradients: %.1f to %.1f, clipped at %.1f\n", *least, *greatest, task.max_norm);
  EXPECT_LT(*least, task.max_norm);
  EXPECT_GT(*greatest, task.max_norm);
  expect_moved(task, results[0].params);

  for (std::uint32_t rank = 0; rank < task.world_size; ++rank) {
    SCOPED_TRACE(::testing::Message() << "rank " << rank);
    expect_close(results[rank].losses, reference[rank].losses, 1e-5, "losses");
    expect_close(results[rank].norms, reference[rank].norms, 1e-5, "norms");
    expect_close(results[rank].params, reference[rank].params, 1e-4, "adapter after 20 steps");
    EXPECT_EQ(results[rank].params, results[0].params) << "one adapter, whoever reads it";
    EXPECT_EQ(results[rank].norms, results[0].norms);
  }
  expect_close(results[0].first, reference[0].first, 1e-5, "first step's gradients");
}

INSTANTIATE_TEST_SUITE_P(OneTwoAndFourProcesses, Training,
                         ::testing::Values(Task{1, 1, 20, false, true}, Task{2, 2, 20, false, false},
                                           Task{3, 4, 20, false, true}),
                         [](const auto& test) { return std::to_string(test.param.world_size) + "Ranks"; });

// The bounds are sums of what ARCHITECTURE.md grants each stage, to first order: forward 4e-3, backward 6e-3, and
// 2^-9 for each rounding of a row to bf16 between them. The residual stream does not amplify relative errors.
TEST_F(DaemonFixture, TheFirstStepInBf16MeetsTheSumOfItsStagesTolerances) {
  constexpr double kForward = 4e-3, kBackward = 6e-3, kRounding = 1.0 / 512;
  constexpr double kLastLayer = 2 * kForward + 2 * kRounding + kBackward;
  constexpr double kFirstLayer = kLastLayer + kBackward + kRounding;
  const Task task{4, 2, 1, true, true};
  ASSERT_NO_FATAL_FAILURE(start_daemon(task.bf16));
  auto ranks = start_ranks(task, "job");
  const auto reference = train_in_double(task, checkpoint_);
  const auto results = results_of(ranks);
  for (std::uint32_t rank = 0; rank < task.world_size; ++rank) {
    // The loss is quadratic: twice the relative error of its argument.
    expect_close(results[rank].losses, reference[rank].losses, 2 * (2 * kForward + 2 * kRounding), "losses");
  }
  for (const auto& [key, want] : reference[0].first) {
    const bool is_last_layer = key.starts_with("2.") || key == "dw.2";
    expect_close({{key, results[0].first.at(key)}}, {{key, want}}, is_last_layer ? kLastLayer : kFirstLayer,
                 key.c_str());
  }
}

TEST_F(DaemonFixture, TheExampleOfTheReadmeTrains) {
  ASSERT_NO_FATAL_FAILURE(start_daemon(true));
  ChildProcess example({KT_EXAMPLE_RANK_PATH, address()}, directory_.file("example.log"));
  EXPECT_EQ(example.wait(), 0) << example.log();
  std::istringstream lines(example.log());
  std::vector<double> losses;
  for (std::string line; std::getline(lines, line);) losses.push_back(std::stod(line.substr(line.rfind(' '))));
  ASSERT_EQ(losses.size(), 10u) << example.log();
  EXPECT_LT(losses.back(), 0.9 * losses.front()) << example.log();
}

}  // namespace
}  // namespace kt::client::testing
