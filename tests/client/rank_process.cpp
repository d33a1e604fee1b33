#include "tests/client/rank_process.h"

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <span>
#include <thread>
#include <utility>

#include "client/session.h"
#include "tests/client/training_task.h"

namespace kt::client::testing {
namespace {

class RankTraining {
 public:
  RankTraining(const RankOrders& orders, Session& session)
      : orders_(orders),
        task_{orders.seed, orders.world_size, orders.num_steps, orders.bf16, orders.shared_a, orders.max_norm, {}},
        session_(session) {}

  Result<TrainingResult> train() {
    KT_TRY_STATUS(prepare());
    const std::vector<std::uint8_t> group_of = task_.group_of();
    for (std::uint32_t step = 0; step < task_.num_steps; ++step) {
      for (std::uint32_t micro = 0; micro < Task::kMicroBatches; ++micro) {
        KT_TRY_STATUS(run_micro_batch(step, micro));
        if (micro == 0 && orders_.pause_in_step == step) pause();
      }
      KT_TRY(const double squares, session_.squared_norm(Task::kAdapter, group_of));
      // Every rank's backwards are in S, and none steps before this rank does.
      if (step == 0) KT_TRY_STATUS(read_all(shm::TensorKind::kGrad, result_.first));
      result_.norms.push_back(std::sqrt(squares) / task_.world_size);
      KT_TRY_STATUS(session_.step(Task::kAdapter, task_.scale(result_.norms.back()), task_.groups(step), group_of));
    }
    KT_TRY_STATUS(read_all(shm::TensorKind::kParam, result_.params));
    return result_;
  }

 private:
  // Only the lowest rank writes the values that stay: joining takes them over.
  Status prepare() {
    KT_TRY_STATUS(session_.create_adapter(Task::kAdapter, task_.adapter()));
    for (const std::uint32_t layer : task_.sizes.moe_layers) {
      for (const shm::AdapterTensor tensor : kTensors) {
        std::vector<float> values = task_.initial_values(layer, tensor);
        if (values.empty()) continue;
        if (orders_.rank != 0) std::fill(values.begin(), values.end(), 7.0f);
        KT_TRY_STATUS(session_.write(Task::kAdapter,
                                     {shm::TensorKind::kParam, layer, tensor, 0, task_.sizes.num_experts}, values));
      }
    }
    if (task_.world_size == 1) return ok_status();
    JoinSpec join{orders_.job_id, "test", orders_.rank, task_.world_size, {}, 40};
    for (std::uint32_t rank = 0; rank < task_.world_size; ++rank) join.members.push_back(rank);
    KT_TRY_STATUS(session_.join(join));
    return ok_status();
  }

  Status run_micro_batch(std::uint32_t step, std::uint32_t micro) {
    const MicroBatch data(task_, step, micro, orders_.rank);
    const std::size_t num_layers = task_.sizes.moe_layers.size();
    std::vector<std::uint64_t> act_ids(num_layers);
    std::vector<float> h = data.x;
    for (std::size_t moe = 0; moe < num_layers; ++moe) {
      act_ids[moe] = session_.new_act_id();
      KT_TRY(Claim claim, session_.claim(ForwardCall{.layer = task_.sizes.moe_layers[moe],
                                                     .adapter_id = Task::kAdapter,
                                                     .act_id = act_ids[moe],
                                                     .num_tokens = data.num_tokens}));
      write_rows(h, claim.input());
      std::copy(data.ids[moe].begin(), data.ids[moe].end(), claim.ids().begin());
      std::copy(data.weights[moe].begin(), data.weights[moe].end(), claim.routing_weights().begin());
      KT_TRY_STATUS(claim.submit());
      add_rows(claim.output(), h);
    }
    const double share = data.num_tokens == 0 ? 0 : 1.0 / (data.num_tokens * Task::kMicroBatches);
    double loss = 0;
    for (std::size_t i = 0; i < h.size(); ++i) {
      const double difference = static_cast<double>(h[i]) - static_cast<double>(data.target[i]);
      loss += difference * difference * share / 2;
      h[i] = static_cast<float>(difference * share);  // Now the gradient.
    }
    result_.losses.push_back(loss);
    const bool is_first = step == 0 && micro == 0;
    for (std::size_t moe = num_layers; moe-- > 0;) {
      KT_TRY(Claim claim, session_.claim(BackwardCall{act_ids[moe], shm::kAccumulate, data.num_tokens}));
      write_rows(h, claim.input());
      KT_TRY_STATUS(claim.submit());
      add_rows(claim.output(), h);
      const std::span<const float> dw = claim.grad_weights();
      if (is_first) result_.first["dw." + std::to_string(task_.sizes.moe_layers[moe])].assign(dw.begin(), dw.end());
    }
    if (is_first) result_.first["dx"].assign(h.begin(), h.end());
    return ok_status();
  }

