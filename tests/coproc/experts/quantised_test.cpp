// Layers of quantised weights: the same tolerances as bf16 against the weights they are computed with, stated ones
// against the weights they were made of, and the same promises about bits.
#include <cmath>
#include <iostream>

#include "kernels/formats.h"
#include "tests/coproc/experts/layer_fixture.h"
#include "tests/support/formats/format_reference.h"

namespace kt::test {
namespace {

struct Case {
  const kernels::KernelTable* table;
  const kernels::StorageFormat* format;
};
void PrintTo(const Case& value, std::ostream* out) { *out << value.table->name << " " << value.format->name; }

std::vector<Case> all_cases() {
  std::vector<Case> cases;
  for (const kernels::KernelTable* table : kernels::all_tables()) {
    for (const kernels::StorageFormat& format : kernels::formats()) {
      if (format.quantised && format.element_bytes == table->element_bytes) cases.push_back({table, &format});
    }
  }
  return cases;
}

class QuantisedLayer : public testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    const std::string why = why_not_runnable(table());
    if (!why.empty()) GTEST_SKIP() << why;
  }
  const kernels::KernelTable& table() const { return *GetParam().table; }
  LayerOptions with_format(LayerOptions options) const {
    options.format = GetParam().format;
    return options;
  }

  struct Errors {
    double forward;   // y
    double weights;   // dw
    double backward;  // dx
    double lora;      // the largest of the gradients
  };
  Errors measure(const LayerOptions& options, std::int64_t num_tokens, std::uint32_t seed) const {
    TestLayer layer(options, table(), seed);
    std::mt19937 random(seed + 1);
    const Batch batch = layer.make_batch(num_tokens, Routing::kSoftmaxTopK, random);
    const ItemResult got = layer.run({&batch}, {})[0];
    const Doubles y = reference_forward(layer.reference(), batch.reference);
    const ReferenceGradients grads = reference_backward(layer.reference(), batch.reference, batch.dy);
    Errors errors{relative_l2(from_elements(got.y.data(), y.size(), 2), y),
                  relative_l2(from_elements(got.dw.data(), grads.dw.size(), 4), grads.dw),
                  relative_l2(from_elements(got.dx.data(), grads.dx.size(), 2), grads.dx), 0};
    for (std::size_t tensor = 0; tensor < kNumLoraTensors; ++tensor) {
      if (layer.reference().lora_rows(tensor) == 0) continue;
      const std::vector<float> gradient = layer.gradient(tensor);
      errors.lora = std::max(errors.lora, relative_l2(Doubles(gradient.begin(), gradient.end()), grads.lora[tensor]));
    }
    std::cout << "seed " << seed << ", H " << options.hidden << ", I " << options.intermediate << ": y "
              << errors.forward << ", dw " << errors.weights << ", dx " << errors.backward << ", LoRA gradients "
              << errors.lora << "\n";
    return errors;
  }

  void expect_within(const Errors& errors, double forward, double backward) {
    EXPECT_LE(errors.forward, forward);
    EXPECT_LE(errors.weights, forward);
    EXPECT_LE(errors.backward, backward);
    EXPECT_LE(errors.lora, backward);
  }
};

INSTANTIATE_TEST_SUITE_P(Tables, QuantisedLayer, testing::ValuesIn(all_cases()), [](const auto& param) {
  return std::string(param.param.table->name) + "_" + std::string(param.param.format->name);
});

// Gradients are those of what forward computes: tight, so both directions use the same numbers.
TEST_P(QuantisedLayer, MatchesTheReferenceWithItsOwnWeights) {
  expect_within(measure(with_format({.hidden = 256, .intermediate = 128}), 96, 61), 4e-3, 6e-3);
  expect_within(measure(with_format({.hidden = 256, .intermediate = 128, .spec = spec_of(8, true, 8)}), 96, 62), 4e-3,
                6e-3);
  // Several groups, the last ones shorter; more panels than are transposed at a time.
  expect_within(
      measure(
          with_format({.num_experts = 2, .top_k = 1, .hidden = 352, .intermediate = 160, .spec = spec_of(4, false, 4)}),
          64, 63),
      4e-3, 6e-3);
}

TEST_P(QuantisedLayer, OfOddSizesMatchesTheReference) {
  expect_within(measure(with_format({.hidden = 48, .intermediate = 40, .spec = spec_of(8, true, 8)}), 64, 64), 4e-3,
                6e-3);
  expect_within(measure(with_format({.hidden = 33, .intermediate = 95, .spec = spec_of(3, false, 5)}), 64, 65), 4e-3,
                6e-3);
}

TEST_P(QuantisedLayer, IsAsNearToTheOriginalWeightsAsItsFormatAllows) {
  LayerOptions options = with_format({.hidden = 256, .intermediate = 256, .spec = spec_of(8, true, 8)});
  options.original_reference = true;
  const FormatReference& reference = format_reference(GetParam().format->name);
  expect_within(measure(options, 96, 66), reference.forward_error, reference.backward_error);
}

TEST_P(QuantisedLayer, GivesEveryTokenTheSameBitsWhateverTheCompanyAndTheWorkers) {
  TestLayer layer(with_format({.hidden = 112, .intermediate = 72, .spec = spec_of(24, false, 8)}), table(), 67);
  std::mt19937 random(68);
  const Batch first = layer.make_batch(37, Routing::kSoftmaxTopK, random);
  const Batch second = layer.make_batch(1, Routing::kWithSentinels, random);
  const Batch third = layer.make_batch(290, Routing::kOneExpert, random);
  const std::vector<const Batch*> batches = {&first, &second, &third};
  const auto together = layer.run(batches, {});
  for (const bool keep : {true, false}) {
    for (std::size_t n = 0; n < batches.size(); ++n) {
      const ItemResult alone = layer.run({batches[n]}, {.num_workers = 3, .keep_gate_up = keep})[0];
      EXPECT_TRUE(alone.y == together[n].y) << "item " << n;
      EXPECT_TRUE(alone.dx == together[n].dx) << "item " << n;
      EXPECT_TRUE(alone.dw == together[n].dw) << "item " << n;
    }
  }
}

TEST_P(QuantisedLayer, TakesTheMemoryOfItsFormat) {
  const coproc::ExpertDims dims = {.num_layers = 1,
                                   .moe_layers = {0},
                                   .num_experts = 2,
                                   .top_k = 1,
                                   .hidden_size = 2048,
                                   .intermediate_size = 768,
                                   .element_bytes = 2};
  const auto plain = coproc::ExpertWeights::create(dims, table()).value()->bytes();
  const auto quantised = coproc::ExpertWeights::create(dims, table(), GetParam().format).value()->bytes();
  const double ratio = static_cast<double>(plain) / static_cast<double>(quantised);
  std::cout << "bf16 takes " << ratio << " times the memory\n";
  EXPECT_GE(ratio, format_reference(GetParam().format->name).memory_ratio);
}

}  // namespace
}  // namespace kt::test
