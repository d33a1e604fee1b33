// The optimizer step against torch itself and against the same formula in double.
#include <algorithm>
#include <cmath>

#include "coproc/experts/adapter_layer.h"
#include "tests/coproc/experts/layer_fixture.h"

namespace kt::test {
namespace {

using coproc::Adapter;
using shm::AdapterTensor;
using shm::TensorKind;

shm::StepGroup to_group(const ReferenceAdamw& hyper) {
  return {hyper.lr, hyper.beta1, hyper.beta2, hyper.eps, hyper.weight_decay, hyper.decoupled ? 1u : 0u};
}

// An adapter over layers 1 and 2 of three.
struct Fixture {
  Fixture(const kernels::KernelTable& table, std::uint32_t num_experts, std::uint32_t hidden,
          std::uint32_t intermediate, const coproc::AdapterLayerSpec& spec)
      : dims{.num_layers = 3,
             .moe_layers = {1, 2},
             .num_experts = num_experts,
             .top_k = 1,
             .hidden_size = hidden,
             .intermediate_size = intermediate,
             .element_bytes = static_cast<std::uint32_t>(table.element_bytes)},
        adapter(dims, table),
        group_of(dims.num_layers * shm::kNumAdapterTensors, 0) {
    const std::uint32_t layers[] = {1, 2};
    EXPECT_TRUE(adapter.add_layers(layers, spec).ok());
    header.scale = 1;
    header.num_groups = 1;
  }
  std::size_t size(std::uint32_t layer, AdapterTensor tensor) const {
    const auto shape = adapter.shape(layer, tensor);
    return shape ? static_cast<std::size_t>(shape->rows * shape->cols) * dims.num_experts : 0;
  }
  std::vector<float> read(TensorKind kind, std::uint32_t layer, AdapterTensor tensor) const {
    std::vector<float> values(size(layer, tensor));
    adapter.read(kind, layer, tensor, 0, dims.num_experts, values.data());
    return values;
  }
  float steps(std::uint32_t layer, AdapterTensor tensor) const {
    float t = -1;
    adapter.read(TensorKind::kT, layer, tensor, 0, 1, &t);
    return t;
  }
  void write(TensorKind kind, std::uint32_t layer, AdapterTensor tensor, const std::vector<float>& values) {
    adapter.write(kind, layer, tensor, 0, dims.num_experts, values.data());
  }
  std::uint8_t& group(std::uint32_t layer, AdapterTensor tensor) {
    return group_of[layer * shm::kNumAdapterTensors + static_cast<std::size_t>(tensor)];
  }
  void step() { adapter.step(header, group_of, pool); }