  // Rows as they lie in the arena: bf16 bits or f32.
  void write_rows(const std::vector<float>& values, std::span<std::byte> rows) const {
    const std::size_t size = task_.bf16 ? 2 : 4;
    for (std::size_t i = 0; i < values.size(); ++i) {
      const auto bits = std::bit_cast<std::uint32_t>(task_.bf16 ? round_bf16(values[i]) : values[i]);
      const auto half = static_cast<std::uint16_t>(bits >> 16);
      std::memcpy(&rows[i * size], task_.bf16 ? static_cast<const void*>(&half) : &bits, size);
    }
  }
  void add_rows(std::span<const std::byte> rows, std::vector<float>& h) const {
    for (std::size_t i = 0; i < h.size(); ++i) {
      std::uint16_t half = 0;
      float value = 0;
      if (task_.bf16) std::memcpy(&half, &rows[i * 2], 2);
      if (task_.bf16) value = std::bit_cast<float>(std::uint32_t{half} << 16);
      if (!task_.bf16) std::memcpy(&value, &rows[i * 4], 4);
      h[i] += value;
    }
  }

  Status read_all(shm::TensorKind kind, std::map<std::string, std::vector<double>>& into) {
    for (const std::uint32_t layer : task_.sizes.moe_layers) {
      for (const shm::AdapterTensor tensor : kTensors) {
        const auto [rows, cols] = task_.tensor_shape(tensor);
        if (rows == 0) continue;
        std::vector<float> values(task_.sizes.num_experts * rows * cols);
        KT_TRY_STATUS(session_.read(Task::kAdapter, {kind, layer, tensor, 0, task_.sizes.num_experts}, values));
        into[tensor_key(layer, tensor)].assign(values.begin(), values.end());
      }
    }
    return ok_status();
  }

  void pause() const {
    std::ofstream(orders_.paused_file()).flush();
    while (!std::filesystem::exists(orders_.resume_file())) std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }

  const RankOrders& orders_;
  const Task task_;
  Session& session_;
  TrainingResult result_;
};

// The result, or {"error": {code, text}}.
nlohmann::json train(const RankOrders& orders) {
  const auto failure = [](const Error& error) {
    return nlohmann::json{{"error", {{"code", static_cast<std::uint32_t>(error.code)}, {"text", error.text()}}}};
  };
  ConnectOptions options;
  options.address = orders.address;
  options.name = "test " + orders.job_id;
  options.arena_bytes = shm::kArenaBytesMin;
  auto session = Session::connect(options);
  if (!session.ok()) return failure(session.error());
  auto result = RankTraining(orders, *session.value()).train();
  if (result.ok()) return result.value();
  // What the user sees next must say the same: a later call of a dead session.
  nlohmann::json report = failure(result.error());
  const Status later = session.value()->barrier(Task::kAdapter);
  report["later"] = later.ok() ? 0 : static_cast<std::uint32_t>(later.error().code);
  report["alive"] = session.value()->daemon_alive();
  return report;
}

}  // namespace
}  // namespace kt::client::testing

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: test_rank_process ORDERS (see rank_process.h)\n");
    return 2;
  }
  ::alarm(55);  // A rank that hangs fails its test.
  const auto orders = nlohmann::json::parse(argv[1]).get<kt::client::testing::RankOrders>();
  const nlohmann::json report = kt::client::testing::train(orders);
  std::ofstream(orders.output) << report;
  return report.contains("error") ? 3 : 0;
}
