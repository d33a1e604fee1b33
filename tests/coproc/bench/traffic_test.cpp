// The account of bytes beyond L2 (coproc/experts/traffic.h) of a layer of Qwen3-30B-A3B's sizes, and its rules on small
// ones. The account depends on shapes, routing and workers only, so the figures are exact.
#include <gtest/gtest.h>

#include <iostream>
#include <memory>
#include <vector>

#include "coproc/bench/elements.h"
#include "coproc/bench/routing.h"
#include "coproc/bench/synthetic_layers.h"
#include "coproc/experts/expert_compute.h"

namespace kt::test {
namespace {

using coproc::Traffic;

using coproc::StageId;

// What a route may move beyond L2, weights aside, at these sizes: a server with AMX has 20 KB of bandwidth for the time
// that one takes to compute.
constexpr std::int64_t kForwardMax = 18 * 1024;
constexpr std::int64_t kBackwardMax = 26 * 1024;
constexpr std::int64_t kMiB = 1 << 20;

struct Setting {
  std::uint32_t hidden = 2048;
  std::uint32_t intermediate = 768;
  std::uint32_t num_experts = 2;
  std::uint32_t top_k = 2;
  std::uint32_t rank = 0;
  int num_workers = 1;
  std::uint32_t num_tokens = 32;
  bool keep_gate_up = true;
  std::int64_t l2_bytes = kMiB;
};

struct Directions {
  Traffic forward;
  Traffic backward;
};

const kernels::KernelTable& best_table() {
  const kernels::KernelTable* const table = kernels::find_table("auto", 2, nullptr);
  return *table;
}

Directions run(const Setting& setting) {
  kernels::KernelTable table = best_table();
  table.l2_bytes = setting.l2_bytes;
  coproc::WorkerPool pool(std::vector<int>(static_cast<std::size_t>(setting.num_workers), -1));
  const coproc::ExpertDims dims = {.num_layers = 1,
                                   .moe_layers = {0},
                                   .num_experts = setting.num_experts,
                                   .top_k = setting.top_k,
                                   .hidden_size = setting.hidden,
                                   .intermediate_size = setting.intermediate,
                                   .element_bytes = 2};
  auto made = coproc::make_synthetic_layers(dims, "bf16", setting.rank, table, pool);
  const coproc::SyntheticLayers layers = std::move(made).value();
  coproc::ExpertCompute compute(dims, table, *layers.weights, pool);
  const std::size_t num_slots = std::size_t{setting.num_tokens} * setting.top_k;
  const std::size_t x_elements = std::size_t{setting.num_tokens} * setting.hidden;
  coproc::SavedActivation activation;
  activation.num_tokens = setting.num_tokens;
  activation.x = coproc::random_elements(static_cast<std::int64_t>(x_elements), 2, 1);
  activation.ids = coproc::Router(setting.num_experts, setting.top_k, 0, 1).route(setting.num_tokens);
  activation.weights.assign(num_slots, 0.5f);
  if (setting.keep_gate_up) {
    activation.gate_up.resize(num_slots * 4 * static_cast<std::size_t>(dims.intermediate_padded()));
  }
  std::vector<std::byte> out(x_elements * 2);
  std::vector<float> dw(num_slots);
  Directions traffic;
  const coproc::ForwardItem forward = {activation.x.data(),
                                       activation.ids.data(),
                                       activation.weights.data(),
                                       activation.num_tokens,
                                       out.data(),
                                       setting.keep_gate_up ? activation.gate_up.data() : nullptr};
  compute.forward(0, layers.adapter.get(), {&forward, 1});
  traffic.forward = compute.traffic();
  const coproc::BackwardItem backward = {activation.x.data(), &activation, out.data(), dw.data()};
  compute.backward(0, layers.adapter.get(), {&backward, 1}, setting.rank > 0);
  traffic.backward = compute.traffic();
  return traffic;
}

void print(const char* name, const Traffic& traffic) {
  std::cout << name << ", bytes per route:\n";
  for (std::size_t n = 0; n < coproc::kNumStages; ++n) {
    const Traffic::Stage& stage = traffic.stages[n];
    if (stage.bytes() == 0) continue;
    std::cout << "  " << coproc::stage_name(static_cast<StageId>(n)) << ": "
              << stage.activation_bytes / traffic.num_routes << "\n";
  }
  std::cout << "  total: " << traffic.total().activation_bytes / traffic.num_routes << "; weights "
            << traffic.total().weight_bytes << ", LoRA " << traffic.total().lora_bytes << " in all\n";
}

std::int64_t per_route(const Traffic& traffic) { return traffic.total().activation_bytes / traffic.num_routes; }

TEST(TrafficTest, EveryTouchedExpertsWeightsAreReadOncePerDirection) {
  const std::int64_t expert_bytes = 3 * 2048 * 768 * 2;
  for (const std::uint32_t rank : {0u, 8u}) {
    const Directions two = run({.rank = rank});
    EXPECT_EQ(two.forward.total().weight_bytes, 2 * expert_bytes);
    EXPECT_EQ(two.backward.total().weight_bytes, 2 * expert_bytes);
  }
  // One token of one expert touches one, also on many workers.
  const Directions one = run({.num_experts = 3, .top_k = 1, .num_workers = 4, .num_tokens = 1});
  EXPECT_EQ(one.forward.total().weight_bytes, expert_bytes);
  EXPECT_EQ(one.backward.total().weight_bytes, expert_bytes);
  EXPECT_EQ(one.forward.num_routes, 1);
}

// Two experts, each computed whole by one of one or two workers: X (dY) in, G and U out (in), the rows of results out
// and in, and y (dX).
TEST(TrafficTest, AnExpertComputedWholeMovesEachArrayOnce) {
  for (const std::uint32_t num_tokens : {32u, 128u}) {
    for (const int num_workers : {1, 2}) {
      SCOPED_TRACE(std::to_string(num_tokens) + " rows an expert, " + std::to_string(num_workers) + " workers");
      const Directions frozen = run({.num_workers = num_workers, .num_tokens = num_tokens});
      EXPECT_EQ(per_route(frozen.forward), 4096 + 3072 + 4096 + 4096 + 2048);
      EXPECT_EQ(per_route(frozen.backward), 4096 + 3072 + 4096 + 4096 + 2048);
      EXPECT_LE(per_route(frozen.forward), kForwardMax);
      EXPECT_LE(per_route(frozen.backward), kBackwardMax);
      EXPECT_EQ(frozen.forward.num_barriers, 2);
      EXPECT_EQ(frozen.backward.num_barriers, 2);
    }
  }
}

TEST(TrafficTest, WithLoraTheLimitsHoldAsLongAsABlocksArraysFitL2) {
  const Directions few = run({.rank = 8, .num_workers = 2, .num_tokens = 32});
  print("backward, LoRA, 32 rows an expert, 1 MiB of L2", few.backward);
  EXPECT_LE(per_route(few.forward), kForwardMax);
  EXPECT_LE(per_route(few.backward), kBackwardMax);
  const Directions many = run({.rank = 8, .num_workers = 2, .num_tokens = 128, .l2_bytes = 2 * kMiB});
  print("backward, LoRA, 128 rows an expert, 2 MiB of L2", many.backward);
  EXPECT_LE(per_route(many.forward), kForwardMax);
  EXPECT_LE(per_route(many.backward), kBackwardMax);
  // dY, Z, dG and dU of 128 rows do not fit in 1 MiB together: written, and read again by their gradients.
  const Directions spilled = run({.rank = 8, .num_workers = 2, .num_tokens = 128});
  print("backward, LoRA, 128 rows an expert, 1 MiB of L2", spilled.backward);
  EXPECT_LE(per_route(spilled.forward), kForwardMax);
  EXPECT_GT(per_route(spilled.backward), kBackwardMax);
}

TEST(TrafficTest, MoreRowsThanFitL2AreBlocksThatReadTheWeightsAgain) {
  const Directions one = run({.num_tokens = 160});
  const Directions two = run({.num_tokens = 161});
  EXPECT_EQ(two.forward.total().weight_bytes, 2 * one.forward.total().weight_bytes);
  EXPECT_EQ(per_route(two.forward), per_route(one.forward));
}

// One expert and two workers: every row is read by both, and nothing is kept for a later stage.
TEST(TrafficTest, ASharedExpertMovesItsRowsBetweenTheStages) {
  const Directions shared = run({.num_experts = 1, .top_k = 1, .num_workers = 2});
  print("forward, one expert shared by 2 workers", shared.forward);
  EXPECT_EQ(shared.forward[StageId::kGatherX].activation_bytes, 32 * 2 * 4096);
  EXPECT_EQ(shared.forward[StageId::kGateUp].activation_bytes, 32 * (2 * 4096 + 1536 + 3072));
  EXPECT_EQ(shared.forward[StageId::kDown].activation_bytes, 32 * (2 * 1536 + 4096));
  EXPECT_EQ(shared.forward.num_barriers, 4);   // X, gate and up, down, sum.
  EXPECT_EQ(shared.backward.num_barriers, 4);  // dY, P, dw beside dX, sum.
}

TEST(TrafficTest, WhatIsNotKeptIsNotWrittenButComputedAgain) {
  const Setting small = {.hidden = 64, .intermediate = 32, .num_experts = 4, .num_tokens = 6};
  Setting forgetful = small;
  forgetful.keep_gate_up = false;
  const Directions kept = run(small);
  const Directions recomputed = run(forgetful);
  EXPECT_EQ(kept.forward.total().activation_bytes - recomputed.forward.total().activation_bytes, 12 * 2 * 32 * 2);
  EXPECT_EQ(recomputed.backward[StageId::kGateUp].weight_bytes, kept.forward[StageId::kGateUp].weight_bytes);
  EXPECT_GT(recomputed.backward.total().bytes(), kept.backward.total().bytes());
}

TEST(TrafficTest, LoraAddsItsParametersAndTheGradientsOfTouchedExperts) {
  const Setting frozen = {.hidden = 64, .intermediate = 32, .num_experts = 4, .num_tokens = 6};
  Setting adapted = frozen;
  adapted.rank = 4;
  const Directions without = run(frozen);
  const Directions with = run(adapted);
  EXPECT_EQ(without.forward.total().lora_bytes, 0);
  EXPECT_EQ(without.backward.total().lora_bytes, 0);
  EXPECT_EQ(with.forward.total().weight_bytes, without.forward.total().weight_bytes);
  // S of A [4, 64], B gate and up [32, 4], down A [4, 32] and B [64, 4]: read and written, in fp32, by 4 experts.
  const std::int64_t floats = 4 * 64 + 2 * 32 * 4 + 4 * 32 + 64 * 4;
  EXPECT_EQ(with.backward[StageId::kLoraGradients].lora_bytes, 4 * 2 * 4 * floats);
  // X·Aᵀ again, for B's gradient: a panel of A.
  EXPECT_EQ(with.backward[StageId::kGatherX].lora_bytes, 4 * 32 * 64 * 2);
}

TEST(TrafficTest, ABatchWithoutRoutesMovesNothing) {
  const Directions empty = run({.hidden = 64, .intermediate = 32, .num_tokens = 0});
  EXPECT_EQ(empty.forward.num_routes, 0);
  EXPECT_EQ(empty.forward.total().bytes(), 0);
  EXPECT_EQ(empty.backward.total().bytes(), 0);
}

}  // namespace
}  // namespace kt::test