  coproc::ExpertDims dims;
  Adapter adapter;
  std::vector<std::uint8_t> group_of;
  shm::StepHeader header{};
  coproc::WorkerPool pool{{-1, -1}};
};

constexpr AdapterTensor kAllTensors[] = {AdapterTensor::kGateA, AdapterTensor::kGateB, AdapterTensor::kUpA,
                                         AdapterTensor::kUpB,   AdapterTensor::kDownA, AdapterTensor::kDownB};

using AdapterStep = EveryTable;
INSTANTIATE_TEST_SUITE_P(Tables, AdapterStep, testing::ValuesIn(kernels::all_tables()), table_name);

// Written by torch 2.13 on a CPU:
//   p = torch.tensor([(i - 4) / 8 for i in range(10)], dtype=torch.float32, requires_grad=True)
//   opt = torch.optim.AdamW([p], lr=1e-2, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1, foreach=False)
//   for step in range(5):
//       p.grad = torch.tensor([((7 * i + 3 * step) % 11 - 5) / 16 for i in range(10)], dtype=torch.float32)
//       opt.step()
//   for t in (p, opt.state[p]["exp_avg"], opt.state[p]["exp_avg_sq"]): print([float(x).hex() for x in t])
// and the same with torch.optim.Adam.
struct TorchValues {
  float p[10];
  float m[10];
  float v[10];
};
constexpr TorchValues kTorchAdamw = {
    {-0x1.e0dabcp-2f, -0x1.9c6514p-2f, -0x1.e75c62p-3f, -0x1.201bb0p-3f, -0x1.454e76p-6f, 0x1.3106d4p-3f,
     0x1.e39c02p-3f, 0x1.7f607cp-2f, 0x1.085786p-1f, 0x1.3da022p-1f},
    {-0x1.bb3d06p-6f, 0x1.1afe1ep-5f, -0x1.8df7a6p-7f, -0x1.ee2ebap-8f, 0x1.254b4cp-7f, -0x1.352936p-5f, 0x1.23c212p-5f,
     -0x1.10b0f2p-6f, -0x1.7e66fep-10f, 0x1.485b1cp-7f},
    {0x1.36ddeep-9f, 0x1.d63a82p-10f, 0x1.7e4d96p-10f, 0x1.554970p-9f, 0x1.7c7ccap-10f, 0x1.d94128p-10f, 0x1.3778e4p-9f,
     0x1.871e64p-10f, 0x1.14884ap-9f, 0x1.138614p-9f}};
constexpr TorchValues kTorchAdam = {
    {-0x1.ddc6dap-2f, -0x1.987ab4p-2f, -0x1.ddefe4p-3f, -0x1.1cce7ap-3f, -0x1.432662p-6f, 0x1.2d0a7ep-3f,
     0x1.dd57d4p-3f, 0x1.704e5ep-2f, 0x1.0525b8p-1f, 0x1.39959ep-1f},
    {-0x1.7f31f4p-5f, 0x1.301a8ap-6f, -0x1.67ab0ep-6f, -0x1.acee80p-7f, 0x1.122910p-7f, -0x1.070aaep-5f, 0x1.74998ap-5f,
     -0x1.de19a0p-10f, 0x1.3f90d2p-6f, 0x1.213eb2p-5f},
    {0x1.75377ap-9f, 0x1.93e888p-10f, 0x1.964992p-10f, 0x1.57e27ap-9f, 0x1.7d12fap-10f, 0x1.bd7c8cp-10f, 0x1.531ea6p-9f,
     0x1.7629e8p-10f, 0x1.1f1b48p-9f, 0x1.374d4cp-9f}};

void expect_near_torch(const std::vector<float>& got, const float (&want)[10]) {
  ASSERT_EQ(got.size(), 10u);
  // A few ulps of the largest: torch's compiler may fuse a multiplication and an addition, ours does not.
  float tolerance = 0;
  for (const float value : want) tolerance = std::max(tolerance, 5e-7f * std::abs(value));
  for (std::size_t n = 0; n < got.size(); ++n) EXPECT_NEAR(got[n], want[n], tolerance) << n;
}

TEST_P(AdapterStep, GivesTorchsOwnValues) {
  for (const bool decoupled : {true, false}) {
    SCOPED_TRACE(decoupled ? "AdamW" : "Adam");
    Fixture f(table(), 2, 5, 3, spec_of(1, true, 0));  // gate_a: 2 experts × [1, 5].
    f.header.scale = 0.5;                              // Of sums twice the gradient.
    f.header.groups[0] = to_group({1e-2, 0.9, 0.99, 1e-6, 0.1, decoupled});
    std::vector<float> values;
    for (int i = 0; i < 10; ++i) values.push_back(static_cast<float>(i - 4) / 8);
    f.write(TensorKind::kParam, 1, AdapterTensor::kGateA, values);
    for (int step = 0; step < 5; ++step) {
      for (int i = 0; i < 10; ++i) {
        values[static_cast<std::size_t>(i)] = static_cast<float>((7 * i + 3 * step) % 11 - 5) / 8;
      }
      f.write(TensorKind::kGrad, 1, AdapterTensor::kGateA, values);
      f.step();
    }
    const TorchValues& want = decoupled ? kTorchAdamw : kTorchAdam;
    expect_near_torch(f.read(TensorKind::kParam, 1, AdapterTensor::kGateA), want.p);
    expect_near_torch(f.read(TensorKind::kExpAvg, 1, AdapterTensor::kGateA), want.m);
    expect_near_torch(f.read(TensorKind::kExpAvgSq, 1, AdapterTensor::kGateA), want.v);
    EXPECT_EQ(f.steps(1, AdapterTensor::kGateA), 5.0f);
  }
}

// Two groups, 10 steps, all six tensors, several chunks (gate_a has 4 · 16 · 2048 floats).
TEST_P(AdapterStep, FollowsTheFormulaInDoubleForTenSteps) {
  constexpr std::uint32_t kSeed = 81;
  std::mt19937 random(kSeed);
  std::normal_distribution<float> normal;
  Fixture f(table(), 4, 2048, 24, spec_of(16, false, 8));
  const ReferenceAdamw hypers[] = {{3e-3, 0.9, 0.999, 1e-8, 0.01, true}, {1e-3, 0.4, 0.95, 1e-6, 0.1, false}};
  f.header.num_groups = 2;
  f.header.groups[0] = to_group(hypers[0]);
  f.header.groups[1] = to_group(hypers[1]);
  f.header.scale = 0.25;
  std::vector<Doubles> params;
  std::vector<ReferenceMoments> moments(std::size(kAllTensors));
  for (const AdapterTensor tensor : kAllTensors) {
    f.group(1, tensor) = static_cast<std::uint8_t>(static_cast<int>(tensor) % 2);
    std::vector<float> values(f.size(1, tensor));
    for (float& value : values) value = normal(random);
    f.write(TensorKind::kParam, 1, tensor, values);
    params.emplace_back(values.begin(), values.end());
  }
  for (int step = 0; step < 10; ++step) {
    for (std::size_t n = 0; n < params.size(); ++n) {
      std::vector<float> sums(params[n].size());
      Doubles grad(sums.size());
      for (std::size_t i = 0; i < sums.size(); ++i) {
        sums[i] = normal(random);
        grad[i] = 0.25 * static_cast<double>(sums[i]);
      }
      f.write(TensorKind::kGrad, 1, kAllTensors[n], sums);
      reference_step(hypers[n % 2], grad, params[n], moments[n]);
    }
    f.step();
  }
  for (std::size_t n = 0; n < params.size(); ++n) {
    SCOPED_TRACE("seed " + std::to_string(kSeed) + ", tensor " + std::to_string(n));
    const auto close = [&](TensorKind kind, const Doubles& want) {
      const auto got = f.read(kind, 1, kAllTensors[n]);
      EXPECT_LE(relative_l2(Doubles(got.begin(), got.end()), want), 1e-6);
    };
    close(TensorKind::kParam, params[n]);
    close(TensorKind::kExpAvg, moments[n].m);
    close(TensorKind::kExpAvgSq, moments[n].v);
  }
}

TEST_P(AdapterStep, LeavesFrozenTensorsAndUntouchedLayersAloneAndClearsAllSums) {
  Fixture f(table(), 3, 48, 40, spec_of(8, false, 8));
  f.header.groups[0] = to_group({1e-2, 0.9, 0.999, 1e-8, 0.1, true});
  f.group(1, AdapterTensor::kUpB) = shm::kFrozen;
  for (const std::uint32_t layer : {1u, 2u}) {
    for (const AdapterTensor tensor : kAllTensors) {
      f.write(TensorKind::kParam, layer, tensor, std::vector<float>(f.size(layer, tensor), 1.0f));
      if (layer == 1) f.write(TensorKind::kGrad, layer, tensor, std::vector<float>(f.size(layer, tensor), 1.0f));
    }
  }
  f.step();
  EXPECT_FALSE(f.adapter.has_gradients());
  for (const std::uint32_t layer : {1u, 2u}) {
    for (const AdapterTensor tensor : kAllTensors) {
      const bool moved = layer == 1 && tensor != AdapterTensor::kUpB;
      for (const float value : f.read(TensorKind::kParam, layer, tensor)) ASSERT_EQ(value != 1.0f, moved);
      for (const float value : f.read(TensorKind::kExpAvg, layer, tensor)) ASSERT_EQ(value != 0.0f, moved);
      for (const float value : f.read(TensorKind::kGrad, layer, tensor)) ASSERT_EQ(value, 0.0f);
      EXPECT_EQ(f.steps(layer, tensor), moved ? 1.0f : 0.0f);
    }
  }
  EXPECT_EQ(f.adapter.squared_norm(f.group_of, f.pool), 0);
}

// torch: a gradient of zero still decays weights and moments. I7: all experts of a layer that ran, with or without
// tokens.
TEST_P(AdapterStep, MovesTheExpertsOfATouchedLayerThatGotNoGradient) {
  Fixture f(table(), 3, 48, 40, spec_of(8, true, 8));
  f.header.groups[0] = to_group({1e-2, 0.9, 0.999, 1e-8, 0.5, true});
  f.write(TensorKind::kParam, 2, AdapterTensor::kGateA, std::vector<float>(f.size(2, AdapterTensor::kGateA), 1.0f));
  f.adapter.layer(2)->touched = true;
  f.step();
  for (const float value : f.read(TensorKind::kParam, 2, AdapterTensor::kGateA)) {
    EXPECT_EQ(value, static_cast<float>(1 - 1e-2 * 0.5));
  }
  EXPECT_EQ(f.steps(2, AdapterTensor::kGateA), 1.0f);
}

TEST_P(AdapterStep, ContinuesFromWrittenStateBitForBit) {
  std::mt19937 random(82);
  std::normal_distribution<float> normal;
  Fixture first(table(), 3, 48, 40, spec_of(8, true, 8));
  Fixture second(table(), 3, 48, 40, spec_of(8, true, 8));
  std::vector<float> values(first.size(1, AdapterTensor::kDownA));
  const auto step = [&](Fixture& f) {
    f.header.groups[0] = to_group({1e-2, 0.9, 0.999, 1e-8, 0.1, true});
    f.write(TensorKind::kGrad, 1, AdapterTensor::kDownA, values);
    f.step();
  };
  for (int n = 0; n < 3; ++n) {
    for (float& value : values) value = normal(random);
    step(first);
  }
  for (const TensorKind kind : {TensorKind::kParam, TensorKind::kExpAvg, TensorKind::kExpAvgSq}) {
    second.write(kind, 1, AdapterTensor::kDownA, first.read(kind, 1, AdapterTensor::kDownA));
  }
  const float t = first.steps(1, AdapterTensor::kDownA);
  second.adapter.write(TensorKind::kT, 1, AdapterTensor::kDownA, 0, 1, &t);
  for (float& value : values) value = normal(random);
  step(first);
  step(second);
  EXPECT_EQ(second.read(TensorKind::kParam, 1, AdapterTensor::kDownA),
            first.read(TensorKind::kParam, 1, AdapterTensor::kDownA));
  EXPECT_EQ(second.steps(1, AdapterTensor::kDownA), 4.0f);
}

// The step renews what the kernels read.
TEST_P(AdapterStep, ReachesTheForwardPass) {
  LayerOptions options;
  options.spec = spec_of(8, false, 8);
  TestLayer layer(options, table(), 83);
  std::mt19937 random(84);
  const Batch batch = layer.make_batch(64, Routing::kSoftmaxTopK, random);
  layer.run({&batch}, {});
  shm::StepHeader header{};
  header.scale = 1;
  header.num_groups = 1;
  header.groups[0] = to_group({0.05, 0.9, 0.999, 1e-8, 0, true});
  coproc::WorkerPool pool(std::vector<int>{-1, -1});
  layer.adapter()->step(header, std::vector<std::uint8_t>(3 * shm::kNumAdapterTensors, 0), pool);
  ReferenceLayer moved = layer.reference();
  for (std::size_t tensor = 0; tensor < kNumLoraTensors; ++tensor) {
    std::vector<float> values(moved.lora.tensors[tensor].size());
    layer.adapter()->read(TensorKind::kParam, TestLayer::kWireLayer, static_cast<AdapterTensor>(tensor), 0, 8,
                          values.data());
    for (std::size_t i = 0; i < values.size(); ++i) {
      moved.lora.tensors[tensor][i] = to_element(static_cast<double>(values[i]), table().element_bytes);
    }
  }
  const ItemResult got = layer.run({&batch}, {.accumulate = false})[0];
  const Doubles want = reference_forward(moved, batch.reference);
  const Doubles before = reference_forward(layer.reference(), batch.reference);
  EXPECT_LE(relative_l2(from_elements(got.y.data(), want.size(), table().element_bytes), want), 4e-3);
  EXPECT_GT(relative_l2(before, want), 4e-2);
}

}  // namespace
}  // namespace kt::test
