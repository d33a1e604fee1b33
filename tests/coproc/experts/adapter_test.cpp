// The adapter as a store: layers, shapes, reading and writing, norm, discard.
#include "coproc/experts/adapter.h"

#include <cmath>
#include <limits>

#include "tests/coproc/experts/layer_fixture.h"

namespace kt::test {
namespace {

using coproc::Adapter;
using shm::AdapterTensor;
using shm::TensorKind;

const kernels::KernelTable& scalar() { return *kernels::find_table("scalar", 2, nullptr); }

coproc::ExpertDims dims_of_test() {
  return {.num_layers = 6,
          .moe_layers = {1, 2, 5},
          .num_experts = 4,
          .top_k = 2,
          .hidden_size = 48,
          .intermediate_size = 40,
          .element_bytes = 2};
}

constexpr TensorKind kArrays[] = {TensorKind::kParam, TensorKind::kGrad, TensorKind::kExpAvg, TensorKind::kExpAvgSq};

class AdapterTest : public testing::Test {
 protected:
  void add(std::vector<std::uint32_t> layers, const coproc::AdapterLayerSpec& spec) {
    const Status status = adapter.add_layers(layers, spec);
    ASSERT_TRUE(status.ok()) << status.error().text();
  }
  std::vector<float> read(TensorKind kind, std::uint32_t layer, AdapterTensor tensor) const {
    const auto shape = adapter.shape(layer, tensor).value();
    std::vector<float> values(static_cast<std::size_t>(shape.rows * shape.cols) * dims.num_experts,
                              std::numeric_limits<float>::quiet_NaN());
    adapter.read(kind, layer, tensor, 0, dims.num_experts, values.data());
    return values;
  }
  // Writes first, first + 1, … to all experts.
  std::vector<float> write_counting(TensorKind kind, std::uint32_t layer, AdapterTensor tensor, float first) {
    std::vector<float> values = read(kind, layer, tensor);
    for (float& value : values) value = first++;
    adapter.write(kind, layer, tensor, 0, dims.num_experts, values.data());
    return values;
  }
  std::vector<std::uint8_t> groups(std::uint8_t group) const {
    return std::vector<std::uint8_t>(dims.num_layers * shm::kNumAdapterTensors, group);
  }

