// Forward and backward of the layer against double, within the tolerances of ARCHITECTURE.md.
#include <cmath>
#include <iostream>

#include "tests/coproc/experts/layer_fixture.h"

namespace kt::test {
namespace {

constexpr const char* kTensorNames[] = {"gate_a", "gate_b", "up_a", "up_b", "down_a", "down_b"};

struct Tolerances {
  double forward;   // y and dw
  double backward;  // dx and LoRA gradients
};
Tolerances tolerances_of(const kernels::KernelTable& table) {
  return table.element_bytes == 2 ? Tolerances{4e-3, 6e-3} : Tolerances{1e-5, 1e-5};
}

Doubles as_doubles(const std::vector<float>& values) { return Doubles(values.begin(), values.end()); }

void expect_close(const std::string& name, const Doubles& got, const Doubles& want, double tolerance) {
  const double error = relative_l2(got, want);
  std::cout << "  " << name << " rel-L2 " << error << "\n";
  EXPECT_LE(error, tolerance) << name;
  if (error <= tolerance) return;
  for (std::size_t n = 0; n < want.size(); ++n) {
    if (std::abs(got[n] - want[n]) <= 10 * tolerance * (std::abs(want[n]) + 1e-3)) continue;
    ADD_FAILURE() << name << "[" << n << "] is " << got[n] << ", not " << want[n];
    return;
  }
}

// Runs one batch and compares everything. `must_be_tight`: enough tokens for the statistics behind the tolerances;
// of a few tokens one dw near zero can be most of the error: they get four times as much.
void compare(const LayerOptions& options, const kernels::KernelTable& table, std::int64_t num_tokens, Routing routing,
             std::uint32_t seed, bool must_be_tight = true) {
  SCOPED_TRACE("seed " + std::to_string(seed) + ", T = " + std::to_string(num_tokens));
  std::cout << "seed " << seed << ", T " << num_tokens << ", H " << options.hidden << ", I " << options.intermediate
            << ", r " << options.spec.gate_up.r << "/" << options.spec.down.r << "\n";
  TestLayer layer(options, table, seed);
  std::mt19937 random(seed + 1);
  const Batch batch = layer.make_batch(num_tokens, routing, random);
  const ItemResult got = layer.run({&batch}, {.num_workers = 2})[0];
  const Doubles y = reference_forward(layer.reference(), batch.reference);
  const ReferenceGradients grads = reference_backward(layer.reference(), batch.reference, batch.dy);
  const double slack = must_be_tight ? 1 : 4;
  const Tolerances tolerance = tolerances_of(table);
  const std::int64_t eb = table.element_bytes;
  expect_close("y", from_elements(got.y.data(), y.size(), eb), y, slack * tolerance.forward);
  expect_close("dw", from_elements(got.dw.data(), grads.dw.size(), 4), grads.dw, slack * tolerance.forward);
  expect_close("dx", from_elements(got.dx.data(), grads.dx.size(), eb), grads.dx, slack * tolerance.backward);
  if (layer.adapter() == nullptr) return;
  EXPECT_TRUE(layer.adapter()->has_gradients());
  for (std::size_t tensor = 0; tensor < kNumLoraTensors; ++tensor) {
    if (layer.reference().lora_rows(tensor) == 0) continue;
    expect_close(kTensorNames[tensor], as_doubles(layer.gradient(tensor)), grads.lora[tensor],
                 slack * tolerance.backward);
  }
}

using ExpertLayer = EveryTable;
INSTANTIATE_TEST_SUITE_P(Tables, ExpertLayer, testing::ValuesIn(kernels::all_tables()), table_name);

TEST_P(ExpertLayer, WithoutAdapterMatchesTheReference) {
  compare({.hidden = 256, .intermediate = 128}, table(), 96, Routing::kSoftmaxTopK, 11);
}

TEST_P(ExpertLayer, WithSharedAMatchesTheReference) {
  compare({.hidden = 256, .intermediate = 128, .spec = spec_of(8, true, 8)}, table(), 96, Routing::kSoftmaxTopK, 12);
}

TEST_P(ExpertLayer, WithSeparateAsMatchesTheReference) {
  compare({.hidden = 256, .intermediate = 128, .spec = spec_of(8, false, 8)}, table(), 96, Routing::kSoftmaxTopK, 13);
}

TEST_P(ExpertLayer, OfSizesThatAreNotMultiplesOf32MatchesTheReference) {
  compare({.hidden = 48, .intermediate = 40}, table(), 64, Routing::kSoftmaxTopK, 14);
  compare({.hidden = 48, .intermediate = 40, .spec = spec_of(8, true, 8)}, table(), 64, Routing::kSoftmaxTopK, 15);
  compare({.hidden = 33, .intermediate = 95, .spec = spec_of(3, false, 5)}, table(), 64, Routing::kSoftmaxTopK, 16);
}

TEST_P(ExpertLayer, WithRanksOf1And40MatchesTheReference) {
  for (const bool shared_a : {false, true}) {
    compare({.hidden = 48, .intermediate = 40, .spec = spec_of(1, shared_a, 40)}, table(), 64, Routing::kSoftmaxTopK,
            17);
    compare({.hidden = 96, .intermediate = 64, .spec = spec_of(40, shared_a, 1)}, table(), 64, Routing::kSoftmaxTopK,
            18);
  }
}

TEST_P(ExpertLayer, WithOneHalfAdaptedMatchesTheReference) {
  compare({.spec = spec_of(8, true, 0)}, table(), 64, Routing::kSoftmaxTopK, 19);
  compare({.spec = spec_of(8, false, 0)}, table(), 64, Routing::kSoftmaxTopK, 20);
  compare({.spec = spec_of(0, false, 8)}, table(), 64, Routing::kSoftmaxTopK, 21);
}

TEST_P(ExpertLayer, WithFewTokensMatchesTheReference) {
  for (const std::int64_t num_tokens : {0, 1, 17}) {
    compare({.spec = spec_of(8, false, 8)}, table(), num_tokens, Routing::kSoftmaxTopK, 22, false);
  }
}

// 300 rows: several chunks of rows in every phase.
TEST_P(ExpertLayer, WithAllTokensAtOneExpertMatchesTheReference) {
  compare({.hidden = 48, .intermediate = 40, .spec = spec_of(8, true, 8)}, table(), 300, Routing::kOneExpert, 23);
  compare({.num_experts = 1, .top_k = 1, .spec = spec_of(8, false, 8)}, table(), 300, Routing::kSoftmaxTopK, 24);
}

TEST_P(ExpertLayer, WithEmptyExpertsMatchesTheReference) {
  compare({.num_experts = 64, .top_k = 2, .hidden = 48, .intermediate = 40, .spec = spec_of(4, false, 4)}, table(), 8,
          Routing::kSoftmaxTopK, 25, false);
}

TEST_P(ExpertLayer, CountsBothRoutesOfATokenThatNamesAnExpertTwice) {
  compare({.spec = spec_of(8, true, 8)}, table(), 64, Routing::kSameExpertTwice, 26);
}

TEST_P(ExpertLayer, IgnoresSentinelsInAllResults) {
  compare({.spec = spec_of(8, false, 8)}, table(), 64, Routing::kWithSentinels, 27);
}

// In fp32 only: in bf16 a gate near the limit may lie on its other side, and then its gradient is another.
TEST(ExpertLayerInFp32, WithClampedSwigluMatchesTheReference) {
  const kernels::KernelTable& table = *kernels::find_table("", sizeof(float), nullptr);
  const Activation clamped = {ActivationKind::kClampedSwiGlu, 0.5F};  // Cuts two fifths of gates and ups.
  for (const bool shared_a : {false, true}) {
    compare({.activation = clamped, .spec = spec_of(8, shared_a, 8)}, table, 64, Routing::kSoftmaxTopK, 33);
  }
  compare({.activation = clamped}, table, 64, Routing::kWithSentinels, 34);
}

// 514 gate and up panels: the widest task there is.
TEST_P(ExpertLayer, WithAVeryWideExpertMatchesTheReference) {
  compare({.num_experts = 1, .top_k = 1, .hidden = 32, .intermediate = 8224, .spec = spec_of(4, false, 4)}, table(), 70,
          Routing::kSoftmaxTopK, 28);
}

TEST_P(ExpertLayer, GivesExactZerosWhereEverySlotIsASentinel) {
  TestLayer layer({.spec = spec_of(8, true, 8)}, table(), 29);
  std::mt19937 random(30);
  const Batch batch = layer.make_batch(5, Routing::kOnlySentinels, random);
  const ItemResult got = layer.run({&batch}, {})[0];
  EXPECT_EQ(got.y, Bytes(batch.x_elements.size()));
  EXPECT_EQ(got.dx, Bytes(batch.x_elements.size()));
  EXPECT_EQ(got.dw, Bytes(batch.reference.ids.size() * sizeof(float)));
  for (const auto& gradient : layer.gradients()) EXPECT_EQ(gradient, std::vector<float>(gradient.size()));
}

// The ids decide, whatever stands in the weights of a sentinel; also where a token mixes both.
TEST_P(ExpertLayer, GivesSentinelSlotsAZeroWeightGradient) {
  TestLayer layer({}, table(), 31);
  std::mt19937 random(32);
  const Batch batch = layer.make_batch(20, Routing::kWithSentinels, random);
  const ItemResult got = layer.run({&batch}, {})[0];
  const Doubles dw = from_elements(got.dw.data(), batch.reference.ids.size(), 4);
  for (std::size_t slot = 0; slot < dw.size(); ++slot) {
    const bool is_sentinel = batch.reference.ids[slot] == static_cast<std::int32_t>(layer.dims().num_experts);
    EXPECT_EQ(dw[slot] == 0, is_sentinel) << "slot " << slot;
  }
}

}  // namespace
}  // namespace kt::test
