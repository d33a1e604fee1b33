// The account of bytes beyond L2 (coproc/experts/traffic.h) of a layer of Qwen3-30B-A3B's sizes, and its rules on small
// ones. The account depends on shapes, routing and workers only, so the figures are exact.
#include <gtest/gtest.h>

#include <iostream>
#include <memory>
#include <vector>

#include "coproc/bench/elements.h"
#include "coproc/bench/routing.h"
#include "coproc/bench/synthetic_layers.h"
#include "coproc/experts/expert_layer.h"

namespace kt::test {
namespace {

using coproc::Traffic;

// DESIGN §7's aim for forward and backward without LoRA: each array once. What is above it today is listed in the
// tests: rows gathered into a copy, P in fp32, and rows read by every worker that has a task of their expert.
constexpr std::int64_t kForwardAim = 18 * 1024;
constexpr std::int64_t kBackwardAim = 26 * 1024;

struct Setting {
  std::uint32_t hidden = 2048;
  std::uint32_t intermediate = 768;
  std::uint32_t num_experts = 2;
  std::uint32_t top_k = 2;
  std::uint32_t rank = 0;
  int num_workers = 1;
  std::uint32_t num_tokens = 32;
  bool keep_gate_up = true;
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
  const kernels::KernelTable& table = best_table();
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
  coproc::Activation activation;
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
  for (const Traffic::Stage& stage : traffic.stages) {
    std::cout << "  " << stage.name << ": " << stage.activation_bytes / traffic.num_routes << "\n";
  }
  std::cout << "  total: " << traffic.total().activation_bytes / traffic.num_routes << "; weights "
            << traffic.total().weight_bytes << ", LoRA " << traffic.total().lora_bytes << " in all\n";
}

std::int64_t per_route(const Traffic& traffic) { return traffic.total().activation_bytes / traffic.num_routes; }

const Traffic::Stage& stage(const Traffic& traffic, std::string_view name) {
  for (const Traffic::Stage& candidate : traffic.stages) {
    if (candidate.name == name) return candidate;
  }
  ADD_FAILURE() << "no stage " << name;
  return traffic.stages.front();
}

TEST(TrafficTest, EveryTouchedExpertsWeightsAreReadOncePerDirection) {
  const std::int64_t expert_bytes =
      48 * kernels::panel_stride_bytes(2048, 2) + 64 * kernels::panel_stride_bytes(768, 2);
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

TEST(TrafficTest, ActivationBytesPerRouteOfThirtyTwoRowsAnExpertStayWithinTodaysAccount) {
  const Directions alone = run({.num_workers = 1});
  print("forward, 32 rows an expert, 1 worker", alone.forward);
  print("backward, 32 rows an expert, 1 worker", alone.backward);
  // Forward: gather 8 KiB, gate and up 4 + 4.5, down 1.5 + 4, sum 4 + 2 (its token's row, of two routes). The aim
  // leaves out the gathered copy's 8 KiB.
  EXPECT_EQ(alone.forward.num_routes, 64);
  EXPECT_LE(per_route(alone.forward), kForwardAim + 10 * 1024);
  // Backward: gather 8, P 4 + 3 in fp32, differentiate 9, dX 3 + 4, sum 6.
  EXPECT_LE(per_route(alone.backward), kBackwardAim + 11 * 1024);

  const Directions together = run({.num_workers = 2});
  print("forward, 32 rows an expert, 2 workers", together.forward);
  print("backward, 32 rows an expert, 2 workers", together.backward);
  // Both workers read X, Z, dY and dG|dU.
  EXPECT_LE(per_route(together.forward), kForwardAim + 16 * 1024);
  EXPECT_LE(per_route(together.backward), kBackwardAim + 18 * 1024);
}

TEST(TrafficTest, RowsThatDoNotFitInL2AreReadAgainByEveryTask) {
  const Directions many = run({.num_workers = 1, .num_tokens = 128});
  print("forward, 128 rows an expert", many.forward);
  print("backward, 128 rows an expert", many.backward);
  // X of 128 rows is 512 KiB: each of gate_up's 24 tasks reads it. dY alike, for each of 24 panels.
  EXPECT_EQ(stage(many.forward, "gate, up").activation_bytes / many.forward.num_routes, 24 * 4096 + 4608);
  EXPECT_EQ(stage(many.backward, "p").activation_bytes / many.backward.num_routes, 24 * 4096 + 3072);
  EXPECT_LE(per_route(many.forward), kForwardAim + 102 * 1024);
  EXPECT_LE(per_route(many.backward), kBackwardAim + 103 * 1024);
}

TEST(TrafficTest, WhatIsNotKeptIsNotWrittenButComputedAgain) {
  const Setting small = {.hidden = 64, .intermediate = 32, .num_experts = 4, .num_tokens = 6};
  Setting forgetful = small;
  forgetful.keep_gate_up = false;
  const Directions kept = run(small);
  const Directions recomputed = run(forgetful);
  EXPECT_EQ(kept.forward.total().activation_bytes - recomputed.forward.total().activation_bytes, 12 * 2 * 32 * 2);
  EXPECT_EQ(stage(recomputed.backward, "gate, up").weight_bytes, stage(kept.forward, "gate, up").weight_bytes);
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
  EXPECT_EQ(stage(with.backward, "lora gradients").lora_bytes, 4 * 2 * 4 * floats);
}

TEST(TrafficTest, ABatchWithoutRoutesMovesNothing) {
  const Directions empty = run({.hidden = 64, .intermediate = 32, .num_tokens = 0});
  EXPECT_EQ(empty.forward.num_routes, 0);
  EXPECT_EQ(empty.forward.total().bytes(), 0);
  EXPECT_EQ(empty.backward.total().bytes(), 0);
}

}  // namespace
}  // namespace kt::test