  coproc::ExpertDims dims = dims_of_test();
  Adapter adapter{dims, scalar()};
  coproc::WorkerPool pool{{-1, -1}};
};

TEST_F(AdapterTest, KnowsTheShapesOfItsTensors) {
  add({1}, spec_of(8, false, 3));
  add({5}, spec_of(4, true, 0));
  const auto expect_shape = [&](std::uint32_t layer, AdapterTensor tensor, std::int64_t rows, std::int64_t cols) {
    const auto shape = adapter.shape(layer, tensor);
    ASSERT_TRUE(shape.has_value());
    EXPECT_EQ(shape->rows, rows);
    EXPECT_EQ(shape->cols, cols);
  };
  expect_shape(1, AdapterTensor::kGateA, 8, 48);
  expect_shape(1, AdapterTensor::kGateB, 40, 8);
  expect_shape(1, AdapterTensor::kUpA, 8, 48);
  expect_shape(1, AdapterTensor::kUpB, 40, 8);
  expect_shape(1, AdapterTensor::kDownA, 3, 40);
  expect_shape(1, AdapterTensor::kDownB, 48, 3);
  expect_shape(5, AdapterTensor::kGateA, 4, 48);
  expect_shape(5, AdapterTensor::kUpB, 40, 4);
  EXPECT_FALSE(adapter.shape(5, AdapterTensor::kUpA).has_value());
  EXPECT_FALSE(adapter.shape(5, AdapterTensor::kDownA).has_value());
  EXPECT_FALSE(adapter.shape(2, AdapterTensor::kGateA).has_value());
  EXPECT_FALSE(adapter.shape(77, AdapterTensor::kGateA).has_value());
  EXPECT_FALSE(adapter.shape(1, static_cast<AdapterTensor>(6)).has_value());
  EXPECT_EQ(*adapter.spec(5), spec_of(4, true, 0));
  EXPECT_EQ(adapter.spec(0), nullptr);
  EXPECT_EQ(adapter.layer(1000), nullptr);
}

TEST_F(AdapterTest, RefusesLayersAndSpecsThatCannotBe) {
  const auto refused = [&](std::vector<std::uint32_t> layers, const coproc::AdapterLayerSpec& spec, const char* why) {
    const Status status = adapter.add_layers(layers, spec);
    ASSERT_FALSE(status.ok());
    EXPECT_EQ(status.error().code, ErrorCode::kInvalidArgument);
    EXPECT_NE(status.error().text().find(why), std::string::npos) << status.error().text();
  };
  refused({0}, spec_of(8, true, 8), "layer 0");
  refused({6}, spec_of(8, true, 8), "layer 6");
  refused({1, 1}, spec_of(8, true, 8), "already");
  refused({1}, spec_of(257, true, 8), "r = 257");
  refused({1}, spec_of(8, true, 257), "r = 257");
  refused({1}, spec_of(0, true, 0), "adapts nothing");
  coproc::AdapterLayerSpec infinite = spec_of(8, true, 8);
  infinite.down.scaling = std::numeric_limits<double>::infinity();
  refused({1}, infinite, "scaling");
  EXPECT_EQ(adapter.layer(1), nullptr);  // A refusal adds nothing.
  add({1}, spec_of(256, true, 8));
  refused({2, 1}, spec_of(8, true, 8), "layer 1");
  EXPECT_EQ(adapter.layer(2), nullptr);
}

TEST_F(AdapterTest, ThatDoesNotFitIsRefusedWithNumbers) {
  dims.num_experts = 1u << 22;
  dims.hidden_size = 1u << 15;
  Adapter huge(dims, scalar());
  const std::uint32_t layers[] = {1};
  const Status status = huge.add_layers(layers, spec_of(256, false, 256));
  ASSERT_FALSE(status.ok());
  EXPECT_EQ(status.error().code, ErrorCode::kNoResources);
  EXPECT_NE(status.error().why.find(" TB, and "), std::string::npos) << status.error().text();
}

TEST_F(AdapterTest, ComparesSpecsLayerByLayer) {
  Adapter other(dims, scalar());
  EXPECT_TRUE(adapter.same_specs(other));
  add({1, 2}, spec_of(8, true, 8));
  EXPECT_FALSE(adapter.same_specs(other));
  const std::uint32_t one[] = {1};
  const std::uint32_t two[] = {2};
  ASSERT_TRUE(other.add_layers(two, spec_of(8, true, 8)).ok());
  EXPECT_FALSE(adapter.same_specs(other));
  ASSERT_TRUE(other.add_layers(one, spec_of(8, true, 8)).ok());
  EXPECT_TRUE(adapter.same_specs(other));
  Adapter different(dims, scalar());
  const std::uint32_t both[] = {1, 2};
  ASSERT_TRUE(different.add_layers(both, spec_of(8, false, 8)).ok());
  EXPECT_FALSE(adapter.same_specs(different));
}

TEST_F(AdapterTest, BeginsWithZerosEverywhere) {
  add({2}, spec_of(8, true, 8));
  for (const TensorKind kind : kArrays) {
    const auto values = read(kind, 2, AdapterTensor::kDownB);
    EXPECT_EQ(values, std::vector<float>(values.size()));
  }
  float t = -1;
  adapter.read(TensorKind::kT, 2, AdapterTensor::kDownB, 0, 1, &t);
  EXPECT_EQ(t, 0.0f);
  EXPECT_FALSE(adapter.has_gradients());
}

TEST_F(AdapterTest, GivesBackWhatWasWrittenOfEveryKindAndTensor) {
  add({1, 5}, spec_of(8, false, 3));
  float first = 1;
  std::vector<std::vector<float>> written;
  for (const std::uint32_t layer : {1u, 5u}) {
    for (std::uint8_t tensor = 0; tensor < shm::kNumAdapterTensors; ++tensor) {
      for (const TensorKind kind : kArrays) {
        written.push_back(write_counting(kind, layer, static_cast<AdapterTensor>(tensor), first));
        first += 10000;
      }
    }
  }
  std::size_t n = 0;
  for (const std::uint32_t layer : {1u, 5u}) {
    for (std::uint8_t tensor = 0; tensor < shm::kNumAdapterTensors; ++tensor) {
      for (const TensorKind kind : kArrays)
        EXPECT_EQ(read(kind, layer, static_cast<AdapterTensor>(tensor)), written[n++]);
    }
  }
}

TEST_F(AdapterTest, ReadsAndWritesRangesOfExperts) {
  add({1}, spec_of(2, true, 0));
  const std::size_t size = 40 * 2;
  const auto before = write_counting(TensorKind::kParam, 1, AdapterTensor::kUpB, 0);
  std::vector<float> middle(2 * size, -7.0f);
  adapter.write(TensorKind::kParam, 1, AdapterTensor::kUpB, 1, 2, middle.data());
  const auto after = read(TensorKind::kParam, 1, AdapterTensor::kUpB);
  for (std::size_t i = 0; i < after.size(); ++i) {
    EXPECT_EQ(after[i], i / size == 1 || i / size == 2 ? -7.0f : before[i]);
  }
  std::vector<float> last(size);
  adapter.read(TensorKind::kParam, 1, AdapterTensor::kUpB, 3, 1, last.data());
  EXPECT_EQ(last, std::vector<float>(after.end() - static_cast<std::ptrdiff_t>(size), after.end()));
}

TEST_F(AdapterTest, TakesAnyFloatForTheNumberOfSteps) {
  add({1}, spec_of(8, true, 8));
  const auto after_writing = [&](float value) {
    adapter.write(TensorKind::kT, 1, AdapterTensor::kGateA, 0, 1, &value);
    float got = -1;
    adapter.read(TensorKind::kT, 1, AdapterTensor::kGateA, 0, 1, &got);
    return got;
  };
  EXPECT_EQ(after_writing(17), 17.0f);
  EXPECT_EQ(after_writing(-3), 0.0f);
  EXPECT_EQ(after_writing(std::numeric_limits<float>::quiet_NaN()), 0.0f);
  EXPECT_EQ(after_writing(std::numeric_limits<float>::infinity()), 9007199254740992.0f);
  float other = -1;
  adapter.read(TensorKind::kT, 1, AdapterTensor::kGateB, 0, 1, &other);
  EXPECT_EQ(other, 0.0f);
}

TEST_F(AdapterTest, IsTouchedByWrittenGradientsOnly) {
  add({1, 2}, spec_of(8, true, 8));
  for (const TensorKind kind : {TensorKind::kParam, TensorKind::kExpAvg, TensorKind::kExpAvgSq}) {
    write_counting(kind, 1, AdapterTensor::kGateA, 1);
    EXPECT_FALSE(adapter.has_gradients());
  }
  write_counting(TensorKind::kGrad, 1, AdapterTensor::kGateA, 1);
  EXPECT_TRUE(adapter.has_gradients());
  adapter.discard(pool);
  EXPECT_FALSE(adapter.has_gradients());
}

TEST_F(AdapterTest, DiscardZeroesAllSumsAndKeepsTheRest) {
  add({1, 2}, spec_of(8, false, 8));
  const auto param = write_counting(TensorKind::kParam, 1, AdapterTensor::kDownA, 5);
  const auto moment = write_counting(TensorKind::kExpAvg, 1, AdapterTensor::kDownA, 9);
  for (std::uint8_t tensor = 0; tensor < shm::kNumAdapterTensors; ++tensor) {
    write_counting(TensorKind::kGrad, 1, static_cast<AdapterTensor>(tensor), 1);
  }
  adapter.discard(pool);
  for (std::uint8_t tensor = 0; tensor < shm::kNumAdapterTensors; ++tensor) {
    const auto sums = read(TensorKind::kGrad, 1, static_cast<AdapterTensor>(tensor));
    EXPECT_EQ(sums, std::vector<float>(sums.size()));
  }
  EXPECT_EQ(read(TensorKind::kParam, 1, AdapterTensor::kDownA), param);
  EXPECT_EQ(read(TensorKind::kExpAvg, 1, AdapterTensor::kDownA), moment);
}

TEST_F(AdapterTest, NormCountsTouchedTensorsThatAreNotFrozen) {
  add({1, 2, 5}, spec_of(8, false, 8));
  const auto squares = [](const std::vector<float>& values) {
    double sum = 0;
    for (const float value : values) sum += static_cast<double>(value) * static_cast<double>(value);
    return sum;
  };
  EXPECT_EQ(adapter.squared_norm(groups(0), pool), 0);
  const double a = squares(write_counting(TensorKind::kGrad, 1, AdapterTensor::kGateA, 0.25f));
  const double b = squares(write_counting(TensorKind::kGrad, 5, AdapterTensor::kDownB, -3));
  EXPECT_DOUBLE_EQ(adapter.squared_norm(groups(3), pool), a + b);
  auto group_of = groups(0);
  group_of[5 * shm::kNumAdapterTensors + static_cast<std::size_t>(AdapterTensor::kDownB)] = shm::kFrozen;
  EXPECT_DOUBLE_EQ(adapter.squared_norm(group_of, pool), a);
  EXPECT_EQ(adapter.squared_norm(groups(shm::kFrozen), pool), 0);
}

TEST_F(AdapterTest, NormHasTheSameBitsForEveryNumberOfWorkers) {
  dims.hidden_size = 4096;
  Adapter large(dims, scalar());
  const std::uint32_t layers[] = {1, 2};
  ASSERT_TRUE(large.add_layers(layers, spec_of(16, true, 16)).ok());
  std::mt19937 random(71);
  std::normal_distribution<float> normal;
  for (const std::uint32_t layer : layers) {
    std::vector<float> values(std::size_t{4} * 16 * 4096);
    for (float& value : values) value = normal(random);
    large.write(TensorKind::kGrad, layer, AdapterTensor::kGateA, 0, 4, values.data());
    large.write(TensorKind::kGrad, layer, AdapterTensor::kDownB, 0, 4, values.data());
  }
  const double want = large.squared_norm(groups(0), pool);
  EXPECT_NEAR(want, 4 * 4.0 * 16 * 4096, 5000);
  for (const int num_workers : {1, 3}) {
    coproc::WorkerPool other(std::vector<int>(static_cast<std::size_t>(num_workers), -1));
    EXPECT_EQ(large.squared_norm(groups(0), other), want);
  }
}

TEST_F(AdapterTest, ReportsItsMemory) {
  EXPECT_EQ(adapter.parameter_bytes() + adapter.gradient_bytes() + adapter.optimizer_bytes(), 0u);
  add({1, 2}, spec_of(8, true, 8));
  const std::uint64_t floats = std::uint64_t{4} * (8 * 48 + 2 * 40 * 8 + 8 * 40 + 48 * 8);
  EXPECT_EQ(adapter.gradient_bytes(), 2 * floats * 4);
  EXPECT_GT(adapter.parameter_bytes(), 2 * floats * 4);
  EXPECT_EQ(adapter.optimizer_bytes(), 0u);
  write_counting(TensorKind::kExpAvg, 1, AdapterTensor::kDownB, 1);
  EXPECT_EQ(adapter.optimizer_bytes(), std::uint64_t{2} * 4 * (48 * 8) * 4);
}

// A write must reach what the kernels read, of the experts written: forward is computed from the packed copies.
TEST_F(AdapterTest, WritesReachTheForwardPass) {
  LayerOptions options;
  options.spec = spec_of(8, false, 8);
  TestLayer layer(options, scalar(), 72);
  std::mt19937 random(73);
  const Batch batch = layer.make_batch(64, Routing::kSoftmaxTopK, random);
  const auto before = layer.run({&batch}, {.accumulate = false})[0];
  ReferenceLayer changed = layer.reference();
  for (std::size_t tensor = 0; tensor < kNumLoraTensors; ++tensor) {
    const auto size = static_cast<std::size_t>(changed.lora_rows(tensor) * changed.lora_cols(tensor));
    std::vector<float> values(2 * size);
    for (std::size_t i = 0; i < values.size(); ++i) {
      values[i] = static_cast<float>(static_cast<int>(i * 7 % 13) - 6) / 64;
      changed.lora.tensors[tensor][3 * size + i] = static_cast<double>(values[i]);
    }
    layer.adapter()->write(TensorKind::kParam, TestLayer::kWireLayer, static_cast<AdapterTensor>(tensor), 3, 2,
                           values.data());
  }
  const auto after = layer.run({&batch}, {.accumulate = false})[0];
  const Doubles want = reference_forward(changed, batch.reference);
  EXPECT_LE(relative_l2(from_elements(after.y.data(), want.size(), 2), want), 4e-3);
  EXPECT_GT(relative_l2(from_elements(before.y.data(), want.size(), 2), want), 4e-2);
}

}  // namespace
}  // namespace kt::test
