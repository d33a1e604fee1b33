// What must be equal bit for bit: results do not depend on company, on the number of workers, or on what was kept.
#include "tests/coproc/experts/layer_fixture.h"

namespace kt::test {
namespace {

using ExpertBits = EveryTable;
INSTANTIATE_TEST_SUITE_P(Tables, ExpertBits, testing::ValuesIn(kernels::all_tables()), table_name);

const LayerOptions kOptions = {.hidden = 112, .intermediate = 72, .spec = spec_of(24, false, 8)};

void expect_same(const ItemResult& got, const ItemResult& want) {
  EXPECT_TRUE(got.y == want.y);
  EXPECT_TRUE(got.dx == want.dx);
  EXPECT_TRUE(got.dw == want.dw);
}

TEST_P(ExpertBits, ItemsOfABatchGetWhatTheyGetAlone) {
  TestLayer layer(kOptions, table(), 41);
  std::mt19937 random(42);
  const Batch first = layer.make_batch(37, Routing::kSoftmaxTopK, random);
  const Batch none = layer.make_batch(0, Routing::kSoftmaxTopK, random);
  const Batch second = layer.make_batch(1, Routing::kWithSentinels, random);
  const Batch third = layer.make_batch(290, Routing::kOneExpert, random);
  const std::vector<const Batch*> batches = {&first, &none, &second, &third};
  const auto together = layer.run(batches, {});
  for (std::size_t n = 0; n < batches.size(); ++n) {
    SCOPED_TRACE("item " + std::to_string(n));
    expect_same(layer.run({batches[n]}, {})[0], together[n]);
  }
}

TEST_P(ExpertBits, ATokenGetsWhatItGetsAlone) {
  TestLayer layer(kOptions, table(), 43);
  std::mt19937 random(44);
  const Batch batch = layer.make_batch(40, Routing::kSoftmaxTopK, random);
  const ItemResult all = layer.run({&batch}, {})[0];
  const std::size_t row = batch.x_elements.size() / 40;
  for (const std::size_t token : {0u, 13u, 39u}) {
    Batch one;
    const auto cut = [token](const auto& from, std::size_t size) {
      const auto begin = from.begin() + static_cast<std::ptrdiff_t>(token * size);
      return std::decay_t<decltype(from)>(begin, begin + static_cast<std::ptrdiff_t>(size));
    };
    one.reference.num_tokens = 1;
    one.reference.ids = cut(batch.reference.ids, 4);
    one.reference.weights = cut(batch.reference.weights, 4);
    one.x_elements = cut(batch.x_elements, row);
    one.dy_elements = cut(batch.dy_elements, row);
    const ItemResult alone = layer.run({&one}, {})[0];
    EXPECT_TRUE(alone.y == cut(all.y, row));
    EXPECT_TRUE(alone.dx == cut(all.dx, row));
    EXPECT_TRUE(alone.dw == cut(all.dw, 4 * sizeof(float)));
  }
}

TEST_P(ExpertBits, DoNotDependOnTheNumberOfWorkers) {
  TestLayer layer(kOptions, table(), 45);
  std::mt19937 random(46);
  const Batch first = layer.make_batch(150, Routing::kSoftmaxTopK, random);
  const Batch second = layer.make_batch(290, Routing::kOneExpert, random);
  std::vector<ItemResult> want;
  std::vector<std::vector<float>> want_gradients;
  for (const int num_workers : {1, 2, 3, 7}) {
    layer.discard();
    const auto got = layer.run({&first, &second}, {.num_workers = num_workers});
    if (want.empty()) {
      want = got;
      want_gradients = layer.gradients();
    }
    SCOPED_TRACE(std::to_string(num_workers) + " workers");
    expect_same(got[0], want[0]);
    expect_same(got[1], want[1]);
    EXPECT_TRUE(got[1].gate_up == want[1].gate_up);
    EXPECT_EQ(layer.gradients(), want_gradients);
  }
}

// With little L2 an expert's rows are several blocks. LoRA's gradients, summed block by block, differ from those of one
// block in the last bits, and not with the number of workers.
TEST_P(ExpertBits, DoNotDependOnTheBlocksOfRows) {
  TestLayer layer(kOptions, table(), 57);
  std::mt19937 random(58);
  const Batch first = layer.make_batch(150, Routing::kSoftmaxTopK, random);
  const Batch second = layer.make_batch(290, Routing::kOneExpert, random);
  const auto want = layer.run({&first, &second}, {});
  const auto want_gradients = layer.gradients();
  std::vector<std::vector<float>> block_gradients;
  for (const int num_workers : {1, 2, 5}) {
    SCOPED_TRACE(std::to_string(num_workers) + " workers");
    layer.discard();
    const auto got = layer.run({&first, &second}, {.num_workers = num_workers, .l2_bytes = 4096});
    expect_same(got[0], want[0]);
    expect_same(got[1], want[1]);
    if (block_gradients.empty()) block_gradients = layer.gradients();
    EXPECT_EQ(layer.gradients(), block_gradients);
    for (std::size_t tensor = 0; tensor < want_gradients.size(); ++tensor) {
      const Doubles one(want_gradients[tensor].begin(), want_gradients[tensor].end());
      const Doubles many(block_gradients[tensor].begin(), block_gradients[tensor].end());
      EXPECT_LE(relative_l2(many, one), 1e-6) << "tensor " << tensor;
    }
  }
}

TEST_P(ExpertBits, OfARecomputedActivationAreThoseOfAKeptOne) {
  for (const auto& spec : {spec_of(24, false, 8), spec_of(8, true, 0), coproc::AdapterLayerSpec{}}) {
    LayerOptions options = kOptions;
    options.spec = spec;
    TestLayer layer(options, table(), 47);
    std::mt19937 random(48);
    const Batch first = layer.make_batch(70, Routing::kWithSentinels, random);
    const Batch second = layer.make_batch(5, Routing::kSameExpertTwice, random);
    const auto kept = layer.run({&first, &second}, {.keep_gate_up = true});
    std::vector<std::vector<float>> kept_gradients;
    if (layer.adapter() != nullptr) {
      kept_gradients = layer.gradients();
      layer.discard();
    }
    const auto recomputed = layer.run({&first, &second}, {.keep_gate_up = false});
    expect_same(recomputed[0], kept[0]);
    expect_same(recomputed[1], kept[1]);
    if (layer.adapter() != nullptr) {
      EXPECT_EQ(layer.gradients(), kept_gradients);
    }
  }
}

TEST_P(ExpertBits, OfResultsDoNotDependOnAccumulating) {
  TestLayer layer(kOptions, table(), 49);
  std::mt19937 random(50);
  const Batch batch = layer.make_batch(30, Routing::kSoftmaxTopK, random);
  for (const bool keep : {true, false}) {
    const auto plain = layer.run({&batch}, {.keep_gate_up = keep, .accumulate = false});
    EXPECT_FALSE(layer.adapter()->has_gradients());
    for (const auto& gradient : layer.gradients()) EXPECT_EQ(gradient, std::vector<float>(gradient.size()));
    expect_same(layer.run({&batch}, {.keep_gate_up = keep})[0], plain[0]);
    EXPECT_TRUE(layer.adapter()->has_gradients());
    layer.discard();
  }
}

TEST_P(ExpertBits, OfTwoBackwardsAddUp) {
  TestLayer layer(kOptions, table(), 51);
  std::mt19937 random(52);
  const Batch batch = layer.make_batch(64, Routing::kSoftmaxTopK, random);
  layer.run({&batch}, {});
  const auto once = layer.gradients();
  layer.run({&batch}, {});
  const auto twice = layer.gradients();
  for (std::size_t tensor = 0; tensor < once.size(); ++tensor) {
    ASSERT_FALSE(once[tensor].empty());
    for (std::size_t n = 0; n < once[tensor].size(); ++n) {
      ASSERT_EQ(twice[tensor][n], 2 * once[tensor][n]) << "tensor " << tensor << ", " << n;
    }
  }
}

TEST_P(ExpertBits, ABackwardWithoutTokensTouchesTheLayerAndChangesNothing) {
  TestLayer layer(kOptions, table(), 53);
  std::mt19937 random(54);
  const Batch none = layer.make_batch(0, Routing::kSoftmaxTopK, random);
  layer.run({&none}, {.accumulate = false});
  EXPECT_FALSE(layer.adapter()->has_gradients());
  layer.run({&none}, {});
  EXPECT_TRUE(layer.adapter()->has_gradients());
  for (const auto& gradient : layer.gradients()) EXPECT_EQ(gradient, std::vector<float>(gradient.size()));
}

// A large batch leaves large scratch behind; a small one after it must not read what is left in it.
TEST_P(ExpertBits, DoNotDependOnWhatRanBefore) {
  TestLayer layer(kOptions, table(), 55);
  std::mt19937 random(56);
  const Batch large = layer.make_batch(200, Routing::kSoftmaxTopK, random);
  const Batch small = layer.make_batch(3, Routing::kSoftmaxTopK, random);
  const auto want = layer.run({&small}, {});
  layer.discard();

  coproc::WorkerPool pool(std::vector<int>{-1, -1});
  const auto forward_item = [](const Batch& batch, Guarded& y) {
    return coproc::ForwardItem{batch.x_elements.data(),
                               batch.reference.ids.data(),
                               batch.reference.weights.data(),
                               static_cast<std::uint32_t>(batch.reference.num_tokens),
                               y.data(),
                               nullptr};
  };
  coproc::ExpertCompute compute(layer.dims(), table(), layer.weights(), pool);
  Guarded y(large.x_elements.size());
  const coproc::ForwardItem before = forward_item(large, y);
  compute.forward(TestLayer::kWireLayer, layer.adapter(), {&before, 1});
  Guarded small_y(small.x_elements.size());
  const coproc::ForwardItem after = forward_item(small, small_y);
  compute.forward(TestLayer::kWireLayer, layer.adapter(), {&after, 1});
  EXPECT_TRUE(small_y.contents() == want[0].y);
  EXPECT_TRUE(small_y.intact());
}

}  // namespace
}  // namespace kt::test
